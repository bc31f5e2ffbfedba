"""Which component runs on which backend, with a reason each: what was asked for, unless a probe says that it is wrong.

Data, not a fall-back: it is decided before anything runs, from one saved diagnosis, and told.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from sa3_convert.components import Component
from sa3_convert.errors import UsageError
from sa3_convert.lab.doctor.results import BAD, Diagnosis, described, setting_name
from sa3_convert.runtime.engines import Backend, Level

_LOW_PRECISION_PROBE = "softmax-low-precision"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a component runs, and why."""

    component: Component
    backend: Backend
    reason: str


def placement(
    backend: Backend,
    diagnosis: Diagnosis | None,
    *,
    precision: Level = "high",
    memory: Level = "normal",
    overrides: Mapping[Component, Backend] | None = None,
    components: Iterable[Component] = tuple(Component),
) -> tuple[Place, ...]:
    """Place each component on the backend that was asked for, unless a probe of it failed at this precision and memory.

    Without a diagnosis nothing was probed; what the user places in `overrides` is not questioned. Precision low is
    refused on CUDA, where Softmax is not known to be right with it.
    """
    given = overrides or {}
    setting = setting_name(precision, memory)
    places = []
    for component in components:
        if component in given:
            places.append(Place(component, given[component], "placed with --place"))
        elif backend == "cpu":
            places.append(Place(component, "cpu", "asked for"))
        else:
            _refuse_low_precision(backend, precision, diagnosis, setting)
            places.append(_probed(component, backend, diagnosis, setting))
    return tuple(places)


def _probed(component: Component, backend: Backend, diagnosis: Diagnosis | None, setting: str) -> Place:
    if diagnosis is None:
        return Place(component, backend, f"not probed; run `sa3-convert doctor --backend {backend}`")
    if failing := diagnosis.failing(component, setting):
        return Place(component, "cpu", described(failing, setting))
    fallen = [r.probe for r in diagnosis.results if component in r.needed_by and r.at(setting).outcome == "cpu"]
    return Place(
        component, backend, f"right, but partly on the CPU: {', '.join(fallen)}" if fallen else "its probes are right"
    )


def _refuse_low_precision(backend: Backend, precision: Level, diagnosis: Diagnosis | None, setting: str) -> None:
    if backend != "cuda" or precision != "low":
        return
    probe = None if diagnosis is None else diagnosis.result(_LOW_PRECISION_PROBE)
    if probe is None or probe.at(setting).outcome in BAD:
        raise UsageError(
            "From MNN 3.6.0 on, Softmax on CUDA reads half buffers as float with --precision low. Use normal or high, "
            "or show with `sa3-convert doctor --backend cuda` that this build does not."
        )


def parse_places(texts: Sequence[str]) -> dict[Component, Backend]:
    """Read `--place COMPONENT=BACKEND` options."""
    backends: dict[str, Backend] = {"cpu": "cpu", "cuda": "cuda", "opencl": "opencl", "vulkan": "vulkan"}
    found: dict[Component, Backend] = {}
    for text in texts:
        name, _, backend = text.partition("=")
        if name not in {c.value for c in Component} or backend not in backends:
            raise UsageError(
                f"--place {text!r} is no placement; write COMPONENT=BACKEND, such as text_encoder=cpu. Components: "
                f"{', '.join(c.value for c in Component)}; backends: {', '.join(backends)}."
            )
        if Component(name) in found:
            raise UsageError(f"--place names {name} twice.")
        found[Component(name)] = backends[backend]
    return found
