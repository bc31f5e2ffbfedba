import io
import json
import os
import struct
import time
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
    SampleFormat,
    audio_writer,
    check_output_path,
    read_audio,
    read_metadata,
    write_audio,
)
from sa3_convert.runtime.wav import chunks

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


KINDS: dict[str, tuple[str, str | None, int]] = {
    "wav": ("WAV", "PCM_16", RATE),
    "float": ("WAV", "FLOAT", RATE),
    "extensible": ("WAVEX", "PCM_24", RATE),
    "adpcm": ("WAV", "IMA_ADPCM", RATE),
    "aiff": ("AIFF", "PCM_16", RATE),
    "flac": ("FLAC", "PCM_16", RATE),
    "vorbis": ("OGG", "VORBIS", RATE),
    "opus": ("OGG", "OPUS", 48000),
    "mp3": ("MP3", None, RATE),
}


def encoded(folder: Path, kind: str) -> bytes:
    container, subtype, rate = KINDS[kind]
    noise = np.random.default_rng(0).normal(0, 0.01, (2, rate // 5)).astype(np.float32)
    return put(folder / kind, tone(0.2, rate) + noise, rate, format=container, subtype=subtype).read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_is_cut_short_anywhere_is_told(tmp_path: Path, kind: str) -> None:
    whole = encoded(tmp_path, kind)
    assert read(tmp_path / kind).shape[1] >= RATE // 5 - 1
    path = tmp_path / "cut"
    cuts = {*range(1, 20), *np.random.default_rng(1).integers(1, len(whole), 60).tolist()}
    for cut in sorted(cuts):
        path.write_bytes(whole[:-cut])
        with pytest.raises(AudioError, match="cut"):
            read(path)


def _mutated(whole: bytes, random: np.random.Generator) -> bytes:
    data = bytearray(whole)
    # Headers decide what is done with the rest.
    end = len(data) if random.random() < 0.3 else min(len(data), 200)
    for _ in range(int(random.integers(1, 8))):
        start = int(random.integers(0, end))
        match random.integers(0, 4):
            case 0:
                data[start] = int(random.integers(0, 256))
            case 1:
                data[start : start + 4] = random.choice([b"\xff" * 4, b"\0" * 4, b"\x7f" + b"\xff" * 3, b"\1\0\0\0"])
            case 2:
                del data[start : start + int(random.integers(1, 40))]
            case _:
                data[start:start] = random.bytes(int(random.integers(1, 40)))
    return bytes(data)


def survive(folder: Path, kind: str, files: int) -> int:
    whole, path = encoded(folder, kind), folder / "mutated"
    random = np.random.default_rng(2)
    taken = 0
    for _ in range(files):
        path.write_bytes(_mutated(whole, random))
        try:
            samples = read(path)
        except AudioError:
            continue
        taken += 1
        assert samples.shape[0] == 2
        assert 1 <= samples.shape[1] <= 10 * RATE + 1
        assert np.isfinite(samples).all()
    return taken


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_is_finite_audio_or_an_audio_error(tmp_path: Path, kind: str) -> None:
    assert survive(tmp_path, kind, 25) < 25


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_one_of_many_damaged_files_is_finite_audio_or_an_audio_error(tmp_path: Path, kind: str) -> None:
    assert survive(tmp_path, kind, 600) < 600


@pytest.mark.parametrize("size", [0xFFFFFFFF, 0x80000000, 0x7FFFFFFF, 0x7FFFF000])
def test_a_wav_that_a_program_wrote_to_a_pipe_is_read_to_its_end(tmp_path: Path, size: int) -> None:
    whole = put(tmp_path / "a.wav", tone(), subtype="FLOAT").read_bytes()
    start = whole.index(b"data") + 4
    path = tmp_path / "piped.wav"
    path.write_bytes(
        whole[:4] + struct.pack("<I", 0xFFFFFFFF) + whole[8:start] + struct.pack("<I", size) + whole[start + 4 :]
    )
    np.testing.assert_array_equal(read(path), tone(), strict=True)


def of_unknown_length(path: Path, seconds: float) -> Path:
    data = bytearray(put(path, tone(seconds), format="FLAC").read_bytes())
    # STREAMINFO's 36 bits for the number of samples; 0 is unknown.
    data[21:26] = bytes([data[21] & 0xF0, 0, 0, 0, 0])
    path.write_bytes(data)
    return path


def test_a_flac_of_unknown_length_is_read_to_its_end(tmp_path: Path) -> None:
    path = of_unknown_length(tmp_path / "a.flac", 3)
    np.testing.assert_allclose(read(path), tone(3), atol=2**-15)


def test_a_flac_of_unknown_length_is_held_to_the_limit_while_it_is_read(tmp_path: Path) -> None:
    with pytest.raises(AudioError, match=r"lasts .* at most 2\.0"):
        read(of_unknown_length(tmp_path / "a.flac", 9), max_seconds=2)


def test_an_mp3_whose_length_would_be_guessed_is_refused(tmp_path: Path) -> None:
    """Half of one with a variable bit rate was taken for the whole."""
    path = tmp_path / "a.mp3"
    path.write_bytes(encoded(tmp_path, "mp3").replace(b"Xing", b"xing").replace(b"Info", b"info"))
    with pytest.raises(AudioError, match="does not say how long it is"):
        read(path)


def test_an_mp3_with_a_tag_before_it_is_read(tmp_path: Path) -> None:
    whole = encoded(tmp_path, "mp3")
    path = tmp_path / "a.mp3"
    path.write_bytes(b"ID3\x03\0\0" + bytes([0, 0, 100, 0]) + b"\0" * 12800 + whole)
    np.testing.assert_array_equal(read(path), read(tmp_path / "mp3"), strict=True)


@pytest.mark.parametrize("container", ["AU", "CAF", "W64", "VOC"])
def test_a_type_that_nobody_tells_to_be_cut_is_refused(tmp_path: Path, container: str) -> None:
    with pytest.raises(AudioError, match="is not taken"):
        read(put(tmp_path / "a", tone(), format=container))


@pytest.mark.parametrize("rate", [0, 1, 999, 400_000, 2**31 - 1, 2**32 - 1])
def test_a_rate_that_no_audio_has_is_refused_at_once(tmp_path: Path, rate: int) -> None:
    path = put(tmp_path / "a.wav", tone())
    data = bytearray(path.read_bytes())
    data[24:28] = struct.pack("<I", rate)
    path.write_bytes(data)
    with pytest.raises(AudioError):
        read(path)


@pytest.mark.parametrize("name", ["a.raw", "a", "a.txt", "a\nb.wav", "é.wav", os.fsdecode(b"\xff.wav")])
def test_the_name_of_a_file_does_not_matter(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(put(tmp_path / "source.wav", tone(), subtype="FLOAT").read_bytes())
    np.testing.assert_array_equal(read(path), tone(), strict=True)


@pytest.mark.parametrize("name", ["a.raw", "a.wav", "a.mp3"])
def test_raw_samples_are_no_audio_file(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(np.random.default_rng(0).bytes(50_000))
    with pytest.raises(AudioError, match="write it anew as WAV or FLAC"):
        read(path)


def _pipe(path: Path) -> None:
    os.mkfifo(path)


@pytest.mark.parametrize("make", [_pipe, lambda path: path.symlink_to("/dev/zero"), lambda path: path.symlink_to(path)])
def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path, make: Any) -> None:
    make(tmp_path / "a.wav")
    began = time.monotonic()
    with pytest.raises(AudioError, match="cannot be read"):
        read(tmp_path / "a.wav")
    assert time.monotonic() - began < 1


def test_a_file_can_be_written_whatever_its_folder_is_called(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"\xff")
    write_audio(folder / "a.wav", tone(), RATE, sample_format="float", metadata={"seed": 1})
    np.testing.assert_array_equal(read(folder / "a.wav"), tone(), strict=True)
    assert read_metadata(folder / "a.wav") == {"seed": 1}


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
    [
        ("out.mid", "pcm16", "no audio file type that can be written here"),
        ("out", "pcm16", "type"),
        ("out.flac", "float", "FLAC"),
        ("out.mp3", "float", "MP3 stores no such samples"),
    ],
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


@pytest.mark.parametrize("sample_format", ["pcm16", "pcm24", "float"])
def test_a_loop_says_so_to_samplers_and_is_read_as_any_other(tmp_path: Path, sample_format: SampleFormat) -> None:
    audio = np.linspace(-0.5, 0.5, 2 * 333, dtype=np.float32).reshape(2, 333)
    with audio_writer(
        tmp_path / "a.wav", 44100, sample_format=sample_format, metadata={"bpm": 120}, loop=True
    ) as writer:
        writer.write(audio[:, :100])
        writer.write(audio[:, 100:])
    with (tmp_path / "a.wav").open("rb") as stream:
        assert struct.unpack("<4sI4s", stream.read(12)) == (b"RIFF", (tmp_path / "a.wav").stat().st_size - 8, b"WAVE")
        found = {name: stream.read(size) for name, size in chunks(stream)}
    values = struct.unpack("<15I", found[b"smpl"])
    # Nanoseconds of a sample, middle C, one loop; it is a forward one, from the first sample to the last, without end.
    assert values == (0, 0, 22676, 60, 0, 0, 0, 1, 0, 0, 0, 0, 332, 0, 0)
    assert read_metadata(tmp_path / "a.wav") == {"bpm": 120}
    np.testing.assert_allclose(read_audio(tmp_path / "a.wav", 44100, max_seconds=1), audio, atol=2.0**-15)


def test_a_loop_in_flac_is_audio_alone(tmp_path: Path) -> None:
    with audio_writer(tmp_path / "a.flac", 44100, loop=True) as writer:
        writer.write(np.zeros((2, 10), np.float32))
    assert b"smpl" not in (tmp_path / "a.flac").read_bytes()
