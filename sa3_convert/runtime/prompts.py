"""Prompts to token ids as the text encoder takes them: right-padded with id 0, no begin or end token, cut to length."""

import unicodedata
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tokenizers
from numpy.typing import NDArray

from sa3_convert.errors import BundleError, UsageError

Integers = NDArray[np.int32]

_WHITESPACE = "\t\n\r"


@dataclass(frozen=True, slots=True)
class Tokens:
    """One tokenised prompt."""

    ids: Integers
    """[1, max_length]."""
    mask: Integers
    """[1, max_length], 1 = token, 0 = padding."""
    dropped: int
    """Tokens at the prompt's end that did not fit."""


class PromptTokenizer:
    """The checkpoint's `tokenizer.json`.

    Args:
        path: the file.
        max_length: tokens that the text encoder takes.

    Raises:
        BundleError: the file is missing or is no tokenizer.

    """

    def __init__(self, path: Path, max_length: int) -> None:
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise BundleError(f"{path} cannot be read: {error.strerror}. Convert again.") from None
        except UnicodeDecodeError as error:
            raise BundleError(f"{path} is damaged: {error}. Convert again.") from None
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises nothing narrower
            raise BundleError(f"{path} is no tokenizer: {error}. Convert again.") from None
        # The file may bring settings of its own; the length is the text encoder's, whose shape is static.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._max_length = max_length

    def encode(self, prompt: str) -> Tokens:
        """Return the tokens of a prompt that passed `check_prompt`; the empty prompt has none."""
        found = self._tokenizer.encode(prompt, add_special_tokens=False).ids
        kept = found[: self._max_length]
        ids = np.zeros((1, self._max_length), np.int32)
        ids[0, : len(kept)] = kept
        mask = (np.arange(self._max_length) < len(kept)).astype(np.int32)[np.newaxis]
        return Tokens(ids, mask, len(found) - len(kept))


def check_prompt(prompt: str, name: str = "prompt") -> None:
    """Refuse what no one types on purpose; empty, long and non-Latin prompts are fine.

    Raises:
        UsageError: the prompt holds a control character other than tab and line breaks, or half of a surrogate pair
            (what a terminal makes of bytes that are not UTF-8).

    """
    for position, character in enumerate(prompt):
        category = unicodedata.category(character)
        if category == "Cs":
            raise UsageError(f"The {name} is not valid Unicode at character {position + 1}. Give it as UTF-8.")
        if category == "Cc" and character not in _WHITESPACE:
            raise UsageError(
                f"The {name} holds the control character U+{ord(character):04X} at character {position + 1}. Remove it."
            )
