"""Figures and names as people read them."""

from sa3_convert.verify.metrics import MAX_DB
from sa3_convert.verify.report.schema import ComponentReport


def shown_db(ratio: float) -> str:
    """Return a ratio; of equal arrays it is infinite."""
    return "∞" if ratio >= MAX_DB else f"{ratio:.1f}"


def shown_floor(floor_db: float | None) -> str:
    """Return a floor, or a dash for what has none."""
    return "–" if floor_db is None else f"{floor_db:g}"


def shown_size(size: int) -> str:
    """Return a size in bytes."""
    if size == 0:
        return "–"
    return f"{size / 2**20:.1f} MiB" if size >= 2**20 else f"{size / 2**10:.1f} KiB"


def shown_name(component: ComponentReport) -> str:
    """Return a model's name, with its engine where that is not MNN."""
    name = component.component.value
    return name if component.engine == "mnn" else f"{name}, {component.engine}"
