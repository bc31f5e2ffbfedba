"""Options of `verify`, and the generations that they choose."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar

import typer

from sa3_convert.cli import paths
from sa3_convert.errors import UsageError

if TYPE_CHECKING:
    from sa3_convert.lab.generations.cases import GenerationCase

_T = TypeVar("_T")

QuickOption = Annotated[bool, typer.Option("--quick", help="Fewer and shorter sampled inputs: what `convert` runs.")]
FullOption = Annotated[
    bool, typer.Option("--full", help="Also compare whole generations, step by step and end to end.")
]
PromptsOption = Annotated[
    str | None, typer.Option("--prompts", metavar="N,N,…", help="Full: prompts by number, 0 to 7; all by default.")
]
SeedsOption = Annotated[
    str | None, typer.Option("--seeds", metavar="N,N,…", help="Full: start noises; 0,1 by default.")
]
SecondsOption = Annotated[
    str | None, typer.Option("--seconds", metavar="S,S,…", help="Full: durations; 2,5,10 by default.")
]
CasesOption = Annotated[
    list[str] | None,
    typer.Option("--case", metavar="CASE", help="Full: this generation only, as 'prompt=0 seed=1 seconds=5'; several."),
]
StepsOption = Annotated[int, typer.Option("--steps", min=1, max=1000, help="Full: denoising steps.")]
EngineOption = Annotated[
    Literal["mnn", "onnxruntime-int8"], typer.Option("--engine", help="Full: what runs the generations.")
]
ReferencesOption = Annotated[
    Path | None,
    typer.Option(
        "--references",
        metavar="DIR",
        help="Where reference outputs are kept for the next time; .sa3-convert-cache beside the bundle by default.",
    ),
]
ReferencesMibOption = Annotated[
    int, typer.Option("--references-mib", min=1, help="Bound of that folder; what was used least recently goes first.")
]
BisectOption = Annotated[
    bool | None,
    typer.Option(
        "--bisect/--no-bisect",
        help="Name the operator to blame in models that fall short; --full does by default. Report: show every model's "
        "operators; the default.",
    ),
]
ReportOption = Annotated[
    Path | None,
    typer.Option(
        "--report",
        metavar="DIR",
        help="Write index.html, report.json and summary.md there, in place of an earlier one.",
        callback=paths.makes,
    ),
]
SinceOption = Annotated[
    Path | None,
    typer.Option(
        "--since",
        metavar="REPORT.json",
        help="Report: also say what changed since this earlier one.",
        callback=paths.reads,
    ),
]
CaseOption = Annotated[
    str | None,
    typer.Option("--case", metavar="CASE", help="Inputs as a generation of `verify --full` has them; it names cases."),
]
StepOption = Annotated[
    int | None, typer.Option("--step", min=0, help="With --case, for the DiT: which denoising step, counted from 0.")
]
CaseStepsOption = Annotated[int, typer.Option("--steps", min=1, max=1000, help="With --case: how many there are.")]
BackendOption = Annotated[
    Literal["cpu", "cuda", "opencl", "vulkan"], typer.Option("--backend", help="What MNN runs the model on.")
]

MemoryOption = Annotated[Literal["normal", "high", "low"], typer.Option("--memory", help="Of MNN; see `run`.")]
PrecisionOption = Annotated[Literal["normal", "high", "low"], typer.Option("--precision", help="Of MNN; see `run`.")]
AgainstOption = Annotated[
    str | None,
    typer.Option(
        "--against",
        metavar="RUNTIME",
        help="Compare with the same file run otherwise, not with its reference: cpu, or cpu,memory=low,threads=1.",
    ),
]


def chosen_cases(
    prompts: str | None, seeds: str | None, seconds: str | None, names: Sequence[str] | None
) -> "tuple[GenerationCase, ...]":
    """Return the generations that options choose.

    Raises:
        UsageError: an option is no list of numbers, there is no such prompt, or both lists and cases are given.

    """
    from sa3_convert.lab.generations.cases import DURATIONS, PROMPTS, SEEDS, GenerationCase, all_cases

    if names:
        if any(option is not None for option in (prompts, seeds, seconds)):
            raise UsageError("--case names whole generations; --prompts, --seeds and --seconds do not go with it.")
        return tuple(dict.fromkeys(GenerationCase.parse(name) for name in names))
    numbers = _listed("--prompts", prompts, int, range(len(PROMPTS)), lambda n: 0 <= n < len(PROMPTS))
    durations = _listed("--seconds", seconds, float, DURATIONS, lambda s: math.isfinite(s) and s > 0)
    return all_cases(numbers, _listed("--seeds", seeds, int, SEEDS, lambda n: 0 <= n < 1 << 64), durations)


def _listed(
    option: str, text: str | None, kind: Callable[[str], _T], default: Sequence[_T], fits: Callable[[_T], bool]
) -> tuple[_T, ...]:
    if text is None:
        return tuple(default)
    try:
        found = tuple(dict.fromkeys(kind(part) for part in text.split(",")))
    except ValueError:
        found = ()
    if not found or not all(fits(value) for value in found):
        raise UsageError(f"{option} {text!r} is no list of such numbers; write for example {_example(default)}.")
    return found


def _example(default: Sequence[object]) -> str:
    return ",".join(f"{value:g}" if isinstance(value, float) else str(value) for value in default)
