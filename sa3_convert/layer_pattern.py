"""Regular expressions of recipes: searched in time that grows with pattern and name, whatever they hold.

Python's own engine tries every way to match, and `(a+)+$` has 2ⁿ of them. pydantic brings the engine of Rust's `regex`,
which follows all ways at once and knows neither look-around nor back-references, which cannot be searched like that.
"""

import functools
import re

from pydantic_core import SchemaError, SchemaValidator, core_schema

_CLASSES = {"d": "[0-9]", "D": "[^0-9]", "w": "[0-9A-Za-z_]", "W": "[^0-9A-Za-z_]", "s": r"[ \t\n]", "S": r"[^ \t\n]"}
_ESCAPED = re.compile(r"\\(.)", re.DOTALL)
_COUNTED = re.compile(r"\{[^}]*?(\d+)\}")
_LARGEST = 50_000


@functools.lru_cache(maxsize=1024)
def layer_pattern(pattern: str) -> SchemaValidator:
    r"""Compile a pattern; what is returned tells by `isinstance_python` whether it is found in a name.

    Names of layers are ASCII, and so are the classes `\d`, `\w` and `\s`: those of all Unicode take milliseconds each.

    Raises:
        ValueError: it is no regular expression, uses what this engine does not have, or repeats too much.

    """
    size = len(pattern)
    for count in _COUNTED.findall(pattern):
        size = min(size * max(int(count[:9]), 1), _LARGEST + 1)
    if size > _LARGEST:
        raise ValueError(f"{pattern[:60]!r} is too large with its repetitions. Use * or + instead of numbers.")
    try:
        return SchemaValidator(core_schema.str_schema(pattern=_ESCAPED.sub(_ascii, pattern)))
    except SchemaError as error:
        why = str(error).rstrip().splitlines()[-1].strip().removeprefix("error: ")
        raise ValueError(f"{pattern[:60]!r} is not a regular expression that is taken here: {why}") from None


def _ascii(escaped: re.Match[str]) -> str:
    if escaped[1] in "pP":
        raise ValueError(f"{escaped.string[:60]!r} names a class of Unicode; names of layers are ASCII.")
    return _CLASSES.get(escaped[1], escaped[0])
