"""What `--help` shows, and `docs/commands.md` with it; completion; options that are alike wherever they are."""

import os
import shlex
import subprocess
import sys
from typing import Any

import pytest
import typer.main

import sa3_convert.cli.app as cli
from tests.cli import reference

COMMANDS = {name.removeprefix("sa3-convert "): command for name, command in reference.commands(
    typer.main.get_command(cli.app)
)}  # fmt: skip


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.run(list(arguments)) == 0
    return capsys.readouterr().out


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERMINAL_WIDTH", "80")


def test_the_reference_of_commands_is_up_to_date() -> None:
    assert reference.FILE.read_text(encoding="utf-8") == reference.render(), "run python -m tests.cli.reference"


def test_the_help_names_every_command_in_a_group_on_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, "--help")
    for panel in ("Convert and run", "Check", "Measure and choose", "Stage by stage"):
        assert f"─ {panel} ─" in text
    assert max(map(len, text.splitlines())) <= 80
    for name, command in COMMANDS.items():
        summary = command.help.splitlines()[0]
        if " " not in name and name != "doctor":
            assert any(f"│ {name} " in line and summary in line for line in text.splitlines()), name


@pytest.mark.parametrize("name", COMMANDS)
def test_short_and_long_help_are_the_same_and_fit(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, *name.split(), "-h")
    assert text == shown(capsys, *name.split(), "--help")
    assert f"Example: sa3-convert {name} " in " ".join(text.split())
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize("name", COMMANDS)
def test_an_example_is_a_command_line_that_its_command_takes(name: str) -> None:
    command: Any = COMMANDS[name]
    words = shlex.split(command.epilog.removeprefix("Example: "))
    assert words[: 1 + len(name.split())] == ["sa3-convert", *name.split()]
    rest = words[1 + len(name.split()) :]
    rest += ["-"] if rest[-1] == "--json" else []
    given, left, _ = command.make_parser(typer.Context(command)).parse_args(rest)
    assert left == []
    assert all(given.get(parameter.name) for parameter in command.params if parameter.required)


@pytest.mark.parametrize("option", ["--json", "--backend", "--memory", "--precision", "--threads", "--references"])
def test_an_option_means_the_same_in_every_command(option: str) -> None:
    found = {
        name: (parameter.help, parameter.metavar, tuple(parameter.opts))
        for name, command in COMMANDS.items()
        for parameter in command.params
        if option in parameter.opts and not getattr(parameter, "hidden", False) and name != "doctor"
    }
    assert len(found) >= 2
    assert len(set(found.values())) == 1, found


def test_a_case_is_written_alike_in_every_command() -> None:
    found = {n: p.metavar for n, c in COMMANDS.items() for p in c.params if "--case" in p.opts}
    assert found == dict.fromkeys(("verify", "bisect", "drift", "sweep"), "'prompt=P seed=S seconds=D'")


def test_a_shell_completes_commands() -> None:
    asked = {"_SA3_CONVERT_COMPLETE": "complete_bash", "COMP_WORDS": "sa3-convert bi", "COMP_CWORD": "1"}
    done = subprocess.run(
        [sys.executable, "-c", "from sa3_convert.cli import main; main()"],
        env=os.environ | asked,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["bisect"]
    assert done.stderr == ""
