"""Prompts to token ids as the text encoder takes them: encoded as the reference does, cut, right-padded with id 0.

The reference calls its tokenizer with special tokens on. Whether that puts any around a prompt is said by
`tokenizer_config.json` if it names `add_bos_token` or `add_eos_token`, as in transformers 5, else by `tokenizer.json`.
"""

import contextlib
import itertools
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np
from numpy.typing import NDArray

from sa3_convert.bundle.manifest import TOKEN_TABLE
from sa3_convert.checkpoint.dimensions import TextEncoderLayout
from sa3_convert.checkpoint.json_file import Picked, held, read_json
from sa3_convert.errors import BundleError, CheckpointError, SettingError
from sa3_convert.runtime.token_table import TokenTable, tabulated
from sa3_convert.system.checked_files import named
from sa3_convert.system.log import capture_stderr
from sa3_convert.system.supervisor import working_on
from sa3_convert.system.untrusted import read_bytes, read_text

if TYPE_CHECKING:
    import tokenizers

Integers = NDArray[np.int32]

_WHITESPACE = "\t\n\r"
_LARGEST = 256 << 20
"""Bytes of a tokenizer; the published one has 33 MiB."""
_LOAD_SECONDS, _ENCODE_SECONDS = 120.0, 30.0
"""Times that nothing honest takes on any machine: a second, and a hundredth of one."""
_ROOM = 4 << 30
"""Bytes that may be taken meanwhile: a normalizer can make a text a million times as long."""
_GET_ANOTHER = "Get the bundle again, or convert its checkpoint, where this is checked."
_TEXT = "A warm analog pad, 128 BPM: soft strings & distant bells (live) – naïve café № 3, 日本の太鼓 🎷"
_PROBES = (
    *("", " ", "  a  b  ", "\t\n\r", _TEXT, _TEXT.upper(), "e\u0301", "\ufeff\u200b", "<bos><eos><pad><unk>"),
    *(chr(code) * 64 + "!" for code in range(32, 127)),
    _TEXT * 200,
)
"""Prompts of all kinds; runs of one character are what careless patterns take for ever on."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """One tokenised prompt."""

    ids: Integers
    """[1, max_length]."""
    mask: Integers
    """[1, max_length], 1 = token, 0 = padding."""
    dropped: int
    """Tokens at the prompt's end that did not fit."""


@dataclass(frozen=True, slots=True)
class Around:
    """Special tokens that stand around every prompt."""

    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()

    @classmethod
    def of(cls, tokenizer: "tokenizers.Tokenizer", path: Path) -> Self:
        """Find out by encoding a text both ways; `ValueError` if they differ by more."""
        plain, whole = (_encode(tokenizer, path, _TEXT, special=special) for special in (False, True))
        for start in range(len(whole) - len(plain) + 1):
            if whole[start : start + len(plain)] == plain:
                return cls(tuple(whole[:start]), tuple(whole[start + len(plain) :]))
        raise ValueError("its post-processor does more than put tokens around a prompt")

    def put(self, ids: list[int]) -> list[int]:
        """Return the ids of a prompt with them."""
        return [*self.before, *ids, *self.after]


class PromptTokenizer:
    """A `tokenizer.json` or its table, with special tokens, for a text encoder; BundleError if it cannot be used.

    Args:
        path: of the file; a table is told by its name.
        text: dimensions of the text encoder; an autoencoder alone has none.
        content: what is used instead of what the file holds.

    """

    def __init__(self, path: Path, text: TextEncoderLayout | None, content: str | None = None) -> None:
        if text is None:
            raise BundleError("An autoencoder alone cannot generate. Give a whole checkpoint, or a bundle of one.")
        self._path, self._text = path, text
        try:
            if path.suffix == Path(TOKEN_TABLE).suffix:
                self._encode, self._around = _from_table(path)
            else:
                tokenizer = _load(path, content)
                self._encode, self._around = partial(_encode, tokenizer, path), Around.of(tokenizer, path)
        except OSError as error:
            raise BundleError(f"{path} cannot be read: {error.strerror or error}. {_GET_ANOTHER}") from None
        except ValueError as error:
            raise BundleError(f"{path} is no tokenizer that can be used: {error}. {_GET_ANOTHER}") from None

    def encode(self, prompt: str) -> Tokens:
        """Return the tokens of a prompt that passed `check_prompt`; the empty prompt has special ones alone, if any."""
        try:
            found = self._encode(prompt)
        except ValueError as error:
            raise BundleError(f"{self._path} fails on this prompt: {error}. {_GET_ANOTHER}") from None
        length, rows = self._text.max_length, self._text.vocab_size
        room = max(length - len(self._around.put([])), 0)
        kept = self._around.put(found[:room])[:length]
        if kept and max(kept) >= rows:
            # MNN would read beyond its table, or take another row of it.
            raise BundleError(f"{self._path} gives token {max(kept)}; the text encoder has {rows}. {_GET_ANOTHER}")
        ids = np.zeros((1, length), np.int32)
        ids[0, : len(kept)] = kept
        mask = (np.arange(length) < len(kept)).astype(np.int32)[np.newaxis]
        return Tokens(ids, mask, max(len(found) - room, 0))


@dataclass(frozen=True, slots=True)
class UsedTokenizer:
    """A checkpoint's tokenizer as the reference uses it."""

    content: str | None
    """What is used instead of `tokenizer.json`, which adds other tokens than the reference does."""
    note: str
    """What a user should know of it; empty where nothing is added."""


def check_tokenizer(path: Path, text: TextEncoderLayout) -> UsedTokenizer:
    """Try a checkpoint's tokenizer on every kind of prompt, and hold all its ids to the text encoder's table."""
    try:
        tokenizer = _load(path)
        used = _as_used(tokenizer, path)
        around = Around.of(tokenizer, path)
        for prompt in _PROBES:
            plain, whole = (_encode(tokenizer, path, prompt, special=special) for special in (False, True))
            if whole != around.put(plain):
                raise ValueError("its post-processor does more than put tokens around a prompt")
        with _library(path, _LOAD_SECONDS):
            last = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing.") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is no tokenizer that can be used: {error}. Download it again.") from None
    if not 0 <= last < text.vocab_size:
        raise CheckpointError(
            f"{path} has ids up to {last}, the text encoder's vocab_size is {text.vocab_size}. "
            "Are the files of one checkpoint?"
        )
    return used


def table_of(path: Path) -> bytes:
    """Return the table of a `tokenizer.json` that was checked; `NoTableError` says why it cannot have one."""
    tokenizer = _load(path)
    around = Around.of(tokenizer, path)
    table = tabulated(read_text(path, _LARGEST), partial(_encode, tokenizer, path), around.before, around.after)
    return table.to_bytes()


def _from_table(path: Path) -> tuple[Callable[[str], list[int]], Around]:
    table = TokenTable.from_bytes(read_bytes(path, _LARGEST))
    return table.encode, Around(table.before, table.after)


class _Named(Picked):
    content: str


class _Settings(Picked):
    """What `tokenizer_config.json` says of special tokens."""

    add_bos_token: bool | None = None
    add_eos_token: bool | None = None
    bos_token: str | _Named | None = None
    eos_token: str | _Named | None = None


def _as_used(tokenizer: "tokenizers.Tokenizer", path: Path) -> UsedTokenizer:
    """Make a tokenizer add what the reference adds, and say what that is."""
    from tokenizers.processors import TemplateProcessing

    config, content = path.with_name("tokenizer_config.json"), None
    settings = held(_Settings, read_json(config), config.name) if config.exists() else _Settings()
    if settings.model_fields_set & {"add_bos_token", "add_eos_token"}:
        tokens = [
            [] if named is None or not wanted else [named if isinstance(named, str) else named.content]
            for wanted, named in (
                (settings.add_bos_token, settings.bos_token),
                (settings.add_eos_token, settings.eos_token),
            )
        ]
        ids: dict[str, int] = {}
        for token in itertools.chain(*tokens):
            number = tokenizer.token_to_id(token)
            if number is None:
                raise CheckpointError(f"{config} adds {token!r} to prompts, which {path.name} does not have.")
            ids[token] = number
        wanted = Around(*(tuple(ids[token] for token in side) for side in tokens))
        with contextlib.suppress(ValueError):
            if Around.of(tokenizer, path) == wanted:
                return UsedTokenizer(None, _note(tokenizer, wanted, path.name))
        tokenizer.post_processor = TemplateProcessing(
            single=[*tokens[0], "$A", *tokens[1]], special_tokens=list(ids.items())
        )
        content = tokenizer.to_str()
    source = path.name if content is None else f"{config.name}, which overrules {path.name}"
    return UsedTokenizer(content, _note(tokenizer, Around.of(tokenizer, path), source))


def _note(tokenizer: "tokenizers.Tokenizer", around: Around, source: str) -> str:
    sides = [
        f"{' '.join(map(str, map(tokenizer.id_to_token, side)))} {where}"
        for side, where in ((around.before, "in front"), (around.after, "behind"))
        if side
    ]
    if not sides and "overrules" not in source:
        return ""
    return f"Prompts are encoded as the reference does, with {' and '.join(sides) or 'no special token'}: {source}."


def _load(path: Path, content: str | None = None) -> "tokenizers.Tokenizer":
    """Return a tokenizer; `ValueError` says why the library cannot use the file, or gives other tokens each time."""
    import tokenizers

    if content is None:
        content = read_text(path, _LARGEST)
    with _library(path, _LOAD_SECONDS):
        tokenizer = tokenizers.Tokenizer.from_str(content)
        # The file may bring settings of its own; the length is the text encoder's, whose shape is static.
        tokenizer.no_truncation()
        tokenizer.no_padding()
    if getattr(tokenizer.model, "dropout", None):
        raise ValueError("its model has a dropout, so that a prompt has other tokens each time")
    return tokenizer


def _encode(tokenizer: "tokenizers.Tokenizer", path: Path, prompt: str, *, special: bool = False) -> list[int]:
    with _library(path, _ENCODE_SECONDS):
        return list(tokenizer.encode(prompt, add_special_tokens=special).ids)


@contextlib.contextmanager
def _library(path: Path, seconds: float) -> Iterator[None]:
    """Turn whatever the library raises into `ValueError`, keep what it prints to itself, and bound what it takes."""
    with capture_stderr(), working_on(named(path), seconds=seconds, room=_ROOM):
        try:
            yield
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # it raises nothing narrower than Exception, and a panic of Rust is not even one
            raise ValueError(str(error) or type(error).__name__) from None


def check_prompt(prompt: str, name: str = "prompt") -> None:
    """Refuse what no one types on purpose; empty, long and non-Latin prompts are fine.

    That is control characters other than tab and line breaks, and half of a surrogate pair (what a terminal makes of
    bytes that are not UTF-8).
    """
    for position, character in enumerate(prompt):
        category = unicodedata.category(character)
        if category == "Cs":
            raise SettingError(f"{{{name}}} is not valid Unicode at character {position + 1}. Give it as UTF-8.")
        if category == "Cc" and character not in _WHITESPACE:
            raise SettingError(
                f"{{{name}}} holds the control character U+{ord(character):04X} at character {position + 1}. Remove it."
            )
