"""How figures, cases and the commands that replay them are written: in the terminal, on the page, in the summary."""

import re
import shlex
from pathlib import Path

from rich.cells import cell_len, set_cell_size

from sa3_convert.check.metrics import MAX_DB
from sa3_convert.components import Component
from sa3_convert.lab.generations.distribution import FREE_RUNNING, Distribution, component_of
from sa3_convert.lab.generations.trajectory import STEPS, GenerationCase
from sa3_convert.runtime.engines import EngineName

_GENERATION = re.compile(r"(prompt=\d+ seed=\d+ seconds=\d+(?:\.\d+)?)(?: step=(\d+))?", re.ASCII)
_LONGEST = 60
"""Columns, of which a letter of an East Asian script takes two."""


def fixed(value: float, digits: int, sign: str = "") -> str:
    """Return a number with so many digits after its point, and never the sign of what is rounded away."""
    return f"{value:{sign}z.{digits}f}"


def shown_db(ratio: float) -> str:
    """Return a ratio; of equal arrays it is infinite."""
    return "∞" if ratio >= MAX_DB else fixed(ratio, 1)


def shown_floor(floor_db: float | None) -> str:
    """Return a floor, or a dash for what has none."""
    return "–" if floor_db is None else f"{floor_db:g}"


def shown_size(size: int) -> str:
    """Return a size in bytes."""
    if size == 0:
        return "–"
    return f"{size / 2**20:.1f} MiB" if size >= 2**20 else f"{size / 2**10:.1f} KiB"


def shown_prompt(text: str, longest: int = _LONGEST) -> str:
    """Return a prompt in quotes, its end left out where it takes more columns."""
    if cell_len(text) > longest:
        text = f"{set_cell_size(text, longest - 1).rstrip()}…"
    return f"“{text}”" if text else "no prompt"


def with_prompts(text: str) -> str:
    """Return text in which whole generations are called by their prompts, and sampled inputs stay as they are."""
    return _GENERATION.sub(lambda found: _shown_case(GenerationCase.parse(found[1]), found[2]), text)


def _shown_case(case: GenerationCase, step: str | None) -> str:
    parts = (shown_prompt(case.text), f"seed {case.seed}", f"{case.seconds:g} s")
    return ", ".join((*parts, f"step {step}") if step else parts)


def replay(
    distribution: Distribution,
    bundle: Path,
    *,
    steps: int = STEPS,
    engine: EngineName = "mnn",
    references: Path | None = None,
) -> str:
    """Return the command that has the worst case again, of so many steps, run by `engine`.

    It bisects the model at the inputs of that case. Where a free-running generation stands has no such inputs, and the
    integer forms for ONNX Runtime cannot be bisected: their command measures that one case again.
    """
    words = ["--component", component_of(distribution.name).value, "--case", distribution.worst_case]
    words += ["--steps", str(steps)] if steps != STEPS else []
    words += [] if references is None else ["--references", str(references)]
    if distribution.name == FREE_RUNNING or engine != "mnn":
        words += ["--full", "--quick", *(["--engine", engine] if engine != "mnn" else [])]
        return shlex.join(["sa3-convert", "verify", str(bundle), *words])
    words += [] if distribution.worst_step is None else ["--step", str(distribution.worst_step)]
    return shlex.join(["sa3-convert", "bisect", str(bundle), *words])


def bisect_command(bundle: Path, component: Component, case: str = "", step: int | None = None) -> str:
    """Return the command that bisects a model: on a sampled input, as 'seed=3 T=108', or at a step of a generation."""
    if case.startswith("prompt="):
        words = ["--case", case, *([] if step is None else ["--step", str(step)])]
    else:
        options = {"seed": "--seed", "T": "--latents"}
        words = [word for pair in case.split() for word in (options[pair.split("=")[0]], pair.split("=")[1])]
    return shlex.join(["sa3-convert", "bisect", str(bundle), "--component", component.value, *words])
