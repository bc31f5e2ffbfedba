"""The page: one HTML file with its styles, figures and audio, that needs no network and runs no script."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files

import numpy as np
import soundfile
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from sa3_convert.arrays import Floats
from sa3_convert.lab.report.figures import (
    MOST_DB,
    Sides,
    Strip,
    end_to_end_figure,
    ink_of,
    layers_figure,
    spectrogram_figure,
    steps_figure,
    storage_figure,
    strips_figure,
    strips_of,
)
from sa3_convert.lab.report.schema import (
    Bisection,
    ComponentReport,
    EndToEnd,
    EndToEndCase,
    Generations,
    Operator,
    Report,
)
from sa3_convert.lab.report.summary import shown_db, shown_floor, shown_name, shown_size
from sa3_convert.lab.report.theme import Ink
from sa3_convert.runtime.audio import Quantiser

_BITS = 16


@dataclass(frozen=True, slots=True)
class Clip:
    """A piece of audio as a `data:` URI."""

    uri: str
    bytes: int
    """Of the encoded audio; in the page it takes a third more."""


def clip(audio: Floats, sample_rate: int) -> Clip:
    """Return 16-bit FLAC; what lies beyond ±1 is clipped, as `run` does.

    Args:
        audio: [channels, samples].
        sample_rate: in Hz.

    """
    buffer = io.BytesIO()
    samples = Quantiser(_BITS, dither=False)(audio).astype(np.int16).T
    soundfile.write(buffer, samples, sample_rate, format="FLAC", subtype="PCM_16")
    data = buffer.getvalue()
    return Clip("data:audio/flac;base64," + base64.b64encode(data).decode("ascii"), len(data))


Heard = Mapping[str, Sides]
"""Audio of the end-to-end comparison: by case and side, [channels, samples]."""

_PLAYED = 2
"""Generations with players: at 5 seconds of stereo they weigh up to 1.2 MB a side."""
_PLAYED_SECONDS = 5


@dataclass(frozen=True, slots=True)
class Drawn:
    """A figure and its caption."""

    svg: Markup
    caption: str


@dataclass(frozen=True, slots=True)
class Player:
    """A piece of audio that can be played."""

    name: str
    uri: str
    bytes: int


@dataclass(frozen=True, slots=True)
class HeardCase:
    """One generation's spectrograms, and its players if it has any."""

    case: str
    drawn: Drawn
    clips: tuple[Player, ...]


@dataclass(frozen=True, slots=True)
class Clips:
    """All players together."""

    seconds: str
    bytes: int


@dataclass(frozen=True, slots=True)
class Figures:
    """Everything that is drawn."""

    components: Drawn
    steps: Drawn | None
    generations: Drawn | None
    end_to_end: Drawn | None
    heard: tuple[HeardCase, ...]
    layers: tuple[Drawn, ...]
    storage: Drawn
    legend: tuple[tuple[str, str], ...]
    """Stored types and the CSS variable of each colour."""

    @property
    def clips(self) -> Clips:
        """What the players weigh."""
        return Clips(f"{_PLAYED_SECONDS} seconds", sum(player.bytes for case in self.heard for player in case.clips))


def draw(report: Report, heard: Heard, sample_rate: int) -> Figures:
    """Return all figures of a report; see `render_page`."""
    generations, end_to_end = report.generations, report.end_to_end
    stored = sorted({s.type for c in report.components for s in c.stored})
    return Figures(
        components=_components(report),
        steps=None if generations is None else _steps(generations),
        generations=None if generations is None else _generations(generations),
        end_to_end=None if end_to_end is None else _end_to_end(end_to_end),
        heard=() if end_to_end is None else tuple(_heard(end_to_end, heard, sample_rate)),
        layers=tuple(_layers(found) for found in report.bisections),
        storage=_storage(report),
        legend=_legend(stored),
    )


def _components(report: Report) -> Drawn:
    svg = strips_figure(strips_of(report.components), "components", f"{report.verdict} A row of dots for each model.")
    return Drawn(
        Markup(svg),
        "A dot for each output on each input; the solid one is the worst. The bar is the floor. "
        f"What has more than {MOST_DB:g} dB stands there.",
    )


def _steps(found: Generations) -> Drawn | None:
    stepped = [d for d in found.distributions if d.by_step]
    if not stepped:
        return None
    said = "; ".join(
        f"{d.name}: mean {d.by_step[0].mean:.1f} dB at the first step, {d.by_step[-1].mean:.1f} dB at the last"
        for d in stepped
    )
    caption = "The DiT step by step: the mean over all generations, and from the worst to the best."
    return Drawn(Markup(steps_figure(stepped, "steps", said)), caption)


def _generations(found: Generations) -> Drawn:
    strips = [Strip(d.name, [o.signal_to_noise_db for o in d.observations], d.floor_db) for d in found.distributions]
    said = "; ".join(
        f"{d.name}: {d.spread.worst:.1f} to {max(s.ratios):.1f} dB"
        for d, s in zip(found.distributions, strips, strict=True)
    )
    return Drawn(
        Markup(strips_figure(strips, "generations", said)),
        "A dot for each comparison; the solid one is the worst. The bar is the floor.",
    )


def _end_to_end(found: EndToEnd) -> Drawn:
    caption = "Spectral distance from the reference's audio, mean over the window sizes."
    return Drawn(Markup(end_to_end_figure(found, "end-to-end", found.judgement)), caption)


def _heard(found: EndToEnd, heard: Heard, sample_rate: int) -> Sequence[HeardCase]:
    """Return the generations whose audio was kept, the furthest from the reference first."""
    kept = [case for case in found.cases if case.case in heard]
    kept.sort(key=lambda case: -case.target.audio.mean_spectral_distance_db)
    return [
        HeardCase(
            case.case,
            _spectrogram(case, heard[case.case], sample_rate, number),
            _players(heard[case.case], sample_rate) if number < _PLAYED else (),
        )
        for number, case in enumerate(kept)
    ]


def _spectrogram(case: EndToEndCase, sides: Sides, sample_rate: int, number: int) -> Drawn:
    said = (
        f"Spectrograms of {case.case}: the bundle is {case.target.audio.mean_spectral_distance_db:.2f} dB from the "
        f"reference, the nudged reference {case.chaos.audio.mean_spectral_distance_db:.2f} dB."
    )
    caption = f"{case.case}: {f'“{case.prompt}”' if case.prompt else 'no prompt'}"
    return Drawn(Markup(spectrogram_figure(sides, sample_rate, f"heard-{number}", said)), caption)


def _players(sides: Sides, sample_rate: int) -> tuple[Player, ...]:
    names = {"reference": "reference", "target": "this bundle"}
    made = [(name, clip(sides[side][:, : _PLAYED_SECONDS * sample_rate], sample_rate)) for side, name in names.items()]
    return tuple(Player(name, encoded.uri, encoded.bytes) for name, encoded in made)


def _layers(found: Bisection) -> Drawn:
    name = found.component.value
    caption = f"{len(found.operators)} operators of {name}; {found.incomparable} more tensors are not comparable."
    return Drawn(Markup(layers_figure(found, f"layers-{name}", f"{name}: {found.verdict}")), caption)


def _storage(report: Report) -> Drawn:
    largest = max(report.components, key=lambda c: c.bytes)
    said = f"Sizes of {len(report.components)} models; the largest is {shown_name(largest)}. The table has all figures."
    caption = "Area is bytes: models, each divided by how its data are stored. What is too small to be named is below."
    return Drawn(Markup(storage_figure(report.components, "sizes-map", said)), caption)


def _legend(stored: Sequence[str]) -> tuple[tuple[str, str], ...]:
    names: dict[Ink, list[str]] = {}
    for kind in stored:
        names.setdefault(ink_of(kind), []).append(kind)
    return tuple((", ".join(kinds), ink.variable) for ink, kinds in names.items())


_HERE = files("sa3_convert.lab.report")
_AROUND = 4
_MOST_OPERATORS = 8
_TOOLS = ("sa3-convert", "MNN", "onnxruntime")


def render_page(report: Report, heard: Heard, sample_rate: int) -> str:
    """Return the page's HTML; the same arguments give the same text.

    Args:
        report: everything that is said.
        heard: audio of the end-to-end comparison by case and side; empty if none was kept.
        sample_rate: of the audio, in Hz.

    """
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "db": shown_db,
        "floor": shown_floor,
        "size": shown_size,
        "versions": _versions,
        "shown_name": shown_name,
        "shown_operators": shown_operators,
        "operators_label": _operators_label,
        "stored_types": _stored_types,
        "stored_bytes": _stored_bytes,
        "tool_names": _tool_names,
    }
    figures = draw(report, heard, sample_rate)
    style = Markup(_HERE.joinpath("style.css").read_text(encoding="utf-8"))
    template = environment.from_string(_HERE.joinpath("page.html").read_text(encoding="utf-8"))
    return template.render(report=report, figures=figures, clips=figures.clips, style=style) + "\n"


def shown_operators(found: Bisection) -> list[Operator]:
    """Return the operators around the one to blame, or those that make the most error of their own."""
    names = [operator.name for operator in found.operators]
    if found.suspect in names:
        at = names.index(found.suspect)
        return list(found.operators[max(0, at - _AROUND) : at + _AROUND + 1])
    return sorted(found.operators, key=lambda o: o.own_error_db)[:_MOST_OPERATORS]


def _operators_label(found: Bisection) -> str:
    which = "around the one to blame" if found.suspect is not None else "that make the most error"
    return f"Operators of {found.component.value} {which}"


def _versions(tools: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {tools[name]}" for name in _TOOLS if name in tools)


def _stored_types(report: Report) -> list[str]:
    """Return the stored types of all models, the most bytes first."""
    sizes: dict[str, int] = {}
    for component in report.components:
        for stored in component.stored:
            sizes[stored.type] = sizes.get(stored.type, 0) + stored.bytes
    return sorted(sizes, key=lambda kind: (-sizes[kind], kind))


def _stored_bytes(component: ComponentReport, kind: str) -> int:
    return sum(stored.bytes for stored in component.stored if stored.type == kind)


def _tool_names(report: Report) -> list[str]:
    return sorted(report.made.converted_with.keys() | report.made.verified_with.keys(), key=str.lower)
