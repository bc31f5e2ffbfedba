"""`docs/commands.md` from the Typer app: `python -m tests.cli.reference` writes it anew."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer.main

from sa3_convert.cli.app import app

FILE = Path(__file__).parents[2] / "docs" / "commands.md"


def commands(command: Any, name: str = "sa3-convert") -> Iterator[tuple[str, Any]]:
    """Yield every command that does something, by its whole name."""
    if children := getattr(command, "commands", None):
        for child, found in children.items():
            yield from commands(found, f"{name} {child}")
    else:
        yield name, command


def render() -> str:
    """Return every command with its arguments, options and example."""
    whole: Any = typer.main.get_command(app)
    lines = ["# Commands", "", "Made from the program; `python -m tests.cli.reference` writes this file.", ""]
    lines += ["Before any command:", "", *(f"- {_names(p)} {_said(p)}" for p in whole.params)]
    for name, command in commands(whole):
        words = " ".join(p.metavar for p in command.params if p.param_type_name == "argument")
        lines += ["", f"## {name}", "", " ".join(command.help.split()), "", f"    {name} {words} [OPTIONS]", ""]
        lines += [f"{command.epilog.partition(': ')[0]}: `{command.epilog.partition(': ')[2]}`", ""]
        lines += [f"- {_names(p)} {_said(p)}" for p in command.params if not getattr(p, "hidden", False)]
    return "\n".join(lines) + "\n"


def _names(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return f"`{parameter.metavar}`"
    flags = ", ".join(f"`{name}`" for name in (*parameter.opts, *parameter.secondary_opts))
    kind = "" if parameter.is_flag else parameter.display_type_rich(typer.Context(typer.main.get_command(app)))
    return f"{flags} `{kind}`" if kind else flags


def _said(parameter: Any) -> str:
    default = getattr(parameter.default, "value", parameter.default)
    shown = "" if default in (None, False, True, ..., ()) or parameter.required else f" Default: `{default}`."
    return (parameter.help or "").replace("\n", " ") + shown


if __name__ == "__main__":
    FILE.write_text(render(), encoding="utf-8")
