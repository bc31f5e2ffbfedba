import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sa3_convert.errors import AudioError, InputError, UsageError
from sa3_convert.runtime.audio import read_metadata
from sa3_convert.runtime.batch import RESULTS, BatchOptions, BatchResult, read_batch, run_batch
from tests.runtime.conftest import Parts
from tests.runtime.fakes import FakeEngine, decode, pipeline

LINES = [{"prompt": "pad", "seed": 1}, {"prompt": "drums", "seed": 2, "output": "drums.flac"}]
SHORT = {"seconds": 0.2, "steps": 1}


def written(folder: Path, lines: list[Any]) -> Path:
    path = folder / "batch.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    return path


def run(
    parts: Parts, folder: Path, lines: list[Any], engine: FakeEngine | None = None, **options: Any
) -> list[BatchResult]:
    items = read_batch(written(folder, lines), SHORT)
    runner = pipeline(parts, engine or FakeEngine())
    return list(run_batch(runner, items, BatchOptions(folder / "out", **options)))


def test_every_line_gives_a_file_and_a_result(small: Parts, tmp_path: Path) -> None:
    results = run(small, tmp_path, LINES, metadata={"variant": "toy"})
    assert [result.output for result in results] == ["0001.wav", "drums.flac"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["0001.wav", "drums.flac", RESULTS]
    lines = [json.loads(line) for line in (tmp_path / "out" / RESULTS).read_text().splitlines()]
    assert [line["request"]["prompt"] for line in lines] == ["pad", "drums"]
    metadata = read_metadata(tmp_path / "out" / "drums.flac")
    assert (metadata["variant"], metadata["request"]["seed"]) == ("toy", 2)


def test_a_second_run_does_nothing(small: Parts, tmp_path: Path) -> None:
    run(small, tmp_path, LINES)
    engine = FakeEngine()
    results = run(small, tmp_path, LINES, engine)
    assert [result.reused for result in results] == [True, True]
    assert engine.loaded == []


def test_only_what_changed_is_made_again(small: Parts, tmp_path: Path) -> None:
    run(small, tmp_path, LINES)
    results = run(small, tmp_path, [LINES[0], LINES[1] | {"steps": 2}])
    assert [result.reused for result in results] == [True, False]


@pytest.mark.parametrize("damage", [lambda p: p.unlink(), lambda p: p.write_bytes(p.read_bytes()[:-1])])
def test_a_file_that_is_gone_or_damaged_is_made_again(small: Parts, tmp_path: Path, damage: Any) -> None:
    run(small, tmp_path, LINES)
    damage(tmp_path / "out" / "0001.wav")
    assert [result.reused for result in run(small, tmp_path, LINES)] == [False, True]


@pytest.mark.parametrize("length", [1, 30, -2])
def test_a_result_line_that_was_cut_off_is_made_again_and_spoils_no_other(
    small: Parts, tmp_path: Path, length: int
) -> None:
    run(small, tmp_path, LINES)
    path = tmp_path / "out" / RESULTS
    first, second = path.read_bytes().splitlines()
    path.write_bytes(first + b"\n" + second[:length])
    assert [result.reused for result in run(small, tmp_path, LINES)] == [True, False]
    assert [result.reused for result in run(small, tmp_path, LINES)] == [True, True]


def test_results_come_as_they_are_finished(small: Parts, tmp_path: Path) -> None:
    items = read_batch(written(tmp_path, LINES), SHORT)
    results = run_batch(pipeline(small, FakeEngine()), items, BatchOptions(tmp_path / "out"))
    next(results)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["0001.wav", RESULTS]


def test_a_rejected_output_leaves_no_file_and_does_not_end_the_batch(small: Parts, tmp_path: Path) -> None:
    run(small, tmp_path, LINES)

    def silent_for_the_first(latents: Any) -> Any:
        silent_for_the_first.calls += 1  # type: ignore[attr-defined]
        return decode(latents) * (silent_for_the_first.calls > 1)  # type: ignore[attr-defined]

    silent_for_the_first.calls = 0  # type: ignore[attr-defined]
    changed = [line | {"steps": 2} for line in LINES]
    first, second = run(small, tmp_path, changed, FakeEngine(decoder=silent_for_the_first))
    assert first.error is not None
    assert "silence" in first.error
    assert not (tmp_path / "out" / "0001.wav").exists()
    assert second.error is None
    assert [result.reused for result in run(small, tmp_path, changed)] == [False, True]


def test_different_seeds_with_the_same_audio_are_rejected_unless_waived(small: Parts, tmp_path: Path) -> None:
    deaf = FakeEngine(decoder=lambda latents: decode(np.ones_like(latents) * np.linspace(0, 1, latents.shape[2])))
    lines = [{"prompt": "pad", "seed": 1}, {"prompt": "pad", "seed": 2}]
    _, second = run(small, tmp_path, lines, deaf)
    assert second.error is not None
    assert "'duplicate'" in second.error
    _, second = run(small, tmp_path, lines, deaf, allow=("duplicate",))
    assert second.error is None


def test_the_same_seed_twice_is_no_fault(small: Parts, tmp_path: Path) -> None:
    results = run(small, tmp_path, [{"prompt": "pad"}, {"prompt": "pad"}])
    assert [result.error for result in results] == [None, None]
    assert results[0].audio_sha256 == results[1].audio_sha256


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            [{"prompt": "a"}, {"prompt": "b", "step": 3}],
            "line 2: There is no setting 'step'. Perhaps you meant 'steps'",
        ),
        ([{"prompt": "a", "steps": 0}], "line 1: 0 steps"),
        ([{"seed": 1}], "line 1: The setting 'prompt' is missing"),
        ([{"prompt": "a", "output": "../x.wav"}], "plain file name"),
        ([{"prompt": "a", "output": ".wav"}], "plain file name"),
        ([{"prompt": "a", "output": 3}], "plain file name"),
        ([{"prompt": "a", "output": "x.mp3"}], "line 1: .*file type"),
        ([{"prompt": "a", "output": "x.wav"}, {"prompt": "b", "output": "x.wav"}], "lines 1 and 2 both write 'x.wav'"),
    ],
)
def test_a_line_that_cannot_be_is_told_by_its_number(tmp_path: Path, lines: list[Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read_batch(written(tmp_path, lines))


@pytest.mark.parametrize(
    "content", [b"", b"\n\n", b"nonsense", b"[1, 2]", b"\xff\xfe", b'{"prompt": "a"}\n{"prompt": ']
)
def test_a_file_that_is_no_batch_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "batch.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"batch\.jsonl"):
        read_batch(path)


def test_a_missing_batch_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        read_batch(tmp_path / "batch.jsonl")


def test_a_line_beyond_the_model_is_told_before_the_first_generation(small: Parts, tmp_path: Path) -> None:
    engine = FakeEngine()
    with pytest.raises(UsageError, match="Line 2: 500 seconds is beyond"):
        run(small, tmp_path, [{"prompt": "a"}, {"prompt": "b", "seconds": 500}], engine)
    assert engine.loaded == []


def test_audio_that_is_missing_is_told_by_its_line(small: Parts, tmp_path: Path) -> None:
    with pytest.raises(AudioError, match=r"Line 1: .*gone\.wav"):
        run(small, tmp_path, [{"prompt": "a", "init_audio": str(tmp_path / "gone.wav")}])


def test_a_format_that_a_file_type_lacks_is_told_before_the_first_generation(small: Parts, tmp_path: Path) -> None:
    engine = FakeEngine()
    with pytest.raises(UsageError, match="FLAC"):
        run(small, tmp_path, LINES, engine, sample_format="float")
    assert engine.loaded == []
