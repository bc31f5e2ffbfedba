"""Whole sweeps of a toy: measured as a conversion measures, kept, gone on with, and told on the command line."""

import errno
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from sa3_convert.cli import app as cli
from sa3_convert.components import Component
from sa3_convert.convert.cache import StageCache
from sa3_convert.convert.stages import ComponentJob
from sa3_convert.errors import BackendError
from sa3_convert.lab.common import Common
from sa3_convert.lab.sweep import sweep as whole_sweep
from sa3_convert.lab.sweep import tasks as room
from sa3_convert.lab.sweep.points import Point
from sa3_convert.lab.sweep.result import Sweep
from sa3_convert.lab.sweep.sweep import recipe_of, run_sweep
from sa3_convert.lab.sweep.tasks import Ran, Task, make, run_task, tasks_for
from sa3_convert.recipe import load_recipe, recipe_file
from sa3_convert.scheduling import in_this_process
from sa3_convert.system.files import alone_in

CONDITIONER = Component.NUMBER_CONDITIONER


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def swept(toy: Path, points: list[Point], cache: Path) -> Sweep:
    return run_sweep(Common(toy, cache), points)


def test_points_are_what_a_conversion_measures(swept: Sweep) -> None:
    int8, fp16 = swept.points
    assert int8.fidelity is not None
    assert fp16.fidelity is not None
    assert 35 < int8.fidelity.signal_to_noise_db < 60 < fp16.fidelity.signal_to_noise_db
    assert int8.bytes is not None
    assert fp16.bytes is not None
    assert int8.bytes < fp16.bytes
    assert set(int8.bits.values()) == {8}
    assert set(fp16.bits.values()) == {16}
    assert not swept.mixed
    assert all(point.on_frontier for point in swept.points)


def test_a_second_sweep_finds_all_of_it_in_the_cache(
    toy: Path, points: list[Point], cache: Path, swept: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("nothing is left to be made")

    monkeypatch.setattr(StageCache, "make", refuse)
    again = run_sweep(Common(toy, cache), points)
    assert [p.fidelity for p in again.points] == [p.fidelity for p in swept.points]


def test_stages_that_points_share_run_once(toy: Path, points: list[Point], cache: Path) -> None:
    tasks = tasks_for(points, Common(toy, cache))
    names = [[task.stage for task in own] for own in tasks.values()]
    assert names == [["export", "mnn", "verify"]] * 2
    assert len({own[0].name for own in tasks.values()}) == 1
    assert len({own[1].name for own in tasks.values()}) == 2


def test_a_worker_with_another_mnn_makes_its_own_and_says_so(
    toy: Path, points: list[Point], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def elsewhere(task: Task, *before: Ran) -> Ran:
        if task.stage == "verify" and task.recipe == points[1].recipe:
            monkeypatch.setattr(room, "mnn_version", lambda: "9.9.9")
            other = {"export": task.keys["export"], "mnn": "other-mnn", "verify": "other-verify"}
            monkeypatch.setattr(room, "stage_keys", lambda job: other)
        return run_task(task, *before)

    def run_here(tasks: list[Task], run: object) -> object:
        return in_this_process(tasks, elsewhere)

    found = run_sweep(Common(toy, tmp_path), points, run_here)  # type: ignore[arg-type]
    assert [point.mnn for point in found.points][1] == "9.9.9"
    assert found.mixed
    assert not found.missing
    assert {path.name for path in (tmp_path / "verify").iterdir()} > {"other-verify"}


@pytest.mark.parametrize(("mnn", "differs"), [(None, "verify"), (None, "export"), ("9.9.9", "export")])
def test_a_worker_with_another_checkpoint_or_version_is_refused(
    toy: Path, points: list[Point], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mnn: str | None, differs: str
) -> None:
    task = tasks_for(points[:1], Common(toy, tmp_path))[points[0].name][-1]
    if mnn is not None:
        monkeypatch.setattr(room, "mnn_version", lambda: mnn)
    there = replace(task, keys={**task.keys, differs: "other"})
    ran = run_task(there)
    assert ran.exit_code == 7
    assert "another checkpoint under this path" in ran.problem
    with pytest.raises(BackendError, match="another version"):
        make(there)
    assert not list(tmp_path.iterdir())


def test_a_conversion_has_no_use_for_what_another_mnn_makes(
    toy: Path, points: list[Point], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = tasks_for(points[:1], Common(toy, tmp_path))[points[0].name][-1]
    monkeypatch.setattr(room, "mnn_version", lambda: "9.9.9")
    with pytest.raises(BackendError, match="another version"):
        make(replace(task, keys={**task.keys, "mnn": "other"}))


def test_what_cannot_be_written_leaves_nothing_and_the_same_command_goes_on(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: object) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    words = ["sweep", str(toy), "--component", "number_conditioner", "--recipe", "int8", "--out", str(tmp_path / "out")]
    monkeypatch.setattr(whole_sweep, "page", full)
    assert cli.run(words) == 3
    assert not list((tmp_path / "out").iterdir())
    monkeypatch.undo()
    assert cli.run(words) == 0
    assert (tmp_path / "out" / "number_conditioner-int8.yaml").is_file()


def test_workers_without_a_common_folder_share_what_they_make(toy: Path, points: list[Point], tmp_path: Path) -> None:
    pytest.importorskip("fsspec")
    address = f"file://{tmp_path}/kept"
    first = run_sweep(Common(toy, tmp_path / "a", store=address), points)
    entries = {path.parent.name: path.stat().st_mtime_ns for path in (tmp_path / "kept").glob("*/*/entry.json")}
    # What a dry run asks.
    there = tasks_for(points, Common(toy, tmp_path / "c", store=address))
    assert all(task.is_done() for own in there.values() for task in own)
    assert not (tmp_path / "c").exists()
    second = run_sweep(Common(toy, tmp_path / "b", store=address), points)
    assert [p.fidelity for p in first.points] == [p.fidelity for p in second.points]
    assert {p.parent.name: p.stat().st_mtime_ns for p in (tmp_path / "kept").glob("*/*/entry.json")} == entries
    # What is brought has the times of its making elsewhere in it, but nothing was made: it took no time.
    assert sum(point.seconds for point in second.points) < sum(point.seconds for point in first.points)


def test_what_fails_is_missing_with_its_reason_and_the_rest_is_there(
    toy: Path, points: list[Point], tmp_path: Path
) -> None:
    broken = Point("broken", CONDITIONER, points[0].recipe.model_copy(update={"floor_db": 200.0}))
    none = Point("none", CONDITIONER, points[0].recipe, problem="No plan is so small.")
    found = run_sweep(Common(toy, tmp_path), [broken, none, points[1]])
    assert [point.name for point in found.missing] == ["broken", "none"]
    assert [point.exit_code for point in found.missing] == [5, 2]
    assert "200" in found.missing[0].problem
    assert found.points[2].fidelity is not None


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/x"), 3, "The disk is full.*'/x'"),
        (MemoryError(), 4, "Out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate"), 4, "Out of memory"),
    ],
)
def test_what_the_system_has_no_room_for_is_missing_and_the_rest_is_there(
    toy: Path,
    points: list[Point],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    code: int,
    said: str,
) -> None:
    made = room.make_stage

    def fails(job: ComponentJob, name: str, *rest: object) -> object:
        if name == "mnn" and job.recipe == points[0].recipe:
            raise error
        return made(job, name, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(room, "make_stage", fails)
    found = run_sweep(Common(toy, tmp_path), points)
    assert [point.name for point in found.missing] == [points[0].name]
    assert found.missing[0].exit_code == code
    assert re.search(said, found.missing[0].problem)
    assert found.points[1].fidelity is not None
    monkeypatch.undo()
    assert not run_sweep(Common(toy, tmp_path), points).missing


def test_a_bug_in_a_task_is_no_missing_point(
    toy: Path, points: list[Point], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "make_stage", None)
    with pytest.raises(TypeError):
        run_sweep(Common(toy, tmp_path), points)


def test_a_recipe_of_the_frontier_has_a_floor_that_it_reaches(swept: Sweep, points: list[Point]) -> None:
    base = load_recipe(recipe_file(Path("int8")))
    made = recipe_of(swept.points[1], points[1], base)
    own = made.for_component(CONDITIONER)
    assert swept.points[1].fidelity is not None
    assert own.floor_db == pytest.approx(swept.points[1].fidelity.signal_to_noise_db - 2, abs=0.06)
    assert made.for_component(Component.DIT) == base.for_component(Component.DIT)


def test_the_command_plans_converts_and_tells(toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["sweep", str(toy), "--component", "number_conditioner", "--sizes", "0.0001,0.02,0.03", "--out"]
    assert cli.run([*words, str(tmp_path / "out"), "--json", str(tmp_path / "f.json")]) == 2
    said = capsys.readouterr().err
    assert "number_conditioner-0.0001 is missing: No plan for number_conditioner is smaller than" in said
    found = json.loads((tmp_path / "f.json").read_text())
    assert found == json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert found["schema"] == 1
    assert Sweep.model_validate(found).variant == "small-music"
    kept = [point["recipe"] for point in found["points"] if point["recipe"]]
    assert kept
    for name in kept:
        assert load_recipe(tmp_path / "out" / name).for_component(CONDITIONER).floor_db > 1
    # Every colour that the picture names, it has.
    picture = (tmp_path / "out" / "number_conditioner.svg").read_text()
    ElementTree.fromstring(picture)
    assert set(re.findall(r"var\((--\w+)\)", picture)) <= set(re.findall(r"(--\w+):", picture))
    assert cli.run([*words, str(tmp_path / "out"), "--dry-run"]) == 0
    assert "nothing was done" in capsys.readouterr().out


def test_a_folder_with_something_else_in_it_is_left_alone(
    toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "index.html").write_text("mine")
    assert cli.run(["sweep", str(toy), "--recipe", "int8", "--out", str(tmp_path)]) == 2
    assert "holds something else" in capsys.readouterr().err
    assert (tmp_path / "index.html").read_text() == "mine"


def test_a_folder_that_another_sweep_works_into_is_left_to_it(
    toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    with alone_in(tmp_path / "out"):
        words = ["--component", "number_conditioner", "--recipe", "int8", "--out", str(tmp_path / "out")]
        assert cli.run(["sweep", str(toy), *words]) == 2
    assert "Another sweep into" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "Give --sizes"),
        (["--sizes", "1:2:1"], "Name it: --component dit"),
        (["--sizes", "1:2:1", "--component", "dit", "--component", "decoder"], "Name it"),
        (["--recipe", "int8", "--recipe", "int8"], "text_encoder-int8 would be there twice"),
        (["--recipe", "int8", "--workers", "2", "--scheduler", "tcp://x:1"], "Give one of them"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    toy: Path, tmp_path: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["sweep", str(toy), "--out", str(tmp_path / "o"), *words]) == 2
    assert said in capsys.readouterr().err


def test_a_cluster_without_dask_is_refused_with_what_brings_it(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    assert cli.run(["sweep", str(toy), "--out", str(tmp_path / "o"), "--recipe", "int8", "--workers", "2"]) == 7
    assert "[cluster]" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()
