"""What `--target-mnn` promises, held against the wheels of older versions: they are fetched, hence slow."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sa3_convert.bundle.manifest import Bundle
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


def test_what_is_newer_than_the_runtime_does_not_run(
    converted: Convert, toy: Path, wheels: Path, tmp_path: Path
) -> None:
    bundle = converted(toy, "fp16", tmp_path / "bundle")[0].bundle
    done = verify(bundle, installed(wheels, "3.0.0"))
    assert done.returncode == 3
    assert "Unary Op can not execute" in done.stderr


def test_half_scales_crash_before_3_6(converted: Convert, toy: Path, wheels: Path, tmp_path: Path) -> None:
    bundle = converted(toy, "int8", tmp_path / "bundle")[0].bundle
    assert verify(bundle, installed(wheels, "3.5.0")).returncode == -8
    done = verify(bundle, installed(wheels, "3.6.0"))
    assert done.returncode == 0, done.stdout + done.stderr
