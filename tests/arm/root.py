"""A Python for ARM64 that runs on this machine: Debian's packages and the wheels for aarch64 under QEMU, in a folder.

Nothing is installed: APT and pip, as they are set up here, only fetch, into folders of their own.
"""

import os
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
CPUS = ("cortex-a76", "cortex-a57", "max")
"""The first has 8-bit and half arithmetic, the second neither, the third every extension that QEMU knows."""

_PACKAGES = ("python3:arm64", "libstdc++6:arm64", "libgomp1:arm64", "qemu-user-static:amd64")
_ORDERS = """
APT::Architecture "arm64";
APT::Architectures {{ "arm64"; "amd64"; }};
APT::Install-Recommends "false";
APT::Sandbox::User "";
Debug::NoLocking "true";
Dir::State "{folder}/state";
Dir::State::status "/dev/null";
Dir::Cache "{folder}/cache";
"""
_SITE = "usr/lib/python3/dist-packages"
# QEMU shows the host's processor, of which ONNX Runtime, which asks for one of ARM, dies.
_PROCESSOR = """\
processor\t: 0
BogoMIPS\t: 50.00
Features\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x3
CPU part\t: 0xd0b
CPU revision\t: 1

"""


def emulated_python(folder: Path, cpu: str) -> Path:
    """Return a command that is Python on ARM64, with all that the package needs but torch; made once in `folder`."""
    root = folder / "root"
    if not root.is_dir():
        unfinished = folder / "unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        _unpack(unfinished)
        _install_wheels(unfinished)
        unfinished.rename(root)
    command = folder / f"python-{cpu}"
    words = [root / "usr/bin/qemu-aarch64-static", "-cpu", cpu, "-L", root, "-E", f"EMULATED_PYTHON={command}"]
    words.append(root / "usr/bin/python3")
    command.write_text(f'#!/bin/sh\nexec {shlex.join(map(str, words))} "$@"\n', encoding="utf-8")
    command.chmod(0o755)
    # Processes that Python starts are emulated too.
    start = 'import os, sys; sys.executable = os.environ["EMULATED_PYTHON"]'
    (root / _SITE / "emulated.pth").write_text(f"{start}\n{REPOSITORY}\n", encoding="utf-8")
    return command


def _unpack(root: Path) -> None:
    apt = root / "apt"
    for name in ("state/lists/partial", "cache/archives/partial"):
        (apt / name).mkdir(parents=True)
    orders = apt / "apt.conf"
    orders.write_text(_ORDERS.format(folder=apt), encoding="utf-8")
    environment = os.environ | {"APT_CONFIG": str(orders)}
    for words in (["update"], ["install", "--yes", "--download-only", *_PACKAGES]):
        subprocess.run(["apt-get", "--quiet=2", *words], env=environment, check=True)
    for package in sorted((apt / "cache/archives").glob("*.deb")):
        subprocess.run(["dpkg-deb", "--extract", package, root], check=True)
    shutil.rmtree(apt)
    (root / "proc").mkdir()
    (root / "proc/cpuinfo").write_text(_PROCESSOR, encoding="utf-8")


def _install_wheels(root: Path) -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = project["dependencies"] + project["optional-dependencies"]["convert"]
    version = (root / "usr/bin/python3").readlink().name.removeprefix("python")
    platforms = [f"--platform=manylinux_2_{minor}_aarch64" for minor in (17, 26, 27, 28, 31, 34)]
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *platforms]
    command += ["--only-binary=:all:", f"--python-version={version}", "--target", str(root / _SITE)]
    command += ["--constraint", str(REPOSITORY / "constraints.txt")]
    subprocess.run([*command, *(name for name in wanted if not name.startswith("torch"))], check=True)
