"""From a backend to a diagnosis, kept for other commands."""

import time

from sa3_convert.doctor.examine import Report, examine
from sa3_convert.doctor.results import Diagnosis
from sa3_convert.doctor.saved import this_machine
from sa3_convert.doctor.surroundings import surroundings
from sa3_convert.fingerprint import version_of
from sa3_convert.mnn.backends import Backend


def diagnose(backend: Backend, report: Report = lambda done, total: None) -> Diagnosis:
    """Run every probe on a backend.

    Raises:
        BackendError: MNN or the backend is not there.

    """
    start = time.perf_counter()
    results = tuple(examine(backend, report=report))
    return Diagnosis(
        mnn=version_of("MNN"),
        backend=backend,
        machine=this_machine(),
        results=results,
        seconds=time.perf_counter() - start,
        surroundings=surroundings(),
    )
