"""What runs in a process of its own, started by `mnn.isolated`: MNN's converter, a look at its result, runs.

`_tools` is the compiled module that holds MNN's converter. Its wrappers (`MNN.tools.*`, and the console scripts) are
never imported: they start pip when they are. Nothing here reaches a network or starts a program; an audit hook sees
to it.
"""

import contextlib
import json
import os
import signal
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Self

from sa3_convert.system.supervisor import die_with_parent

SCRATCH = ".__convert_external_data.bin"
"""The converter's own name for the file, in its working directory, through which it passes all weights."""
FULL_DISK: Final = 74
"""Exit status: what was written cannot be trusted. Words would be lost, because they go to a file, too."""
_ROOM = 1 << 20
_FORBIDDEN = ("socket.connect", "socket.getaddrinfo", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn")


@dataclass(frozen=True, slots=True)
class Job:
    """One model to run at one setting."""

    model: str
    feeds: tuple[str, ...]
    """`.npz` files, run one after the other."""
    outputs: tuple[str, ...]
    backend: str
    precision: str
    memory: str
    report: str
    """Where to write; a job without a report ended the process. `<report>.npz` gets the arrays, named "run/output"."""

    @property
    def arrays(self) -> Path:
        """Where its outputs are."""
        return Path(f"{self.report}.npz")

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> Self:
        """Read what `dataclasses.asdict` gave."""
        return cls(**{**data, "feeds": tuple(data["feeds"]), "outputs": tuple(data["outputs"])})


@dataclass(frozen=True, slots=True)
class JobOutcome:
    """What became of a job that ended by itself."""

    error: str | None
    messages: tuple[str, ...]


def main(arguments: list[str]) -> int:
    """Run `convert FLAG…`, `ports FILE REPORT` or `run JOBS` and return the exit status."""
    die_with_parent()
    # Python ignores this signal, so a file that may not grow further would be cut short without a word.
    if hasattr(signal, "SIGXFSZ"):
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    sys.addaudithook(_refuse)
    command, *rest = arguments
    if command == "convert":
        return _convert(rest)
    if command == "ports":
        return _ports(Path(rest[0]), Path(rest[1]))
    if command == "run":
        for data in json.loads(Path(rest[0]).read_text(encoding="utf-8")):
            job = Job.from_data(data)
            Path(job.report).write_text(json.dumps(asdict(_run(job))), encoding="utf-8")
        return 0
    raise SystemExit(f"unknown command {command!r}")


def _convert(flags: list[str]) -> int:
    """Call the converter. Its return value says nothing and is not looked at; what it wrote is judged by the caller.

    It does not notice a full disk: weights that did not fit into the scratch file come out as other numbers in a file
    of the right size. So the scratch file is held until room for more has been found.
    """
    import _tools

    with Path(SCRATCH).open("wb"):
        _tools.mnnconvert(["mnnconvert", *flags])
        sys.stdout.flush()
        if not has_room(Path()):
            return FULL_DISK
    Path(SCRATCH).unlink(missing_ok=True)
    return 0


def has_room(folder: Path) -> bool:
    """Tell whether a folder's disk takes more."""
    probe = folder / "room"
    try:
        with probe.open("wb") as stream:
            stream.write(b"\0" * _ROOM)
            stream.flush()
            os.fsync(stream.fileno())
    except OSError:
        return False
    finally:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)
    return True


def _ports(path: Path, report: Path) -> int:
    """Load a model and write its inputs and outputs as JSON; a damaged file may kill the process here."""
    from sa3_convert.errors import ModelFileError
    from sa3_convert.mnn.session import MnnSession

    found: dict[str, Any]
    try:
        with MnnSession(path, threads=1, memory="low") as session:
            found = {
                "inputs": {name: [str(port.dtype), list(port.shape)] for name, port in session.inputs.items()},
                "outputs": list(session.outputs),
            }
    except ModelFileError as error:
        found = {"error": str(error)}
    report.write_text(json.dumps(found), encoding="utf-8")
    return 0


def _run(job: Job) -> JobOutcome:
    import numpy as np

    from sa3_convert.errors import Sa3Error
    from sa3_convert.mnn.session import MnnSession

    messages: tuple[str, ...] = ()
    results: dict[str, Any] = {}
    settings: dict[str, Any] = {"backend": job.backend, "precision": job.precision, "memory": job.memory}
    try:
        with MnnSession(Path(job.model), outputs=job.outputs, threads=1, **settings) as session:
            for number, file in enumerate(job.feeds):
                with np.load(file, allow_pickle=False) as feeds:
                    ran = session.run({name: feeds[name] for name in feeds.files})
                results |= {f"{number}/{name}": array for name, array in ran.items()}
            messages = session.messages
    except (Sa3Error, ValueError) as error:
        return JobOutcome(str(error), messages)
    np.savez(job.arrays, **results)
    return JobOutcome(None, messages)


def _refuse(event: str, arguments: tuple[object, ...]) -> None:
    if event in _FORBIDDEN:
        raise PermissionError(f"conversion tried {event}{arguments!r}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
