"""The figure of sizes: what the bytes of all models are."""

from collections.abc import Mapping, Sequence

import squarify
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from sa3_convert.verify.report.schema import ComponentReport
from sa3_convert.verify.report.shown import shown_name, shown_size
from sa3_convert.verify.report.theme import WIDTH, Ink, new_figure, styled, svg_of

_HEIGHT = 260.0
_CHARACTER = 6.2
_LINE = 13.0
_MARGIN = 6.0
_INKS: Mapping[str, Ink] = {
    "fp32": Ink.FLOAT,
    "fp16": Ink.HALF,
    "bf16": Ink.HALF,
    "scales": Ink.SCALES,
    "structure": Ink.OTHER,
}


def ink_of(stored: str) -> Ink:
    """Return the colour of a stored type; weights as integers, of any width, share one."""
    if stored in ("int32", "int64", "uint8", "bool"):
        return Ink.OTHER
    return _INKS.get(stored, Ink.INTEGER)


def storage_figure(components: Sequence[ComponentReport], name: str, label: str) -> str:
    """Return a treemap: models by size, each divided by stored type."""
    figure = new_figure(_HEIGHT, layout=None)
    with styled():
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_xlim(0, WIDTH)
        axes.set_ylim(_HEIGHT, 0)
        axes.axis("off")
        ranked = sorted((c for c in components if c.bytes), key=lambda c: -c.bytes)
        boxes = _squares([c.bytes for c in ranked], (0, 0, WIDTH, _HEIGHT))
        for component, box in zip(ranked, boxes, strict=True):
            _draw(axes, component, box)
    return svg_of(figure, name, label)


Box = tuple[float, float, float, float]
"""x, y, width, height."""


def _draw(axes: Axes, component: ComponentReport, box: Box) -> None:
    x, y, width, height = box
    stored = [(s.type, s.bytes) for s in component.stored] or [(component.precision, component.bytes)]
    title = f"{shown_name(component)} {shown_size(component.bytes)}"
    if not _fits(title, width):
        title = shown_name(component)
    titled = _fits(title, width) and height >= 2 * _LINE
    for (kind, size), inner in zip(stored, _squares([size for _, size in stored], box), strict=True):
        axes.add_patch(Rectangle(inner[:2], inner[2], inner[3], fc=ink_of(kind), ec=Ink.SURFACE, lw=0.8))
        # The model's name stands across its top.
        taken = _LINE if titled and inner[1] - y < 1 else 0.0
        _write(axes, (inner[0], inner[1] + taken, inner[2], inner[3] - taken), [kind, shown_size(size)])
    axes.add_patch(Rectangle((x, y), width, height, fill=False, ec=Ink.SURFACE, lw=4))
    if titled:
        axes.text(x + _MARGIN, y + _MARGIN, title, va="top", fontsize=10, fontweight="bold")


def _write(axes: Axes, box: Box, lines: Sequence[str]) -> None:
    """Write the lines that fit into a box."""
    x, y, width, height = box
    room = int((height - _MARGIN) / _LINE)
    for number, line in enumerate([line for line in lines if _fits(line, width)][:room]):
        axes.text(x + _MARGIN, y + _MARGIN + number * _LINE, line, va="top", fontsize=10)


def _fits(text: str, width: float) -> bool:
    return len(text) * _CHARACTER + 2 * _MARGIN <= width


def _squares(sizes: Sequence[int], within: Box) -> list[Box]:
    """Return boxes whose areas are as the sizes, which fall."""
    x, y, width, height = within
    normed = squarify.normalize_sizes(sizes, width, height)
    return [(r["x"], r["y"], r["dx"], r["dy"]) for r in squarify.squarify(normed, x, y, width, height)]
