"""A small report made by hand, with names that a careless page would stumble over."""

from typing import Any

from sa3_convert.check.results import Figures, Measurement, Spread
from sa3_convert.components import Component
from sa3_convert.lab.generations.distribution import Observation
from sa3_convert.lab.generations.end_to_end import AudioFidelity, Divergence, EndToEnd, EndToEndCase
from sa3_convert.lab.miniature.judge import Recognition
from sa3_convert.lab.report.schema import (
    Bisection,
    Generations,
    Made,
    ModelFile,
    Operator,
    Report,
    ReportedDistribution,
    ReportedModel,
    StepSpread,
    StoredType,
)

CASES = ("prompt=6 seed=0 seconds=1", "prompt=4 seed=0 seconds=1")
"""A prompt in letters that few fonts have, and none."""
NASTY = '<script>alert(1)</script> & "quotes" | pipe `tick` $x_1$'


def figures(db: float = 40.0) -> dict[str, float]:
    return {"signal_to_noise_db": db, "cosine": 0.9999, "max_abs_error": 0.1, "mean_abs_error": 0.01}


def spread(worst: float = 38.0, count: int = 4) -> Spread:
    return Spread(count=count, mean=worst + 2, percentile_5=worst + 0.5, worst=worst)


def component(name: Component = Component.DIT, **changes: Any) -> ReportedModel:
    values: dict[str, Any] = {
        "component": name,
        "engine": "mnn",
        "precision": "int8",
        "passed": True,
        "floor_db": 30.0,
        "claimed_db": 38.0,
        "measured_db": 38.0,
        "spread": spread(),
        "worst": Figures(**figures(38.0)),
        "worst_case": "seed=3 T=8",
        "replay": f"sa3-convert bisect 'my bundle' --component {name.value} --seed 3 --latents 8",
        "cases": (Measurement("seed=3 T=8", "out", **figures(38.0)), Measurement("s", "o", **figures(300.0))),
        "bytes": 3000,
        "files": (ModelFile(path=f"{name.value}.mnn", bytes=3000, sha256="0f" * 32),),
        "stored": (StoredType(type="int8", bytes=2000), StoredType(type="structure", bytes=1000)),
    }
    return ReportedModel(**values | changes)


def distribution(name: str, part: Component, steps: int) -> ReportedDistribution:
    return ReportedDistribution(
        name=name,
        component=part,
        spread=spread(),
        floor_db=None if "free" in name else 30.0,
        worst_case="prompt=0 seed=0 seconds=1",
        worst_step=1 if steps else None,
        replay=f"sa3-convert bisect b --component {part.value}",
        by_step=tuple(StepSpread(step=i, best=50.0 - i, **dict(spread(40.0 - i))) for i in range(steps)),
        observations=tuple(Observation("c", step=i, **figures(40.0 - i)) for i in range(max(steps, 1))),
    )


def operator(name: str, own: float, **changes: Any) -> Operator:
    values: dict[str, Any] = {
        "name": name,
        "onnx_operators": ("MatMul", "Add"),
        "mnn_operator": "Convolution",
        "stored": "int8",
        "shape": (1, 8, 4),
        "error_in_db": 60.0,
        "error_out_db": own - 1,
        "own_error_db": own,
        "limit_db": 36.0,
        "is_faulty": own < 36,
    }
    return Operator(**values | changes)


def bisection(name: Component = Component.DIT, own: float = 45.0) -> Bisection:
    suspect = NASTY if own < 36 else None
    return Bisection(
        component=name,
        fell_short=own < 36,
        verdict=f"{NASTY} is the worst.",
        suspect=suspect,
        operators=(operator("first", 300.0), operator(NASTY, own), *(operator(f"o{i}", 50.0 + i) for i in range(20))),
        incomparable=2,
        replay=f"sa3-convert bisect b --component {name.value}",
    )


def end_to_end() -> EndToEnd:
    def divergence(distance: float) -> Divergence:
        audio = AudioFidelity(
            spectral_distance_db=(distance,) * 3,
            envelope_correlation=0.99,
            loudness_db=-0.001,
            width=0.01,
        )
        return Divergence(latent_cosine=0.999, audio=audio)

    cases = tuple(EndToEndCase(name, divergence(1.0 + i), divergence(0.5)) for i, name in enumerate(CASES))
    return EndToEnd(cases)


def made(**changes: Any) -> Made:
    tools = {"sa3-convert": "0.1.0", "MNN": "3.6.1", "onnxruntime": "1.32.0"}
    values: dict[str, Any] = {
        "bundle": f"bundles/{NASTY}",
        "variant": "small-music",
        "recipe": NASTY,
        "checkpoint": "somewhere",
        "digests": {"dit": "ab" * 32},
        "converted_with": tools,
        "verified_with": tools,
        "bytes": 3000,
    }
    return Made(**values | changes)


def report(**changes: Any) -> Report:
    values: dict[str, Any] = {
        "passed": True,
        "verdict": "Passed: all is well.",
        "problems": (),
        "made": made(),
        "since_conversion": (),
        "since_report": None,
        "components": (component(), component(Component.DECODER)),
        "generations": Generations(
            engine="mnn",
            steps=3,
            distributions=(
                distribution("dit, teacher-forced", Component.DIT, 3),
                distribution("dit, free-running", Component.DIT, 3),
                distribution("decoder", Component.DECODER, 0),
            ),
        ),
        "end_to_end": end_to_end(),
        "recognitions": (Recognition("mnn", 9, 10, "inpainting", ((NASTY, "silence"),)),),
        "bisections": (bisection(), bisection(Component.DECODER)),
        "not_run": (),
    }
    return Report(**values | changes)
