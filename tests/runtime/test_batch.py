import json
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from sa3_convert.errors import AudioError, BundleError, InputError, UsageError
from sa3_convert.runtime.audio import read_metadata
from sa3_convert.runtime.batch import RESULTS, BatchOptions, BatchResult, run_batch
from sa3_convert.runtime.batch_file import read_batch
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


@pytest.mark.parametrize(
    "other",
    [{"metadata": {"models": {"dit": "1" * 64}}}, {"sample_format": "float"}, {"dither": True}],
    ids=["models", "format", "dither"],
)
def test_what_was_made_by_other_models_or_written_otherwise_is_made_again(
    small: Parts, tmp_path: Path, other: dict[str, Any]
) -> None:
    lines = [{"prompt": "pad", "seed": 1}, {"prompt": "drums", "seed": 2}]
    before = {"metadata": {"models": {"dit": "0" * 64}}}
    run(small, tmp_path, lines, **before)
    assert [result.reused for result in run(small, tmp_path, lines, **before | other)] == [False, False]
    assert [result.reused for result in run(small, tmp_path, lines, **before | other)] == [True, True]


def test_what_changes_no_sample_makes_nothing_again(small: Parts, tmp_path: Path) -> None:
    lines = [{"prompt": "pad", "seed": "random"}]
    metadata = {"models": {"dit": "0" * 64}, "hub": "x/y@1"}
    (first,) = run(small, tmp_path, lines, metadata=metadata)
    (again,) = run(small, tmp_path, lines, metadata=metadata | {"hub": "x/y@2"})
    assert again.reused
    assert again.request == first.request


def test_audio_that_is_gone_is_told_when_its_line_has_its_turn(small: Parts, tmp_path: Path) -> None:
    gone = {"prompt": "drums", "seed": 2, "seconds": 0.2, "init_audio": "gone.wav"}
    with pytest.raises(AudioError, match=r"Line 2: .*gone\.wav"):
        run(small, tmp_path, [LINES[0], gone])
    assert (tmp_path / "out" / "0001.wav").exists()


def test_what_was_made_from_other_audio_of_the_same_name_is_made_again(small: Parts, tmp_path: Path) -> None:
    lines = [LINES[0], {"prompt": "drums", "seed": 2, "init_audio": "given.wav"}]
    random = np.random.default_rng(0)
    for expected in ([False, False], [True, False]):
        soundfile.write(tmp_path / "given.wav", random.uniform(-1, 1, (8820, 2)), 44100)
        assert [result.reused for result in run(small, tmp_path, lines)] == expected
    assert [result.reused for result in run(small, tmp_path, lines)] == [True, True]


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
        ([{"prompt": "a", "steps": 0}], "line 1: steps is 0"),
        ([{"seed": 1}], "line 1: prompt is missing"),
        ([{"prompt": "a", "output": "../x.wav"}], "plain file name"),
        ([{"prompt": "a", "output": ".wav"}], "plain file name"),
        ([{"prompt": "a", "output": 3}], "plain file name"),
        ([{"prompt": "a", "output": "x.mid"}], "line 1: .*file type"),
        ([{"prompt": "a", "output": "x.wav"}, {"prompt": "b", "output": "x.wav"}], "lines 1 and 2 both write 'x.wav'"),
        ([{"prompt": "a", "output": "é.wav"}, {"prompt": "b", "output": "E\u0301.WAV"}], "lines 1 and 2 both write"),
        ([{"prompt": "a", "output": "x" * 252 + ".wav"}], "more than 255 bytes"),
    ],
)
def test_a_line_that_cannot_be_is_told_by_its_number(tmp_path: Path, lines: list[Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read_batch(written(tmp_path, lines))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\n\n",
        b"nonsense",
        b"[1, 2]",
        b"\xff\xfe",
        b'{"prompt": "a"}\n{"prompt": ',
        b'{"prompt": "a"}\r{"prompt": "b"}',
        b'{"prompt": "a", "seconds": 1e400}',
        b'{"prompt": "a", "seconds": NaN}',
        b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}",
        b'{"prompt": "a\\u0000"}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "a", "output": "\\udfff.wav"}',
        b'{"prompt": ' + b"[" * 100_000,
        b'{"prompt": "a", "inpaint": ' + b"[" * 65 + b"]" * 65 + b"}",
        b'{"prompt": "a", "prompt": "b"}',
        b'{"prompt": "a"}\xef\xbb\xbf\n{"prompt": "a"}',
    ],
)
def test_a_file_that_is_no_batch_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "batch.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"batch\.jsonl"):
        read_batch(path)


@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "large"])
def test_what_is_no_file_of_bounded_size_is_no_batch(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "batch.jsonl"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path = Path("/dev/zero")
    else:
        with path.open("wb") as stream:
            stream.truncate(1 << 40)
    with pytest.raises(InputError, match="cannot be read"):
        read_batch(path)


def test_lines_end_at_line_feeds_alone_and_a_byte_order_mark_is_fine(tmp_path: Path) -> None:
    path = tmp_path / "batch.jsonl"
    prompts = ["a\u2028b", "\u2029c\u2028"]
    lines = [json.dumps({"prompt": prompt}, ensure_ascii=False) for prompt in prompts]
    path.write_bytes("\r\n".join(["\ufeff" + lines[0], lines[1], '{"prompt": "last"}']).encode())
    assert [item.request.prompt for item in read_batch(path)] == [*prompts, "last"]


def test_a_missing_batch_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        read_batch(tmp_path / "batch.jsonl")


def test_a_line_beyond_the_model_is_told_before_the_first_generation(small: Parts, tmp_path: Path) -> None:
    engine = FakeEngine()
    with pytest.raises(UsageError, match="Line 2: seconds is 500, beyond"):
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


ODD = [
    {"output": []},
    {"output": {"a": 1}},
    {"output": None},
    {"output": 3},
    {"line": "1"},
    {"line": []},
    {"request": []},
    {"request": "text"},
    {"error": 3},
    {"file_sha256": ["0" * 64]},
    {"audio_sha256": {}},
    {"audio_sha256": []},
    {"seconds": 5},
    {"seconds": {"text": "long"}},
    {"seconds": {"no such stage": 1.0}},
    {"seconds": {"text": [1.0]}},
    {"warnings": 5},
    {"warnings": "text"},
    {"warnings": [3]},
    {"warnings": {"a": "b"}},
    {"warnings": [["deep"]]},
]


@pytest.mark.parametrize("odd", ODD, ids=str)
def test_a_result_of_other_types_counts_as_absent(small: Parts, tmp_path: Path, odd: dict[str, Any]) -> None:
    run(small, tmp_path, LINES)
    path = tmp_path / "out" / RESULTS
    first, second = (json.loads(line) for line in path.read_text().splitlines())
    path.write_text(json.dumps(first | odd) + "\n" + json.dumps(second) + "\n")
    assert [result.reused for result in run(small, tmp_path, LINES)] == [False, True]


@pytest.mark.parametrize(
    "line",
    [b"5", b"null", b"[]", b"NaN", b'"text"', b"\xff", b"[" * 100_000, b"{", b"\x00", b'{"line": 1e400}'],
)
def test_a_line_that_is_no_result_counts_as_absent(small: Parts, tmp_path: Path, line: bytes) -> None:
    run(small, tmp_path, LINES)
    path = tmp_path / "out" / RESULTS
    path.write_bytes(line + b"\n" + path.read_bytes() + line)
    assert [result.reused for result in run(small, tmp_path, LINES)] == [True, True]


def test_a_number_in_a_result_that_is_none_makes_it_absent(small: Parts, tmp_path: Path) -> None:
    run(small, tmp_path, LINES)
    path = tmp_path / "out" / RESULTS
    first, second = path.read_text().splitlines()
    path.write_text(first.replace('"seconds": 0.2', '"seconds": NaN') + "\n" + second + "\n")
    assert [result.reused for result in run(small, tmp_path, LINES)] == [False, True]


def test_no_file_outside_is_looked_at_because_a_result_names_it(small: Parts, tmp_path: Path) -> None:
    run(small, tmp_path, LINES)
    path = tmp_path / "out" / RESULTS
    os.mkfifo(tmp_path / "pipe")
    line = json.loads(path.read_text().splitlines()[0])
    with path.open("a") as stream:
        for output in ("../pipe", str(tmp_path / "pipe"), "/dev/zero", "../../../../etc/passwd"):
            stream.write(json.dumps(line | {"output": output}) + "\n")
    assert [result.reused for result in run(small, tmp_path, LINES)] == [True, True]


@pytest.mark.parametrize("name", ["0001.wav", RESULTS])
@pytest.mark.parametrize("kind", ["pipe", "folder", "link out", "link to a device"])
def test_only_regular_files_of_the_folder_are_written(small: Parts, tmp_path: Path, name: str, kind: str) -> None:
    outside = tmp_path / "outside"
    outside.write_text("precious")
    place = tmp_path / "out" / name
    place.parent.mkdir()
    if kind == "pipe":
        os.mkfifo(place)
    elif kind == "folder":
        place.mkdir()
    else:
        place.symlink_to(outside if kind == "link out" else "/dev/null")
    engine = FakeEngine()
    with pytest.raises((UsageError, BundleError), match=r"regular file|leads out of|is a folder"):
        run(small, tmp_path, LINES, engine)
    assert engine.loaded == []
    assert outside.read_text() == "precious"


def test_two_names_of_one_file_are_told_before_the_first_generation(small: Parts, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "0001.wav").symlink_to("0002.wav")
    engine = FakeEngine()
    with pytest.raises(UsageError, match="are one file"):
        run(small, tmp_path, [{"prompt": "a"}, {"prompt": "b"}], engine)
    assert engine.loaded == []


@pytest.mark.parametrize("name", ["0001.wav", "link.wav"])
def test_audio_that_a_line_reads_is_not_written_over(small: Parts, tmp_path: Path, name: str) -> None:
    run(small, tmp_path, LINES)
    (tmp_path / "link.wav").symlink_to("out/0001.wav")
    before = (tmp_path / "out" / "0001.wav").read_bytes()
    source = tmp_path / "link.wav" if name == "link.wav" else tmp_path / "out" / name
    with pytest.raises(UsageError, match="would replace what is read"):
        run(small, tmp_path, [{"prompt": "new"}, {"prompt": "b", "init_audio": str(source)}])
    assert (tmp_path / "out" / "0001.wav").read_bytes() == before


def test_a_batch_file_that_has_the_name_of_the_results_is_not_appended_to(small: Parts, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    file = written(tmp_path, LINES).rename(tmp_path / "out" / RESULTS)
    before = file.read_bytes()
    options = BatchOptions(tmp_path / "out", reads=(("--batch", file),))
    with pytest.raises(UsageError, match="would replace what is read: --batch"):
        next(run_batch(pipeline(small, FakeEngine()), read_batch(file, SHORT), options))
    assert file.read_bytes() == before


def test_a_second_batch_into_the_folder_is_refused_while_the_first_runs(small: Parts, tmp_path: Path) -> None:
    items = read_batch(written(tmp_path, LINES), SHORT)
    first = run_batch(pipeline(small, FakeEngine()), items, BatchOptions(tmp_path / "out"))
    next(first)
    (tmp_path / "same").symlink_to("out")
    with pytest.raises(UsageError, match="Another batch is writing into"):
        next(run_batch(pipeline(small, FakeEngine()), items, BatchOptions(tmp_path / "same")))
    assert [result.output for result in first] == ["drums.flac"]
    assert [result.reused for result in run(small, tmp_path, LINES)] == [True, True]


def test_of_many_batches_at_once_one_does_the_work_and_each_line_is_written_once(small: Parts, tmp_path: Path) -> None:
    items = read_batch(written(tmp_path, [{"prompt": "p", "seed": seed} for seed in range(8)]), SHORT)
    refused: list[UsageError] = []
    begin = threading.Barrier(6)

    def run_one() -> None:
        begin.wait()
        try:
            list(run_batch(pipeline(small, FakeEngine()), items, BatchOptions(tmp_path / "out", allow=("duplicate",))))
        except UsageError as error:
            refused.append(error)

    threads = [threading.Thread(target=run_one) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refused) < 6
    outputs = [json.loads(line)["output"] for line in (tmp_path / "out" / RESULTS).read_text().splitlines()]
    assert outputs == [f"{line:04d}.wav" for line in range(1, 9)]


def test_a_drawn_seed_is_kept_by_the_next_run(small: Parts, tmp_path: Path) -> None:
    lines = [{"prompt": "pad", "seed": "random"}, {"prompt": "drums", "seed": "random"}]
    first = [result.request["seed"] for result in run(small, tmp_path, lines)]
    results = run(small, tmp_path, [*lines, {"prompt": "bass"}])
    assert [result.reused for result in results] == [True, True, False]
    assert [result.request["seed"] for result in results[:2]] == first


def test_a_file_that_no_batch_of_the_folder_made_is_not_replaced(small: Parts, tmp_path: Path) -> None:
    precious = tmp_path / "out" / "drums.flac"
    precious.parent.mkdir()
    precious.write_text("precious")
    engine = FakeEngine()
    with pytest.raises(UsageError, match=r"Line 2: .*drums\.flac exists, and was not made with these settings"):
        run(small, tmp_path, LINES, engine)
    assert (engine.loaded, precious.read_text()) == ([], "precious")
    assert [result.error for result in run(small, tmp_path, LINES, force=True)] == [None, None]


def test_a_file_whose_line_a_killed_run_did_not_write_is_made_again(small: Parts, tmp_path: Path) -> None:
    run(small, tmp_path, LINES)
    (tmp_path / "out" / RESULTS).unlink()
    assert [result.reused for result in run(small, tmp_path, LINES)] == [False, False]
