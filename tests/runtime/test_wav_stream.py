import os
import stat
import threading
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from sa3_convert.errors import AudioError, UsageError
from sa3_convert.runtime.audio import (
    SampleFormat,
    check_growing_path,
    growing_wav,
    read_metadata,
    write_audio,
)

RATE = 44100
AUDIO = np.linspace(-1, 0.99, 2 * 301, dtype=np.float32).reshape(2, 301)


@pytest.mark.parametrize("sample_format", get_args(SampleFormat))
def test_a_grown_file_holds_what_a_written_one_holds(tmp_path: Path, sample_format: SampleFormat) -> None:
    with growing_wav(tmp_path / "grown.wav", RATE, 301, sample_format=sample_format) as writer:
        writer.write(AUDIO[:, :100])
        writer.write(AUDIO[:, 100:])
    write_audio(tmp_path / "whole.wav", AUDIO, RATE, sample_format=sample_format)
    grown, whole = (soundfile.info(tmp_path / name) for name in ("grown.wav", "whole.wav"))
    assert (grown.samplerate, grown.channels, grown.frames, grown.subtype) == (RATE, 2, 301, whole.subtype)
    expected, _ = soundfile.read(tmp_path / "whole.wav")
    np.testing.assert_array_equal(soundfile.read(tmp_path / "grown.wav")[0], expected)


def test_chunks_can_be_read_while_the_file_grows(tmp_path: Path) -> None:
    told: list[Path] = []
    with growing_wav(tmp_path / "x.wav", RATE, 301, sample_format="float", report=told.append) as writer:
        writer.write(AUDIO[:, :100])
        samples, rate = soundfile.read(told[0].open("rb"), dtype="float32")
        assert rate == RATE
        np.testing.assert_array_equal(samples, AUDIO[:, :100].T)
        assert not (tmp_path / "x.wav").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["x.wav"]


@pytest.mark.parametrize("failure", [KeyboardInterrupt, RuntimeError])
def test_nothing_is_left_after_an_error_and_the_old_file_stays(tmp_path: Path, failure: type[BaseException]) -> None:
    (tmp_path / "x.wav").write_bytes(b"old")

    def fail() -> None:
        with growing_wav(tmp_path / "x.wav", RATE, 301) as writer:
            writer.write(AUDIO)
            raise failure

    with pytest.raises(failure):
        fail()
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]


@pytest.mark.parametrize("sample_format", get_args(SampleFormat))
@pytest.mark.parametrize("length", [0, 1, 2, 3000, 40_000, 1_000_000])
def test_metadata_of_any_length_leaves_the_samples_alone(
    tmp_path: Path, sample_format: SampleFormat, length: int
) -> None:
    metadata = {"prompt": "é" * length}
    path = tmp_path / "x.wav"
    write_audio(path, AUDIO, RATE, sample_format=sample_format, metadata=metadata)
    assert read_metadata(path) == metadata
    assert soundfile.info(path).frames == 301
    assert int.from_bytes(path.read_bytes()[4:8], "little") == path.stat().st_size - 8


TEXTS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))
WHOLE = st.integers(-(2**63), 2**64 - 1)


@settings(deadline=None)
@given(metadata=st.dictionaries(TEXTS, TEXTS | WHOLE | st.lists(TEXTS)), samples=st.integers(1, 50))
def test_any_metadata_can_be_read_back_and_the_samples_after_it(
    tmp_path_factory: pytest.TempPathFactory, metadata: dict[str, Any], samples: int
) -> None:
    path = tmp_path_factory.mktemp("wav") / "x.wav"
    with growing_wav(path, RATE, samples, metadata=metadata) as writer:
        writer.write(AUDIO[:, :samples])
    assert read_metadata(path) == metadata
    assert soundfile.info(path).frames == samples
    assert int.from_bytes(path.read_bytes()[4:8], "little") == path.stat().st_size - 8


def test_the_header_states_the_whole_length_before_the_first_sample(tmp_path: Path) -> None:
    told: list[Path] = []
    with growing_wav(tmp_path / "x.wav", RATE, 301, sample_format="pcm24", report=told.append) as writer:
        header = told[0].read_bytes()
        writer.write(AUDIO)
    assert header[-8:-4] == b"data"
    assert int.from_bytes(header[-4:], "little") == 301 * 2 * 3


@pytest.mark.parametrize("name", ["x.flac", "x", "folder.wav"])
def test_what_cannot_grow_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder.wav").mkdir()
    with pytest.raises(UsageError):
        check_growing_path(tmp_path / name)


def test_a_place_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(AudioError, match="cannot be written"), growing_wav(tmp_path / "file" / "x.wav", RATE, 1):
        pass


def stamped(value: float) -> Any:
    """Return audio that says throughout whose it is."""
    return np.full((2, 301), value, np.float32)


def test_two_that_grow_to_one_name_at_once_leave_the_whole_of_one(tmp_path: Path) -> None:
    """A fixed name for both gave one file with the other's audio."""
    path, trials = tmp_path / "song.wav", 120
    for _ in range(trials):
        begin = threading.Barrier(2)
        last: list[float] = []

        def grow(value: float, begin: threading.Barrier = begin, last: list[float] = last) -> None:
            names: list[Path] = []
            with growing_wav(path, RATE, 301, sample_format="float", report=names.append) as writer:
                begin.wait()
                writer.write(stamped(value)[:, :100])
                writer.write(stamped(value)[:, 100:])
                samples, _ = soundfile.read(names[0].open("rb"), dtype="float32")
                np.testing.assert_array_equal(samples, stamped(value).T)
            last.append(value)

        threads = [threading.Thread(target=grow, args=(value,)) for value in (0.25, -0.5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(last) == [-0.5, 0.25]
        samples, _ = soundfile.read(path, dtype="float32")
        assert samples.shape == (301, 2)
        assert set(np.unique(samples)) in ({np.float32(0.25)}, {np.float32(-0.5)})
        assert [file.name for file in tmp_path.iterdir()] == ["song.wav"]


def test_a_link_of_the_name_under_which_others_grew_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("precious")
    for name in ("x.wav.partial", ".x.wav.partial", ".x.wav.0123456789abcdef.partial"):
        (tmp_path / name).symlink_to("precious")
    with growing_wav(tmp_path / "x.wav", RATE, 301) as writer:
        writer.write(AUDIO)
    assert (tmp_path / "precious").read_text() == "precious"
    assert soundfile.info(tmp_path / "x.wav").frames == 301


@pytest.mark.parametrize("name", ["pipe.wav", "pipe"])
def test_a_pipe_gets_each_chunk_as_it_comes(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    read: list[int] = []

    def reader() -> None:
        with (tmp_path / name).open("rb", buffering=0) as stream:
            while data := stream.read(1 << 20):
                read.append(len(data))

    thread = threading.Thread(target=reader)
    thread.start()
    with growing_wav(tmp_path / name, RATE, 301, report=lambda _: pytest.fail("nothing grows")) as writer:
        writer.write(AUDIO[:, :100])
        writer.write(AUDIO[:, 100:])
    thread.join()
    assert sum(read) == 44 + 301 * 4
    assert stat.S_ISFIFO((tmp_path / name).stat().st_mode)


def test_a_pipe_whose_reader_goes_away_is_told(tmp_path: Path) -> None:
    reader, end = os.pipe()
    os.close(reader)
    try:
        with pytest.raises(AudioError, match="Broken pipe"), growing_wav(Path(f"/dev/fd/{end}"), RATE, 301):
            pass
    finally:
        os.close(end)
