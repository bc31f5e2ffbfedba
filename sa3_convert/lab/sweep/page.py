"""The page of a sweep: size against fidelity, and which layers got how many bits."""

from collections.abc import Sequence
from importlib.resources import files

import numpy as np
from jinja2 import Environment, StrictUndefined

from sa3_convert.components import Component
from sa3_convert.lab.report.figures import MOST_DB
from sa3_convert.lab.report.formatting import shown_db, shown_size
from sa3_convert.lab.report.theme import Ink, new_figure, styled, svg_of
from sa3_convert.lab.sweep.result import Measured, Sweep

_ROW = 5.0
"""Points of height of a layer in the map of bits."""
_LEAST_HEIGHT = 90.0
"""Of the map, beside which the words along its axes have room."""


def page(sweep: Sweep) -> str:
    """Return the page's HTML; the same sweep gives the same text."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"db": shown_db, "size": shown_size}
    components = list(dict.fromkeys(point.component for point in sweep.points))
    template = environment.from_string(files("sa3_convert.lab.sweep").joinpath("page.html").read_text("utf-8"))
    text = template.render(
        sweep=sweep,
        style=files("sa3_convert.lab.report").joinpath("style.css").read_text("utf-8"),
        drawn=[_component(sweep, component) for component in components],
    )
    return text + "\n"


def _component(sweep: Sweep, component: Component) -> dict[str, object]:
    points = [point for point in sweep.points if point.component is component]
    had = sweep.had.get(component, [])
    return {
        "name": component.value,
        "points": points,
        "frontier": frontier_figure(had, component.value) if had else "",
        "bits": bits_figure(had, component.value) if any(point.bits for point in had) else "",
    }


def frontier_figure(points: Sequence[Measured], component: str) -> str:
    """Return worst fidelity against size: what was measured, what was predicted of it, and the frontier as a line."""
    figure = new_figure(260)
    with styled():
        axes = figure.add_subplot()
        for points_of, marker, ink in ((True, "o", Ink.FIRST), (False, "o", Ink.OTHER)):
            own = [_dot(point) for point in points if point.on_frontier is points_of]
            label = "on the frontier" if points_of else "beaten by another"
            if own:
                axes.plot(
                    *zip(*sorted(own), strict=True), marker, ls="-" if points_of else "", color=ink, ms=6, label=label
                )
        planned = [(p.predicted_bytes / 2**20, p.predicted_db) for p in points if p.predicted_bytes and p.predicted_db]
        if planned:
            axes.plot(*zip(*planned, strict=True), "x", color=Ink.SECOND, ms=6, label="predicted mean")
        axes.set_xlabel("MiB, less is better")
        axes.set_ylabel("worst signal-to-noise ratio, dB")
        axes.grid(axis="y")
        figure.legend(loc="outside upper left", ncols=3)
    return svg_of(figure, f"frontier-{component}", f"{component}: size against fidelity")


def _dot(point: Measured) -> tuple[float, float]:
    assert point.fidelity is not None
    return (point.bytes or 0) / 2**20, min(point.fidelity.signal_to_noise_db, MOST_DB)


def bits_figure(points: Sequence[Measured], component: str) -> str:
    """Return a map of bits: a row per layer, a column per point."""
    layers = list(points[0].bits)
    bits = np.array([[point.bits[layer] for point in points] for layer in layers])
    figure = new_figure(60 + max(_ROW * len(layers), _LEAST_HEIGHT))
    with styled():
        axes = figure.add_subplot()
        for x, y in np.ndindex(bits.T.shape):
            share = float(bits[y, x]) / 16
            axes.fill_between([x - 0.45, x + 0.45], y - 0.5, y + 0.5, color=Ink.FIRST, alpha=share, lw=0)
        axes.set_xlim(-0.6, len(points) - 0.4)
        axes.set_ylim(len(layers) - 0.5, -0.5)
        axes.set_xticks(range(len(points)), [point.name.removeprefix(f"{component}-") for point in points], rotation=60)
        axes.set_ylabel(f"{len(layers)} layers, from the first")
        axes.set_yticks([])
    return svg_of(figure, f"bits-{component}", f"{component}: bits by layer, darker is more")
