"""Diagnoses on disk: one file per version of MNN, backend and machine, whole or absent; reading one is all `run` does.

A file that is damaged, of another shape, or about something else than its name says counts as absent: nothing is
believed that was not probed.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

import platformdirs

from sa3_convert.doctor.results import Diagnosis
from sa3_convert.files import write_text
from sa3_convert.fingerprint import fingerprint, version_of
from sa3_convert.gpu import gpus
from sa3_convert.runtime.machine import machine
from sa3_convert.untrusted import read_json


@cache
def this_machine() -> str:
    """Return a short name for what decides how MNN computes here: processor, instruction sets, GPUs."""
    found: dict[str, Any] = machine()
    parts = {name: found[name] for name in ("processor", "instructions")}
    return fingerprint(**parts, gpus=[(gpu.name, gpu.driver) for gpu in gpus()])[:12]


def diagnosis_path(backend: str) -> Path:
    """Return where the diagnosis of the installed MNN on this machine stands."""
    folder = Path(platformdirs.user_cache_dir("sa3-convert")) / "doctor"
    return folder / f"mnn-{version_of('MNN')}-{backend}-{this_machine()}.json"


def save(diagnosis: Diagnosis) -> Path:
    """Keep a diagnosis of the installed MNN on this machine; return where."""
    path = diagnosis_path(diagnosis.backend)
    write_text(path, json.dumps(diagnosis.to_data(), indent=1, allow_nan=False) + "\n")
    return path


def saved(backend: str) -> Diagnosis | None:
    """Return what was found for the installed MNN on this machine, or None when it was not probed."""
    try:
        diagnosis = Diagnosis.from_data(read_json(diagnosis_path(backend)))
    except (OSError, ValueError):
        return None
    wanted = (version_of("MNN"), backend, this_machine())
    return diagnosis if (diagnosis.mnn, diagnosis.backend, diagnosis.machine) == wanted else None
