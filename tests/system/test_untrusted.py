"""What is read from outside is a file, small enough, and holds nothing that surprises later code."""

import os
import time
from pathlib import Path

import pytest

from sa3_convert.system.untrusted import open_regular, parse_json, printable, read_bytes, read_json, read_text


def test_a_pipe_is_refused_without_waiting_for_its_other_end(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="not a regular file"):
        open_regular(tmp_path / "pipe")


@pytest.mark.parametrize("path", ["/dev/zero", "/dev/null", "/"])
def test_devices_and_folders_are_refused(path: str) -> None:
    with pytest.raises(OSError, match="not a regular file"):
        read_bytes(Path(path))


def test_a_file_is_read_up_to_its_limit_and_no_further(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    assert read_bytes(tmp_path / "file", 5) == b"12345"
    with pytest.raises(OSError, match="more than 4 bytes"):
        read_bytes(tmp_path / "file", 4)


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_text(tmp_path / "file") == '{"a": 1}'
    assert read_json(tmp_path / "file") == {"a": 1}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[" * 100_000,
        "[" * 70 + "]" * 70,
        '{"a":' * 70 + "1" + "}" * 70,
        '{"a": 1, "a": 2}',
        "NaN",
        "-Infinity",
        "1e400",
        "[-1e400]",
        "1" * 400,
        "1" * 5000,
        str(1 << 64),
        r'"\ud800"',
        r'{"\udfff": 1}',
        r'"\u0000"',
    ],
)
def test_json_that_would_surprise_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        parse_json(text)


def test_a_name_that_stands_twice_is_found_at_once_among_many() -> None:
    text = "{" + ",".join(f'"{number}":0' for number in [*range(200_000), 199_999]) + "}"
    began = time.process_time()
    with pytest.raises(ValueError, match="names '199999' twice"):
        parse_json(text)
    assert time.process_time() - began < 10


@pytest.mark.parametrize("text", ["18446744073709551615", "-1.5e300", r'"\ud83d\ude00"', "[" * 60 + "]" * 60, "null"])
def test_unusual_but_sound_json_is_taken(text: str) -> None:
    parse_json(text)


def test_what_would_control_a_terminal_is_shown_as_text() -> None:
    assert printable("a\x1b[31mb\x9bc\u202ed\r\n\t") == "a\\x1b[31mb\\x9bc\\u202ed\\r\n\\t"
    assert printable("Größe 音 [bold]") == "Größe 音 [bold]"
