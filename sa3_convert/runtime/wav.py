"""What libsndfile lacks of WAV: comments of any length, a header known before the samples, files cut short."""

import io
import itertools
import struct
from collections.abc import Iterator
from typing import BinaryIO, Final

from sa3_convert.system.untrusted import SMALL

_INTEGER, _FLOAT = 1, 3
_SOFTWARE = b"sa3-convert\0"


def wave_header(samples: int, rate: int, channels: int, width: int, *, is_float: bool, information: bytes) -> bytes:
    """Return everything that stands in a WAV before its samples.

    `samples` are per channel, `width` the bytes of one value, `information` a chunk of `information_chunk` or nothing.
    """
    frame = width * channels
    code = _FLOAT if is_float else _INTEGER
    chunks = _chunk(b"fmt ", struct.pack("<HHIIHH", code, channels, rate, rate * frame, frame, 8 * width))
    if is_float:
        chunks += _chunk(b"fact", struct.pack("<I", samples))
    chunks += information
    data = samples * frame
    riff = struct.pack("<4sI4s", b"RIFF", 4 + len(chunks) + 8 + data, b"WAVE")
    return riff + chunks + struct.pack("<4sI", b"data", data)


def information_chunk(comment: str) -> bytes:
    """Return a chunk that names this tool and holds a comment."""
    return _chunk(b"LIST", b"INFO" + _chunk(b"ISFT", _SOFTWARE) + _chunk(b"ICMT", comment.encode() + b"\0"))


def sampler_chunk(rate: int, samples: int) -> bytes:
    """Return a chunk that tells samplers and audio programs that all of it is one loop, played without end."""
    middle_c, forever = 60, 0
    instrument = struct.pack("<9I", 0, 0, round(1e9 / rate), middle_c, 0, 0, 0, 1, 0)
    return _chunk(b"smpl", instrument + struct.pack("<6I", 0, 0, 0, samples - 1, 0, forever))


def append_chunk(stream: BinaryIO, chunk: bytes) -> None:
    """Append a chunk to a whole WAV that is open for reading and writing."""
    end = stream.seek(0, io.SEEK_END)
    padding = b"\0" * (end % 2)
    stream.write(padding + chunk)
    stream.seek(4)
    stream.write(struct.pack("<I", end + len(padding) + len(chunk) - 8))


def read_comment(stream: BinaryIO) -> str | None:
    """Return the comment of a WAV that is open for reading, None if it has none."""
    stream.seek(12)
    for name, size in itertools.islice(chunks(stream), _MOST_CHUNKS):
        if name == b"LIST" and stream.read(4) == b"INFO":
            information = io.BytesIO(stream.read(min(max(size - 4, 0), SMALL)))
            for key, length in itertools.islice(chunks(information), _MOST_CHUNKS):
                if key == b"ICMT":
                    return information.read(length).rstrip(b"\0").decode("utf-8")
    return None


def _chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack("<4sI", name, len(content)) + content + b"\0" * (len(content) % 2)


def chunks(stream: BinaryIO, order: str = "<") -> Iterator[tuple[bytes, int]]:
    """Yield name and size of each chunk, the stream at its content; the caller may read from it.

    The order of sizes is `<` for RIFF, `>` for AIFF and RIFX.
    """
    position = stream.tell()
    while len(header := stream.read(8)) == 8:
        name, size = struct.unpack(order + "4sI", header)
        yield name, size
        position += 8 + size + size % 2
        stream.seek(position)


_UNKNOWN: Final = 0x7FFF0000
"""Sizes from here on are written by programs that write to a pipe and cannot come back to say the real one."""
_MOST_CHUNKS: Final = 1000
_OGG_PAGE: Final = 27 + 255 + 255 * 255
_OGG_LAST: Final = 4
_MP3_HEADER: Final = 4096
"""Bytes in which a first frame stands, and the header in it."""


def cut_short(stream: BinaryIO, container: str) -> str | None:
    """Return what a whole file lacks of what it says, as a sentence; None if nothing can be told to be missing."""
    if container in ("WAV", "WAVEX", "AIFF"):
        return _missing_bytes(stream)
    if container == "OGG" and not _has_last_page(stream):
        return "is cut short: its last page is missing."
    if container == "MP3" and not _has_xing_header(stream):
        return "does not say how long it is (an MP3 without a Xing or Info header), so nobody can tell if it is whole."
    return None


def _missing_bytes(stream: BinaryIO) -> str | None:
    end = stream.seek(0, io.SEEK_END)
    stream.seek(0)
    order = ">" if stream.read(4) in (b"FORM", b"RIFX") else "<"
    stream.seek(12)
    for name, size in itertools.islice(chunks(stream, order), _MOST_CHUNKS):
        if name in (b"data", b"SSND"):
            there = end - stream.tell()
            if there < size < _UNKNOWN:
                return f"is cut short: it says that it has {size} bytes of samples and has {there}."
            return None
    return "names no samples."


def _has_last_page(stream: BinaryIO) -> bool:
    end = stream.seek(0, io.SEEK_END)
    stream.seek(max(end - 2 * _OGG_PAGE, 0))
    tail = stream.read()
    page = tail[max(tail.rfind(b"OggS"), 0) :]
    if len(page) < 27 or not page[5] & _OGG_LAST:
        return False
    segments = page[26]
    return len(page) >= 27 + segments + sum(page[27 : 27 + segments])


def _has_xing_header(stream: BinaryIO) -> bool:
    stream.seek(0)
    while (tag := stream.read(10))[:3] == b"ID3" and len(tag) == 10:
        size = sum((byte & 127) << shift for byte, shift in zip(tag[6:], (21, 14, 7, 0), strict=True))
        stream.seek(size + (10 if tag[5] & 16 else 0), io.SEEK_CUR)
    stream.seek(-len(tag), io.SEEK_CUR)
    first = stream.read(_MP3_HEADER)
    return b"Xing" in first or b"Info" in first
