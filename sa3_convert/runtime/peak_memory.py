"""How much memory a generation takes at most, measured in a process that does nothing else."""

import dataclasses
import json
import resource
import subprocess
import sys
from pathlib import Path

from sa3_convert.errors import BackendError
from sa3_convert.runtime.checks import CHECKS
from sa3_convert.runtime.contenders import Contender
from sa3_convert.runtime.request import GenerateRequest
from sa3_convert.runtime.timed import Clock
from sa3_convert.supervisor import die_with_parent


def peak_memory(contender: Contender, request: GenerateRequest) -> int:
    """Return the most bytes that were resident at once while a new process made one generation.

    Models are loaded for their stage and freed after it, as `run` does.

    Raises:
        BackendError: the process failed; the message is its own.

    """
    task = {"contender": dataclasses.asdict(contender), "request": request.to_json()}
    command = [sys.executable, "-m", "sa3_convert.runtime.peak_memory"]
    result = subprocess.run(command, input=json.dumps(task), capture_output=True, text=True, check=False)
    if result.returncode:
        reason = result.stderr.strip().splitlines()[-1:] or ["without a word (killed for its memory?)"]
        raise BackendError(f"Measuring the memory of {contender.name} ended with {result.returncode}: {reason[0]}")
    return int(json.loads(result.stdout)["peak_bytes"])


def resident_peak() -> int:
    """Return this process's largest resident size so far, in bytes."""
    try:
        # Unlike ru_maxrss this does not count what the parent had before it started this program.
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:"))


def _main() -> None:
    die_with_parent()
    task = json.load(sys.stdin)
    request = GenerateRequest.from_json(task["request"])
    with Contender(**task["contender"]).open(Clock(), keep_loaded=False) as pipeline:
        # Chunks are let go as they come, as when they are written to a file.
        for _ in pipeline.stream(request, allow=CHECKS):
            pass
    sys.stdout.write(json.dumps({"peak_bytes": resident_peak()}) + "\n")


if __name__ == "__main__":
    _main()
