"""Drift as tables and lines for the terminal."""

from collections.abc import Sequence

from rich.table import Table

from sa3_convert.verify.drift_baseline import BundleBaseline, Figure
from sa3_convert.verify.drift_compare import Drift, Row, limit

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
