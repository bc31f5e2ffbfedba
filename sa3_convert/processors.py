"""How many processors there are to compute with."""

import os
from pathlib import Path

_TOPOLOGY = Path("/sys/devices/system/cpu")


def usable_processors() -> int:
    """Return how many processors this process may use."""
    return len(_usable()) or os.cpu_count() or 1


def default_threads(topology: Path = _TOPOLOGY) -> int:
    """Return the number of threads to compute with when nobody says: one per usable physical core.

    Two threads on one core share its arithmetic units, which a single one keeps busy.

    Args:
        topology: where Linux describes its processors; what it does not describe counts as a core of its own.

    """
    cores = {_siblings(topology / f"cpu{number}/topology/thread_siblings_list", number) for number in _usable()}
    return len(cores) or usable_processors()


def _usable() -> set[int]:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()


def _siblings(file: Path, number: int) -> str:
    """Return what processors of one core have in common."""
    try:
        return file.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return str(number)
