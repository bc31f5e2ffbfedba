"""A tokenizer as a few sorted arrays, which load in hundredths of a second where a vocabulary of 256,000 takes seconds.

It holds only what encoding needs of byte-pair encoding: the ids of single characters, and for each pair of ids that
merges its rank and the id that it becomes. The strings of all other tokens are not needed. `tabulated` makes one and
keeps it only if it encodes hundreds of prompts as `tokenizers` does; what it does not know leaves no table.
"""

import heapq
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

from sa3_convert.system.untrusted import parse_json

FORMAT: Final = 1
_PLAIN_MODEL: Final = {
    "type": "BPE",
    "dropout": None,
    "continuing_subword_prefix": None,
    "end_of_word_suffix": None,
    "ignore_merges": False,
}
_SAMPLES: Final = 600
_LONGEST_SAMPLE: Final = 24
"""Tokens of a prompt that is tried."""


class NoTableError(ValueError):
    """A tokenizer does what a table cannot say; the message names it."""


@dataclass(slots=True)
class TokenTable:
    """Encodes text as the tokenizer does that it was made of."""

    pairs: NDArray[np.uint64]
    """Pairs of ids that merge, the left one in the upper half, ascending."""
    ranks: NDArray[np.uint32]
    """When each merges: lower ones first."""
    merged: NDArray[np.uint32]
    """What each becomes."""
    characters: Mapping[str, int]
    bytes_: Sequence[int]
    """Ids of the 256 bytes, for characters that have none; empty without such a fallback, -1 for a byte without one."""
    unknown: int | None
    fuse_unknown: bool
    added: Mapping[str, int]
    """Tokens that are found in the text before anything else is done."""
    replaced: tuple[str, str] | None
    """What is replaced in the text between them, and by what."""
    before: tuple[int, ...]
    """What stands in front of every prompt."""
    after: tuple[int, ...]
    """What stands behind it."""
    _lengths: dict[str, list[int]] = field(default_factory=dict)
    """Lengths of the added tokens that begin with a character, longest first."""
    _known: dict[int, tuple[int, int] | None] = field(default_factory=dict)
    """Pairs that were looked up."""

    def __post_init__(self) -> None:
        starts: dict[str, set[int]] = {}
        for token in self.added:
            starts.setdefault(token[:1], set()).add(len(token))
        self._lengths = {start: sorted(lengths, reverse=True) for start, lengths in starts.items()}

    def encode(self, prompt: str) -> list[int]:
        """Return the ids of a prompt, without what stands around it; `ValueError` for what is no Unicode."""
        prompt.encode()
        ids = []
        for piece, token in self._pieces(prompt):
            if token is not None:
                ids.append(token)
            elif piece:
                ids += self._merge(self._symbols(piece.replace(*self.replaced) if self.replaced else piece))
        return ids

    def _pieces(self, text: str) -> Iterator[tuple[str, int | None]]:
        """Yield the text between added tokens, and these with their ids: the leftmost, and of those the longest."""
        start = position = 0
        while position < len(text):
            for length in self._lengths.get(text[position], ()):
                token = self.added.get(text[position : position + length])
                if token is not None:
                    yield text[start:position], None
                    yield "", token
                    start = position = position + length
                    break
            else:
                position += 1
        yield text[start:], None

    def _symbols(self, text: str) -> list[int]:
        symbols: list[int] = []
        pending = False
        for character in text:
            known = self.characters.get(character)
            if known is not None:
                if pending and self.unknown is not None:
                    symbols.append(self.unknown)
                    pending = False
                symbols.append(known)
                continue
            fallback = [self.bytes_[byte] for byte in character.encode()] if self.bytes_ else [-1]
            if min(fallback) >= 0:
                symbols += fallback
                continue
            if pending and not self.fuse_unknown and self.unknown is not None:
                symbols.append(self.unknown)
            pending = self.unknown is not None
        if pending and self.unknown is not None:
            symbols.append(self.unknown)
        return symbols

    def _merge(self, symbols: list[int]) -> list[int]:
        """Merge neighbours, the lowest rank first and of equal ones the leftmost, until no pair merges."""
        following = [*range(1, len(symbols)), -1]
        preceding = list(range(-1, len(symbols) - 1))
        waiting: list[tuple[int, int, int]] = []

        def push(left: int, right: int) -> None:
            found = self._pair(symbols[left], symbols[right])
            if found is not None:
                heapq.heappush(waiting, (found[0], left, found[1]))

        for left in range(len(symbols) - 1):
            push(left, left + 1)
        while waiting:
            _, left, merged = heapq.heappop(waiting)
            right = following[left]
            if symbols[left] < 0 or right < 0:
                continue
            found = self._pair(symbols[left], symbols[right])
            if found is None or found[1] != merged:
                continue  # one of the two has merged with another meanwhile
            symbols[left], symbols[right] = merged, -1
            following[left] = following[right]
            if following[left] >= 0:
                preceding[following[left]] = left
                push(left, following[left])
            if preceding[left] >= 0:
                push(preceding[left], left)
        return [symbol for symbol in symbols if symbol >= 0]

    def _pair(self, left: int, right: int) -> tuple[int, int] | None:
        """Return rank and result of a pair of ids, or None."""
        key = left << 32 | right
        if key not in self._known:
            index = int(np.searchsorted(self.pairs, np.uint64(key)))
            found = index < len(self.pairs) and int(self.pairs[index]) == key
            self._known[key] = (int(self.ranks[index]), int(self.merged[index])) if found else None
        return self._known[key]

    def to_bytes(self) -> bytes:
        """Return the contents of a file: a line of JSON, then the arrays; the same table gives the same bytes."""
        numbers = {
            "pairs": self.pairs,
            "ranks": self.ranks,
            "merged": self.merged,
            "characters": [ord(character) for character in self.characters],
            "ids": list(self.characters.values()),
            "bytes": self.bytes_,
        }
        arrays = {name: np.asarray(numbers[name], kind) for name, kind in _ARRAYS.items()}
        head = {
            "format": FORMAT,
            "lengths": {name: len(array) for name, array in arrays.items()},
            "unknown": self.unknown,
            "fuse_unknown": self.fuse_unknown,
            "added": dict(self.added),
            "replaced": self.replaced,
            "before": self.before,
            "after": self.after,
        }
        return b"".join([json.dumps(head).encode(), b"\n", *(array.tobytes() for array in arrays.values())])

    @classmethod
    def from_bytes(cls, content: bytes) -> Self:
        """Return the table that a file holds; `ValueError` says why it is none."""
        line, _, body = content.partition(b"\n")
        head = parse_json(line.decode())
        if not isinstance(head, dict) or head.get("format") != FORMAT:
            raise ValueError(f"it is no table of format {FORMAT}")
        try:
            found, start = {}, 0
            for name, kind in _ARRAYS.items():
                found[name] = np.frombuffer(body, kind, _number(head["lengths"][name]), start)
                start += found[name].nbytes
            sizes = {len(found[name]) for name in ("pairs", "ranks", "merged")}
            if start != len(body) or len(sizes) != 1 or len(found["bytes"]) not in (0, 256):
                raise ValueError("its arrays do not belong together")
            return cls(
                pairs=found["pairs"],
                ranks=found["ranks"],
                merged=found["merged"],
                characters=dict(zip(map(chr, found["characters"].tolist()), found["ids"].tolist(), strict=True)),
                bytes_=found["bytes"].tolist(),
                unknown=None if head["unknown"] is None else _number(head["unknown"]),
                fuse_unknown=head["fuse_unknown"] is True,
                added={token: _number(number) for token, number in head["added"].items() if token},
                replaced=None if head["replaced"] is None else (_text(head["replaced"][0]), _text(head["replaced"][1])),
                before=tuple(map(_number, head["before"])),
                after=tuple(map(_number, head["after"])),
            )
        except (ArithmeticError, AttributeError, LookupError, TypeError) as error:
            raise ValueError(f"it is damaged ({type(error).__name__}: {error})") from None


_ARRAYS: Final = {"pairs": "<u8", "ranks": "<u4", "merged": "<u4", "characters": "<u4", "ids": "<u4", "bytes": "<i4"}


def _number(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 31:
        raise ValueError(f"{str(value)[:40]!r} is no id")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{str(value)[:40]!r} is no text")
    return value


Encode = Callable[[str], list[int]]


def tabulated(content: str, encode: Encode, before: tuple[int, ...], after: tuple[int, ...]) -> TokenTable:
    """Return the table of a tokenizer, which encodes a few hundred prompts as it does.

    Args:
        content: of `tokenizer.json`, which `tokenizers` has taken.
        encode: what `tokenizers` makes of a prompt, without special tokens.
        before: what it puts in front of every prompt.
        after: what it puts behind it.

    Raises:
        NoTableError: it does more than a table can say, or a prompt comes out different.

    """
    values = json.loads(content)
    table = _table(values, encode, before, after)
    for prompt in _prompts([*values["model"]["vocab"], *table.added]):
        if table.encode(prompt) != encode(prompt):
            raise NoTableError(f"the table encodes {prompt[:60]!r} otherwise")
    return table


def _table(values: Mapping[str, Any], encode: Encode, before: tuple[int, ...], after: tuple[int, ...]) -> TokenTable:
    model = values["model"]
    for key, plain in _PLAIN_MODEL.items():
        if model.get(key, plain) not in (plain, plain or ""):
            raise NoTableError(f"its model's {key} is {model[key]!r}")
    vocabulary: dict[str, int] = model["vocab"]
    added = {}
    for token in values.get("added_tokens") or ():
        if not token["content"] or any(token.get(key) for key in ("single_word", "lstrip", "rstrip", "normalized")):
            raise NoTableError(f"its added token {token['content']!r} is found in another way than by its letters")
        ids = encode(token["content"])
        if len(ids) != 1:
            raise NoTableError(f"its added token {token['content']!r} is not found")
        # The file may give it another id than the library does.
        added[token["content"]] = ids[0]
    replaced = _replacement(values.get("normalizer"))
    _check_pre_tokenizer(values.get("pre_tokenizer"), replaced)
    pairs: dict[int, tuple[int, int]] = {}
    for rank, merge in enumerate(model["merges"]):
        left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
        pairs[vocabulary[left] << 32 | vocabulary[right]] = (rank, vocabulary[left + right])
    keys = np.array(list(pairs), np.uint64)
    order = np.argsort(keys)
    ranked = np.array(list(pairs.values()), np.uint32).reshape(-1, 2)[order]
    fallback = [vocabulary.get(f"<0x{byte:02X}>", -1) for byte in range(256)] if model.get("byte_fallback") else []
    return TokenTable(
        pairs=keys[order],
        ranks=np.ascontiguousarray(ranked[:, 0]),
        merged=np.ascontiguousarray(ranked[:, 1]),
        characters={token: number for token, number in vocabulary.items() if len(token) == 1},
        bytes_=fallback,
        unknown=None if model.get("unk_token") is None else vocabulary[model["unk_token"]],
        fuse_unknown=bool(model.get("fuse_unk")),
        added=added,
        replaced=replaced,
        before=before,
        after=after,
    )


def _replacement(normalizer: Mapping[str, Any] | None) -> tuple[str, str] | None:
    """Return what a normalizer replaces by what."""
    match normalizer:
        case None:
            return None
        case {"type": "Replace", "pattern": {"String": str(pattern)}, "content": str(content)} if pattern:
            return pattern, content
    raise NoTableError(f"its normalizer is a {normalizer.get('type')}")


def _check_pre_tokenizer(pre_tokenizer: Mapping[str, Any] | None, replaced: tuple[str, str] | None) -> None:
    """Refuse one that could cut the text: one that splits at what was replaced finds nothing."""
    match pre_tokenizer:
        case None:
            return
        case {"type": "Split", "pattern": {"String": str(pattern)}, "invert": False} if (
            replaced is not None and pattern == replaced[0] and len(pattern) == 1 and pattern not in replaced[1]
        ):
            return
    raise NoTableError(f"its pre-tokenizer is a {pre_tokenizer.get('type')}")


_HOSTILE: Final = (
    *("", " ", "  a  b  ", "\t\n\r", "e\u0301", "\ufeff\u200b", "<bos><eos><pad><unk>", "< bos >", "<<bos>>", "<0x41>"),
    *(
        "a" * 3000,
        "ab " * 800,
        " " * 300,
        "\n" * 100,
        "▁▁▁▁ ▁",
        "日本の太鼓" * 20,
        "🎷🎺👨‍👩‍👧 \U0010ffff\ue000",
        "\x00\x01\x7f",
    ),
    *(chr(code) * 65 + "!" for code in range(32, 127)),
)


def _prompts(tokens: Sequence[str]) -> Iterator[str]:
    """Yield prompts made of a vocabulary, some with spaces or another alphabet between, and text of other kinds."""
    yield from _HOSTILE
    chosen = random.Random(0)
    between = ("", " ", "  ", "\u00e9", "\ud7ff", "<", "▁", "\U0001f3b7")
    for _ in range(_SAMPLES):
        words = chosen.choices(tokens, k=chosen.randint(1, _LONGEST_SAMPLE))
        yield "".join(word + chosen.choice(between) for word in words)
