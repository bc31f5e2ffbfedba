import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from sa3_convert.errors import AudioError, UsageError
from sa3_convert.runtime import audio as audio_module
from sa3_convert.runtime.audio import (
    PcmStream,
    Quantiser,
    audio_writer,
    check_output_path,
    read_audio,
    read_metadata,
    write_audio,
)

Floats = NDArray[np.float32]
RATE = 44100


def tone(seconds: float = 0.1, rate: int = RATE, channels: int = 2, frequency: float = 440) -> Floats:
    time = np.arange(int(seconds * rate)) / rate
    wave = 0.5 * np.sin(2 * np.pi * frequency * time)
    return np.stack([wave * (1 - 0.5 * c) for c in range(channels)]).astype(np.float32)


def put(path: Path, audio: Floats, rate: int = RATE, **options: Any) -> Path:
    soundfile.write(path, audio.T, rate, **options)
    return path


def read(path: Path, max_seconds: float = 10) -> Floats:
    return read_audio(path, RATE, max_seconds=max_seconds)


def test_a_float_wav_at_the_models_rate_is_read_bit_for_bit(tmp_path: Path) -> None:
    path = put(tmp_path / "a.wav", tone(), subtype="FLOAT")
    np.testing.assert_array_equal(read(path), tone(), strict=True)


def test_mono_becomes_two_equal_channels(tmp_path: Path) -> None:
    path = put(tmp_path / "a.wav", tone(channels=1), subtype="FLOAT")
    samples = read(path)
    assert samples.shape == (2, 4410)
    np.testing.assert_array_equal(samples[0], samples[1])
    assert samples.flags.c_contiguous


@pytest.mark.parametrize("rate", [8000, 22050, 48000, 96000])
def test_other_rates_are_converted(tmp_path: Path, rate: int) -> None:
    path = put(tmp_path / "a.wav", tone(0.5, rate), rate, subtype="FLOAT")
    samples = read(path)
    assert abs(samples.shape[1] - RATE // 2) <= 2
    middle = slice(4000, 18000)
    np.testing.assert_allclose(samples[:, middle], tone(0.5)[:, middle], atol=2e-3)


@pytest.mark.parametrize("name", ["a.flac", "a.ogg", "a.mp3", "a.aiff"])
def test_other_file_types_are_read(tmp_path: Path, name: str) -> None:
    samples = read(put(tmp_path / name, tone(0.5)))
    assert abs(samples.shape[1] - RATE // 2) < 3000
    assert 0.4 < np.abs(samples).max() < 0.6


def _missing(path: Path) -> None: ...


def _eight_channels(path: Path) -> None:
    put(path, tone(channels=8))


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _text(path: Path) -> None:
    path.write_text("this is no audio")


def _no_samples(path: Path) -> None:
    put(path, np.zeros((2, 0), np.float32))


def _nan(path: Path) -> None:
    samples = tone()
    samples[1, 7] = np.nan
    put(path, samples, subtype="FLOAT")


def _infinite(path: Path) -> None:
    samples = tone()
    samples[0, 7] = np.inf
    put(path, samples, subtype="FLOAT")


def _three_hours(path: Path) -> None:
    with soundfile.SoundFile(path, "w", 8000, 1, format="FLAC") as file:
        for _ in range(3 * 3600 // 600):
            file.write(np.zeros(8000 * 600, np.int16))


def _folder(path: Path) -> None:
    path.mkdir()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_missing, "No such file"),
        (_empty, "0 bytes"),
        (_text, "cannot be read as audio"),
        (_no_samples, "no samples"),
        (_eight_channels, "8 channels"),
        (_nan, "NaN"),
        (_infinite, "infinite"),
        (_three_hours, r"10800\.0 seconds; this model takes at most 10\.0"),
        (_folder, "cannot be read"),
    ],
)
def test_unusable_audio_is_told_with_its_name(tmp_path: Path, make: Any, message: str) -> None:
    path = tmp_path / "input.wav"
    make(path)
    with pytest.raises(AudioError, match=message) as error:
        read(path)
    assert "input.wav" in str(error.value)


def test_a_wav_cut_within_its_header_is_refused(tmp_path: Path) -> None:
    whole = put(tmp_path / "a.wav", tone()).read_bytes()
    for length in (1, 8, 20, 40):
        (tmp_path / "b.wav").write_bytes(whole[:length])
        with pytest.raises(AudioError):
            read(tmp_path / "b.wav")


@pytest.mark.parametrize(("sample_format", "step"), [("pcm16", 2.0**-15), ("pcm24", 2.0**-23), ("float", 1e-9)])
def test_what_is_written_is_read_back_within_half_a_step(tmp_path: Path, sample_format: Any, step: float) -> None:
    path = tmp_path / "out.wav"
    write_audio(path, tone(), RATE, sample_format=sample_format)
    assert soundfile.info(path).subtype == {"pcm16": "PCM_16", "pcm24": "PCM_24", "float": "FLOAT"}[sample_format]
    assert np.abs(read(path) - tone()).max() <= step / 2 + 1e-9


def test_full_scale_is_clipped_not_wrapped(tmp_path: Path) -> None:
    path = tmp_path / "out.wav"
    write_audio(path, np.array([[1.0, -1.0], [1.5, -1.5]], np.float32), RATE)
    samples, _ = soundfile.read(path, dtype="int16")
    np.testing.assert_array_equal(samples, [[32767, 32767], [-32768, -32768]])


@given(value=st.floats(-1, 1, width=32), bits=st.sampled_from([16, 24]))
def test_quantising_is_to_the_nearest_step(value: float, bits: int) -> None:
    full = 1 << (bits - 1)
    (step,) = Quantiser(bits, dither=False)(np.array([value], np.float32))
    assert step == full - 1 or abs(step - float(np.float32(value)) * full) <= 0.5


def test_dither_keeps_a_tone_below_one_step_audible() -> None:
    quiet = (tone(1.0)[:1] * 2 * 0.4 / 32768).astype(np.float32)
    assert not Quantiser(16, dither=False)(quiet).any()
    dithered = Quantiser(16, dither=True)(quiet)[0]
    assert np.corrcoef(dithered, quiet[0])[0, 1] > 0.2


def test_dither_is_the_same_in_every_run_however_it_is_cut() -> None:
    first = Quantiser(16, dither=True)(tone())
    np.testing.assert_array_equal(first, Quantiser(16, dither=True)(tone()))


@pytest.mark.parametrize("sample_format", ["pcm16", "pcm24", "float"])
def test_raw_samples_on_a_pipe_are_those_of_the_file(tmp_path: Path, sample_format: Any) -> None:
    path = tmp_path / "out.wav"
    write_audio(path, tone(), RATE, sample_format=sample_format, dither=True)
    pipe = io.BytesIO()
    stream = PcmStream(pipe, sample_format=sample_format, dither=True)
    stream.write(tone())
    (raw := tmp_path / "out.raw").write_bytes(pipe.getvalue())
    subtype = soundfile.info(path).subtype
    samples, _ = soundfile.read(
        raw, channels=2, samplerate=RATE, subtype=subtype, format="RAW", endian="LITTLE", dtype="float32"
    )
    np.testing.assert_array_equal(samples.T, read(path), strict=True)


def test_metadata_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "out.wav"
    metadata = {"prompt": '日本 🎷 "quoted"', "seed": 7, "models": {"dit": "ab" * 32}, "text": "x" * 5000}
    write_audio(path, tone(), RATE, metadata=metadata)
    assert read_metadata(path) == metadata
    assert soundfile.info(path).frames == 4410


def test_metadata_comes_back_from_flac(tmp_path: Path) -> None:
    path = tmp_path / "out.flac"
    write_audio(path, tone(), RATE, sample_format="pcm24", metadata={"seed": 7})
    assert read_metadata(path) == {"seed": 7}


@pytest.mark.parametrize("comment", [None, "hello", "[1]"])
def test_a_file_of_another_tool_has_no_settings(tmp_path: Path, comment: str | None) -> None:
    path = tmp_path / "a.wav"
    with soundfile.SoundFile(path, "w", RATE, 2) as file:
        if comment is not None:
            file.comment = comment
        file.write(tone().T)
    with pytest.raises(AudioError, match="no settings"):
        read_metadata(path)


def test_metadata_of_a_missing_file_is_an_audio_error(tmp_path: Path) -> None:
    with pytest.raises(AudioError):
        read_metadata(tmp_path / "a.wav")


def test_writing_in_pieces_equals_writing_at_once(tmp_path: Path) -> None:
    audio = tone(0.3)
    write_audio(tmp_path / "whole.wav", audio, RATE)
    with audio_writer(tmp_path / "pieces.wav", RATE) as writer:
        for start in range(0, audio.shape[1], 777):
            writer.write(audio[:, start : start + 777])
    assert (tmp_path / "pieces.wav").read_bytes() == (tmp_path / "whole.wav").read_bytes()


def write_and_be_interrupted(path: Path) -> None:
    with audio_writer(path, RATE) as writer:
        writer.write(tone())
        raise KeyboardInterrupt


def test_an_interrupted_write_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        write_and_be_interrupted(tmp_path / "out.wav")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_write_leaves_the_file_that_was_there(tmp_path: Path) -> None:
    path = tmp_path / "out.wav"
    write_audio(path, tone(), RATE)
    before = path.read_bytes()
    with pytest.raises(KeyboardInterrupt):
        write_and_be_interrupted(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_an_audio_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def __init__(self, *_: object, **__: object) -> None:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(audio_module.soundfile, "SoundFile", Full)
    with pytest.raises(AudioError, match="No space left"):
        write_audio(tmp_path / "out.wav", tone(), RATE)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "sample_format", "message"),
    [("out.mp3", "pcm16", "no known audio file type"), ("out", "pcm16", "type"), ("out.flac", "float", "FLAC")],
)
def test_a_name_that_cannot_be_written_is_told_before_any_work(
    tmp_path: Path, name: str, sample_format: Any, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        check_output_path(tmp_path / name, sample_format)


def test_a_folder_is_no_output_file(tmp_path: Path) -> None:
    (tmp_path / "out.wav").mkdir()
    with pytest.raises(UsageError, match="is a folder"):
        check_output_path(tmp_path / "out.wav", "pcm16")


def test_metadata_that_is_cut_off_is_not_taken_for_whole(tmp_path: Path) -> None:
    path = tmp_path / "out.wav"
    write_audio(path, tone(), RATE, metadata={"prompt": "é" * 2000})
    whole = path.read_bytes()
    for length in (12, 20, 50, 500):
        path.write_bytes(whole[:length])
        with pytest.raises(AudioError):
            read_metadata(path)


def test_metadata_is_json_that_other_tools_can_read(tmp_path: Path) -> None:
    path = tmp_path / "out.wav"
    write_audio(path, tone(), RATE, metadata={"prompt": "é"})
    with soundfile.SoundFile(path) as file:
        assert json.loads(file.comment) == {"prompt": "é"}
        assert file.software.startswith("sa3-convert")
