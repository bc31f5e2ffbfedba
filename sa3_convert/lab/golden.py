"""What the published reference implementation gives on a toy that `synthesize` makes, and how far an engine is from it.

`golden.safetensors` was computed by that implementation in float32 on a CPU; `tests/golden/README.md` says how.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open

from sa3_convert.arrays import constant, host
from sa3_convert.checkpoint.reader import Checkpoint
from sa3_convert.components import Component, contract
from sa3_convert.errors import Sa3Error, VerificationError
from sa3_convert.lab.bench import Contender
from sa3_convert.runtime.output_checks import CHECKS
from sa3_convert.runtime.pipeline import Pipeline
from sa3_convert.runtime.request import GenerateRequest

_FILE: Final = Path(__file__).with_suffix(".safetensors")
OF_PEAK: Final = 1e-3
"""Of the largest magnitude, for engines that compute in float32. Sums in another order and another sine leave 10⁻⁴ in
a component at most (phases reach 6·10⁴ rad, where float32 has steps of 4·10⁻³), and eight steps may carry that on
tenfold. Ten bits of what is multiplied, as halves and TF32 have them, leave 4·10⁻⁴ to 9·10⁻⁴, and 2.5·10⁻³ in the
guided case, which finds them."""
_GENERATION: Final = GenerateRequest(
    "warm analog synth pad with slow attack, 90 BPM", seconds=0.2, steps=8, seed=7, peak="clip"
)
_GUIDED: Final = GenerateRequest(
    _GENERATION.prompt,
    seconds=0.2,
    steps=8,
    seed=5,
    cfg_scale=4.0,
    negative_prompt="thunder and heavy rain on a tin roof, distant dogs barking",
    peak="clip",
)


@dataclass(frozen=True, slots=True)
class GoldenFinding:
    """One golden case on one engine."""

    engine: str
    what: str
    of_peak: float | None = None
    """Largest difference from what the reference implementation gave, in parts of its largest magnitude."""
    error: str = ""

    @property
    def passes(self) -> bool:
        """Whether it is within the limit."""
        return self.of_peak is not None and self.of_peak <= OF_PEAK

    def describe(self) -> str:
        """Return what was found, in a few words."""
        found = self.error if self.of_peak is None else f"{self.of_peak:.1e} of the peak, more than {OF_PEAK:g}"
        return f"{self.engine}, golden {self.what}: {found}"


@dataclass(frozen=True, slots=True)
class Golden:
    """The golden cases."""

    tensors: Mapping[str, NDArray[Any]]
    weights: Mapping[str, str]
    """By component: SHA-256 of the weights that they are of."""

    @classmethod
    def read(cls) -> "Golden":
        """Read them from the package."""
        with safe_open(_FILE, framework="numpy") as file:
            return cls({name: file.get_tensor(name) for name in file.keys()}, file.metadata())  # noqa: SIM118

    def check(self, checkpoint: Checkpoint) -> None:
        """Raise VerificationError unless a checkpoint is the one that they are of."""
        for name, digest in self.weights.items():
            if checkpoint.digest(Component(name)) != digest:
                raise VerificationError(
                    f"NumPy {version('numpy')} makes other numbers of the toy's seed than those that the reference was "
                    f"given ({name} differs), so nothing can be said. Use the one of constraints.txt."
                )

    def distances(self, pipeline: Pipeline) -> Iterator[tuple[str, float]]:
        """Yield what was compared, and its largest difference in parts of the reference's largest magnitude.

        Each component runs twice on the same arrays: what stays the same is recorded by then, and graphs are replayed.
        """
        for component in Component:
            ports = contract(component, pipeline.layout)
            feeds = {port.name: constant(self.tensors[f"{component.value}.{port.name}"]) for port in ports.inputs}
            (output,) = ports.outputs
            with pipeline.models.use(component) as session:
                runs = [host(session.run(feeds)[output.name]) for _ in range(2)]
            expected = self.tensors[f"{component.value}.{output.name}"]
            yield component.value, max(of_peak(run, expected) for run in runs)
        made = pipeline.generate(_GENERATION, allow=CHECKS)
        yield "generation", of_peak(host(made.report.latents), self.tensors["generate.latents"])
        yield "its audio", of_peak(made.audio[np.newaxis], self.tensors["decoder.audio"].clip(-1, 1))
        made = pipeline.generate(_GUIDED, allow=CHECKS)
        yield "guided", of_peak(host(made.report.latents), self.tensors["guided.latents"])


def golden_findings(
    contenders: Sequence[Contender], checkpoint: Checkpoint, say: Callable[[str], None]
) -> list[GoldenFinding]:
    """Hold engines over a toy checkpoint, or over what was converted from it, to the golden cases.

    Raises:
        VerificationError: the checkpoint is not the one that they are of.

    """
    cases = Golden.read()
    cases.check(checkpoint)
    findings = []
    for contender in contenders:
        say(f"golden cases, {contender.name}")
        troubles: list[str] = []
        with tolerated("error", troubles), contender.open(keep_loaded=True) as pipeline:
            for what, distance in cases.distances(pipeline):
                known = distance if np.isfinite(distance) else None
                error = "" if known is not None else "what came out is not all numbers"
                findings.append(GoldenFinding(contender.name, what, known, error))
        findings += [GoldenFinding(contender.name, "the rest", error=trouble) for trouble in troubles]
    return findings


@contextlib.contextmanager
def tolerated(what: str, troubles: list[str]) -> Iterator[None]:
    """Let a test go on after what goes wrong in the block; libraries of GPUs have errors of their own kinds."""
    try:
        yield
    except Exception as error:
        troubles.append(f"{what}: {error if isinstance(error, Sa3Error) else repr(error)}")


def of_peak(actual: NDArray[Any], expected: NDArray[Any]) -> float:
    """Return the largest difference over the last axis' first places, those that `expected` has; inf for no number."""
    difference = np.abs(actual[..., : expected.shape[-1]].astype(np.float64) - expected)
    return float(np.nan_to_num(difference, nan=np.inf).max() / np.abs(expected).max())
