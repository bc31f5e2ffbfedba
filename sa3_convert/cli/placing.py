"""Where `run` puts the components, told before it begins."""

from collections.abc import Sequence

from sa3_convert.cli.console import stderr
from sa3_convert.components import Component
from sa3_convert.doctor.saved import saved
from sa3_convert.mnn.backends import require_backend
from sa3_convert.runtime.engines import Backend, Level
from sa3_convert.runtime.placement import parse_places, placement


def placed(backend: Backend, precision: Level, memory: Level, overrides: Sequence[str]) -> dict[Component, Backend]:
    """Return the backend of each component, and say why on stderr unless all is as usual.

    Raises:
        UsageError: an override is no placement, or the precision cannot be had.
        BackendError: a backend is not there.

    """
    given = parse_places(overrides)
    for wanted in {backend, *given.values()} - {"cpu"}:
        require_backend(wanted)
    diagnosis = None if backend == "cpu" else saved(backend)
    places = placement(backend, diagnosis, precision=precision, memory=memory, overrides=given)
    for place in places if backend != "cpu" or given else ():
        stderr.print(f"{place.component.value} on {place.backend}: {place.reason}")
    return {place.component: place.backend for place in places}
