"""Every command works where there is no POSIX: see `elsewhere/sitecustomize.py` for what is taken away."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sa3_convert.bundle.reader import Bundle
from sa3_convert.errors import UsageError
from sa3_convert.recipe import WeightScheme, load_recipe
from sa3_convert.system import files, untrusted
from sa3_convert.system.files import write_text
from sa3_convert.system.untrusted import check_name
from tests.bundles import CONFIGS

ELSEWHERE = Path(__file__).parent / "elsewhere"
ALL = """
import json, sys
from sa3_convert.cli.app import run
print("CODES " + json.dumps({line: run(line.split()) for line in sys.stdin.read().splitlines()}))
"""


def elsewhere(*arguments: str, folder: Path, given: str = "") -> subprocess.CompletedProcess[str]:
    """Run Python there; its temporary folder is its own, because its locks are other ones than ours."""
    temporary = folder / "tmp"
    temporary.mkdir(exist_ok=True)
    path = os.pathsep.join([str(ELSEWHERE), str(Path(__file__).parents[2])])
    environment = os.environ | {"PYTHONPATH": path, "TMPDIR": str(temporary), "PYTHONWARNDEFAULTENCODING": "1"}
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, cwd=folder, env=environment, input=given, capture_output=True, encoding="utf-8", check=False
    )


@pytest.fixture
def place(toy: Path, toy_int8: Bundle, cache: Path, tmp_path: Path) -> Path:
    """Return a folder with what the commands name."""
    for name, target in {"toy": toy, "bundle": toy_int8.path, "cache": cache}.items():
        (tmp_path / name).symlink_to(target)
    base = load_recipe(CONFIGS / "int8.yaml")
    plain = {c: r.model_copy(update={"weights": WeightScheme(bits=8)}) for c, r in base.components.items()}
    # No other test makes what it asks for.
    write_text(tmp_path / "own.yaml", base.model_copy(update={"components": plain}).to_yaml())
    write_text(tmp_path / "batch.jsonl", '{"prompt": "a", "output": "a.wav"}\n{"prompt": "b", "seed": 1}\n')
    return tmp_path


SHORT = "--seconds 0.5 --steps 1"
COMMANDS = f"""
checkpoint synthesize made --variant small-sfx
convert toy --recipe int8 --out bundle
convert toy --recipe own.yaml --out other --cache cache --component decoder --component number_conditioner
convert toy --recipe own.yaml --out other --cache own-cache --component number_conditioner --force
convert toy --recipe fp16 --out planned --dry-run
run bundle --prompt pad {SHORT} --json pad.json -o pad.wav
run bundle --from pad.json -o pad.wav
run bundle --prompt pad {SHORT} --stream -o streamed.wav
run bundle --prompt pad {SHORT} --engine onnxruntime -o pad.flac
run bundle --batch batch.jsonl {SHORT} -o many
run bundle --batch batch.jsonl {SHORT} -o many
verify bundle --quick --component number_conditioner --json verified.json
verify bundle --quick --component number_conditioner --no-bisect --report report
verify bundle --quick --component number_conditioner --no-bisect --report report
bench bundle --engine mnn {SHORT} --repeats 1
inspect bundle/dit.mnn
table bundle other
bundle export bundle --to hub
bundle publish bundle --to someone/models --allow synthetic --dry-run
plan toy --component dit --target-mib 1 --out planned.yaml --dry-run
plan --help
bisect bundle --component number_conditioner
export toy --component number_conditioner --out a.onnx
fuse a.onnx --component number_conditioner --out b.onnx
mnn b.onnx --component number_conditioner --out c.mnn
mnn b.onnx --component number_conditioner --out c.mnn
""".strip()


def test_every_command_works_without_posix(place: Path) -> None:
    done = elsewhere("-c", ALL, folder=place, given=COMMANDS)
    codes = json.loads(done.stdout.rpartition("CODES ")[2])
    assert len(codes) > 20
    assert {line: code for line, code in codes.items() if code != 0} == {}, done.stderr
    left = [file.name for file in place.rglob("*") if file.name.endswith((".partial", ".lock"))]
    assert left == []


@pytest.mark.slow
def test_doctor_works_without_posix(tmp_path: Path) -> None:
    done = elsewhere("-m", "sa3_convert", "doctor", folder=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "code"), [("inspect bundle/dit.mnn", 0), ("inspect bundle/recipe.yaml", 3), ("run bundle", 2)]
)
def test_a_command_runs_in_one_process_where_none_can_be_forked(place: Path, arguments: str, code: int) -> None:
    done = elsewhere("-m", "sa3_convert", *arguments.split(), folder=place)
    assert done.returncode == code, done.stderr
    assert "bug" not in done.stderr


def test_the_test_takes_away_what_it_says(tmp_path: Path) -> None:
    (tmp_path / "held").touch()
    code = "import sys; exec(compile(sys.stdin.read(), 'ours.py', 'exec'), {'__package__': 'sa3_convert'})"
    given = """
import os, signal
from pathlib import Path
def fails(act):
    try:
        act()
    except (ImportError, AttributeError, OSError) as error:
        return type(error).__name__
kept = open("held", "rb")
print(fails(lambda: __import__("fcntl", globals())), fails(lambda: os.fork), fails(lambda: signal.SIGKILL),
      fails(lambda: open("/proc/self/status", "rb")), fails(lambda: os.open(".", os.O_RDONLY)),
      fails(lambda: Path("held").replace("other")), fails(lambda: Path("tmp").rmdir()), hasattr(os, "fork"))
"""
    done = elsewhere("-c", code, folder=tmp_path, given=given)
    names = "ImportError AttributeError AttributeError FileNotFoundError PermissionError PermissionError None False"
    assert done.stdout.split() == names.split(), done.stderr


WRITE = "from pathlib import Path; from sa3_convert.system.files import atomic_path, write_text; "


def test_what_a_killed_process_left_is_swept_and_what_is_being_written_is_not(tmp_path: Path) -> None:
    killed = WRITE + "import os\nwith atomic_path(Path('a')):\n    os.kill(os.getpid(), 9)"
    assert elsewhere("-c", killed, folder=tmp_path).returncode == -9
    assert len(list(tmp_path.glob(".a.*.partial"))) == 1
    both = WRITE + (
        "import subprocess, sys\nwith atomic_path(Path('b')) as b:\n"
        f"    subprocess.run([sys.executable, '-c', {WRITE!r} + \"write_text(Path('c'), '')\"], check=True)\n"
        "    b.write_text('', encoding='utf-8')"
    )
    done = elsewhere("-c", both, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(file.name for file in tmp_path.iterdir()) == ["b", "c", "tmp"]


@pytest.mark.parametrize("name", ["CON", "nul.wav", "Com1", "a:b", "a.", "a ", "x/AUX/y.wav", "what?.wav", "lpt¹.txt"])
def test_names_that_windows_keeps_for_itself_are_refused_there_alone(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_name(tmp_path / name)
    monkeypatch.setattr(untrusted, "_WINDOWS", True)
    with pytest.raises(UsageError, match="Windows gives no file"):
        write_text(tmp_path / name, "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["console.wav", "..", "../pad.wav", ".hidden", "com.wav", "Änderung ü.wav"])
def test_other_names_are_taken_on_windows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(untrusted, "_WINDOWS", True)
    check_name(Path(name))


def test_a_file_that_another_has_open_for_a_moment_is_replaced_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusals = [PermissionError("in use"), PermissionError("in use")]
    replace = Path.replace

    def refused(path: Path, target: Path) -> Path:
        if refusals:
            raise refusals.pop()
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", refused)
    with pytest.raises(PermissionError):
        write_text(tmp_path / "file", "on POSIX nobody waits")
    refusals.append(PermissionError("in use"))
    monkeypatch.setattr(files, "fcntl", None)
    write_text(tmp_path / "file", "whole")
    assert [file.name for file in tmp_path.iterdir()] == ["file"]
