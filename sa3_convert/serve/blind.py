"""A blind test: pairs of the same piece from two models, in an order that nobody knows; which is which, by ear."""

import json
import secrets
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sa3_convert.check.metrics import wilson
from sa3_convert.system.files import write_text

PAIRS = 10


@dataclass(slots=True)
class Pair:
    """One question."""

    seed: int
    first: str
    """The model of the one that is heard first."""
    jobs: list[str]
    """In the order in which they are heard."""
    answer: str | None = None
    """Which was taken for the first model's, the first or the second."""


@dataclass(slots=True)
class BlindTest:
    """Ten questions: which of two is the first model's?"""

    a: str
    b: str
    settings: dict[str, Any]
    pairs: list[Pair] = field(default_factory=list)

    def order(self) -> tuple[str, str]:
        """Return the models of the next pair, in a drawn order."""
        return (self.a, self.b) if secrets.randbelow(2) else (self.b, self.a)

    @property
    def right(self) -> int:
        """How many answers were right."""
        return sum(pair.answer == ("first" if pair.first == self.a else "second") for pair in self.pairs)

    def verdict(self) -> str:
        """Return the result as a sentence."""
        low, high = wilson(self.right, len(self.pairs))
        told = "they were told apart" if low > 0.5 or high < 0.5 else "chance explains it"
        return (
            f"{self.right} of {len(self.pairs)} right; the share lies within {low:.0%} and {high:.0%} (95 %): {told}."
        )

    def save(self, folder: Path) -> Path:
        """Write everything that was asked and answered as JSON, and return the file."""
        path = folder / f"blind-{secrets.token_hex(8)}.json"
        told = {"schema": 1, **asdict(self), "right": self.right, "of": len(self.pairs)}
        told["interval"] = list(wilson(self.right, len(self.pairs)))
        write_text(path, json.dumps(told, indent=2) + "\n")
        return path
