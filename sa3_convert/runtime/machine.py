"""What a measurement was made on."""

import os
import platform
from pathlib import Path
from typing import Any

from sa3_convert.processors import usable_processors
from sa3_convert.tools import tool_versions

_INTERESTING = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "amx_int8", "asimddp", "i8mm")
"""Instruction sets that decide how fast integer products are."""


def machine() -> dict[str, Any]:
    """Return processor, cores, memory, system and versions, JSON-ready; what the system does not tell is None."""
    model, flags = _processor(Path("/proc/cpuinfo"))
    return {
        "processor": model or platform.processor() or platform.machine(),
        "instructions": [name for name in _INTERESTING if name in flags],
        "cores": os.cpu_count(),
        "usable_cores": usable_processors(),
        "memory_bytes": _memory(),
        "system": platform.platform(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "versions": tool_versions(),
    }


def _processor(file: Path) -> tuple[str | None, frozenset[str]]:
    """Return model name and instruction sets from the kernel's description."""
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None, frozenset()
    fields: dict[str, str] = {}
    for line in text.splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    return fields.get("model name"), frozenset((fields.get("flags") or fields.get("Features") or "").split())


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None
