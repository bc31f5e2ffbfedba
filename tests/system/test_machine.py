"""What the machine is; what it does not tell is not known."""

import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

import sa3_convert
from sa3_convert.system.machine import (
    _SLICE,
    _schedule,
    _set_schedule,
    available_memory,
    default_threads,
    integer_products,
    machine,
    short_slices,
    usable_processors,
)


@pytest.fixture
def four(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil.Process, "cpu_affinity", lambda _: [0, 1, 2, 3])


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


def test_only_processors_that_may_be_used_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil.Process, "cpu_affinity", lambda _: [0, 2])
    assert default_threads(describe(tmp_path, cpu0="0,2", cpu1="1,3", cpu2="0,2", cpu3="1,3")) == 1


@pytest.mark.usefixtures("four")
def test_what_linux_does_not_describe_is_a_core_each(tmp_path: Path) -> None:
    assert default_threads(tmp_path) == 4


@pytest.mark.usefixtures("four")
@pytest.mark.parametrize(("cores", "threads"), [(2, 2), (8, 4), (None, 4)])
def test_a_system_that_tells_only_how_many_cores_there_are_is_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cores: int | None, threads: int
) -> None:
    monkeypatch.setattr(psutil, "cpu_count", lambda logical: cores)
    assert default_threads(tmp_path / "none") == threads


def test_a_system_without_affinities_gives_all_its_processors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(psutil.Process, "cpu_affinity")
    monkeypatch.setattr("os.cpu_count", lambda: 6)
    assert default_threads(tmp_path) == usable_processors() == 6


@pytest.mark.parametrize(
    ("described", "instruction"),
    [
        ("model name\t: Xeon\nflags\t\t: fpu avx2 avx512f avx512_vnni amx_int8", "amx_int8"),
        ("flags\t\t: fpu avx2 avx_vnni", "avx_vnni"),
        ("flags\t\t: fpu avx2 avx512f", None),
        ("Features\t: fp asimd asimdhp asimddp", "asimddp"),
        ("Features\t: fp asimd", None),
        (None, None),
    ],
)
def test_fast_products_of_integers_are_known_by_their_instruction(
    tmp_path: Path, described: str | None, instruction: str | None
) -> None:
    if described is not None:
        (tmp_path / "cpuinfo").write_text(described + "\n")
    assert integer_products(tmp_path / "cpuinfo") == instruction


@pytest.fixture
def seven(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=4000, total=8000))
    monkeypatch.setattr(psutil, "swap_memory", lambda: SimpleNamespace(free=3000))


@pytest.mark.usefixtures("seven")
def test_free_memory_counts_swap(tmp_path: Path) -> None:
    assert available_memory(tmp_path) == 7000


@pytest.mark.usefixtures("seven")
@pytest.mark.parametrize(("limit", "expected"), [("max", 7000), ("3000", 2000), ("900", 0)])
def test_a_control_groups_limit_counts(limit: str, expected: int, tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text(limit + "\n")
    (tmp_path / "memory.current").write_text("1000\n")
    assert available_memory(tmp_path) == expected


@pytest.mark.parametrize("error", [psutil.AccessDenied(), FileNotFoundError("/proc/meminfo"), AttributeError()])
def test_what_the_system_does_not_tell_is_not_known(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> None:
        raise error

    monkeypatch.setattr(psutil, "virtual_memory", refuse)
    assert available_memory(tmp_path) is None
    assert machine()["memory_bytes"] is None


@pytest.mark.parametrize(
    ("given", "policy", "spins"),
    [({}, "PASSIVE", "0"), ({"OMP_WAIT_POLICY": "active"}, "ACTIVE", None), ({"GOMP_SPINCOUNT": "77"}, None, "77")],
)
def test_threads_of_torch_sleep_while_they_wait_unless_the_user_says_otherwise(
    given: dict[str, str], policy: str | None, spins: str | None
) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in sa3_convert.WAITING}
    environment |= given | {"OMP_DISPLAY_ENV": "verbose"}
    command = [sys.executable, "-c", "import sa3_convert.rounding.grid"]
    # What libgomp says that it read when torch loaded it.
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stderr
    assert policy is None or f"OMP_WAIT_POLICY = '{policy}'" in said
    assert spins is None or f"GOMP_SPINCOUNT = '{spins}'" in said


def own_slice() -> tuple[int, int]:
    """Return this thread's nice value and its slice in nanoseconds."""
    found = _schedule()
    if not found.slice:
        pytest.skip("this system does not tell slices")
    return found.nice, found.slice


def test_slices_are_short_in_a_block_and_in_threads_that_it_starts() -> None:
    nice, before = own_slice()
    within: list[tuple[int, int]] = []
    assert before > _SLICE
    with short_slices():
        assert own_slice() == (nice, _SLICE)
        thread = threading.Thread(target=lambda: within.append(own_slice()))
        thread.start()
        thread.join()
    assert (own_slice(), within) == ((nice, before), [(nice, _SLICE)])


def test_a_slice_that_the_user_chose_is_given_back() -> None:
    nice, before = own_slice()
    found: list[tuple[int, int]] = []

    def with_a_slice_of_its_own() -> None:
        chosen = _schedule()
        chosen.slice = before + 500_000
        _set_schedule(chosen)
        with short_slices():
            pass
        found.append(own_slice())

    thread = threading.Thread(target=with_a_slice_of_its_own)
    thread.start()
    thread.join()
    assert found == [(nice, before + 500_000)]
