import os
from pathlib import Path

import pytest

from sa3_convert.system.machine import default_threads, usable_processors


@pytest.fixture
def four(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})


def describe(folder: Path, **siblings: str) -> Path:
    for name, text in siblings.items():
        file = folder / name / "topology" / "thread_siblings_list"
        file.parent.mkdir(parents=True)
        file.write_text(f"{text}\n")
    return folder


@pytest.mark.usefixtures("four")
def test_two_processors_of_one_core_count_once(tmp_path: Path) -> None:
    assert default_threads(describe(tmp_path, cpu0="0,2", cpu1="1,3", cpu2="0,2", cpu3="1,3")) == 2
    assert usable_processors() == 4


@pytest.mark.usefixtures("four")
def test_only_processors_that_may_be_used_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 2})
    assert default_threads(describe(tmp_path, cpu0="0,2", cpu1="1,3", cpu2="0,2", cpu3="1,3")) == 1


@pytest.mark.usefixtures("four")
def test_what_the_system_does_not_describe_is_a_core_each(tmp_path: Path) -> None:
    assert default_threads(tmp_path) == 4


def test_a_system_without_affinities_gives_all_its_processors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert default_threads(tmp_path) == usable_processors() == 6
