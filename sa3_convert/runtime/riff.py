"""What libsndfile lacks of WAV files: comments of any length, and a header whose length is known before the samples.

libsndfile reads no comment beyond 2 KB, and one beyond 32 KB makes it write a file without a data chunk. Source: the
RIFF specification and its INFO list.
"""

import io
import struct
from collections.abc import Iterator
from typing import BinaryIO

from sa3_convert.untrusted import SMALL

_INTEGER, _FLOAT = 1, 3
_SOFTWARE = b"sa3-convert\0"


def wave_header(samples: int, rate: int, channels: int, width: int, *, is_float: bool, information: bytes) -> bytes:
    """Return everything that stands in a WAV before its samples.

    Args:
        samples: per channel.
        rate: Hz.
        channels: number of channels.
        width: bytes of one value.
        is_float: whether values are floating point.
        information: a chunk of `information_chunk`, or nothing.

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


def append_chunk(stream: BinaryIO, chunk: bytes) -> None:
    """Append a chunk to a whole WAV that is open for reading and writing."""
    end = stream.seek(0, io.SEEK_END)
    padding = b"\0" * (end % 2)
    stream.write(padding + chunk)
    stream.seek(4)
    stream.write(struct.pack("<I", end + len(padding) + len(chunk) - 8))


def read_comment(stream: BinaryIO) -> str | None:
    """Return the comment of a WAV that is open for reading, None if it has none.

    Raises:
        UnicodeDecodeError: it is not UTF-8.

    """
    stream.seek(12)
    for name, size in chunks(stream):
        if name == b"LIST" and stream.read(4) == b"INFO":
            information = io.BytesIO(stream.read(min(max(size - 4, 0), SMALL)))
            for key, length in chunks(information):
                if key == b"ICMT":
                    return information.read(length).rstrip(b"\0").decode("utf-8")
    return None


def _chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack("<4sI", name, len(content)) + content + b"\0" * (len(content) % 2)


def chunks(stream: BinaryIO, order: str = "<") -> Iterator[tuple[bytes, int]]:
    """Yield name and size of each chunk, the stream at its content; the caller may read from it.

    Args:
        stream: at the first chunk.
        order: `<` for RIFF, `>` for AIFF and RIFX, whose sizes are big-endian.

    """
    position = stream.tell()
    while len(header := stream.read(8)) == 8:
        name, size = struct.unpack(order + "4sI", header)
        yield name, size
        position += 8 + size + size % 2
        stream.seek(position)
