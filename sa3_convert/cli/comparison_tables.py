"""Comparisons as tables for the terminal: sampled inputs, whole generations, bisections, drift."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from sa3_convert.check.results import BundleFidelity, ComponentFidelity, Measurement, Verdict
from sa3_convert.lab.bisect.against import Against
from sa3_convert.lab.bisect.result import BisectResult, limit_db
from sa3_convert.lab.drift.baseline import BundleBaseline, Figure
from sa3_convert.lab.drift.compare import Drift, Row, limit
from sa3_convert.lab.generations.audio_metrics import WINDOWS
from sa3_convert.lab.generations.cases import STEPS
from sa3_convert.lab.generations.distribution import FREE_RUNNING, Distribution, GenerationFidelity, component_of
from sa3_convert.lab.generations.end_to_end import Divergence, EndToEnd
from sa3_convert.runtime.engines import EngineName


def render_fidelity(result: BundleFidelity) -> Table:
    """Return one row per model: its worst figures, its floor, and whether it passed; about 80 columns wide."""
    table = Table(title=f"{result.bundle} ({result.recipe}) against ONNX Runtime, fp32")
    table.add_column("component", no_wrap=True)
    table.add_column("as", no_wrap=True)
    for name in ("dB", "mean", "floor", "cosine", "max error"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for verdict in result.verdicts:
        table.add_row(*_row(verdict))
    return table


def render_cases(fidelity: ComponentFidelity) -> Table:
    """Return one row per case and output of a component."""
    table = Table(title=fidelity.component.value)
    for name in ("case", "output"):
        table.add_column(name)
    for name in ("dB", "cosine", "max error", "mean error"):
        table.add_column(name, justify="right")
    for measurement in fidelity.measurements:
        table.add_row(measurement.case, measurement.output, *_figures(measurement))
    return table


def _figures(measurement: Measurement) -> tuple[str, ...]:
    f = measurement.fidelity
    return f"{f.signal_to_noise_db:.1f}", f"{f.cosine:.6f}", f"{f.max_abs_error:.2e}", f"{f.mean_abs_error:.2e}"


def _row(verdict: Verdict) -> tuple[str | Text, ...]:
    fidelity = verdict.fidelity
    worst = fidelity.worst
    return (
        fidelity.component.value,
        verdict.precision if verdict.engine == "mnn" else f"{verdict.precision} ORT",
        f"{worst.signal_to_noise_db:.1f}",
        f"{fidelity.mean.signal_to_noise_db:.1f}",
        f"{verdict.floor_db:g}",
        f"{worst.cosine:.6f}",
        f"{worst.max_abs_error:.2e}",
        Text("ok", "green") if verdict.passed else Text("failed", "red"),
    )


def render_against(result: Against, reach: int = 4) -> Table:
    """Return the operators around the first that differs between two ways to run a file, or around the worst."""
    centre = result.suspect or result.worst
    at = result.differences.index(centre)
    table = Table(title=result.verdict(), caption=f"{len(result.differences)} tensors were compared")
    for name in ("name", "MNN operator", "stored", "shape"):
        table.add_column(name)
    for name in ("dB in", "dB out"):
        table.add_column(name, justify="right")
    for difference in result.differences[max(0, at - reach) : at + reach + 1]:
        table.add_row(
            f"▶ {difference.name}" if difference is centre else f"  {difference.name}",
            difference.operator,
            difference.stored,
            "×".join(str(size) for size in difference.shape),
            f"{difference.in_db:.1f}",
            f"{difference.out_db:.1f}",
            style="bold red" if difference is result.suspect else None,
        )
    return table


def render_bisect(result: BisectResult, reach: int = 4) -> Table:
    """Return the operators around the one to blame, or around the one with the most error of its own."""
    centre = result.suspect or result.worst
    lost = len(result.incomparable)
    table = Table(title=result.verdict(), caption=f"{lost} tensors are not comparable: fused, or their names were lost")
    for name in ("ONNX name", "ONNX operators", "MNN operator", "stored", "shape"):
        table.add_column(name)
    for name in ("dB in", "dB out", "own dB", "allowed"):
        table.add_column(name, justify="right")
    for operator in result.around(centre, reach):
        table.add_row(
            f"▶ {operator.name}" if operator is centre else f"  {operator.name}",
            "+".join(operator.onnx_operators),
            operator.mnn_operator,
            operator.stored,
            "×".join(str(size) for size in operator.shape),
            f"{operator.error_in_db:.1f}",
            f"{operator.error_out_db:.1f}",
            f"{operator.own_error_db:.1f}",
            f"{limit_db(operator.stored):.0f}",
            style="bold red" if operator is result.suspect else None,
        )
    return table


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
        table.add_row(case.case, "target", *_distribution_figures([case.target]))
        table.add_row("", "chaos", *_distribution_figures([case.chaos]), style="dim")
    if len(result.cases) > 1:
        table.add_section()
        table.add_row("mean size", "target", *_distribution_figures([case.target for case in result.cases]))
        table.add_row("", "chaos", *_distribution_figures([case.chaos for case in result.cases]), style="dim")
    return Group(table, Text(result.judgement()))


def _distribution_figures(divergences: list[Divergence]) -> list[str]:
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


_STYLES = {"moved": "bold red", "gone": "bold red", "new": "bold red", "better": "green", "not judged": "dim"}


def render_drift(drift: Drift) -> Table:
    """Return what moved and what got better; when nothing did, sizes and means, so that one sees what was held."""
    moved = [row for row in drift.rows if row.failed or row.status == "better"]
    speed = [row for row in drift.rows if row.figure.kind == "speed" and row not in moved]
    rows = moved or [row for row in drift.rows if _is_main(row.figure)]
    what = "what moved" if not drift.passed else "what got better" if moved else "sizes and means; nothing moved"
    return _table(f"{' '.join(drift.baseline.key)}: {what}", [*rows, *speed])


def _is_main(figure: Figure) -> bool:
    return figure.kind == "size" or (figure.kind == "fidelity" and figure.name.endswith(": mean"))


def _table(title: str, rows: Sequence[Row]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("component", no_wrap=True)
    table.add_column("figure")
    for name in ("before", "now", "allowed"):
        table.add_column(name, justify="right")
    table.add_column("", no_wrap=True)
    for row in rows:
        table.add_row(
            row.figure.component.value,
            row.figure.name,
            "none" if row.before is None else shown(row.figure, row.before.value),
            "none" if row.now is None else shown(row.figure, row.now.value),
            "" if row.allowed is None else shown(row.figure, row.allowed),
            row.status,
            style=_STYLES.get(row.status),
        )
    return table


def render_baseline(baseline: BundleBaseline) -> Table:
    """Return the main figures of a new baseline with what each may become."""
    table = Table(title=f"{' '.join(baseline.key)}: baseline", title_justify="left")
    table.add_column("component", no_wrap=True)
    table.add_column("figure")
    for name in ("now", "allowed"):
        table.add_column(name, justify="right")
    for figure in filter(_is_main, baseline.figures):
        values = (shown(figure, figure.value), shown(figure, limit(figure)))
        table.add_row(figure.component.value, figure.name, *values)
    return table


def shown(figure: Figure, value: float | str) -> str:
    """Return a value in its unit."""
    if isinstance(value, str):
        return value
    if figure.kind == "size":
        return f"{value / 2**20:.3f} MiB"
    if figure.kind == "speed":
        return f"{value:.2f} ×"
    return f"{value:.2f} dB"
