"""Hostile values in every place of a JSON document, and a watch over everything that stands around a folder."""

import contextlib
import copy
import hashlib
import json
import random
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RAW = "@raw@"
"""A text that starts with it is written into the JSON as it stands behind it."""

PATHS = (
    *("", ".", "..", "/", "../x", "../../x", "/x", "a/../../b", "a//b", "./a", "a/", "~/x", "x\\..\\y", "C:\\x", "-"),
    *("manifest.json", "MANIFEST.JSON", "recipe.yaml", ".lock", "..\u2215x", "x/../../../../../../../tmp/x", "a" * 300),
)
TEXTS = (
    *("\x1b[2J", "\x1b]0;t\x07", "a\nb", "a\r", "\t", "\x9b31m", "\u202e", "\u200b", "e\u0301", "\ud800", "a\0b"),
    *("$(id)", "`id`", "<script>", "|", "x" * 100_000, "CON", "null", "0", "1e9", "int99", "fp8", "0" * 64, "f" * 64),
)
NUMBERS = (
    *(0, 1, -1, 2, 3, 33, 255, 4097, 2**31 - 1, 2**31, 2**63, 10**12, -(10**12), 0.5, -0.0, 1e-300, 1e300, True, False),
    *(f"{RAW}{text}" for text in ("NaN", "Infinity", "-Infinity", "1e400", "9" * 400, "-" + "9" * 5000, "0.1e-999999")),
)
OTHERS = (None, [], {}, [[]], [None], {"": None}, {"..": 1}, f"{RAW}{'[' * 5000}{']' * 5000}", f'{RAW}{{"a":1,"a":2}}')
HOSTILE: tuple[Any, ...] = (*PATHS, *TEXTS, *NUMBERS, *OTHERS)

Place = tuple[str | int, ...]


def places(node: Any, place: Place = ()) -> Iterator[Place]:
    """Yield where something stands in a document, the whole first."""
    yield place
    inner = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in inner:
        yield from places(value, (*place, key))


def mutations(document: Any, count: int, seed: int) -> Iterator[tuple[Place, str]]:
    """Yield documents with one to three hostile changes, as text; every kind of place has the same share.

    Yields:
        Where the first change is, and the text.

    """
    rng = random.Random(seed)
    kinds: dict[Place, list[Place]] = {}
    for place in places(document):
        kinds.setdefault(tuple("*" if isinstance(key, int) else key for key in place), []).append(place)
    every = [place for group in kinds.values() for place in group]
    for _ in range(count):
        changed = copy.deepcopy(document)
        first = rng.choice(rng.choice(list(kinds.values())))
        for place in (first, *(rng.choice(every) for _ in range(rng.choice((0, 0, 0, 1, 2))))):
            with contextlib.suppress(LookupError, TypeError):
                _change(changed, place, document, rng)
        yield first, _text(changed)


def _change(document: Any, place: Place, original: Any, rng: random.Random) -> None:
    if not place:
        return
    holder = document
    for key in place[:-1]:
        holder = holder[key]
    key = place[-1]
    match rng.randrange(8):
        case 0:
            del holder[key]
        case 1:
            # What stands elsewhere in the document is of the right form, and wrong here.
            other = original
            for step in rng.choice(list(places(original))):
                other = other[step]
            holder[key] = copy.deepcopy(other)
        case 2 if isinstance(holder[key], int | float):
            holder[key] = holder[key] * rng.choice((-1, 0, 0.5, 2, 10, 1e9)) + rng.choice((0, 1, -1))
        case 3 if isinstance(holder, dict):
            holder[rng.choice((*PATHS, *TEXTS)[:-1])] = holder.pop(key)
        case 4 if isinstance(holder, list):
            holder.append(copy.deepcopy(holder[key]))
        case _:
            holder[key] = rng.choice(HOSTILE)


def _text(document: Any) -> str:
    text = json.dumps(document)
    raw = [value for value in HOSTILE if isinstance(value, str) and value.startswith(RAW)]
    for value in raw:
        text = text.replace(json.dumps(value), value.removeprefix(RAW))
    return text


@dataclass(frozen=True)
class Seen:
    """What stands under a name."""

    kind: int
    mode: int
    content: str


def listing(folder: Path, leaving: tuple[Path, ...] = ()) -> dict[str, Seen]:
    """Return everything below a folder, links not followed, except what stands in `leaving`."""
    found = {}
    for entry in sorted(folder.rglob("*")):
        if not any(entry.is_relative_to(left) for left in leaving):
            state = entry.lstat()
            content = ""
            if stat.S_ISREG(state.st_mode):
                content = hashlib.sha256(entry.read_bytes()).hexdigest()
            elif stat.S_ISLNK(state.st_mode):
                content = str(entry.readlink())
            found[str(entry.relative_to(folder))] = Seen(
                stat.S_IFMT(state.st_mode), stat.S_IMODE(state.st_mode), content
            )
    return found


class Surroundings:
    """A folder that may be written to, deep within others that may not; what changes there is counted.

    Args:
        root: an empty folder.

    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.allowed = root / "a" / "b" / "c" / "given"
        self.allowed.mkdir(parents=True)
        for folder in (root, root / "a", root / "a" / "b", root / "a" / "b" / "c"):
            for name in ("x", "b.txt", "manifest.json", "recipe.yaml"):
                (folder / name).write_text(f"{name} of {folder.name}")
        self._before = listing(root, (self.allowed,))
        self._elsewhere = self._visible()

    def changed(self) -> list[str]:
        """Return the names of what was made, changed or removed outside of the folder; empty is well."""
        now, elsewhere = listing(self.root, (self.allowed,)), self._visible()
        names = {name for name in self._before.keys() | now.keys() if self._before.get(name) != now.get(name)}
        return sorted(names | (elsewhere ^ self._elsewhere))

    def _visible(self) -> set[str]:
        """Return what stands directly in the places that absolute and long relative paths lead to."""
        return {str(entry) for folder in (Path("/"), Path.cwd()) for entry in folder.iterdir()}
