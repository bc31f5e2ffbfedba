"""A whole conversion needs no network, starts no pip, and imports nothing of MNN's tools."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.bundles import CONFIGS

GUARD = """
import os, subprocess, sys
log = open({log!r}, "a", buffering=1)
def hook(event, args):
    if event == "import" and args[0] and args[0].startswith("MNN.tools"):
        log.write("import " + args[0] + chr(10))
    if event in ("socket.connect", "socket.getaddrinfo"):
        log.write(event + chr(10))
    if event in ("subprocess.Popen", "os.posix_spawn", "os.exec", "os.system"):
        log.write("start " + repr(args[1] if len(args) > 1 else args) + chr(10))
sys.addaudithook(hook)
"""


def network_namespace() -> list[str]:
    """Return the command prefix that takes the network away, as root or as a user."""
    for prefix in (["unshare", "-n"], ["unshare", "-rn"]):
        if (
            shutil.which("unshare")
            and subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode == 0
        ):
            return prefix
    return []


def test_a_conversion_without_network_succeeds_and_starts_no_pip(toy: Path, cache: Path, tmp_path: Path) -> None:
    prefix = network_namespace()
    if sys.platform == "linux":
        assert prefix, "this test needs `unshare` and the right to make a network namespace"
    log = tmp_path / "log"
    log.touch()
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(GUARD.format(log=str(log)))
    arguments = ["convert", str(toy), "--recipe", str(CONFIGS / "int8.yaml"), "--out", str(tmp_path / "out")]
    # A cache of its own: every stage runs.
    command = [*prefix, sys.executable, "-m", "sa3_convert", *arguments, "--cache", str(tmp_path / "cache")]
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(site), "HOME": str(tmp_path)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    noted = log.read_text()
    assert "mnn.worker" in noted, "the guard did not see the converter start"
    assert "pip" not in noted
    assert "MNN.tools" not in noted
    assert "socket.connect" not in noted


@pytest.mark.parametrize("script", ["mnnconvert", "mnnquant", "mnn"])
def test_the_source_never_names_the_scripts_that_run_pip(script: str) -> None:
    package = Path(__file__).parents[2] / "sa3_convert"
    for file in package.rglob("*.py"):
        text = file.read_text()
        assert f"MNN.tools.{script}" not in text, file
        # As the program of a command; `mnn` alone is also an engine's name.
        started = rf'(run|Popen|call|check_call|check_output|exec\w*|spawn\w*|system)\(\s*[\[(]?\s*"{script}\b'
        assert not re.search(started, text), file
