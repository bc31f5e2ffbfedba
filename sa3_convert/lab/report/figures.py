"""The figures of a report: fidelity, layers, spectrograms, sizes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import squarify
from matplotlib.axes import Axes
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from sa3_convert.arrays import Floats
from sa3_convert.lab.generations.end_to_end import EndToEnd
from sa3_convert.lab.report.formatting import shown_prompt, shown_size
from sa3_convert.lab.report.schema import Bisection, ReportedDistribution, ReportedModel
from sa3_convert.lab.report.theme import WIDTH, Ink, new_figure, png_of, styled, svg_of
from sa3_convert.publish.card import Dot

MOST_DB = 140.0
"""Equal arrays have no ratio, and nearly equal ones differ by rounding alone: their dots stand here."""
_ROW = 34
_AXIS = 44
_TALL_ROW = 44
_LABEL = 48
"""Columns of a prompt above a row."""


@dataclass(frozen=True, slots=True)
class Strip:
    """The ratios of one quantity, in dB, and the floor that is asked of it."""

    label: str
    ratios: Sequence[float]
    floor_db: float | None = None


def strips_figure(strips: Sequence[Strip], name: str, label: str) -> str:
    """Return one row per quantity: a dot per comparison, a bar for the floor."""
    figure = new_figure(_AXIS + _ROW * len(strips))
    with styled():
        axes = figure.add_subplot()
        for row, strip in enumerate(strips):
            ratios = [min(ratio, MOST_DB) for ratio in strip.ratios]
            worst = min(ratios)
            ink = Ink.BAD if strip.floor_db is not None and worst < strip.floor_db else Ink.FIRST
            axes.plot(ratios, [row] * len(ratios), "o", color=Ink.FIRST, alpha=0.4, ms=6, mew=0)
            axes.plot(worst, row, "o", color=ink, ms=7, mew=0)
            if strip.floor_db is not None:
                axes.plot([strip.floor_db] * 2, [row - 0.34, row + 0.34], color=Ink.BAD, lw=2.5)
        _horizontal(axes, [strip.label for strip in strips], "signal-to-noise ratio in dB, more is better")
    return svg_of(figure, name, label)


def _horizontal(axes: Axes, labels: Sequence[str], title: str) -> None:
    """Make each label a row, from the top down."""
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.set_xlabel(title)
    axes.grid(axis="x")
    axes.tick_params(length=0)
    axes.spines["left"].set_visible(False)


def sizes_figure(dots: Sequence[Dot]) -> bytes:
    """Return size against fidelity as PNG, a dot for each component, a colour for each bundle."""
    figure = new_figure(260)
    names = list(dict.fromkeys(dot.bundle for dot in dots))
    with styled():
        axes = figure.add_subplot()
        for number, name in enumerate(names):
            own = [dot for dot in dots if dot.bundle == name]
            mib, ratios = [dot.bytes / 2**20 for dot in own], [min(dot.worst_db, MOST_DB) for dot in own]
            marker, color = "osD^vP"[number % 6], (Ink.FIRST, Ink.SECOND)[number % 2]
            axes.plot(mib, ratios, marker, color=color, ms=6, mew=0, label=name)
            for dot, x, y in zip(own, mib, ratios, strict=True):
                axes.annotate(dot.component, (x, y), (5, 4), textcoords="offset points", fontsize=8)
        axes.set_xscale("log")
        axes.margins(0.25, 0.12)
        axes.set_xlabel("MiB, less is better")
        axes.set_ylabel("worst signal-to-noise ratio, dB")
        axes.grid(axis="y")
        if len(names) > 1:
            figure.legend(loc="outside upper left", ncols=2)
    return png_of(figure)


def steps_figure(distributions: Sequence[ReportedDistribution], name: str, label: str) -> str:
    """Return mean, spread and worst of each denoising step, a line per quantity."""
    figure = new_figure(240)
    with styled():
        axes = figure.add_subplot()
        for found, color, marker in zip(distributions, (Ink.FIRST, Ink.SECOND), ("o", "s"), strict=False):
            steps = [step.step for step in found.by_step]
            title = found.name.removeprefix("dit, ")
            low, high = [step.worst for step in found.by_step], [step.best for step in found.by_step]
            axes.fill_between(steps, low, high, color=color, alpha=0.18, lw=0)
            axes.plot(steps, [step.mean for step in found.by_step], marker, ls="-", color=color, ms=4.5, label=title)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=9))
        axes.set_xlabel("denoising step, counted from 0")
        axes.set_ylabel("signal-to-noise ratio, dB")
        axes.grid(axis="y")
        axes.tick_params(length=0)
        figure.legend(loc="outside upper left", ncols=2)
    return svg_of(figure, name, label)


def end_to_end_figure(found: EndToEnd, name: str, label: str) -> str:
    """Return one row per generation: the target's spectral distance beside that of the nudged reference."""
    figure = new_figure(_AXIS + 24 + _TALL_ROW * len(found.cases))
    with styled():
        axes = figure.add_subplot()
        target = [case.target.audio.mean_spectral_distance_db for case in found.cases]
        chaos = [case.chaos.audio.mean_spectral_distance_db for case in found.cases]
        for row, case in enumerate(found.cases):
            axes.plot([target[row], chaos[row]], [row, row], color=Ink.GRID, lw=3, zorder=1)
            # Above its row and not beside it, where a long one would leave no room for the figure.
            prompt, place = shown_prompt(case.prompt, _LABEL), axes.get_yaxis_transform()
            axes.text(0.01, row - 0.3, prompt, transform=place, fontsize=10, va="bottom").set_in_layout(False)
        axes.plot(target, range(len(target)), "o", color=Ink.FIRST, ms=8, mew=0, label="this bundle")
        axes.plot(
            chaos, range(len(chaos)), "D", mfc=Ink.SURFACE, mec=Ink.SECOND, mew=2, ms=7, label="reference, nudged"
        )
        _horizontal(axes, [""] * len(found.cases), "spectral distance in dB, less is better")
        axes.set_ylim(len(found.cases) - 0.4, -0.9)
        axes.set_xlim(left=0)
        figure.legend(loc="outside upper left", ncols=2)
    return svg_of(figure, name, label)


_LEAST_DB = 140.0
"""Errors below this are rounding of float arithmetic; they get no bar."""


def layers_figure(found: Bisection, name: str, label: str) -> str:
    """Return a bar per operator in the graph's order; the higher, the more error."""
    figure = new_figure(190)
    operators = found.operators
    with styled():
        axes = figure.add_subplot()
        bottom = min(_LEAST_DB, max((o.own_error_db for o in operators if o.own_error_db < _LEAST_DB), default=60.0))
        bottom = max(bottom, 60.0) + 5
        for wanted, color, thinnest in ((False, Ink.FIRST, 250), (True, Ink.BAD, 150)):
            bars = [i for i, o in enumerate(operators) if o.is_faulty is wanted and o.own_error_db < bottom]
            # From the bottom up: the axis is turned round.
            heights = [operators[i].own_error_db - bottom for i in bars]
            axes.bar(bars, heights, bottom=bottom, width=max(1.0, len(operators) / thinnest), color=color, lw=0)
        gathered = [min(bottom, operator.error_out_db) for operator in operators]
        axes.plot(range(len(operators)), gathered, color=Ink.SECOND, lw=1.1)
        top = min([*gathered, *(o.own_error_db for o in operators)])
        axes.set_ylim(bottom, top - 5)
        axes.set_xlim(-1, len(operators))
        axes.set_xlabel("operators, in the order of the graph")
        axes.set_ylabel("dB below the signal")
        axes.grid(axis="y")
        axes.tick_params(length=0)
    return svg_of(figure, name, label)


Sides = Mapping[str, Floats]
"""`reference`, `target` and `chaos`, [channels, samples] each."""

_WINDOW = 4096
_COLUMNS = 140
_BANDS = 72
_LOWEST_HZ = 40.0
_RANGE_DB = 80.0
_PIXELS: Mapping[str, Any] = {"origin": "lower", "aspect": "auto", "interpolation": "none"}
_SCALES_DB = (0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 40.0)


def levels(audio: Floats, sample_rate: int) -> NDArray[np.float64]:
    """Return levels in dB of [channels, samples] as [bands, columns]; bands rise by equal ratios from 40 Hz up."""
    padded = np.pad(audio.astype(np.float64), ((0, 0), (_WINDOW // 2, _WINDOW)))
    starts = np.linspace(0, max(audio.shape[1] - 1, 0), _COLUMNS).astype(int)
    frames = padded[:, starts[:, None] + np.arange(_WINDOW)] * np.hanning(_WINDOW)
    power = (np.abs(np.fft.rfft(frames, axis=-1)) ** 2).mean(axis=0)
    edges = _band_edges(sample_rate)
    summed = np.concatenate([[np.zeros(_COLUMNS)], np.cumsum(power, axis=1).T])
    # A low band is narrower than a bin: it takes at least the bin that it lies in.
    low = np.floor(edges[:-1]).astype(int)
    high = np.maximum(np.floor(edges[1:]).astype(int), low + 1)
    bands = (summed[high] - summed[low]) / (high - low)[:, None]
    decibels: NDArray[np.float64] = 10 * np.log10(np.maximum(bands, 1e-12))
    return decibels


def _band_edges(sample_rate: int) -> NDArray[np.float64]:
    """Return the bands' edges, in bins."""
    return np.geomspace(_LOWEST_HZ, sample_rate / 2, _BANDS + 1) * _WINDOW / sample_rate


def spectrogram_figure(sides: Sides, sample_rate: int, name: str, label: str) -> str:
    """Return reference and target side by side, and below them what each of target and nudged reference changes."""
    shown = {side: levels(audio, sample_rate) for side, audio in sides.items()}
    peak = float(shown["reference"].max())
    floored = {side: np.maximum(values, peak - _RANGE_DB) for side, values in shown.items()}
    changes = [floored[side] - floored["reference"] for side in ("target", "chaos")]
    # One scale for both changes: they are there to be compared.
    most = float(np.percentile(np.abs(changes), 99.5))
    scale = next((step for step in _SCALES_DB if step >= most), _SCALES_DB[-1])
    sounds = [("reference", floored["reference"] - peak), ("this bundle", floored["target"] - peak)]
    differences = [("change: this bundle", changes[0]), ("change: nudged", changes[1])]
    rows = [("magma", -_RANGE_DB, 0.0, "level in dB", sounds), ("berlin", -scale, scale, "change in dB", differences)]
    seconds = sides["reference"].shape[1] / sample_rate
    figure = new_figure(300)
    with styled():
        grid = figure.subplots(2, 2, sharex=True, sharey=True)
        for line, (colours, low, high, unit, panels) in zip(grid, rows, strict=True):
            for axes, (title, values) in zip(line, panels, strict=True):
                image = draw_levels(axes, values, colours, (low, high), seconds, sample_rate)
                axes.set_title(title)
            line[0].set_ylabel("Hz")
            bar = figure.colorbar(image, ax=line, aspect=12, pad=0.02, label=unit)
            bar.outline.set_visible(False)
            bar.ax.tick_params(length=0)
        for axes in grid[-1]:
            axes.set_xlabel("seconds")
    return svg_of(figure, name, label)


def draw_levels(
    axes: Axes, values: NDArray[np.float64], colours: str, shown: tuple[float, float], seconds: float, sample_rate: int
) -> AxesImage:
    """Draw what `levels` gives, or a difference of two, between two values in dB, with its frequencies at the side."""
    extent = (0, seconds, 0, _BANDS)
    image = axes.imshow(values, colours, vmin=shown[0], vmax=shown[1], extent=extent, **_PIXELS)
    axes.set_yticks([_row_of(hertz, sample_rate) for hertz in (100, 1000, 10000)], ["100", "1k", "10k"])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return image


def _row_of(hertz: float, sample_rate: int) -> float:
    return float(_BANDS * np.log(hertz / _LOWEST_HZ) / np.log(sample_rate / 2 / _LOWEST_HZ))


_HEIGHT = 260.0
_CHARACTER = 6.2
_LINE = 13.0
_MARGIN = 6.0
_OTHERS = {"structure", "int32", "int64", "uint8", "bool"}
_INKS = {"fp32": Ink.FLOAT, "fp16": Ink.HALF, "bf16": Ink.HALF, "scales": Ink.SCALES}


def ink_of(stored: str) -> Ink:
    """Return the colour of a stored type; weights as integers, of any width, share one."""
    return Ink.OTHER if stored in _OTHERS else _INKS.get(stored, Ink.INTEGER)


def storage_figure(components: Sequence[ReportedModel], name: str, label: str) -> str:
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


def _draw(axes: Axes, component: ReportedModel, box: Box) -> None:
    x, y, width, height = box
    stored = [(s.type, s.bytes) for s in component.stored] or [(component.precision, component.bytes)]
    title = f"{component.name} {shown_size(component.bytes)}"
    if not _fits(title, width):
        title = component.name
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
