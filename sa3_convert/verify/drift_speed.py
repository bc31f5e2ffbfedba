"""Speed as a ratio: MNN's time over ONNX Runtime's on the same inputs, in turns, so that a machine's noise cancels.

It is processor time on one thread: what other processes do counts for neither side, and thousands of short hand-overs
between threads, which is what a toy model is on many cores, are not taken for the speed of its arithmetic.
"""

import math
import statistics
import time
from collections.abc import Iterator, Mapping
from typing import Final

from sa3_convert.bundle.manifest import Bundle
from sa3_convert.components import Component
from sa3_convert.runtime.engines import Models
from sa3_convert.runtime.opening import bundle_engine
from sa3_convert.session import Arrays, Session
from sa3_convert.verify.drift_baseline import Figure
from sa3_convert.verify.drift_rules import speed_may_grow_by
from sa3_convert.verify.inputs import sample_inputs
from sa3_convert.verify.progress import Report

REPEATS: Final = 5
_LATENTS: Final[Mapping[Component, int]] = {Component.DIT: 108, Component.DECODER: 32, Component.ENCODER: 32}
_SHORTEST: Final = 0.05
"""Seconds of work between two looks at the clock, whose steps can be of milliseconds."""


def speed_figures(bundle: Bundle, report: Report) -> Iterator[Figure]:
    """Yield one ratio per component; both of its models are in memory together.

    Args:
        bundle: its files were checked.
        report: called as work goes on.

    """
    engines = [bundle_engine(bundle, name, {"threads": 1}) for name in ("onnxruntime", "mnn")]
    for done, component in enumerate(bundle.components):
        report("speed", done, len(bundle.components))
        sample = sample_inputs(component, bundle.layout, seed=0, latents=_LATENTS.get(component, 1))
        reference, target = (Models(engine).use(component) for engine in engines)
        with reference as first, target as second:
            ratios = time_ratios(first, second, sample.feeds)
        ratio = statistics.median(ratios)
        yield Figure(
            component=component,
            kind="speed",
            name="time, MNN / ONNX Runtime",
            value=round(ratio, 4),
            rule="may not rise",
            tolerance=round(speed_may_grow_by(ratio, ratios), 4),
        )


def time_ratios(reference: Session, target: Session, feeds: Arrays, repeats: int = REPEATS) -> list[float]:
    """Return the target's time over the reference's, in pairs of which every other one starts with the target."""
    sessions = (reference, target)
    for session in sessions:
        session.run(feeds)
    runs = math.ceil(_SHORTEST / max(_seconds(reference, feeds, 1), 1e-6))
    ratios = []
    for turn in range(repeats):
        seconds = {}
        for index in (0, 1) if turn % 2 else (1, 0):
            seconds[index] = _seconds(sessions[index], feeds, runs)
        ratios.append(seconds[1] / seconds[0])
    return ratios


def _seconds(session: Session, feeds: Arrays, runs: int) -> float:
    start = time.process_time()
    for _ in range(runs):
        session.run(feeds)
    return time.process_time() - start
