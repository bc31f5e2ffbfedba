"""Whole generations as tables for the terminal, and how to have each worst case again."""

import shlex
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from sa3_convert.runtime.engines import EngineName
from sa3_convert.verify.audio_metrics import WINDOWS
from sa3_convert.verify.distribution import FREE_RUNNING, GenerationFidelity, component_of
from sa3_convert.verify.distribution_result import Distribution
from sa3_convert.verify.end_to_end import Divergence, EndToEnd
from sa3_convert.verify.generations import STEPS


def render_generations(
    result: GenerationFidelity, bundle: Path, *, engine: EngineName = "mnn", references: Path | None = None
) -> RenderableType:
    """Return a row per distribution, the DiT step by step, and the commands of `replay` for the worst cases."""
    on = "" if engine == "mnn" else f" on {engine}"
    table = Table(title=f"Over whole generations of {result.steps} steps{on}, dB", title_justify="left")
    table.add_column("", no_wrap=True)
    for name in ("runs", "mean", "5 %", "worst"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("worst case", no_wrap=True)
    for distribution in result.distributions:
        found = distribution.summary
        figures = (f"{value:.1f}" for value in (found.mean, found.percentile_5, found.worst))
        table.add_row(distribution.name, str(found.count), *figures, _case(distribution))
    parts: list[RenderableType] = [table]
    stepped = [d for d in result.distributions if d.by_step()]
    if stepped:
        parts.append(_steps(stepped))
    parts.append(Text("The worst cases again:"))
    for distribution in result.distributions:
        command = replay(distribution, bundle, steps=result.steps, engine=engine, references=references)
        parts.append(Text(f"  {command}"))
    return Group(*parts)


def _case(distribution: Distribution) -> str:
    found = distribution.summary
    return found.worst_case + ("" if found.worst_step is None else f" step={found.worst_step}")


def _steps(distributions: list[Distribution]) -> Table:
    """Return the mean and the worst of each denoising step."""
    table = Table(title="By denoising step, dB", title_justify="left")
    table.add_column("step", justify="right")
    for distribution in distributions:
        for name in ("mean", "worst"):
            table.add_column(f"{distribution.name}, {name}", justify="right")
    for step in distributions[0].by_step():
        figures = []
        for distribution in distributions:
            worst = min(o.fidelity.signal_to_noise_db for o in distribution.observations if o.step == step)
            figures += [f"{distribution.by_step()[step]:.1f}", f"{worst:.1f}"]
        table.add_row(str(step), *figures)
    return table


def replay(
    distribution: Distribution,
    bundle: Path,
    *,
    steps: int = STEPS,
    engine: EngineName = "mnn",
    references: Path | None = None,
) -> str:
    """Return the command that has the worst case again.

    It bisects the model at the inputs of that case. Where a free-running generation stands has no such inputs, and the
    integer forms for ONNX Runtime cannot be bisected: their command measures that one case again.

    Args:
        distribution: what was measured.
        bundle: of which bundle.
        steps: of the denoising loop.
        engine: what ran it.
        references: where reference outputs were kept, if that was asked for.

    """
    found = distribution.summary
    words = ["--component", component_of(distribution.name).value, "--case", found.worst_case]
    if steps != STEPS:
        words += ["--steps", str(steps)]
    if references is not None:
        words += ["--references", str(references)]
    if distribution.name == FREE_RUNNING or engine != "mnn":
        words += ["--full", "--quick", *(["--engine", engine] if engine != "mnn" else [])]
        return shlex.join(["sa3-convert", "verify", str(bundle), *words])
    words += [] if found.worst_step is None else ["--step", str(found.worst_step)]
    return shlex.join(["sa3-convert", "bisect", str(bundle), *words])


def render_end_to_end(result: EndToEnd) -> RenderableType:
    """Return each generation's figures beside those of the nudged reference, their means, and what they amount to."""
    table = Table(title="From prompt to audio, against the reference", title_justify="left")
    table.add_column("case", no_wrap=True)
    table.add_column("", no_wrap=True)
    for name in ("latent cosine", *(f"spectra {window}" for window in WINDOWS), "envelope", "LU", "width"):
        table.add_column(name, justify="right")
    for case in result.cases:
        table.add_row(case.case, "target", *_figures([case.target]))
        table.add_row("", "chaos", *_figures([case.chaos]), style="dim")
    if len(result.cases) > 1:
        table.add_section()
        table.add_row("mean size", "target", *_figures([case.target for case in result.cases]))
        table.add_row("", "chaos", *_figures([case.chaos for case in result.cases]), style="dim")
    return Group(table, Text(result.judgement()))


def _figures(divergences: list[Divergence]) -> list[str]:
    """Return means; of differences that have a sign, the mean size."""
    count = len(divergences)

    def mean(values: list[float]) -> float:
        return sum(values) / count

    audio = [d.audio for d in divergences]
    sign = "+" if count == 1 else ""
    loudness = audio[0].loudness_db if count == 1 else mean([abs(a.loudness_db) for a in audio])
    width = audio[0].width if count == 1 else mean([abs(a.width) for a in audio])
    return [
        f"{mean([d.latent_cosine for d in divergences]):.5f}",
        *(f"{mean([a.spectral_distance_db[i] for a in audio]):.2f}" for i in range(len(WINDOWS))),
        f"{mean([a.envelope_correlation for a in audio]):.4f}",
        f"{loudness:{sign}.2f}",
        f"{width:{sign}.3f}",
    ]
