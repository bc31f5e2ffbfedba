"""JSON files of a checkpoint: read strictly, held to models that also write them, and what is wrong in short words."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Final, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)
from pydantic_core import ArgsKwargs, ErrorDetails

from sa3_convert.errors import CheckpointError
from sa3_convert.system import untrusted

Model = TypeVar("Model", bound=BaseModel)
_LONGEST: Final = 200
_SHOWN: Final = 5
_SPELLED: Final = ConfigDict(strict=True, frozen=True, allow_inf_nan=False)


def shown(value: Any) -> str:
    """Return a value of a file for a message: as Python spells it, cut where it gets long."""
    text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def listed(problems: Sequence[str]) -> str:
    """Return the first few problems and how many more there are."""
    rest = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
    return "; ".join(problems[:_SHOWN]) + rest


def read_json(path: Path, limit: int = untrusted.SMALL) -> Any:
    """Read a JSON file; one that is missing, unreadable, too large or not strict JSON is a `CheckpointError`."""
    try:
        return untrusted.read_json(path, limit)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing.") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from None


class Whole(BaseModel):
    """An object that may hold nothing unknown; its fields stand in the order in which they are written."""

    model_config = ConfigDict(**_SPELLED, extra="forbid")


class Picked(BaseModel):
    """An object of which only what is named here is looked at."""

    model_config = ConfigDict(**_SPELLED, extra="ignore")


def absent_is(default: Any) -> Any:
    """Give the meaning of an absent key where that is not supported."""
    return Field(default=default, validate_default=True)


def only(supported: Any) -> AfterValidator:
    """Return a validator of a setting that has one supported value; its type says what equals it (1 is not True)."""

    def check(value: Any) -> Any:
        if value != supported:
            raise ValueError(f"only {supported!r} is supported")
        return value

    return AfterValidator(check)


Yes = Annotated[bool, only(True)]
No = Annotated[bool, only(False)]


def _as_spelled(value: Any, check: ValidatorFunctionWrapHandler) -> Any:
    check(value)
    return value


Kept: Final = WrapValidator(_as_spelled)
"""A number is written as it was read: 64 does not become 64.0."""
Unread = Any
"""A setting that matters for training or loading only, or to other readers."""
One: Final = Field(min_length=1, max_length=1)
"""A list with an entry per stage; every published SAME has one."""
Nothing = Annotated[list[Any], Field(default=[], max_length=0)]
Unity = Annotated[float, Field(ge=1, le=1)]


def faults(error: ValidationError, name: str = "") -> str:
    """Return what is wrong, each time with the key below `name`, what it is and what was expected."""
    return listed([_fault(one, name) for one in error.errors(include_url=False)])


def _fault(error: ErrorDetails, name: str) -> str:
    kind, context, value = error["type"], error.get("ctx", {}), error["input"]
    spelled = [f"[{part}]" if isinstance(part, int) else f".{part[:_LONGEST]}" for part in error["loc"]]
    where, parent = ((name + "".join(parts)).removeprefix(".") or "it" for parts in (spelled, spelled[:-1]))
    match kind:
        case "missing":
            return f"{parent} has no {error['loc'][-1]!r}"
        case "extra_forbidden":
            return f"{where} is not supported: this tool does not know what it means"
        case "union_tag_invalid":
            tag = context["discriminator"].strip("'")
            return f"{where}.{tag} is {shown(context['tag'])}; only {context['expected_tags']} are supported"
        case "union_tag_not_found":
            return f"{where} has no {context['discriminator']}"
        case "value_error" if isinstance(value, dict | ArgsKwargs):
            return f"{where}: {context['error']}"
        case "model_type" | "dict_type" | "model_attributes_type":
            return f"{where} is {type(value).__name__}, expected an object"
        case "value_error":
            return f"{where} is {shown(value)}; {context['error']}"
        case "literal_error":
            return f"{where} is {shown(value)}; only {context['expected']} is supported"
    expected = _EXPECTED[kind].format(**context) if kind in _EXPECTED else error["msg"]
    return f"{where} is {shown(value)}, expected {expected}"


_EXPECTED: Final = {
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "a text",
    "list_type": "a list",
    "none_required": "null",
    "greater_than_equal": "at least {ge}",
    "less_than_equal": "at most {le}",
    "less_than": "less than {lt}",
    "too_short": "a length of at least {min_length}",
    "too_long": "a length of at most {max_length}",
}


def held(model: type[Model], data: Any, name: str) -> Model:
    """Return parsed JSON as its model, or say in a `CheckpointError` which keys of `name` do not fit."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise CheckpointError(f"{faults(error, name)}.") from None
