"""The inputs that a component meets in a generation: what a bisection of a verification's worst case needs."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sa3_convert.arrays import Arrays
from sa3_convert.components import Component
from sa3_convert.errors import UsageError
from sa3_convert.lab.generations.trajectory import GenerationCase, References, Side, dit_constants
from sa3_convert.runtime.engines import EngineName


def case_feeds(references: References, component: Component, case: GenerationCase, step: int | None) -> Arrays:
    """Return what a component is run with in a case, everything before it computed by the references.

    Args:
        references: of the bundle.
        component: which one. Of audio that is decoded in several windows, the first one counts.
        case: the generation.
        step: of the denoising loop, for the DiT alone.

    Raises:
        UsageError: there is no such step, or a step was given for a component that has none, or none for the DiT.

    """
    if (step is None) == (component is Component.DIT):
        raise UsageError("A step of the denoising loop (--step) goes with the DiT, and the DiT's case needs one.")
    if step is not None:
        return _dit_feeds(references, case, step)
    recorder = _Recorder()
    side = Side(references.side.bundle, recorder)
    try:
        if component is Component.TEXT_ENCODER:
            side.prompt_embedding(case)
        elif component is Component.NUMBER_CONDITIONER:
            side.seconds_embedding(case)
        elif component is Component.DECODER:
            side.audio(case, references.trajectory(case).result)
        else:
            side.encoded(references.audio(case))
    except _RecordedError:
        pass
    return recorder.feeds


def _dit_feeds(references: References, case: GenerationCase, step: int) -> Arrays:
    path = references.trajectory(case)
    if not 0 <= step < len(path.times):
        raise UsageError(f"There is no step {step}; steps are 0 to {len(path.times) - 1}.")
    x, t = path.inputs[step], path.times[step]
    constants = dit_constants(references.side.layout, case, references.conditioning(case))
    return {"x": x, "t": np.array([t], np.float32), **constants}


class _RecordedError(Exception):
    """Ends a run of which only the inputs are wanted."""


class _Recorder:
    """An engine and its only session: keeps the first inputs that it is handed, and stops there."""

    name: EngineName = "onnxruntime"
    settings: Mapping[str, Any] = MappingProxyType({})

    def __init__(self) -> None:
        self.feeds: Arrays = {}

    def load(self, component: Component) -> "_Recorder":
        return self

    def run(self, feeds: Arrays) -> dict[str, NDArray[Any]]:
        self.feeds = feeds
        raise _RecordedError
