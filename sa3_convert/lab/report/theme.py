"""Figures that take their colours from the page: one SVG for light, dark and print.

A figure is drawn with stand-in colours, each of which becomes a CSS variable of `style.css`. Text stays text. The same
figure gives the same bytes: no dates, and identifiers that depend on the figure's name alone.
"""

import io
import re
import warnings
from contextlib import AbstractContextManager
from enum import StrEnum
from html import escape
from importlib.resources import files
from typing import Any, Literal

import matplotlib as mpl
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import is_color_like, to_hex
from matplotlib.figure import Figure

WIDTH = 345.6
"""In points, which are CSS pixels on a phone: there a figure is shown at its own size, and its text can be read."""


class Ink(StrEnum):
    """Stand-ins, and which variables they are."""

    TEXT = "#010001"
    MUTED = "#010002"
    GRID = "#010003"
    SURFACE = "#010004"
    FIRST = "#010005"
    SECOND = "#010006"
    BAD = "#010007"
    INTEGER = "#010008"
    HALF = "#010009"
    FLOAT = "#01000a"
    SCALES = "#01000b"
    OTHER = "#01000c"

    @property
    def variable(self) -> str:
        """The CSS variable."""
        return f"var(--{self.name.lower()})"


_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 10.5,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 10,
    "xtick.labelsize": 10,
    "ytick.labelsize": 10,
    "legend.fontsize": 10,
    "legend.frameon": False,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "text.color": Ink.TEXT,
    "axes.titlecolor": Ink.TEXT,
    "axes.labelcolor": Ink.MUTED,
    "xtick.color": Ink.GRID,
    "ytick.color": Ink.GRID,
    "xtick.labelcolor": Ink.MUTED,
    "ytick.labelcolor": Ink.MUTED,
    "axes.edgecolor": Ink.GRID,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": Ink.GRID,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.8,
    # Names come from files: a dollar in them is no formula.
    "text.parse_math": False,
}


def new_figure(height: float, *, layout: Literal["constrained"] | None = "constrained") -> Figure:
    """Return an empty figure, `WIDTH` × `height` points."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(WIDTH / 72, height / 72), layout=layout)
        FigureCanvasSVG(figure)
    return figure


def styled() -> AbstractContextManager[None]:
    """Return a context in which axes take the page's style."""
    return mpl.rc_context(_STYLE)


def svg_of(figure: Figure, name: str, label: str) -> str:
    """Return a figure as an `<svg>` element to stand in a page.

    Its identifiers begin with `name`, unique in the page; `label` says what it shows to those who do not see it.
    """
    buffer = io.StringIO()
    with mpl.rc_context(_STYLE | {"svg.hashsalt": name}), warnings.catch_warnings():
        # Text stays text: the reader's browser has the letters that the font for measuring lacks.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = buffer.getvalue()
    text = re.sub(r"<!--.*?-->\n?", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = _with_own_identifiers(text, name)
    # The page's own font: the one that it was laid out for is not on every machine, and is wider than most.
    text = re.sub(r"(font: [^;\"]*?[\d.]+px )[^;\"]*", r"\1var(--font)", text)
    text = re.sub(r"font-family: [^;\"]*", "font-family: var(--font)", text)
    for ink in Ink:
        text = text.replace(ink.value, ink.variable)
    view = re.search(r'viewBox="[^"]*"', text)
    assert view is not None
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" {view[0]} '
        f'role="img" aria-label="{escape(label)}">'
    )
    return head + text[text.index(">") + 1 :].rstrip()


def standalone(svg: str) -> str:
    """Return an `<svg>` element as a file of its own, for a README: the page's colours are in it, light or dark."""
    colours, _, _ = files("sa3_convert.lab.report").joinpath("style.css").read_text("utf-8").partition("* {")
    return svg.replace(">", f"><style>{colours}</style>", 1) + "\n"


_COLOURS = ("color", "facecolor", "edgecolor", "markerfacecolor", "markeredgecolor")


def png_of(figure: Figure) -> bytes:
    """Return a figure as PNG in the page's colours on white, for readers that show no SVG."""
    style = files("sa3_convert.lab.report").joinpath("style.css").read_text(encoding="utf-8")
    # The first of each name is the light one.
    light = dict(reversed(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", style)))
    colours = {ink.value: light[ink.name.lower()] for ink in Ink}
    for artist in figure.findobj():
        for name in _COLOURS:
            found: Any = getattr(artist, f"get_{name}", lambda: None)()
            if is_color_like(found) and (colour := colours.get(to_hex(found))):
                getattr(artist, f"set_{name}")(colour)
    buffer = io.BytesIO()
    with mpl.rc_context(_STYLE):
        figure.savefig(buffer, format="png", dpi=2 * 72, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


def _with_own_identifiers(text: str, name: str) -> str:
    """Keep the identifiers that are referred to, and make them the figure's own."""
    used = set(re.findall(r"url\(#([^)]+)\)", text)) | set(re.findall(r'xlink:href="#([^"]+)"', text))
    text = re.sub(r'\s+id="([^"]+)"', lambda found: f' id="{name}-{found[1]}"' if found[1] in used else "", text)
    text = re.sub(r"url\(#", f"url(#{name}-", text)
    return re.sub(r'xlink:href="#', f'xlink:href="#{name}-', text)
