"""The workflow files: valid YAML, scripts that a shell can read, and commands that exist with those options."""

import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import typer.main
import yaml

from sa3_convert.cli.app import app

ROOT = Path(__file__).parents[1]
CI = ROOT / ".github" / "workflows" / "ci.yml"
SYSTEMS = ROOT / ".github" / "workflows" / "systems.yml"
EXAMPLE = ROOT / "docs" / "github-workflow.yml"


def workflow(path: Path) -> dict[Any, Any]:
    loaded: dict[Any, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return loaded


def steps(path: Path) -> Iterator[dict[str, Any]]:
    for job in workflow(path)["jobs"].values():
        yield from job["steps"]


def scripts(path: Path) -> list[str]:
    return [step["run"] for step in steps(path) if "run" in step]


def option_names(words: list[str]) -> tuple[set[str], set[str]]:
    """Return the options that a command line gives, and those that its command takes."""
    command: Any = typer.main.get_command(app)
    rest = words[1:]
    while isinstance(command, click.Group) or hasattr(command, "commands"):
        assert rest[0] in command.commands, f"there is no command {rest[0]}"
        command, rest = command.commands[rest[0]], rest[1:]
    taken = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    return {word for word in rest if word.startswith("-")}, taken


@pytest.mark.parametrize("path", [CI, SYSTEMS, EXAMPLE], ids=lambda path: path.name)
def test_a_workflow_is_complete(path: Path) -> None:
    loaded = workflow(path)
    assert loaded["name"]
    assert loaded[True]  # YAML 1.1 reads the key `on` as a boolean
    assert loaded["permissions"]["contents"] == "read"
    for job in loaded["jobs"].values():
        assert job["runs-on"]
        assert job["timeout-minutes"]
    for step in steps(path):
        assert ("uses" in step) is not ("run" in step)
        assert re.fullmatch(r"[\w-]+/[\w-]+@v\d+", step.get("uses", "a/b@v1"))


@pytest.mark.parametrize("path", [CI, SYSTEMS, EXAMPLE], ids=lambda path: path.name)
def test_every_script_is_one_that_a_shell_can_read(path: Path) -> None:
    for script in scripts(path):
        result = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True, check=False)
        assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(("path", "least"), [(EXAMPLE, 4), (SYSTEMS, 20)], ids=["example", "systems"])
def test_every_command_exists_with_its_options(path: Path, least: int) -> None:
    commands = [line for line in path.read_text(encoding="utf-8").splitlines() if "#   sa3-convert drift" in line]
    commands += [line for script in scripts(path) for line in script.splitlines() if line.startswith("sa3-convert")]
    assert len(commands) >= least
    for line in commands:
        given, taken = option_names(shlex.split(line[line.index("sa3-convert") :].partition(" | ")[0]))
        assert given <= taken, line


def test_the_workflow_for_other_systems_says_whether_it_has_run_as_the_readme_does() -> None:
    told = SYSTEMS.read_text(encoding="utf-8").startswith("# Not run yet.")
    assert told is ("has not run yet" in (ROOT / "README.md").read_text(encoding="utf-8"))
    for job in workflow(SYSTEMS)["jobs"].values():
        systems = job.get("strategy", {}).get("matrix", {}).get("system", [job["runs-on"]])
        assert any(system.startswith("macos") for system in systems)


def test_every_variable_of_the_examples_scripts_is_set() -> None:
    loaded = workflow(EXAMPLE)
    for step in steps(EXAMPLE):
        known = {*loaded["env"], *step.get("env", {})}
        assert set(re.findall(r"\$(\w+)", step.get("run", ""))) <= known


def test_the_projects_own_workflow_runs_what_a_newcomer_runs() -> None:
    assert scripts(CI) == [".ci/run"]
    run = ROOT / ".ci" / "run"
    assert os.access(run, os.X_OK)
    for command in ("make convert", "make drift", "make lint", "make test"):
        assert command in run.read_text(encoding="utf-8")
