"""Every command ends with its own exit code and readable text, whatever standard output is."""

import contextlib
import json
import os
import pty
import re
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from sa3_convert.bundle.reader import Bundle
from sa3_convert.lab.drift.compare import FORMULA
from sa3_convert.system import streams

ENCODINGS = ("ascii", "cp437", "cp1252", "gbk", "cp932")
OUTPUTS = ("file", "pipe", "closed", "terminal 40", "terminal 200", "dumb terminal", "terminal without colours")

COMMANDS = {
    "inspect bundle/dit.mnn": 0,
    "run bundle --prompt pad --seconds 0.5 --steps 1 -o pad.wav": 0,
    "run bundle --prompt pad --bpm 240 --bars 1 --steps 1 -n 2 --seed random --force -o loop.wav": 0,
    "bundle card bundle -o card.md": 0,
    "bundle publish bundle --to a/b --dry-run --allow synthetic": 0,
    "convert toy --recipe int8 --out new --dry-run": 0,
    "plan toy --component dit --target-mib 1 --out planned.yaml --dry-run": 0,
    "bisect bundle --component number_conditioner": 0,
    "table bundle": 0,
    "verify bundle --quick --component number_conditioner": 0,
    "drift bundle --baseline drift.json --no-speed --update --reason first --case 'prompt=0 seed=0 seconds=0.5'": 0,
    "drift bundle --baseline drift.json --no-speed": 0,
    "-v inspect bundle/number_conditioner.mnn": 0,
    "run --help": 0,
    "--version": 0,
    "inspect absent.mnn": 3,
    "run bundle": 2,
    "nonsense": 2,
}
LONG = ("drift", "verify", "plan", "bisect")
"""What the fast tests leave out, but for the poorest output."""

ALL = """
import json, shlex, sys
from pathlib import Path
from sa3_convert.system.streams import prepare_standard_streams
prepare_standard_streams()
from sa3_convert.cli.app import run
Path("codes.json").write_text(json.dumps({line: run(shlex.split(line)) for line in json.loads(sys.argv[1])}))
"""


@pytest.fixture
def place(toy: Path, toy_int8: Bundle, tmp_path: Path) -> Path:
    (tmp_path / "toy").symlink_to(toy)
    (tmp_path / "bundle").symlink_to(toy_int8.path)
    return tmp_path


def ran(arguments: list[str], folder: Path, encoding: str, output: str) -> tuple[int, bytes]:
    """Run Python with such a standard output and error; return its exit code and what was shown."""
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "NO_COLOR", "TERM", "LC_ALL")}
    # Of modules that are not on its path, Python would not find ours in another folder.
    environment |= {
        "PYTHONIOENCODING": encoding,
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "TERM": "xterm-256color",
    }
    if "dumb" in output:
        environment["TERM"] = "dumb"
    if "without colours" in output:
        environment["NO_COLOR"] = "1"
    command = [sys.executable, *arguments]
    if output == "closed":
        done = subprocess.run(["sh", "-c", '"$0" "$@" >&- 2>&-', *command], cwd=folder, env=environment, check=False)
        return done.returncode, b""
    if output == "file":
        with (folder / "output").open("wb") as stream:
            done = subprocess.run(command, cwd=folder, env=environment, stdout=stream, stderr=stream, check=False)
        return done.returncode, (folder / "output").read_bytes()
    if output == "pipe":
        piped = subprocess.run(
            command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
        )
        return piped.returncode, piped.stdout
    return _on_a_terminal(command, folder, environment, int(output.split()[-1]) if output[-1].isdigit() else 80)


def _on_a_terminal(command: list[str], folder: Path, environment: dict[str, str], width: int) -> tuple[int, bytes]:
    main, other = pty.openpty()
    termios.tcsetwinsize(other, (24, width))
    shown = b""
    with subprocess.Popen(command, cwd=folder, env=environment, stdin=other, stdout=other, stderr=other) as process:
        os.close(other)
        with contextlib.suppress(OSError):  # so Linux tells that the other side is closed
            while piece := os.read(main, 1 << 16):
                shown += piece
    os.close(main)
    return process.returncode, shown


def complaints(folder: Path, encoding: str, output: str, commands: dict[str, int]) -> list[str]:
    """Run commands and return what is wrong with how they end and what they say."""
    code, shown = ran(["-c", ALL, json.dumps(list(commands))], folder, encoding, output)
    codes = json.loads((folder / "codes.json").read_text())
    found = [f"{line}: {codes[line]} instead of {wanted}" for line, wanted in commands.items() if codes[line] != wanted]
    text = shown.decode(encoding)
    if code != 0 or "bug" in text:
        found.append(text)
    # Everything that the package itself says has a spelling.
    found += re.findall(r".*\\[xuU][0-9a-f]{2}.*", text)
    if "x1b" not in text and ("dumb" in output or not output.startswith("terminal")):
        found += re.findall(r".*\x1b\[[0-9;]*m.*", text)
    return found


@pytest.mark.parametrize(("encoding", "output"), [("ascii", "pipe"), ("cp437", "terminal 40"), ("gbk", "closed")])
def test_commands_end_with_their_own_code_and_readable_text(place: Path, encoding: str, output: str) -> None:
    left_out = LONG[:2] if encoding == "ascii" else LONG
    quick = {line: code for line, code in COMMANDS.items() if line.split()[0] not in left_out}
    assert complaints(place, encoding, output, quick) == []


@pytest.mark.slow
@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_all_commands_do_so_everywhere(place: Path, encoding: str, output: str) -> None:
    more = {"doctor --all": 0} if output == "terminal 40" else {}
    assert complaints(place, encoding, output, COMMANDS | more) == []


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_line_is_in_the_encoding_of_its_stream(tmp_path: Path, encoding: str) -> None:
    code = (
        "from sa3_convert.system.streams import prepare_standard_streams; prepare_standard_streams()\n"
        "from sa3_convert.cli.echo import echo; echo('64×256 ▶ 太 é'); echo('−1 …', err=True)"
    )
    ended, shown = ran(["-c", code], tmp_path, encoding, "pipe")
    assert ended == 0
    expected = {
        "ascii": "64x256 > \\u592a \\xe9\n-1 ...\n",
        "cp437": "64x256 > \\u592a é\n-1 ...\n",
        "cp1252": "64×256 > \\u592a é\n-1 …\n",
        "gbk": "64×256 > 太 é\n-1 …\n",
        "cp932": "64×256 > 太 \\xe9\n－1 …\n",
    }
    assert shown.decode(encoding) == expected[encoding]


def test_the_rule_of_drift_is_readable_in_ascii() -> None:
    assert b"\\" not in FORMULA.encode("ascii", streams._SPELLING)


def test_the_program_itself_does_so(place: Path) -> None:
    code, shown = ran(["-m", "sa3_convert", "inspect", "bundle/number_conditioner.mnn"], place, "ascii", "file")
    assert code == 0
    assert "64x256" in shown.decode("ascii")


def test_names_that_cannot_be_printed_are_escaped(place: Path) -> None:
    (place / "bundle").rename(place / "雨 ü")
    command = [
        "-m",
        "sa3_convert",
        "run",
        "雨 ü",
        "--prompt",
        "pad",
        "--seconds",
        "0.5",
        "--steps",
        "1",
        "-o",
        "雨.wav",
    ]
    code, shown = ran(command, place, "cp437", "pipe")
    assert code == 0
    assert "\\u96e8.wav: 0.50 s" in shown.decode("cp437")
    assert (place / "雨.wav").is_file()


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["inspect", b"bundle\xff/dit.mnn"], 2),
        (["export", "toy", "--component", "number_conditioner", "--out", "a.onnx"], 3),
        (["convert", "toy", "--component", "number_conditioner", "--out", "new"], 3),
        (["inspect", "bundle/number_conditioner.mnn"], 0),
    ],
)
def test_names_that_cannot_be_decoded_are_told_and_written_where_that_is_possible(
    place: Path, arguments: list[str | bytes], code: int
) -> None:
    folder = Path(os.fsdecode(os.fsencode(place) + b"/odd\xff"))
    folder.mkdir()
    for name in ("bundle", "toy"):
        (folder / name).symlink_to(place / name)
    found, shown = ran(["-m", "sa3_convert", *map(os.fsdecode, arguments)], folder, "utf-8", "pipe")
    assert found == code, shown
    assert ("is not UTF-8. Rename the file or folder" in shown.decode()) == (code != 0)
