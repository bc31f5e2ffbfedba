"""A stage's result is whole or absent."""

import copy
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import Field

from sa3_convert.convert.cache import CachedResult, Notes, StageCache
from sa3_convert.errors import ConversionError

KEY = "0" * 64


class Answer(Notes):
    """Notes of a stage that has something to tell."""

    answer: int
    figures: dict[str, float] = Field(default_factory=dict)


def write_result(folder: Path) -> Answer:
    (folder / "model.bin").write_bytes(b"weights")
    (folder / "model.bin.data").write_bytes(b"more")
    return Answer(answer=42, figures={"snr": 41.25, "cosine": 0.5}, detail="fine")


def find(cache: StageCache) -> CachedResult[Answer] | None:
    return cache.find("export", KEY, Answer)


@pytest.fixture
def cache(tmp_path: Path) -> StageCache:
    return StageCache(tmp_path / "cache")


@pytest.fixture
def made(cache: StageCache) -> CachedResult[Answer]:
    return cache.make("export", KEY, write_result)


def test_a_result_is_found_as_it_was_made(cache: StageCache) -> None:
    assert find(cache) is None
    made = cache.make("export", KEY, write_result)
    assert find(cache) == made
    assert made.notes.answer == 42
    assert made.file("model.bin").read_bytes() == b"weights"


def test_a_damaged_result_is_absent_and_made_again(cache: StageCache, made: CachedResult[Answer]) -> None:
    made.file("model.bin").write_bytes(b"weightz")
    assert find(cache) is None
    assert cache.make("export", KEY, write_result) == find(cache)


def test_a_whole_result_is_replaced_only_on_request(cache: StageCache, made: CachedResult[Answer]) -> None:
    def other(folder: Path) -> Answer:
        (folder / "other").write_bytes(b"x")
        return Answer(answer=1)

    assert cache.make("export", KEY, other) == made
    assert cache.make("export", KEY, other, replace=True).notes.answer == 1


@pytest.mark.parametrize("text", ["", "{", "[]", '{"files": 3}', '{"files": {"x": "y"}}', "[" * 200_000, "1e999999"])
def test_an_entry_of_another_shape_is_no_result(cache: StageCache, made: CachedResult[Answer], text: str) -> None:
    (made.folder / "entry.json").write_text(text)
    assert find(cache) is None


def test_an_entry_counts_only_where_it_belongs(cache: StageCache, made: CachedResult[Answer]) -> None:
    shutil.copytree(made.folder, made.folder.with_name("1" * 64))
    shutil.copytree(made.folder.parent, made.folder.parent.with_name("mnn"))
    assert cache.find("export", "1" * 64, Answer) is None
    assert cache.find("mnn", KEY, Answer) is None


@pytest.mark.parametrize("notes", [{}, {"answer": "many"}, {"answer": 1, "unknown": 2}, {"answer": 1, "figures": [3]}])
def test_notes_of_another_shape_are_no_result_even_if_sealed(
    cache: StageCache, made: CachedResult[Answer], notes: dict[str, Any]
) -> None:
    class Anything(Notes, extra="allow"):
        """What another version of a stage may have noted."""

    cache.make("export", KEY, lambda _: Anything(**notes), replace=True)
    assert cache.find("export", KEY, Anything) is not None
    assert find(cache) is None


def _to_link(folder: Path, outside: Path) -> None:
    shutil.copy(folder / "model.bin", outside)
    (folder / "model.bin").unlink()
    (folder / "model.bin").symlink_to(outside)


def _to_pipe(folder: Path, _: Path) -> None:
    (folder / "entry.json").unlink()
    os.mkfifo(folder / "entry.json")


def _to_linked_folder(folder: Path, outside: Path) -> None:
    shutil.move(folder, outside)
    folder.symlink_to(outside)


def _to_file(folder: Path, _: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("in the way")


@pytest.mark.parametrize("damage", [_to_link, _to_pipe, _to_linked_folder, _to_file])
def test_what_is_no_folder_of_plain_files_is_absent_and_replaced_without_touching_what_a_link_leads_to(
    cache: StageCache, made: CachedResult[Answer], tmp_path: Path, damage: Callable[[Path, Path], None]
) -> None:
    outside = tmp_path / "outside"
    damage(made.folder, outside)
    before = {path: path.read_bytes() for path in tmp_path.glob("outside/*")}
    assert find(cache) is None
    assert cache.make("export", KEY, write_result) == find(cache)
    assert {path: path.read_bytes() for path in tmp_path.glob("outside/*")} == before


def test_what_cannot_be_replaced_is_named(
    cache: StageCache, made: CachedResult[Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> Path:
        raise PermissionError(1, "Operation not permitted")

    (made.folder / "entry.json").write_text("damaged")
    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(ConversionError, match=f"{KEY} cannot be replaced: Operation not permitted"):
        cache.make("export", KEY, write_result)


ODD: tuple[Any, ...] = (
    *(None, True, 0, -1, 1e308, 10**400, "", "x", "\0", "../../outside", "/etc/passwd", "entry.json", "model.bin"),
    *([], {}, [[]], {"": {}}, ["model.bin"]),
)


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield from _places(child, (*path, key))


def damaged_data(entry: Any, rng: random.Random) -> Any:
    """Return an entry with one part replaced, removed, renamed or added."""
    changed = copy.deepcopy(entry)
    place = rng.choice([path for path in _places(entry) if path])
    *above, last = place
    holder = changed
    for key in above:
        holder = holder[key]
    match rng.randrange(4):
        case 0:
            holder[last] = rng.choice(ODD)
        case 1:
            del holder[last]
        case _ if isinstance(holder, list):
            holder.append(rng.choice(ODD))
        case 2:
            holder[str(rng.choice(ODD))] = holder.pop(last)
        case _:
            holder[str(rng.choice(ODD))] = rng.choice(ODD)
    return changed


def _damaged_text(text: bytes, rng: random.Random) -> bytes:
    """Return text with a byte changed, a part cut out, doubled or nested."""
    at, to = sorted((rng.randrange(len(text)), rng.randrange(len(text) + 1)))
    match rng.randrange(4):
        case 0:
            return text[:at] + bytes([rng.randrange(256)]) + text[at + 1 :]
        case 1:
            return text[:at] + text[to:]
        case 2:
            return text[:to] + text[at:]
        case _:
            return text[:at] + b"[" * rng.choice((1, 300, 100_000)) + text[at:]


def test_of_a_thousand_damaged_entries_none_is_accepted_unless_it_says_the_same(
    cache: StageCache, made: CachedResult[Answer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "outside").write_text("private")
    opened: list[Path] = []
    open_path = Path.open

    def watched(self: Path, *arguments: Any, **options: Any) -> Any:
        opened.append(self)
        return open_path(self, *arguments, **options)

    monkeypatch.setattr(Path, "open", watched)
    file = made.folder / "entry.json"
    text = file.read_bytes()
    whole, rng, accepted = json.loads(text), random.Random(0), 0
    for number in range(1500):
        damaged = json.dumps(damaged_data(whole, rng)).encode() if number % 2 else _damaged_text(text, rng)
        file.write_bytes(damaged)
        opened.clear()
        found = find(cache)
        assert all(path.parent == made.folder for path in opened)
        if found is not None:
            accepted += 1
            assert json.loads(damaged) == whole, damaged
            assert found == made
    assert accepted < 100
    assert (tmp_path / "outside").read_text() == "private"


def test_a_failure_leaves_nothing(cache: StageCache, tmp_path: Path) -> None:
    def fail(folder: Path) -> Notes:
        (folder / "half").write_bytes(b"x")
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        cache.make("export", KEY, fail)
    assert list((tmp_path / "cache" / "export").iterdir()) == []
    assert find(cache) is None


def test_what_a_dead_process_left_is_swept(cache: StageCache, tmp_path: Path) -> None:
    leftover = tmp_path / "cache" / "export" / ".key.0123456789abcdef.partial"
    leftover.mkdir(parents=True)
    (leftover / "big").write_bytes(b"x")
    cache.make("export", KEY, write_result)
    assert not leftover.exists()
