"""What `--target-mnn` promises, held against the wheels of older versions: they are fetched, hence slow."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sa3_convert.bundle.reader import Bundle
from tests.bundles import Convert

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("wheels")


def installed(wheels: Path, version: str) -> Path:
    folder = wheels / version
    if not folder.exists():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
        subprocess.run([*command, f"MNN=={version}"], check=True)
    return folder


def verify(bundle: Bundle, runtime: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sa3_convert", "verify", str(bundle.path)]
    environment = os.environ | {"PYTHONPATH": str(runtime)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def raw_run(model: Path, runtime: Path) -> int:
    """Run a model on zeros by MNN alone; a signal that ends it is a negative number."""
    program = """
import sys, MNN
interpreter = MNN.Interpreter(sys.argv[1])
session = interpreter.createSession({})
for tensor in interpreter.getSessionInputAll(session).values():
    interpreter.resizeTensor(tensor, tuple(size if size > 0 else 8 for size in tensor.getShape()))
interpreter.resizeSession(session)
sys.exit(interpreter.runSession(session))
"""
    environment = os.environ | {"PYTHONPATH": str(runtime)}
    command = [sys.executable, "-c", program, str(model)]
    return subprocess.run(command, env=environment, capture_output=True, check=False).returncode


@pytest.mark.parametrize("recipe", ["fp16", "portable"])
@pytest.mark.parametrize(
    ("target", "version"), [("3.0", "3.0.0"), (None, "3.1.0"), (None, "3.2.0"), (None, "3.4.1"), (None, "3.5.0")]
)
def test_the_target_runs_it_and_keeps_its_floors(
    converted: Convert, toy: Path, wheels: Path, tmp_path: Path, recipe: str, target: str | None, version: str
) -> None:
    bundle = converted(toy, recipe, tmp_path / "bundle", target_mnn=target)[0].bundle
    done = verify(bundle, installed(wheels, version))
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("recipe", "component", "version", "dies"),
    [("int8", "dit", "3.5.0", True), ("fp16", "dit", "3.0.0", False), ("fp16", "decoder", "3.0.0", False)],
)
def test_what_needs_a_newer_one_is_refused_before_it_fails(
    converted: Convert,
    toy: Path,
    wheels: Path,
    tmp_path: Path,
    recipe: str,
    component: str,
    version: str,
    dies: bool,
) -> None:
    bundle = converted(toy, recipe, tmp_path / "bundle", target_mnn=None if dies else "3.6")[0].bundle
    runtime = installed(wheels, version)
    done = verify(bundle, runtime)
    assert done.returncode == 7, done.stdout + done.stderr
    assert f"{version} is installed" in " ".join(done.stderr.split())
    assert raw_run(bundle.path / f"{component}.mnn", runtime) != 0


def test_half_scales_are_read_from_3_6(converted: Convert, toy: Path, wheels: Path, tmp_path: Path) -> None:
    done = verify(converted(toy, "int8", tmp_path / "bundle")[0].bundle, installed(wheels, "3.6.0"))
    assert done.returncode == 0, done.stdout + done.stderr
