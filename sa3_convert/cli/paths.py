"""What a command's options read and write: checked as they are parsed, and nothing written that is read."""

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import typer

from sa3_convert.bundle.overlap import Named, require_apart, require_outside
from sa3_convert.errors import UsageError
from sa3_convert.system.streams import check_stream, claim_standard_output, descriptor_of, is_stream
from sa3_convert.system.untrusted import check_name

_META = "sa3_convert.paths"


@dataclass(slots=True)
class _Paths:
    """Of one command."""

    reads: list[Named] = field(default_factory=list)
    opens: list[Named] = field(default_factory=list)
    """Folders that are read."""
    writes: list[Named] = field(default_factory=list)
    folders: list[Named] = field(default_factory=list)

    def check(self) -> None:
        require_apart(self.writes, [*self.reads, *self.opens] if self.writes else ())
        require_outside(self.folders, self.opens)


def path(text: str) -> Path:
    """Return what is a path or the id of a bundle; what is said to be here (`./a/b`) is no id."""
    given = Path(text)
    return given.absolute() if text.startswith("./") and not given.exists() else given


def reads(context: typer.Context, parameter: typer.CallbackParam, value: Any) -> Any:
    """Note files that are read; a strength behind a file's name is none of it."""
    found = _noted(context)
    for given in _listed(value):
        names = {given, given.rpartition(":")[0] or given}
        found.reads += [(_name(parameter), Path(name)) for name in sorted(names)]
    found.check()
    return value


def opens(context: typer.Context, parameter: typer.CallbackParam, value: Any) -> Any:
    """Note folders that are read: bundles and checkpoints."""
    found = _noted(context)
    found.opens += [(_name(parameter), Path(given)) for given in _listed(value)]
    found.check()
    return value


def writes(context: typer.Context, parameter: typer.CallbackParam, value: Path | None) -> Path | None:
    """Note a file that is written; `-` is standard output, which from here on takes nothing else."""
    if value is not None:
        writes_as(context, _name(parameter), value)
    return value


def writes_as(context: typer.Context, name: str, path: Path) -> None:
    """Note a file that is written where only the whole command line tells so; see `writes`."""
    _check_writable(name, path)
    found = _noted(context)
    found.writes.append((name, path))
    found.check()
    if descriptor_of(path) == 1:
        claim_standard_output()


def reads_as(context: typer.Context, named: Iterable[Named]) -> tuple[Named, ...]:
    """Note files that other files name, and return all that is read."""
    found = _noted(context)
    found.reads += named
    found.check()
    return (*found.reads, *found.opens)


def updates(context: typer.Context, parameter: typer.CallbackParam, value: Path) -> Path:
    """Note a file that is read, and may then be written."""
    reads(context, parameter, value)
    if descriptor_of(value) == 1:
        claim_standard_output()
    return value


def writes_model(context: typer.Context, parameter: typer.CallbackParam, value: Path) -> Path:
    """Note a model that is written, which may need a second file beside it."""
    name = _name(parameter)
    _check_loadable(value)
    if is_stream(value):
        raise UsageError(f"{name} {value}: a model may need a second file beside it. Name a file.")
    writes(context, parameter, value)
    found = _noted(context)
    found.writes += [(name, value.with_name(f"{value.name}{suffix}")) for suffix in (".data", ".weight")]
    found.check()
    return value


def makes(context: typer.Context, parameter: typer.CallbackParam, value: Path | None) -> Path | None:
    """Note a folder that is made, which must not lie in what is read, nor around it."""
    if value is not None:
        if is_stream(value):
            raise UsageError(f"{_name(parameter)} {value} is no folder. Name one.")
        check_name(value)
        _check_loadable(value)
        found = _noted(context)
        found.folders.append((_name(parameter), value))
        found.check()
    return value


def _noted(context: typer.Context) -> _Paths:
    return cast("_Paths", context.meta.setdefault(_META, _Paths()))


def _listed(value: Any) -> list[str]:
    return [] if value is None else [str(one) for one in (value if isinstance(value, list | tuple) else [value])]


def _name(parameter: typer.CallbackParam) -> str:
    """Return what the user calls an option or argument."""
    # `BUNDLE…` is one of several; an option's last name is its long one.
    return str(parameter.opts[-1] if parameter.param_type_name == "option" else parameter.metavar).rstrip("…")


def _check_loadable(path: Path) -> None:
    """Raise UnicodeEncodeError for a place whose name is not UTF-8: no library that writes or loads models takes it."""
    os.path.realpath(path).encode()


def _check_writable(name: str, path: Path) -> None:
    """Check that a file can stand there, before any long work."""
    check_name(path)
    try:
        if is_stream(path):
            check_stream(path)
            return
        if path.is_dir():
            raise UsageError(f"{name} {path} is a folder. Name a file.")
        parent = path.absolute().parent
        while not parent.exists():
            parent = parent.parent
        if not parent.is_dir():
            raise UsageError(f"{name} {path} cannot be written: {parent} is a file.")
        if not os.access(parent, os.W_OK | os.X_OK):
            raise UsageError(f"{name} {path} cannot be written: nothing may be put into {parent}.")
    except OSError as error:
        raise UsageError(f"{name} {path} cannot be written: {error.strerror or error}.") from None
