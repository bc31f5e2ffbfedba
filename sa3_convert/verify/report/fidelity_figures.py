"""Figures of fidelity: where the comparisons of each model lie, and the denoising loop step by step."""

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from sa3_convert.verify.report.schema import ComponentReport, Distribution, EndToEnd
from sa3_convert.verify.report.shown import shown_name
from sa3_convert.verify.report.theme import Ink, new_figure, styled, svg_of

MOST_DB = 140.0
"""Equal arrays have no ratio, and nearly equal ones differ by rounding alone: their dots stand here."""
_ROW = 34
_AXIS = 44


@dataclass(frozen=True, slots=True)
class Strip:
    """The ratios of one quantity, in dB, and the floor that is asked of it."""

    label: str
    ratios: Sequence[float]
    floor_db: float | None = None


def strips_of(components: Sequence[ComponentReport]) -> list[Strip]:
    """Return a strip per model: its outputs on sampled inputs."""
    return [Strip(shown_name(c), [case.signal_to_noise_db for case in c.cases], c.floor_db) for c in components]


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
        axes.set_yticks(range(len(strips)), [strip.label for strip in strips])
        axes.set_ylim(len(strips) - 0.4, -0.6)
        _decibel_axis(axes)
    return svg_of(figure, name, label)


def _decibel_axis(axes: Axes) -> None:
    axes.set_xlabel("signal-to-noise ratio in dB, more is better")
    axes.grid(axis="x")
    axes.tick_params(length=0)
    axes.spines["left"].set_visible(False)


def steps_figure(distributions: Sequence[Distribution], name: str, label: str) -> str:
    """Return mean, spread and worst of each denoising step, a line per quantity."""
    figure = new_figure(240)
    with styled():
        axes = figure.add_subplot()
        for found, color, marker in zip(distributions, (Ink.FIRST, Ink.SECOND), ("o", "s"), strict=False):
            steps = [step.step for step in found.by_step]
            title = found.name.removeprefix("dit, ")
            axes.fill_between(
                steps,
                [step.worst for step in found.by_step],
                [step.best for step in found.by_step],
                color=color,
                alpha=0.18,
                lw=0,
            )
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
    figure = new_figure(_AXIS + 24 + _ROW * len(found.cases))
    with styled():
        axes = figure.add_subplot()
        rows = range(len(found.cases))
        target = [case.target.audio.mean_spectral_distance_db for case in found.cases]
        chaos = [case.chaos.audio.mean_spectral_distance_db for case in found.cases]
        for row in rows:
            axes.plot([target[row], chaos[row]], [row, row], color=Ink.GRID, lw=3, zorder=1)
        axes.plot(target, rows, "o", color=Ink.FIRST, ms=8, mew=0, label="this bundle")
        axes.plot(chaos, rows, "D", mfc=Ink.SURFACE, mec=Ink.SECOND, mew=2, ms=7, label="reference, nudged")
        axes.set_yticks(rows, [case.case.replace("prompt=", "prompt ").split(" seed")[0] for case in found.cases])
        axes.set_ylim(len(found.cases) - 0.4, -0.6)
        axes.set_xlim(left=0)
        axes.set_xlabel("spectral distance in dB, less is better")
        axes.grid(axis="x")
        axes.tick_params(length=0)
        axes.spines["left"].set_visible(False)
        figure.legend(loc="outside upper left", ncols=2)
    return svg_of(figure, name, label)
