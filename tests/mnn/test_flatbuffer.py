"""The reader of FlatBuffers, on hand-made bytes: what each field is, and that nothing outside is touched."""

import struct

import pytest

from sa3_convert.errors import ModelFileError
from sa3_convert.mnn.file.flatbuffer import DECODED_LIMIT, Buffer, Extent, Table

NAME, NUMBER, LIST, ABSENT = 0, 1, 2, 3


def made(*, name_end: int = 0, slots: tuple[int, ...] = (4, 8, 12), table_size: int = 16) -> bytearray:
    """Return a buffer: offset to the root, vtable, a table of name, number and list, then what these point to."""
    vtable = struct.pack("<HHHHHxx", 4 + 2 * len(slots), table_size, *slots)
    table = 4 + len(vtable)
    name, items = table + 16, table + 16 + 8
    body = struct.pack("<iIiI", table - 4, name - (table + 4), -7, items - (table + 12))
    tail = struct.pack("<I3sBI2i", 3, b"abc", name_end, 2, 5, -6)
    return bytearray(struct.pack("<I", table) + vtable + body + tail)


def table(data: bytes | bytearray) -> Table:
    return Buffer(bytes(data)).root()


def test_fields_are_read_by_number() -> None:
    root = table(made())
    assert (root.string(NAME), root.integer(NUMBER), root.integers(LIST)) == ("abc", -7, (5, -6))
    assert root.extent(LIST, 4) == Extent(44, 8)


def test_an_absent_field_has_its_default() -> None:
    for root in (table(made()), table(made(slots=(0, 0, 0)))):
        assert root.string(ABSENT) is None
        assert root.integer(ABSENT, default=5) == 5
        assert root.integers(ABSENT) == ()
        assert root.table(ABSENT) is None
        assert list(root.tables(ABSENT)) == []
        assert root.extent(ABSENT, 1) is None


@pytest.mark.parametrize("slot", [3, 13, 16, 0xFFFF])
def test_a_field_outside_its_table_is_refused(slot: int) -> None:
    with pytest.raises(ModelFileError, match="field 2 of the table at byte 16 lies outside it"):
        table(made(slots=(4, 8, slot))).integers(LIST)


def test_a_string_without_an_end_is_refused() -> None:
    with pytest.raises(ModelFileError, match="does not end"):
        table(made(name_end=1)).string(NAME)


def test_a_string_that_is_not_utf8_is_read_with_marks() -> None:
    data = made()
    data[36] = 0xFF
    assert table(data).string(NAME) == "\ufffdbc"


def test_a_name_of_megabytes_is_refused() -> None:
    data = made()
    data[32:36] = (1 << 20).to_bytes(4, "little")
    with pytest.raises(ModelFileError, match="has 1048576 bytes"):
        table(data + bytes(2 << 20)).string(NAME)


@pytest.mark.parametrize("length", [3, 1 << 20, 0xFFFFFFFF])
def test_a_vector_beyond_the_end_is_refused(length: int) -> None:
    data = made()
    data[40:44] = length.to_bytes(4, "little")
    with pytest.raises(ModelFileError, match="refers to bytes 44 to"):
        table(data).extent(LIST, 4)


@pytest.mark.parametrize("size", [0, 3, 4, 15, 17, 31, 35])
def test_a_short_buffer_is_refused(size: int) -> None:
    with pytest.raises(ModelFileError):
        table(made()[:size]).string(NAME)


@pytest.mark.parametrize("vtable", [(0, 16), (3, 16), (5, 16), (10, 3), (0x7FFE, 16), (10, 0xFFFF)])
def test_a_vtable_that_cannot_be_is_refused(vtable: tuple[int, int]) -> None:
    data = made()
    data[4:8] = struct.pack("<HH", *vtable)
    with pytest.raises(ModelFileError):
        table(data)


def test_a_vtable_before_the_buffer_is_refused() -> None:
    data = made()
    data[16:20] = struct.pack("<i", 1000)
    with pytest.raises(ModelFileError, match="refers to bytes -984"):
        table(data)


def test_what_may_be_decoded_is_bounded_over_all_reads() -> None:
    root = table(made())
    with pytest.raises(ModelFileError, match="structure is larger than 16 MiB"):
        sum(len(root.integers(LIST)) for _ in range(DECODED_LIMIT))
