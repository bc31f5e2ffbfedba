"""What is measured does not depend on where passes run; what cannot be used of them is told."""

import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sa3_convert import scheduling
from sa3_convert.checkpoint.reader import Checkpoint
from sa3_convert.checkpoint.synthetic import synthesize
from sa3_convert.cli import app as cli
from sa3_convert.components import Component
from sa3_convert.errors import BackendError, ConversionError, InputError
from sa3_convert.lab.common import Common
from sa3_convert.lab.planner import measuring
from sa3_convert.lab.planner.measuring import CASES, Part, Pass, Pricing, measure, to_measure
from tests.played import silent


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("measuring") / "toy"
    synthesize(folder, "small-music", "toy", 0, "gaussian")
    return Checkpoint.open(folder)


def elsewhere(tasks: Sequence[Any], run: Callable[..., Any]) -> Iterator[tuple[Any, Any]]:
    """Run passes as workers might: sent, and the last first."""
    tasks, run = pickle.loads(pickle.dumps((tasks, run)))
    for task in reversed(tasks):
        yield task, run(task)


def kept(cache: Path) -> dict[str, bytes]:
    """Return what measurements leave in a cache, by name."""
    return {str(file.relative_to(cache)): file.read_bytes() for file in cache.rglob("*") if file.is_file()}


def test_workers_leave_the_same_bytes_whichever_pass_is_first(checkpoint: Checkpoint, tmp_path: Path) -> None:
    component = Component.NUMBER_CONDITIONER
    here, there = (
        Common(checkpoint.folder, tmp_path / "a", threads=1),
        Common(checkpoint.folder, tmp_path / "b", threads=1),
    )
    ticks: list[tuple[object, ...]] = []
    assert measure(here, component, "fp16", silent) == measure(
        there, component, "fp16", lambda *t: ticks.append(t), elsewhere
    )
    assert kept(here.cache) == kept(there.cache)
    assert len([name for name in kept(here.cache) if name.startswith("curvature/")]) == 2
    assert not any(name.startswith("unfinished") for name in kept(here.cache))
    count = len(CASES[component])
    assert [tick for tick in ticks if tick[0] == "measuring"] == [("measuring", n, count) for n in range(count + 1)]


@pytest.mark.parametrize("what", [Pass, Pricing])
def test_two_commands_that_measure_the_same_at_once_both_have_it(
    checkpoint: Checkpoint, tmp_path: Path, what: type[Part]
) -> None:
    common = Common(checkpoint.folder, tmp_path, threads=1)
    others: list[object] = []

    def overtaken(tasks: Sequence[Any], run: Callable[..., Any]) -> Iterator[tuple[Any, Any]]:
        for number, task in enumerate(tasks):
            outcome = task, run(task)
            if number == 0 and isinstance(task, what):
                others.append(measure(common, task.component, "fp16", silent))
            yield outcome

    assert [measure(common, Component.NUMBER_CONDITIONER, "fp16", silent, overtaken)] == others


def test_workers_with_caches_of_their_own_share_by_a_store(checkpoint: Checkpoint, tmp_path: Path) -> None:
    pytest.importorskip("fsspec")
    component = Component.NUMBER_CONDITIONER
    here = Common(checkpoint.folder, tmp_path / "here", store=f"file://{tmp_path}/store", threads=1)

    def run(tasks: Sequence[Any], run: Callable[..., Any]) -> Iterator[tuple[Any, Any]]:
        for number, task in enumerate(tasks):
            own = replace(here, cache=tmp_path / f"worker{number % 2}")
            yield task, run(replace(task, common=own))

    alone = Common(checkpoint.folder, tmp_path / "alone", threads=1)
    assert measure(here, component, "fp16", silent, run) == measure(alone, component, "fp16", silent)


def test_what_was_measured_elsewhere_and_is_not_here_is_told(checkpoint: Checkpoint, tmp_path: Path) -> None:
    def away(tasks: Sequence[Any], run: Callable[..., Any]) -> Iterator[tuple[Any, Any]]:
        for task in tasks:
            yield task, run(replace(task, common=replace(task.common, cache=tmp_path / "away")))

    common = Common(checkpoint.folder, tmp_path / "here", threads=1)
    with pytest.raises(InputError, match="workers must see the same folder"):
        measure(common, Component.NUMBER_CONDITIONER, "fp16", silent, away)
    assert kept(common.cache) == {}


def test_a_worker_that_would_measure_something_else_is_refused(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other(tasks: Sequence[Any], run: Callable[..., Any]) -> Iterator[tuple[Any, Any]]:
        monkeypatch.setattr(measuring, "stage_keys", lambda _: {"export": "of another torch"})
        yield tasks[0], run(tasks[0])

    with pytest.raises(BackendError, match="another version"):
        measure(Common(checkpoint.folder, tmp_path), Component.NUMBER_CONDITIONER, "fp16", silent, other)


def test_a_pass_that_no_worker_comes_to_an_end_with_ends_it_and_the_others_are_kept(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    def dying(tasks: Sequence[Any], run: Callable[..., Any]) -> Iterator[tuple[Any, Any]]:
        yield tasks[0], run(tasks[0])
        yield tasks[1], ConversionError("Worker after worker ended.")

    component, common = Component.NUMBER_CONDITIONER, Common(checkpoint.folder, tmp_path, threads=1)
    with pytest.raises(ConversionError, match="Worker after worker"):
        measure(common, component, "fp16", silent, dying)
    sent: list[int] = []

    def counting(tasks: Sequence[Any], run: Callable[..., Any]) -> Iterator[tuple[Any, Any]]:
        sent.extend(task.number for task in tasks if isinstance(task, Pass))
        yield from elsewhere(tasks, run)

    made = measure(common, component, "fp16", silent, counting)
    assert sent == list(range(1, len(CASES[component])))
    assert made == measure(replace(common, cache=tmp_path / "alone"), component, "fp16", silent)


def test_a_damaged_part_is_measured_again(checkpoint: Checkpoint, tmp_path: Path) -> None:
    component, common = Component.NUMBER_CONDITIONER, Common(checkpoint.folder, tmp_path, threads=1)

    def interrupt(what: str, done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(common, component, "fp16", interrupt)
    parts = sorted(tmp_path.glob("unfinished/*/*/curvature.safetensors"))
    assert len(parts) == 3
    parts[1].write_bytes(parts[1].read_bytes()[:-8] + bytes(8))
    assert measure(common, component, "fp16", silent) == measure(
        replace(common, cache=tmp_path / "alone"), component, "fp16", silent
    )


def test_the_command_writes_the_same_recipe_with_workers(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("distributed")
    monkeypatch.setattr(scheduling, "on_dask", lambda _, tasks, run: elsewhere(tasks, run))
    asked = ["--component", "number_conditioner", "--target-mib", "0.03", "--threads", "1"]
    words = ["plan", str(checkpoint.folder), *asked]
    for name, more in (("here", []), ("there", ["--workers", "2"])):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        assert cli.run([*words, *more, "--out", "planned.yaml"]) == 0
    assert kept(tmp_path / "here") == kept(tmp_path / "there")
    assert cli.run([*words, "--out", "p.yaml", "--workers", "2", "--scheduler", "tcp://x:1"]) == 2


def test_a_sweep_measures_on_its_workers(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("distributed")
    ran: list[str] = []

    def on_dask(_: object, tasks: Sequence[Any], run: Callable[..., Any]) -> Iterator[tuple[Any, Any]]:
        for task in tasks:
            ran.append(type(task).__name__)
            yield task, run(task) if isinstance(task, Part) else ConversionError("No more of it.")

    monkeypatch.setattr(scheduling, "on_dask", on_dask)
    words = ["--component", "number_conditioner", "--sizes", "0.03", "--out", str(tmp_path / "out"), "--workers", "2"]
    assert cli.run(["sweep", str(checkpoint.folder), *words]) == 4
    assert ran == ["Pass"] * len(CASES[Component.NUMBER_CONDITIONER]) + ["Pricing"] + ["Task"] * 3


def test_prices_are_kept_some_layers_at_a_time_and_are_those_of_one_process(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "_LAYERS_AT_ONCE", 5)
    component, common = Component.DIT, Common(checkpoint.folder, tmp_path / "a", threads=1)
    layers = len(measuring.layers_to_measure(checkpoint, component))
    passes, parts = len(CASES[component]), -(-layers // 5)
    assert [type(part) for part in to_measure(common, component, "fp16")] == [Pass] * passes + [Pricing] * parts

    def interrupted(tasks: Sequence[Any], run: Callable[..., Any]) -> Iterator[tuple[Any, Any]]:
        for task in elsewhere(tasks, run):
            yield task
            if isinstance(task[0], Pricing):
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(common, component, "fp16", silent, interrupted)
    left = to_measure(common, component, "fp16")
    assert [type(part) for part in left] == [Pricing] * (parts - 1)
    assert len(to_measure(common, component, "fp32")) == parts
    (kept_prices,) = tmp_path.rglob("prices.json")
    kept_prices.write_bytes(kept_prices.read_bytes()[:-1])
    assert len(to_measure(common, component, "fp16")) == parts
    sent: list[Any] = []

    def counting(tasks: Sequence[Any], run: Callable[..., Any]) -> Iterator[tuple[Any, Any]]:
        sent.extend(tasks)
        yield from elsewhere(tasks, run)

    made = measure(common, component, "fp16", silent, counting)
    assert len(sent) == parts
    assert list(made.layers) == list(measuring.layers_to_measure(checkpoint, component))
    assert to_measure(common, component, "fp16") == []
    monkeypatch.setattr(measuring, "_LAYERS_AT_ONCE", layers)
    assert made == measure(replace(common, cache=tmp_path / "b"), component, "fp16", silent)


@pytest.mark.parametrize("command", ["plan", "sweep"])
def test_a_dry_run_tells_what_is_left_to_measure(
    checkpoint: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    size = {"plan": ["--target-mib", "0.03"], "sweep": ["--sizes", "0.03"]}[command]
    words = [command, str(checkpoint.folder), "--component", "number_conditioner", *size, "--cache", str(tmp_path)]
    words += ["--out", str(tmp_path / "out.yaml"), "--dry-run"]
    assert cli.run(words) == 0
    assert "17 parts" in capsys.readouterr().out
    measure(Common(checkpoint.folder, tmp_path), Component.NUMBER_CONDITIONER, "fp16", silent)
    assert cli.run(words) == 0
    assert "was measured before" in capsys.readouterr().out
