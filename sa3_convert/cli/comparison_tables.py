"""Comparisons as tables for the terminal: sampled inputs, whole generations, bisections, drift."""

from collections.abc import Iterable
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from sa3_convert.check.results import BundleFidelity, Verdict
from sa3_convert.cli.console import grid
from sa3_convert.lab.bisect.runtimes import RuntimeComparison
from sa3_convert.lab.bisect.walk import BisectResult, limit_db
from sa3_convert.lab.drift.baseline import BundleBaseline, Figure
from sa3_convert.lab.drift.compare import Drift, limit
from sa3_convert.lab.generations.distribution import Distribution, GenerationFidelity, ratios_by_step
from sa3_convert.lab.generations.end_to_end import WINDOWS, Divergence, EndToEnd
from sa3_convert.lab.report.formatting import fixed, replay
from sa3_convert.runtime.engines import EngineName


def _table(title: str, words: Iterable[str], figures: Iterable[str], *, no_wrap: bool = False) -> Table:
    """Return an empty table: columns of words, of which the first keeps its lines, and then of figures."""
    table = Table(title=title, title_justify="left")
    for number, name in enumerate(words):
        table.add_column(name, no_wrap=no_wrap or (number == 0 and name in ("component", "case")))
    for name in figures:
        table.add_column(name, justify="right", no_wrap=no_wrap)
    return table


def render_fidelity(result: BundleFidelity) -> Table:
    """Return one row per model: worst figures (the largest error), floor, and whether it passed; 80 columns wide."""
    title = f"{result.bundle} ({result.recipe}) against ONNX Runtime, fp32"
    figures = ("dB", "mean", "floor", "cosine", "error", "at low")
    table = grid(title, ("component", "as"), figures, ("",))
    for verdict in result.verdicts:
        table.add_row(*_row(verdict))
    for verdict in result.adapted:
        table.add_row(*_row(verdict, " slots"))
    return table


def _row(verdict: Verdict, form: str = "") -> tuple[str | Text, ...]:
    worst = verdict.worst
    return (
        verdict.component.value,
        verdict.precision + ("" if verdict.engine == "mnn" else " ORT") + form,
        fixed(worst.signal_to_noise_db, 1),
        fixed(verdict.mean.signal_to_noise_db, 1),
        f"{verdict.floor_db:g}" if verdict.has_floor else "–",
        fixed(worst.cosine, 5),
        f"{worst.max_abs_error:.0e}",
        "–" if verdict.half_db is None else fixed(verdict.half_db, 1),
        Text("failed", "red") if not verdict.passed else Text("ok" if verdict.has_floor else "", "green"),
    )


def render_against(result: RuntimeComparison, reach: int = 4) -> Table:
    """Return the operators around the first that differs between two ways to run a file, or around the worst."""
    centre = result.suspect or result.worst
    at = result.differences.index(centre)
    table = _table(result.verdict(), ("name", "MNN operator", "stored", "shape"), ("dB in", "dB out"))
    table.caption = f"{len(result.differences)} tensors were compared"
    for difference in result.differences[max(0, at - reach) : at + reach + 1]:
        table.add_row(
            f"▶ {difference.name}" if difference is centre else f"  {difference.name}",
            difference.operator,
            difference.stored,
            "×".join(str(size) for size in difference.shape),
            fixed(difference.in_db, 1),
            fixed(difference.out_db, 1),
            style="bold red" if difference is result.suspect else None,
        )
    return table


def render_bisect(result: BisectResult, reach: int = 4) -> Table:
    """Return the operators around the one to blame, or around the one with the most error of its own."""
    centre = result.suspect or result.worst
    names = ("ONNX name", "ONNX operators", "MNN operator", "stored", "shape")
    table = _table(result.verdict(), names, ("dB in", "dB out", "own dB", "allowed"))
    table.caption = f"{len(result.incomparable)} tensors are not comparable: fused, or their names were lost"
    for operator in result.around(centre, reach):
        table.add_row(
            f"▶ {operator.name}" if operator is centre else f"  {operator.name}",
            "+".join(operator.onnx_operators),
            operator.mnn_operator,
            operator.stored,
            "×".join(str(size) for size in operator.shape),
            fixed(operator.error_in_db, 1),
            fixed(operator.error_out_db, 1),
            fixed(operator.own_error_db, 1),
            fixed(limit_db(operator.stored), 0),
            style="bold red" if operator is result.suspect else None,
        )
    return table


def render_generations(
    result: GenerationFidelity, bundle: Path, *, engine: EngineName = "mnn", references: Path | None = None
) -> RenderableType:
    """Return a row per distribution, the DiT step by step, and the commands of `replay` for the worst cases."""
    on = "" if engine == "mnn" else f" on {engine}"
    title = f"Over whole generations of {result.steps} steps{on}, dB"
    table = _table(title, ("",), ("runs", "mean", "5 %", "worst"), no_wrap=True)
    table.add_column("worst case", no_wrap=True)
    for distribution in result.distributions:
        figures = (fixed(ratio, 1) for ratio in (distribution.mean, distribution.percentile_5, distribution.worst))
        table.add_row(distribution.name, str(distribution.count), *figures, distribution.place)
    parts: list[RenderableType] = [table]
    stepped = [d for d in result.distributions if d.by_step]
    if stepped:
        parts.append(_steps(stepped))
    parts.append(Text("The worst cases again:"))
    for distribution in result.distributions:
        command = replay(distribution, bundle, steps=result.steps, engine=engine, references=references)
        parts.append(Text(f"  {command}"))
    return Group(*parts)


def _steps(distributions: list[Distribution]) -> Table:
    """Return the mean and the worst of each denoising step."""
    names = (f"{distribution.name}, {name}" for distribution in distributions for name in ("mean", "worst"))
    table = _table("By denoising step, dB", (), ("step", *names))
    worst = [{s: min(r) for s, r in ratios_by_step(d.observations).items()} for d in distributions]
    for step in distributions[0].by_step:
        pairs = ((d.by_step[step], low[step]) for d, low in zip(distributions, worst, strict=True))
        table.add_row(str(step), *(fixed(ratio, 1) for pair in pairs for ratio in pair))
    return table


def render_end_to_end(result: EndToEnd) -> RenderableType:
    """Return each generation's figures beside those of the nudged reference, their means, and what they amount to."""
    names = ("latent cosine", *(f"spectra {window}" for window in WINDOWS), "envelope", "LU", "width")
    table = _table("From prompt to audio, against the reference", ("case", ""), names)
    for case in result.cases:
        table.add_row(case.case, "target", *_distribution_figures([case.target]))
        table.add_row("", "chaos", *_distribution_figures([case.chaos]), style="dim")
    if len(result.cases) > 1:
        table.add_section()
        table.add_row("mean size", "target", *_distribution_figures([case.target for case in result.cases]))
        table.add_row("", "chaos", *_distribution_figures([case.chaos for case in result.cases]), style="dim")
    return Group(table, Text(result.judgement))


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
        fixed(mean([d.latent_cosine for d in divergences]), 5),
        *(fixed(mean([a.spectral_distance_db[i] for a in audio]), 2) for i in range(len(WINDOWS))),
        fixed(mean([a.envelope_correlation for a in audio]), 4),
        fixed(loudness, 2, sign),
        fixed(width, 3, sign),
    ]


_STYLES = {"moved": "bold red", "gone": "bold red", "new": "bold red", "better": "green", "not judged": "dim"}


def render_drift(drift: Drift) -> Table:
    """Return what moved and what got better; when nothing did, sizes and means, so that one sees what was held."""
    moved = [row for row in drift.rows if row.failed or row.status == "better"]
    speed = [row for row in drift.rows if row.figure.kind == "speed" and row not in moved]
    rows = moved or [row for row in drift.rows if _is_main(row.figure)]
    what = "what moved" if not drift.passed else "what got better" if moved else "sizes and means; nothing moved"
    table = _table(f"{' '.join(drift.baseline.key)}: {what}", ("component", "figure"), ("before", "now", "allowed"))
    table.add_column("", no_wrap=True)
    for row in (*rows, *speed):
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


def _is_main(figure: Figure) -> bool:
    return figure.kind == "size" or (figure.kind == "fidelity" and figure.name.endswith(": mean"))


def render_baseline(baseline: BundleBaseline) -> Table:
    """Return the main figures of a new baseline with what each may become."""
    table = _table(f"{' '.join(baseline.key)}: baseline", ("component", "figure"), ("now", "allowed"))
    for figure in filter(_is_main, baseline.figures):
        values = (shown(figure, figure.value), shown(figure, limit(figure)))
        table.add_row(figure.component.value, figure.name, *values)
    return table


def shown(figure: Figure, value: float | str) -> str:
    """Return a value in its unit."""
    if isinstance(value, str):
        return value
    if figure.kind == "size":
        return f"{fixed(value / 2**20, 3)} MiB"
    if figure.kind == "speed":
        return f"{fixed(value, 2)} ×"
    return f"{fixed(value, 2)} dB"
