"""What others wrote is shown on a terminal, and never controls it."""

import os
import pty
import re
import subprocess
import sys
from io import StringIO
from pathlib import Path

import pytest

from sa3_convert.bundle.manifest import Fidelity
from sa3_convert.bundle.reader import Bundle
from sa3_convert.cli.app import run
from sa3_convert.cli.console import EscapingConsole, bundle_table
from sa3_convert.components import Component
from tests.bundle.test_manifest import make_bundle

HOSTILE = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202egnp\r\x08"


def on_a_terminal(program: str) -> str:
    """Return what a program writes to a terminal."""
    main, other = pty.openpty()
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "100"}
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdin=other, stdout=other, stderr=other, env=environment) as process:
        os.close(other)
        shown = b""
        while True:
            try:
                piece = os.read(main, 1 << 16)
            except OSError:
                break
            if not piece:
                break
            shown += piece
    os.close(main)
    assert process.returncode == 0, shown
    return shown.decode()


def test_styles_stay_and_names_are_escaped_on_a_terminal() -> None:
    shown = on_a_terminal(
        "from rich.table import Table; from rich.text import Text\n"
        "from sa3_convert.cli.console import stderr, stdout\n"
        f"name = {HOSTILE!r}\n"
        "table = Table(title=name); table.add_column('name'); table.add_row(Text(name, style='bold red'))\n"
        "stdout.print(table); stdout.print(name); stderr.print(f'Note: {name}'); stdout.print([name], style='green')\n"
    )
    assert "\x1b[1;31m" in shown
    assert "┃" in shown
    # Only rich's own sequences, which set colours, are left.
    bare = re.sub(r"\x1b\[[0-9;]*m", "", shown).replace("\r\n", "\n")
    assert bare.replace("\n", "").isprintable()
    assert bare.count(r"\x1b]0;owned") >= 3


def test_a_stage_that_has_begun_is_overwritten_by_its_result_on_a_terminal() -> None:
    shown = on_a_terminal(
        "from sa3_convert.cli.console import show_stage\n"
        "from sa3_convert.components import Component; from sa3_convert.convert.conversion import StageEvent\n"
        "show_stage(StageEvent(Component.DIT, 'mnn', 'started'))\n"
    )
    assert re.search(r"converting … *\r$", re.sub(r"\x1b\[[0-9;]*m", "", shown))


def test_a_long_stage_says_how_far_it_is_and_what_is_left() -> None:
    shown = on_a_terminal(
        "from sa3_convert.cli.console import show_stage\n"
        "from sa3_convert.components import Component; from sa3_convert.convert.conversion import StageEvent\n"
        "show_stage(StageEvent(Component.DIT, 'round', 'working', 100.4, '4 of 12'))\n"
        "show_stage(StageEvent(Component.DIT, 'round', 'working', 0.0, '0 of 12'))\n"
    )
    first, second, _ = re.sub(r"\x1b\[[0-9;]*m", "", shown).split("\r")
    assert first.rstrip() == "dit                rounding 4 of 12, 0:01:40 left …"
    # What stood there is covered.
    assert (second.rstrip(), len(second)) == ("dit                rounding 0 of 12 …", len(first))


@pytest.mark.parametrize(
    "arguments", [["run", f"/no{HOSTILE}", "--prompt", "x", "-o", "x.wav"], ["table", f"--bog{HOSTILE}"], ["x\x1b[2J"]]
)
def test_messages_are_escaped(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert run(arguments) in (2, 3)
    captured = capfd.readouterr()
    assert captured.err.replace("\n", "").isprintable()
    assert r"\x1b" in captured.err


def test_every_word_to_the_terminal_goes_through_one_of_two_doors() -> None:
    package = Path(__file__).parents[2] / "sa3_convert"
    doors = {"cli/echo.py", "cli/console.py"}
    direct = re.compile(r"typer\.(echo|secho)|(?<![\w.])print\(|[^g]Console\(")
    found = {
        str(file.relative_to(package))
        for file in package.rglob("*.py")
        if direct.search(re.sub(r"class \w+\(Console\)", "", file.read_text(encoding="utf-8")))
    }
    assert found <= doors


def test_a_model_without_a_floor_is_a_row_all_the_same(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path)
    figures = Fidelity(signal_to_noise_db=40, cosine=1, max_abs_error=0)
    artifacts = tuple(a.model_copy(update={"fidelity": figures}) for a in bundle.manifest.artifacts)
    console = EscapingConsole(file=StringIO(), width=120)
    console.print(bundle_table(Bundle(tmp_path, bundle.manifest.model_copy(update={"artifacts": artifacts}))))
    assert isinstance(console.file, StringIO)
    assert console.file.getvalue().count("40.0") == len(Component)
