"""Run the models of bundles on this machine, and compare them with the reference as x86 made it."""

import json
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from sa3_convert.arrays import Session, free
from sa3_convert.bundle.reader import Bundle
from sa3_convert.check.compare import Outputs, compare_runs, run_samples
from sa3_convert.check.inputs import Sample, samples_for
from sa3_convert.components import Component
from sa3_convert.runtime.engines import MnnEngine, bundle_engine

SETTINGS: dict[str, dict[str, Any]] = {
    "high": {"precision": "high"},
    "normal": {"precision": "normal"},
    "low": {"precision": "low"},
    "low, split": {"precision": "low", "split": True},
    "memory low": {"memory": "low"},
    "half": {"precision": "low"},
}
"""How `run` is asked to run models; at `low` it gives some of them `normal`. `half` is low for those."""


@dataclass(frozen=True)
class Figure:
    """The worst ratio of a model to the reference."""

    bundle: str
    component: str
    setting: str
    machine: str
    db: float
    emulated_db: float | None
    """What the conversion foretold of half arithmetic alone, where the model was run with it."""


def measured(folder: Path, references: Path, settings: Sequence[str]) -> Iterator[Figure]:
    """Yield the figures of a bundle; inputs and the reference's outputs are kept in `references` by the first run."""
    bundle = Bundle.open(folder)
    for component in bundle.components:
        kept = references / f"{folder.name}-{component.value}.npz"
        if not kept.is_file():
            _keep_reference(bundle, component, kept)
        samples, expected = _kept_reference(bundle, component, kept)
        for setting in settings:
            options = SETTINGS[setting]
            if setting == "low, split" and component is not Component.DIT:
                continue
            engine = bundle_engine(bundle, "mnn", {"threads": 1} | options)
            assert isinstance(engine, MnnEngine)
            if setting == "half":
                if component not in engine.raised:
                    continue
                engine = replace(engine, right_at_low=bundle.components)
            found = compare_runs(component, bundle.layout, samples, expected, _run(engine.load(component), samples))
            in_half = engine.precision == "low" and component not in engine.raised
            kind = "mnn-step" if "split" in options else "mnn"
            half_db = bundle.artifact(component, kind).half_db if in_half else None
            db = found.worst.signal_to_noise_db
            yield Figure(folder.name, component.value, setting, platform.machine(), db, half_db)


def _run(session: Session, samples: list[Sample]) -> list[Outputs]:
    try:
        return run_samples(session, samples)
    finally:
        free(session)


def _keep_reference(bundle: Bundle, component: Component, file: Path) -> None:
    samples = samples_for(component, bundle.layout, quick=True)
    outputs = _run(bundle_engine(bundle, "onnxruntime", {"threads": 1}).load(component), samples)
    arrays = {}
    for number, (sample, made) in enumerate(zip(samples, outputs, strict=True)):
        arrays |= {f"{number} fed {name}": array for name, array in sample.feeds.items()}
        arrays |= {f"{number} made {name}": array for name, array in made.items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("xb") as stream:
        np.savez(stream, **arrays)


def _kept_reference(bundle: Bundle, component: Component, file: Path) -> tuple[list[Sample], list[Outputs]]:
    with np.load(file) as archive:
        arrays = dict(archive)

    def named(prefix: str) -> Outputs:
        return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}

    # Another libm makes other inputs in the last bit, so they are kept as well.
    samples = samples_for(component, bundle.layout, quick=True)
    fed = [replace(sample, feeds=named(f"{number} fed ")) for number, sample in enumerate(samples)]
    return fed, [named(f"{number} made ") for number in range(len(samples))]


def main(
    references: Annotated[Path, typer.Option()],
    bundles: list[Path],
    setting: Annotated[list[str] | None, typer.Option()] = None,
) -> None:
    """Print a line of JSON for each figure."""
    for bundle in bundles:
        for figure in measured(bundle, references, setting or list(SETTINGS)):
            typer.echo(json.dumps(figure.__dict__))


if __name__ == "__main__":
    typer.run(main)
