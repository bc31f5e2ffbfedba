"""How figures and cases are written, and how pictures take their colours from the page: one SVG for light, dark, print.

A figure is drawn with stand-in colours, each of which becomes a CSS variable of `style.css`. Text stays text. The same
figure gives the same bytes: no dates, and identifiers that depend on the figure's name alone.
"""

import io
import re
import shlex
import warnings
from contextlib import AbstractContextManager
from enum import StrEnum
from html import escape
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
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


def _with_own_identifiers(text: str, name: str) -> str:
    """Keep the identifiers that are referred to, and make them the figure's own."""
    used = set(re.findall(r"url\(#([^)]+)\)", text)) | set(re.findall(r'xlink:href="#([^"]+)"', text))
    text = re.sub(r'\s+id="([^"]+)"', lambda found: f' id="{name}-{found[1]}"' if found[1] in used else "", text)
    text = re.sub(r"url\(#", f"url(#{name}-", text)
    return re.sub(r'xlink:href="#', f'xlink:href="#{name}-', text)
