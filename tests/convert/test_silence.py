"""Nothing is collected and nobody is asked: no files of others in the user's folders, no name and no address sought.

The kernel counts, so that what native libraries do by themselves is seen: in a network namespace without any route,
every attempt to reach an address raises a counter, and so does every question to a name server.
"""

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from sa3_convert.bundle.reader import Bundle
from tests.convert.test_isolation import network_namespace

COUNTED = """
# Names are asked of a server of the network, not of a daemon that answers through a socket file.
mount --bind "$0/nsswitch.conf" /etc/nsswitch.conf && mount --bind "$0/resolv.conf" /etc/resolv.conf || exit 99
"$@"
code=$?
cat /proc/net/snmp > "$0/snmp"
cat /proc/net/snmp6 > "$0/snmp6"
exit $code
"""
ASKING = "import socket\ntry: socket.getaddrinfo('www.example.org', 443)\nexcept OSError: pass"
REACHING = "import socket\ntry: socket.create_connection(('192.0.2.1', 443), 1)\nexcept OSError: pass"
# Its first upload is tried after nine seconds.
HOLDING = """
import sys, time
from pathlib import Path
from sa3_convert.ort import OrtSession
session = OrtSession(Path(sys.argv[1]))
time.sleep(15)
"""


@dataclass(frozen=True)
class Watched:
    """What a command did besides its work."""

    code: int
    attempts: int
    """To reach an address or to look up a name."""
    output: str


def watched(command: Sequence[str], home: Path) -> Watched:
    """Run a command in a user's home without a network, counting what it tries to reach."""
    prefix = network_namespace()
    if sys.platform != "linux" or not prefix:
        pytest.skip("this system has no network namespaces")
    notes = home.parent / f"{home.name}-notes"
    notes.mkdir(exist_ok=True)
    (notes / "nsswitch.conf").write_text("hosts: files dns\n")
    (notes / "resolv.conf").write_text("nameserver 192.0.2.53\noptions timeout:1 attempts:1\n")
    (home / "work").mkdir(parents=True, exist_ok=True)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("XDG_", "ORT_", "HF_"))}
    root = str(Path(__file__).parents[2])
    result = subprocess.run(
        [*prefix, "-m", "sh", "-c", COUNTED, str(notes), *command],
        env={**kept, "HOME": str(home), "PYTHONPATH": root},
        cwd=home / "work",
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode == 99:
        pytest.skip(f"this system lets nobody mount in a namespace: {result.stderr}")
    return Watched(result.returncode, unreachable(notes), result.stdout + result.stderr)


def unreachable(notes: Path) -> int:
    names, values = (line.split() for line in (notes / "snmp").read_text().splitlines() if line.startswith("Ip:"))
    version_6 = dict(line.split() for line in (notes / "snmp6").read_text().splitlines())
    return int(dict(zip(names, values, strict=True))["OutNoRoutes"]) + int(version_6["Ip6OutNoRoutes"])


def sa3(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "sa3_convert", *map(str, arguments)]


def strangers(home: Path) -> list[str]:
    """Return files in a user's home that are neither our cache nor what was asked for."""
    found = (path.relative_to(home) for path in home.rglob("*") if not path.is_dir())
    return sorted(str(path) for path in found if path.parts[:2] != (".cache", "sa3-convert") and path.parts[0] != "out")


@pytest.mark.parametrize("attempt", [ASKING, REACHING])
def test_the_watch_sees_an_attempt(attempt: str, tmp_path: Path) -> None:
    assert watched([sys.executable, "-c", attempt], tmp_path / "home").attempts > 0


def test_verifying_and_running_the_reference_are_silent(toy_fp32: Bundle, tmp_path: Path) -> None:
    home = tmp_path / "home"
    wav = home / "out" / "x.wav"
    said = ["--prompt", "rain", "--seconds", 1, "--steps", 2, "--engine", "onnxruntime", "-o", wav]
    for command in (sa3("verify", toy_fp32.path), sa3("run", toy_fp32.path, *said)):
        seen = watched(command, home)
        assert (seen.code, seen.attempts) == (0, 0), seen.output
    assert strangers(home) == []


def test_an_answer_of_the_user_to_the_contrary_is_not_asked_for(toy_fp32: Bundle, tmp_path: Path) -> None:
    command = ["env", "ORT_DISABLE_TELEMETRY=0", *sa3("verify", toy_fp32.path, "--component", "number_conditioner")]
    assert watched(command, tmp_path / "home").code == 0
    assert strangers(tmp_path / "home") == []


@pytest.mark.slow
def test_every_command_is_silent(tmp_path: Path) -> None:
    home = tmp_path / "home"
    out = home / "out"
    bundle, recipe = out / "bundle", Path(__file__).parents[2] / "configs" / "int8.yaml"
    said = ["--prompt", "rain", "--seconds", 1, "--steps", 2]
    model = bundle / "reference" / "number_conditioner.onnx"
    commands = [
        sa3("checkpoint", "synthesize", out / "toy"),
        sa3("convert", out / "toy", "--recipe", recipe, "--out", bundle, "--with-reference"),
        sa3("verify", bundle),
        sa3("verify", bundle, "--full", "--prompts", 0, "--seeds", 0, "--seconds", 2, "--references", out / "kept"),
        *(sa3("run", bundle, *said, "--engine", name, "-o", out / f"{name}.wav") for name in ("mnn", "onnxruntime")),
        sa3("run", bundle, *said, "--engine", "torch", "--checkpoint", out / "toy", "-o", out / "torch.wav"),
        sa3("bench", bundle, "--seconds", 1, "--repeats", 1, "--steps", 2),
        sa3("doctor"),
        [sys.executable, "-c", HOLDING, str(model)],
    ]
    seen = [watched(command, home) for command in commands]
    assert [one.code for one in seen] == [0] * len(seen), [one.output for one in seen if one.code]
    # ONNX Runtime's own quantisation; whether it is close enough depends on the processor.
    quantising = ("--recipe", recipe, "--out", out / "integers", "--component", "encoder", "--with-ort-int8")
    seen.append(watched(sa3("convert", out / "toy", *quantising), home))
    assert seen[-1].code in (0, 5), seen[-1].output
    assert [one.attempts for one in seen] == [0] * len(seen)
    assert strangers(home) == []
