"""Batches on workers, which stand-ins play: the order of what is told, what is written down, what costs one line."""

import json
import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sa3_convert.bundle.reader import Bundle
from sa3_convert.errors import AudioError, BundleError, ConversionError, Sa3Error
from sa3_convert.runtime import opening as room
from sa3_convert.runtime.batch import RESULTS, BatchOptions, BatchResult, Line, Workers, run_batch
from sa3_convert.runtime.batch_file import read_batch
from sa3_convert.runtime.engines import EngineName
from sa3_convert.runtime.opening import Opening
from sa3_convert.runtime.pipeline import Pipeline
from sa3_convert.scheduling import BESIDE_WEIGHTS, Estimate, Latest
from tests.runtime.conftest import Parts
from tests.runtime.fakes import FakeEngine, decode, pipeline

LINES = [{"prompt": "pad", "seed": seed, "seconds": 0.2, "steps": 1} for seed in range(1, 5)]
OPENING = Opening(Path("bundle"), "mnn", {})
MODELS = {"models": {"dit": "0"}}

Play = Callable[..., list[BatchResult]]


@pytest.fixture
def opened(small: Parts, monkeypatch: pytest.MonkeyPatch) -> list[Pipeline]:
    """Let openings open stand-ins, and return those that were."""
    found: list[Pipeline] = []

    def open_one(self: Opening, **how: Any) -> Pipeline:
        assert how == {"keep_loaded": True}
        engine = FakeEngine(decoder=self.options.get("decoder", decode))
        found.append(pipeline(small, engine, keep_loaded=True))
        return found[-1]

    monkeypatch.setattr(Opening, "open", open_one)
    monkeypatch.setattr(Opening, "memory_bytes", lambda self, adapters: 7)
    for module in ("opening", "batch"):
        monkeypatch.setattr(f"sa3_convert.runtime.{module}.made_by", lambda *_, **__: MODELS)
    monkeypatch.setattr(room, "_held", Latest[Any, Any]())
    return found


@pytest.fixture
def play(small: Parts, tmp_path: Path, opened: list[Pipeline]) -> Play:
    """Run a batch whose lines come as `order` has them; one whose number has an error there ends with it."""

    def run(order: Sequence[int | tuple[int, Sa3Error]], opening: Opening = OPENING, **options: Any) -> Any:
        def runner(tasks: Sequence[Any], run: Callable[..., Any]) -> Iterator[tuple[Any, Any]]:
            tasks, run = pickle.loads(pickle.dumps((tasks, run)))
            by_name = {task.name: task for task in tasks}
            assert all(task.takes.memory_bytes == 7 for task in tasks)
            for one in order:
                number, error = one if isinstance(one, tuple) else (one, None)
                yield by_name[str(number)], error or run(by_name[str(number)])

        file = tmp_path / "batch.jsonl"
        file.write_text("\n".join(json.dumps(line) for line in LINES))
        here = pipeline(small, FakeEngine())
        made = run_batch(here, read_batch(file), BatchOptions(tmp_path / "out", **options), Workers(runner, opening))
        return list(made)

    return run


def written(folder: Path) -> list[int]:
    return [json.loads(line)["line"] for line in (folder / "out" / RESULTS).read_text().splitlines()]


def test_what_comes_in_any_order_is_told_in_that_of_the_file_and_written_down_at_once(
    play: Play, tmp_path: Path, opened: list[Pipeline]
) -> None:
    assert [result.line for result in play([3, 1, 4, 2])] == [1, 2, 3, 4]
    assert written(tmp_path) == [3, 1, 4, 2]
    # One pipeline for all lines, and what it has loaded stays.
    assert len(opened) == 1
    engine = opened[0].models.engine
    assert isinstance(engine, FakeEngine)
    loaded = [component for component, _ in engine.loaded]
    assert len(loaded) == len(set(loaded))
    assert [result.reused for result in play([])] == [True] * 4


def test_files_are_those_of_a_batch_without_workers(play: Play, small: Parts, tmp_path: Path) -> None:
    play([4, 3, 2, 1])
    items = read_batch(tmp_path / "batch.jsonl")
    list(run_batch(pipeline(small, FakeEngine()), items, BatchOptions(tmp_path / "here")))
    names = [item.output for item in items]
    assert [(tmp_path / "out" / n).read_bytes() for n in names] == [(tmp_path / "here" / n).read_bytes() for n in names]


def test_a_line_that_fails_fails_alone_and_is_made_the_next_time(play: Play, tmp_path: Path) -> None:
    lost = ConversionError("Worker after worker ended.")
    results = play([1, (2, lost), (3, AudioError("no such file")), 4])
    assert [(result.exit_code, result.error) for result in results] == [
        (0, None),
        (4, "Worker after worker ended."),
        (3, "no such file"),
        (0, None),
    ]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["0001.wav", "0004.wav", RESULTS]
    assert [result.reused for result in play([2, 3])] == [True, False, False, True]


def test_of_two_seeds_with_the_same_audio_the_later_line_is_rejected_whichever_comes_first(
    play: Play, tmp_path: Path
) -> None:
    deaf = Opening(Path("bundle"), "mnn", {"decoder": same_for_all})
    first, *rest = play([3, 2, 4, 1], deaf)
    assert first.error is None
    assert ["'duplicate'" in str(result.error) for result in rest] == [True] * 3
    assert {result.exit_code for result in rest} == {8}
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["0001.wav", RESULTS]
    assert not any(result.error for result in play([2, 3, 4], deaf, allow=("duplicate",)))


def same_for_all(latents: Any) -> Any:
    return decode(np.ones_like(latents) * np.linspace(0, 1, latents.shape[2]))


def test_what_a_worker_makes_in_another_folder_of_that_name_is_no_file_of_the_batch(
    play: Play, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    away = tmp_path / "away"

    def elsewhere(self: Line) -> Line:
        return replace(self, options=replace(self.options, folder=away))

    monkeypatch.setattr(Line, "elsewhere", elsewhere)
    results = play([1, 2, 3, 4])
    assert (away / "0001.wav").exists()
    assert all("workers must see the same folder" in str(result.error) for result in results)
    assert {result.exit_code for result in results} == {3}


def test_other_models_under_the_path_are_refused_and_another_bundle_takes_the_place(
    small: Parts, opened: list[Pipeline]
) -> None:
    with pytest.raises(BundleError, match="holds other models"):
        room.held(OPENING, {False: {"models": {"dit": "1"}}})
    with pytest.raises(BundleError, match="holds other models"):
        room.held(OPENING, {False: MODELS, True: {"models": {"dit": "1"}}})
    first = room.held(OPENING, {False: MODELS})
    assert room.held(Opening(Path("bundle"), "mnn", {}), {False: MODELS}) is first
    assert room.held(Opening(Path("other"), "mnn", {}), {False: MODELS}) is not first
    assert len(opened) == 4


def test_half_a_file_of_a_worker_that_died_is_removed(play: Play, tmp_path: Path) -> None:
    left = tmp_path / "out" / ".0001.wav.0123456789abcdef.partial"
    left.parent.mkdir()
    left.write_bytes(b"half")
    play([(1, ConversionError("died")), 2, 3, 4])
    assert not left.exists()


def test_what_is_sent_names_files_from_the_root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    line = {"prompt": "pad", "init_audio": "a.wav", "adapters": ["l.safetensors:0.5"]}
    Path("b.jsonl").write_text(json.dumps(line))
    (item,) = read_batch(Path("b.jsonl"))
    sent = Line(item, {"init_audio": "../a.wav"}, BatchOptions(Path("out")), Estimate(1.0, 1), "").elsewhere()
    assert sent.item.request.files() == [tmp_path / "a.wav", tmp_path / "l.safetensors"]
    assert sent.options.folder == tmp_path / "out"
    # What is told of it stays as it is.
    assert sent.request == {"init_audio": "../a.wav"}
    there = Opening(
        Path("bundle"), "torch", {"checkpoint": Path("c"), "loras": ("l.safetensors:2", "~/m:1")}
    ).elsewhere()
    assert there.path == tmp_path / "bundle"
    assert there.options == {
        "checkpoint": tmp_path / "c",
        "loras": (f"{tmp_path}/l.safetensors:2", str(Path.home() / "m:1")),
    }


@pytest.mark.parametrize(
    ("engine", "options"), [("mnn", {}), ("mnn", {"memory": "low"}), ("onnxruntime", {}), ("torch", {})]
)
def test_memory_is_that_of_all_models_and_of_the_work(
    toy: Path, toy_int8: Bundle, engine: EngineName, options: dict[str, Any]
) -> None:
    sizes = {
        kind: sum(e.bytes for a in toy_int8.manifest.artifacts if a.kind == kind for e in a.files)
        for kind in ("mnn", "onnx")
    }
    weights = Opening(toy if engine == "torch" else toy_int8.path, engine, options).memory_bytes() - BESIDE_WEIGHTS
    assert {
        ("mnn", "normal"): sizes["mnn"] + sizes["onnx"],
        ("mnn", "low"): 2 * sizes["mnn"],
        ("onnxruntime", "normal"): 2 * sizes["onnx"],
        # Numbers alone, without graphs around them.
        ("torch", "normal"): pytest.approx(sizes["onnx"], rel=0.2),
    }[engine, options.get("memory", "normal")] == weights
