"""A verification as a table for the terminal."""

from rich.table import Table

from sa3_convert.verify.result import BundleFidelity, ComponentFidelity, Measurement, Verdict


def render(result: BundleFidelity) -> Table:
    """Return one row per model: its worst figures, its floor, and whether it passed; 80 columns wide."""
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


def _row(verdict: Verdict) -> tuple[str, ...]:
    fidelity = verdict.fidelity
    worst = fidelity.worst
    return (
        fidelity.component.value,
        verdict.precision,
        f"{worst.signal_to_noise_db:.1f}",
        f"{fidelity.mean.signal_to_noise_db:.1f}",
        f"{verdict.floor_db:g}",
        f"{worst.cosine:.6f}",
        f"{worst.max_abs_error:.2e}",
        "[green]ok[/]" if verdict.passed else "[red]failed[/]",
    )
