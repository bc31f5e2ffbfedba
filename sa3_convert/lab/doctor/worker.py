"""What runs in a process of its own, which MNN may end: models on a backend, their results written one by one.

Started by `apart`. A job that is found without a report is the one that ended the process.
"""

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from sa3_convert.errors import Sa3Error
from sa3_convert.system.supervisor import die_with_parent

RUN, CALL = "run", "call"


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
    """Where to write; `<report>.npz` gets the arrays, named "run/output"."""

    @property
    def arrays(self) -> Path:
        """Where its outputs are."""
        return Path(f"{self.report}.npz")

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> Self:
        """Read what `dataclasses.asdict` gave."""
        return cls(**{**data, "feeds": tuple(data["feeds"]), "outputs": tuple(data["outputs"])})


@dataclass(frozen=True, slots=True)
class Ran:
    """What became of a job that ended by itself."""

    error: str | None
    messages: tuple[str, ...]


def main(arguments: list[str]) -> int:
    """Run `run JOBS` or `call NAME MODEL REPORT`; always 0 when the process lives to its end."""
    die_with_parent()
    command, *rest = arguments
    if command == CALL:
        from sa3_convert.lab.doctor.bindings import CHECKS

        name, model, report = rest
        Path(report).write_text(json.dumps(CHECKS[name](Path(model))), encoding="utf-8")
        return 0
    for data in json.loads(Path(rest[0]).read_text(encoding="utf-8")):
        job = Job.from_data(data)
        ran = _run(job)
        Path(job.report).write_text(json.dumps(asdict(ran)), encoding="utf-8")
    return 0


def _run(job: Job) -> Ran:
    from sa3_convert.mnn.session import MnnSession

    messages: tuple[str, ...] = ()
    results: dict[str, NDArray[Any]] = {}
    settings: dict[str, Any] = {"backend": job.backend, "precision": job.precision, "memory": job.memory}
    try:
        with MnnSession(Path(job.model), outputs=job.outputs, threads=1, **settings) as session:
            for number, file in enumerate(job.feeds):
                with np.load(file, allow_pickle=False) as feeds:
                    ran = session.run({name: feeds[name] for name in feeds.files})
                results |= {f"{number}/{name}": array for name, array in ran.items()}
            messages = session.messages
    except (Sa3Error, ValueError) as error:
        return Ran(str(error), messages)
    np.savez(job.arrays, **results)  # type: ignore[arg-type]
    return Ran(None, messages)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
