"""Conversions that are killed, starved of disk or memory, or run twice at once, and what they leave behind.

A trial starts the real command line in a process of its own, disturbs it, looks at everything that stands under a final
name, then runs the same command again undisturbed. The processes are forked from a server that has imported the heavy
packages, so that a trial costs what the conversion costs.
"""

import contextlib
import ctypes
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

from sa3_convert.bundle.reader import Bundle
from sa3_convert.errors import BundleError
from sa3_convert.system.files import sha256_file

HEAVY = (
    *("torch", "torch._dynamo", "torch.onnx", "onnx", "onnx.reference", "onnx_ir", "onnxscript", "onnxruntime", "MNN"),
    *(
        "networkx",
        "safetensors.numpy",
        "rich.table",
        "sa3_convert.cli.app",
        "sa3_convert.convert.conversion",
        "sa3_convert.convert.plan",
    ),
)
KILLED = -9
_NEW_MOUNTS, _NEW_USERS = 0x00020000, 0x10000000
MS_PRIVATE_RECURSIVE = (1 << 18) | (1 << 14)


@dataclass(frozen=True)
class Place:
    """Where a trial converts to."""

    out: Path
    cache: Path

    @classmethod
    def under(cls, folder: Path) -> "Place":
        return cls(folder / "out", folder / "cache")

    def command(self, checkpoint: Path, components: Sequence[str], *more: str) -> list[str]:
        chosen = [part for name in components for part in ("--component", name)]
        place = ["--out", str(self.out), "--cache", str(self.cache), "--recipe", "configs/int8.yaml"]
        return ["convert", str(checkpoint), *place, *chosen, "--threads", "1", *more]


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    output: str


class Server:
    """Starts commands in processes forked from one that has everything imported."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._count = 0
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(list(HEAVY))

    def start(self, arguments: Sequence[str], limit: int | None = None) -> tuple[BaseProcess, Path]:
        self._count += 1
        log = self._folder / f"{self._count}.log"
        process = self._context.Process(target=_command, args=(list(arguments), str(log), limit))
        process.start()
        return process, log

    def supervise(self, arguments: Sequence[str], temporary: Path) -> tuple[BaseProcess, Path]:
        """Start a command as its users do, with a parent that watches it, in a process group of its own."""
        self._count += 1
        log = self._folder / f"{self._count}.log"
        process = self._context.Process(target=_supervised, args=(list(arguments), str(log), str(temporary)))
        process.start()
        return process, log

    def run(self, arguments: Sequence[str], limit: int | None = None) -> Ended:
        process, log = self.start(arguments, limit)
        return ended(process, log)

    def call(self, function: Callable[..., None], *arguments: object) -> int:
        """Run a function in a fresh process and return its exit status."""
        process = self._context.Process(target=function, args=arguments)
        process.start()
        process.join(600)
        assert process.exitcode is not None, "stuck"
        return process.exitcode


def ended(process: BaseProcess, log: Path) -> Ended:
    """Wait for a command; one that does not end within ten minutes is stuck."""
    process.join(600)
    assert process.exitcode is not None, f"stuck: {log.read_text()}"
    return Ended(process.exitcode, log.read_text())


def _command(arguments: list[str], log: str, limit: int | None) -> None:
    os._exit(command_here(arguments, log, limit))


def _supervised(arguments: list[str], log: str, temporary: str) -> None:
    from sa3_convert.cli import main

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    tempfile.tempdir = os.environ["TMPDIR"] = temporary
    os.setpgid(0, 0)
    main(arguments)


def command_here(arguments: list[str], log: str, limit: int | None = None) -> int:
    """Run a command in this process with its output in a file, under a limit of further memory in bytes."""
    from sa3_convert.cli.app import run

    stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    if limit is not None:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + limit, used + limit))
    return run(arguments)


# ---- what may stand under a final name


def digests(out: Path) -> dict[str, str]:
    """Return the SHA-256 of every model in a bundle."""
    return {file.name: sha256_file(file) for file in sorted(out.glob("*.mnn"))}


def damage(place: Place, expected: dict[str, str]) -> list[str]:
    """Return what stands under a final name and is not what a clean conversion makes."""
    found = []
    for name, digest in digests(place.out).items():
        if expected.get(name) != digest:
            found.append(f"{name} is not what a clean conversion makes")
    if (place.out / "manifest.json").exists():
        with contextlib.suppress(BundleError):
            bundle = Bundle.open(place.out)
            bundle.check(kinds=("mnn",))
            models = {a.path: a.sha256 for a in bundle.manifest.artifacts if a.kind == "mnn"}
            found += [f"the manifest accepts a wrong {p}" for p, digest in models.items() if expected.get(p) != digest]
    for entry in place.cache.glob("*/*"):
        if not entry.name.startswith(".") and entry.is_dir():
            found += [f"{entry.parent.name}: {problem}" for problem in _damaged_entry(entry)]
    return found


def _damaged_entry(entry: Path) -> Iterator[str]:
    try:
        files = json.loads((entry / "entry.json").read_text())["files"]
    except (OSError, ValueError, KeyError) as error:
        yield f"{entry.name} has no whole entry: {error!r}"
        return
    for name, digest in files.items():
        if sha256_file(entry / name) != digest:
            yield f"{entry.name}/{name} is damaged"


def leftovers(place: Place) -> list[str]:
    """Return what a process that is gone has left behind."""
    roots = (place.out, place.cache)
    return sorted(str(file) for root in roots for file in root.rglob("*") if "partial" in file.name)


def check_completed(place: Place, again: Ended, expected: dict[str, str]) -> None:
    """Assert that the same command, undisturbed, ends well and leaves exactly what a clean one does."""
    assert again.code == 0, again.output
    assert digests(place.out) == expected
    Bundle.open(place.out).check(kinds=("mnn",))
    assert damage(place, expected) == []
    assert leftovers(place) == []


# ---- disturbances


def kill_at(server: Server, arguments: Sequence[str], seconds: float) -> bool:
    """Start a command, kill it after some seconds, and tell whether it was still running."""
    process, _ = server.start(arguments)
    process.join(seconds)
    process.kill()
    process.join()
    return process.exitcode == KILLED


def moments(count: int, span: float, seed: int) -> list[float]:
    """Return moments spread over a span: one in each of `count` equal parts, at random within it."""
    generator = random.Random(seed)
    return [span * (index + generator.random()) / count for index in range(count)]


def on_own_disk(folder: Path, mebibytes: float) -> None:
    """Give this process a small disk at `folder` that nobody else sees; it goes with the process."""
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.getuid(), os.getgid()
    flags = _NEW_MOUNTS | (0 if user == 0 else _NEW_USERS)
    if libc.unshare(flags):
        raise OSError(ctypes.get_errno(), "unshare")
    if user:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    libc.mount(b"none", b"/", None, MS_PRIVATE_RECURSIVE, None)
    folder.mkdir(parents=True, exist_ok=True)
    _mount("-t", "tmpfs", "-o", f"size={int(mebibytes * 1024)}k", "none", str(folder))


@contextlib.contextmanager
def filled_after(seconds: float, folder: Path) -> Iterator[None]:
    """Have all that is left of a disk taken by another process, some seconds from now, until the block ends."""
    filler = os.fork()
    if filler == 0:
        time.sleep(seconds)
        with contextlib.suppress(OSError), (folder / "filler").open("wb", buffering=0) as stream:
            while True:
                stream.write(bytes(4096))
        os._exit(0)
    try:
        yield
    finally:
        os.kill(filler, signal.SIGKILL)
        os.waitpid(filler, 0)
        (folder / "filler").unlink(missing_ok=True)


def remount(folder: Path, option: str) -> None:
    """Change a mounted disk: `ro`, `rw`."""
    _mount("-o", f"remount,{option}", str(folder))


def _mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True)


def set_clock_of_files(place: Place, seconds: float) -> None:
    """Make every file look as if it had been written that much earlier or later."""
    moment = time.time() + seconds
    for root in (place.out, place.cache):
        for file in root.rglob("*"):
            os.utime(file, (moment, moment))


def afresh(place: Place) -> Place:
    """Remove what an earlier trial made."""
    for root in (place.out, place.cache):
        shutil.rmtree(root, ignore_errors=True)
    return place
