from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from sa3_convert.errors import AudioError, UsageError
from sa3_convert.runtime.audio import SAMPLE_FORMATS, SampleFormat, read_metadata, write_audio
from sa3_convert.runtime.wav_stream import check_growing_path, growing_wav

RATE = 44100
AUDIO = np.linspace(-1, 0.99, 2 * 301, dtype=np.float32).reshape(2, 301)


@pytest.mark.parametrize("sample_format", SAMPLE_FORMATS)
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


@pytest.mark.parametrize("sample_format", SAMPLE_FORMATS)
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


@given(metadata=st.dictionaries(st.text(), st.text() | st.integers() | st.lists(st.text())), samples=st.integers(1, 50))
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
