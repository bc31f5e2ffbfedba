"""Verification on sampled inputs and bisection as tables for the terminal."""

from rich.table import Table
from rich.text import Text

from sa3_convert.verify.against import Against
from sa3_convert.verify.bisect_result import BisectResult, limit_db
from sa3_convert.verify.result import BundleFidelity, ComponentFidelity, Measurement, Verdict


def render(result: BundleFidelity) -> Table:
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
