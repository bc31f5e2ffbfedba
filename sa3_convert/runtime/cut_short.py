"""Whether an audio file holds all that it says: libsndfile takes what is there of WAV, AIFF and Ogg without a word.

Sources: the RIFF and AIFF specifications; RFC 3533 (Ogg); the Xing header of MP3, without which a duration is guessed.
"""

import io
import itertools
from typing import BinaryIO, Final

from sa3_convert.runtime.riff import chunks

_UNKNOWN: Final = 0x7FFF0000
"""Sizes from here on are written by programs that write to a pipe and cannot come back to say the real one."""
_MOST_CHUNKS: Final = 1000
_OGG_PAGE: Final = 27 + 255 + 255 * 255
_OGG_LAST: Final = 4
_MP3_HEADER: Final = 4096
"""Bytes in which a first frame stands, and the header in it."""


def cut_short(stream: BinaryIO, container: str) -> str | None:
    """Return what a file lacks of what it says, as a sentence; None if nothing can be told to be missing.

    Args:
        stream: the whole file.
        container: libsndfile's name for it.

    """
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
