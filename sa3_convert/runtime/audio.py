"""Audio files in and out, through libsndfile and soxr, and a WAV that can be read while it grows."""

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Literal, Self

import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray

from sa3_convert.arrays import Floats
from sa3_convert.errors import AudioError, UsageError
from sa3_convert.runtime import wav as riff
from sa3_convert.runtime.wav import cut_short
from sa3_convert.system.files import atomic_path, sha256_file
from sa3_convert.system.streams import is_stream, is_terminal, opened_stream
from sa3_convert.system.supervisor import working_on
from sa3_convert.system.untrusted import SMALL, open_regular, parse_json

SampleFormat = Literal["pcm16", "pcm24", "float"]

_CHANNELS = 2
_BLOCK = 1 << 16
_SUBTYPES: Mapping[SampleFormat, str] = {"pcm16": "PCM_16", "pcm24": "PCM_24", "float": "FLOAT"}
_BYTES: Mapping[SampleFormat, int] = {"pcm16": 2, "pcm24": 3, "float": 4}
ENDINGS = {".wav": "WAV", ".flac": "FLAC", ".ogg": "OGG", ".mp3": "MP3"}
_LOSSY: Mapping[str, Mapping[str, Any]] = {
    "OGG": {"subtype": "VORBIS", "compression_level": 0.2},
    "MP3": {"subtype": "MPEG_LAYER_III", "compression_level": 0.0, "bitrate_mode": "CONSTANT"},
}
"""How they are encoded: some 260 and 320 kbit/s."""
_READ = ("WAV", "WAVEX", "FLAC", "OGG", "MP3", "AIFF")
"""What libsndfile or `cut_short` tells to be cut; of its other formats neither does."""
_RATES = (1000, 384000)
_UNKNOWN_LENGTH = 1 << 60
_CONVERT = "If a player plays it, let an audio program write it anew as WAV or FLAC."


def read_audio(path: Path, rate: int, *, max_seconds: float) -> Floats:
    """Read a WAV, FLAC, Ogg, MP3 or AIFF file, whatever its name.

    Args:
        path: the file.
        rate: sample rate wanted, Hz; others are converted (soxr, very high quality).
        max_seconds: longest file accepted.

    Returns:
        [2, N] float32, N ≥ 1; mono is doubled.

    Raises:
        AudioError: it is missing, empty, no audio, cut short, too long, has more than two channels, or holds NaN or
            infinities.

    """
    with _explained(path, "read"), open_regular(path) as stream, working_on(path):
        if not os.fstat(stream.fileno()).st_size:
            raise AudioError(f"{path} is empty (0 bytes).")
        with _ForwardFile(stream.fileno(), closefd=False) as file:
            _check_header(path, file, max_seconds)
            # libsndfile goes on where the file stands.
            position = os.lseek(stream.fileno(), 0, os.SEEK_CUR)
            if (fault := cut_short(stream, file.format)) is not None:
                raise AudioError(f"{path} {fault} {_CONVERT}")
            os.lseek(stream.fileno(), position, os.SEEK_SET)
            samples = _decoded(path, file, max_seconds)
            found = int(file.samplerate)
    if not np.isfinite(samples).all():
        raise AudioError(f"{path} holds samples that are NaN or infinite.")
    if found != rate:
        samples = soxr.resample(samples, found, rate, quality="VHQ")
        if samples.shape[0] == 0:
            raise AudioError(f"{path} is shorter than one sample at {rate} Hz.")
    stereo = np.broadcast_to(samples, (samples.shape[0], _CHANNELS)) if samples.shape[1] == 1 else samples
    return np.ascontiguousarray(stereo.T, dtype=np.float32)


def audio_length(path: Path, rate: int) -> int:
    """Return how many samples a file has at a rate, as its header says; raise AudioError if that cannot be told."""
    with _explained(path, "read"), open_regular(path) as stream, working_on(path):
        file = _ForwardFile(stream.fileno(), closefd=False)
        _check_header(path, file, math.inf)
        if not _states_length(file):
            raise AudioError(f"{path} does not say how long it is. Say how many seconds are wanted.")
        if not file.frames:
            raise AudioError(f"{path} holds no samples.")
        return round(int(file.frames) * rate / int(file.samplerate))


def audio_sha256(path: Path) -> str:
    """Return the hex SHA-256 of an audio file's bytes; raise AudioError if it cannot be read."""
    with _explained(path, "read"):
        return sha256_file(path)


@contextlib.contextmanager
def _explained(path: Path, done: Literal["read", "written"]) -> Iterator[None]:
    """Raise AudioError where the system or libsndfile refuses."""
    try:
        yield
    except OSError as error:
        raise AudioError(f"{path} cannot be {done}: {error.strerror or error}.") from None
    except soundfile.LibsndfileError as error:
        if done == "written":
            # libsndfile does not say why the system refused.
            raise AudioError(f"{path} cannot be written: {error.error_string} Is the disk full?") from None
        why = error.error_string or "it is damaged or cut short."
        raise AudioError(f"{path} cannot be read as audio: {why} {_CONVERT}") from None


class _ForwardFile(soundfile.SoundFile):  # type: ignore[misc]
    """Read from begin to end: seeking, as soundfile does after each block, fails in a FLAC of unknown length."""

    def seekable(self) -> bool:
        return False


def _check_header(path: Path, file: soundfile.SoundFile, max_seconds: float) -> None:
    if file.format not in _READ:
        raise AudioError(f"{path} is {file.format_info}, which is not taken. {_CONVERT}")
    if file.channels > _CHANNELS:
        raise AudioError(f"{path} has {file.channels} channels; give mono or stereo.")
    lowest, highest = _RATES
    if not lowest <= file.samplerate <= highest:
        raise AudioError(
            f"{path} says that it has {file.samplerate} samples a second; {lowest} to {highest} are taken."
        )
    if _states_length(file):
        _check_length(path, file.frames / file.samplerate, max_seconds)


def _check_length(path: Path, seconds: float, max_seconds: float) -> None:
    if seconds > max_seconds:
        raise AudioError(
            f"{path} lasts {seconds:.1f} seconds; this model takes at most {max_seconds:.1f}. Cut it first."
        )


def _states_length(file: soundfile.SoundFile) -> bool:
    return bool(file.frames < _UNKNOWN_LENGTH)


def _decoded(path: Path, file: soundfile.SoundFile, max_seconds: float) -> Floats:
    """Return all samples [N, channels], held to the limit while they are read."""
    blocks, length = [], 0
    while len(block := file.read(_BLOCK, dtype="float32", always_2d=True)):
        blocks.append(block)
        length += len(block)
        _check_length(path, length / file.samplerate, max_seconds)
    if _states_length(file) and length < file.frames:
        raise AudioError(f"{path} is cut short: it says that it has {file.frames} samples and has {length}. {_CONVERT}")
    if not length:
        raise AudioError(f"{path} holds no samples.")
    return np.concatenate(blocks)


class AudioWriter:
    """An audio file that grows; made by `audio_writer`."""

    def __init__(self, file: soundfile.SoundFile, sample_format: SampleFormat, dither: bool) -> None:
        self._file = file
        self._quantiser = Quantiser.of(sample_format, dither=dither)

    def write(self, audio: Floats) -> None:
        """Append [2, n] samples within ±1."""
        for start in range(0, audio.shape[1], _BLOCK):
            block = audio[:, start : start + _BLOCK]
            if self._quantiser is None:
                self._file.write(np.ascontiguousarray(block.T))
            else:
                self._file.write(self._quantiser(block).T << (32 - self._quantiser.bits))


class PcmStream:
    """Raw samples to a pipe: little-endian, channels interleaved, flushed after every chunk."""

    def __init__(self, stream: BinaryIO, *, sample_format: SampleFormat = "pcm16", dither: bool = False) -> None:
        self._stream = stream
        self._quantiser = Quantiser.of(sample_format, dither=dither)

    def write(self, audio: Floats) -> None:
        """Append [2, n] samples within ±1."""
        if self._quantiser is None:
            data = audio.T.astype("<f4").tobytes()
        else:
            integers = np.ascontiguousarray(self._quantiser(audio).T.astype("<i4"))
            width = self._quantiser.bits // 8
            data = integers.view(np.uint8).reshape(-1, 4)[:, :width].tobytes()
        self._stream.write(data)
        self._stream.flush()


class Quantiser:
    """Rounds floating-point samples to integers of `bits`.

    `dither` adds triangular noise of ±1 step before rounding, so that what is lost is noise and not distortion; the
    noise is the same in every run.
    """

    def __init__(self, bits: int, *, dither: bool) -> None:
        self.bits = bits
        self._noise = np.random.Generator(np.random.PCG64(0)) if dither else None

    @classmethod
    def of(cls, sample_format: SampleFormat, *, dither: bool) -> Self | None:
        """Return that of a format; floating point has none."""
        return None if sample_format == "float" else cls(8 * _BYTES[sample_format], dither=dither)

    def __call__(self, audio: Floats) -> NDArray[np.int32]:
        """Return `audio` in steps of 2^(1 − bits); what lies beyond full scale is clipped."""
        full = 1 << (self.bits - 1)
        steps = audio.astype(np.float64) * full
        if self._noise is not None:
            steps += self._noise.random(steps.shape) - self._noise.random(steps.shape)
        return np.clip(np.rint(steps), -full, full - 1).astype(np.int32)


@contextlib.contextmanager
def audio_writer(
    path: Path,
    rate: int,
    *,
    sample_format: SampleFormat = "pcm16",
    dither: bool = False,
    metadata: Mapping[str, Any] | None = None,
    loop: bool = False,
) -> Iterator[AudioWriter]:
    """Yield a stereo writer; the file takes its name when the block ends without an error, and is gone otherwise.

    Args:
        path: `.wav`, `.flac`, `.ogg` or `.mp3`; a pipe, a device or standard output gets the whole file at its end, a
            WAV if unnamed.
        rate: Hz.
        sample_format: of the samples; FLAC has no floating point, Ogg and MP3 none of these.
        dither: see `Quantiser`.
        metadata: kept as JSON in the file's comment; `read_metadata` reads it back.
        loop: let a WAV say to samplers that it is one loop.

    Raises:
        UsageError: another file type or a format that it does not have.
        AudioError: the file cannot be written.

    """
    container = _container(path, sample_format)
    encoding = _LOSSY.get(container, {"subtype": _SUBTYPES[sample_format]})
    comment = None if metadata is None else json.dumps(metadata, ensure_ascii=True)
    with _explained(path, "written"), atomic_path(path) as temporary, temporary.open("rb+") as stream:
        # soundfile takes no name that is not UTF-8.
        with soundfile.SoundFile(
            stream.fileno(),
            "w",
            rate,
            _CHANNELS,
            format=container,
            closefd=False,
            **encoding,
        ) as file:
            if comment is not None and container != "WAV":
                file.software = "sa3-convert"
                file.comment = comment
            yield AudioWriter(file, "float" if container in _LOSSY else sample_format, dither)
            frames = file.frames
        if loop and container == "WAV":
            riff.append_chunk(stream, riff.sampler_chunk(rate, frames))
        if comment is not None and container == "WAV":
            riff.append_chunk(stream, riff.information_chunk(comment))


def check_output_path(path: Path, sample_format: SampleFormat) -> None:
    """Check, before any long work, that a file of this name and format can be written."""
    _container(path, sample_format)
    if is_terminal(path):
        raise UsageError("Standard output is a terminal, and audio is no text. Pipe it into something, or name a file.")
    if path.is_dir():
        raise UsageError(f"{path} is a folder. Name a file.")


def write_audio(
    path: Path,
    audio: Floats,
    rate: int,
    *,
    sample_format: SampleFormat = "pcm16",
    dither: bool = False,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Write [2, N] samples within ±1 as a whole file or not at all; see `audio_writer`."""
    with audio_writer(path, rate, sample_format=sample_format, dither=dither, metadata=metadata) as writer:
        writer.write(audio)


def read_metadata(path: Path) -> dict[str, Any]:
    """Return the metadata that `audio_writer` put into a file; raise AudioError if there is none."""
    values = None
    with _explained(path, "read"), contextlib.suppress(ValueError), open_regular(path) as stream:
        comment = riff.read_comment(stream) if stream.read(4) == b"RIFF" else None
        if comment is None:
            os.lseek(stream.fileno(), 0, os.SEEK_SET)
            with working_on(path), soundfile.SoundFile(stream.fileno(), closefd=False) as file:
                comment = file.comment
        values = parse_json(comment[:SMALL])
    if not isinstance(values, dict):
        raise AudioError(f"{path} holds no settings of this tool.")
    return values


def check_replaceable(path: Path, metadata: Mapping[str, Any]) -> None:
    """Refuse to replace a file, unless it is audio that was made with the same settings and models."""
    if is_stream(path) or not path.exists():
        return
    with contextlib.suppress(AudioError):
        if read_metadata(path) == json.loads(json.dumps(metadata)):
            return
    raise UsageError(f"{path} exists, and was not made with these settings. Name another file, or give --force.")


def _container(path: Path, sample_format: SampleFormat) -> str:
    container = ENDINGS.get(path.suffix.lower(), "WAV" if is_stream(path) else None)
    if container is None or container not in soundfile.available_formats():
        known = [ending for ending, name in ENDINGS.items() if name in soundfile.available_formats()]
        raise UsageError(f"{path} has no audio file type that can be written here. Name it {' or '.join(known)}.")
    if container in _LOSSY and sample_format != "pcm16":
        raise UsageError(f"{path}: {container} stores no such samples. Leave --format away, or use a .wav file.")
    if container == "FLAC" and sample_format == "float":
        raise UsageError(f"{path}: FLAC holds no floating-point samples. Use --format pcm24, or a .wav file.")
    return container


@contextlib.contextmanager
def growing_wav(
    path: Path,
    rate: int,
    samples: int,
    *,
    sample_format: SampleFormat = "pcm16",
    dither: bool = False,
    metadata: Mapping[str, Any] | None = None,
    report: Callable[[Path], None] = lambda _: None,
) -> Iterator[PcmStream]:
    """Yield a stereo writer; the file grows under a name of its own, and takes `path` when the block ends well.

    Every chunk is in the file when `write` returns, and the header states the whole length (`samples` per channel) from
    the start, so that a player can follow; `report` is told under which name. After an error what has grown is gone. A
    pipe or a device is written to directly. The rest is as for `audio_writer`.
    """
    check_growing_path(path)
    header = riff.wave_header(
        samples,
        rate,
        _CHANNELS,
        _BYTES[sample_format],
        is_float=sample_format == "float",
        information=b"" if metadata is None else riff.information_chunk(json.dumps(metadata, ensure_ascii=True)),
    )
    with _explained(path, "written"), contextlib.ExitStack() as stack:
        growing = None if is_stream(path) else stack.enter_context(atomic_path(path))
        stream = stack.enter_context(opened_stream(path) if growing is None else growing.open("wb"))
        stream.write(header)
        stream.flush()
        if growing is not None:
            report(growing)
        yield PcmStream(stream, sample_format=sample_format, dither=dither)


def check_growing_path(path: Path) -> None:
    """Check, before any long work, that a WAV of this name can be written while it grows."""
    if not is_stream(path) and path.suffix.lower() != ".wav":
        raise UsageError(f"{path}: only a WAV can be read while it grows. Name it .wav, or leave --stream away.")
    check_output_path(path, "pcm16")
