"""The page: one HTML file with its styles, figures and audio, that needs no network and runs no script."""

import base64
import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.resources import files

import numpy as np
import soundfile
from jinja2 import Environment, StrictUndefined

from sa3_convert.arrays import Floats
from sa3_convert.lab.generations.end_to_end import EndToEndCase
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
)
from sa3_convert.lab.report.formatting import fixed, shown_db, shown_floor, shown_prompt, shown_size, with_prompts
from sa3_convert.lab.report.schema import Bisection, Generations, Operator, Report, ReportedModel
from sa3_convert.lab.report.theme import Ink
from sa3_convert.runtime.audio import Quantiser

Heard = Mapping[str, Sides]
"""Audio of the end-to-end comparison: by case and side, [channels, samples]."""

_BITS = 16
_PLAYED = 2
"""Generations with players: at 5 seconds of stereo they weigh up to 1.2 MB a side."""
_PLAYED_SECONDS = 5


@dataclass(frozen=True, slots=True)
class Drawn:
    """A figure and its caption."""

    svg: str
    caption: str


@dataclass(frozen=True, slots=True)
class Player:
    """A piece of audio that can be played."""

    name: str
    uri: str
    """The audio itself, as `data:`."""
    bytes: int
    """Of the encoded audio; in the page it takes a third more."""


@dataclass(frozen=True, slots=True)
class HeardCase:
    """One generation's spectrograms, and its players if it has any."""

    case: str
    drawn: Drawn
    players: tuple[Player, ...]


def player(name: str, audio: Floats, sample_rate: int) -> Player:
    """Return the beginning of [channels, samples] as 16-bit FLAC; what lies beyond ±1 is clipped, as `run` does."""
    buffer = io.BytesIO()
    samples = Quantiser(_BITS, dither=False)(audio[:, : _PLAYED_SECONDS * sample_rate]).astype(np.int16).T
    soundfile.write(buffer, samples, sample_rate, format="FLAC", subtype="PCM_16")
    data = buffer.getvalue()
    return Player(name, "data:audio/flac;base64," + base64.b64encode(data).decode("ascii"), len(data))


def _components(report: Report) -> Drawn:
    strips = [Strip(c.name, [case.signal_to_noise_db for case in c.cases], c.floor_db) for c in report.components]
    return Drawn(
        strips_figure(strips, "components", f"{report.verdict} A row of dots for each model."),
        "A dot for each output on each input; the solid one is the worst. The bar is the floor. "
        f"What has more than {MOST_DB:g} dB stands there.",
    )


def _generations(found: Generations) -> Iterator[Drawn]:
    if stepped := [d for d in found.distributions if d.by_step]:
        said = "; ".join(
            f"{d.name}: mean {shown_db(d.by_step[0].mean)} dB at the first step, {shown_db(d.by_step[-1].mean)} dB at "
            "the last"
            for d in stepped
        )
        caption = "The DiT step by step: the mean over all generations, and from the worst to the best."
        yield Drawn(steps_figure(stepped, "steps", said), caption)
    strips = [Strip(d.name, [o.signal_to_noise_db for o in d.observations], d.floor_db) for d in found.distributions]
    said = "; ".join(f"{s.label}: {shown_db(min(s.ratios))} to {shown_db(max(s.ratios))} dB" for s in strips)
    caption = "A dot for each comparison; the solid one is the worst. The bar is the floor."
    yield Drawn(strips_figure(strips, "generations", said), caption)


def _heard(report: Report, heard: Heard, sample_rate: int) -> list[HeardCase]:
    """Return the generations whose audio was kept, the furthest from the reference first."""
    kept = [case for case in report.end_to_end.cases if case.case in heard] if report.end_to_end else []
    kept.sort(key=lambda case: -case.target.audio.mean_spectral_distance_db)
    return [
        HeardCase(
            with_prompts(case.case),
            _spectrogram(case, heard[case.case], sample_rate, number),
            tuple(
                player(name, heard[case.case][side], sample_rate)
                for side, name in (("reference", "reference"), ("target", "this bundle"))
                if number < _PLAYED
            ),
        )
        for number, case in enumerate(kept)
    ]


def _spectrogram(case: EndToEndCase, sides: Sides, sample_rate: int, number: int) -> Drawn:
    far, chance = (fixed(side.audio.mean_spectral_distance_db, 2) for side in (case.target, case.chaos))
    said = f"the bundle is {far} dB from the reference, the nudged reference {chance} dB."
    label = f"Spectrograms of {with_prompts(case.case)}: {said}"
    caption = f"{shown_prompt(case.prompt, 1000)}: {said}"
    return Drawn(spectrogram_figure(sides, sample_rate, f"heard-{number}", label), caption)


def _layers(found: Bisection) -> Drawn:
    name = found.component.value
    caption = f"{len(found.operators)} operators of {name}; {found.incomparable} more tensors are not comparable."
    return Drawn(layers_figure(found, f"layers-{name}", f"{name}: {found.verdict}"), caption)


def _storage(report: Report) -> Drawn:
    largest = max(report.components, key=lambda c: c.bytes)
    said = f"Sizes of {len(report.components)} models; the largest is {largest.name}. The table has all figures."
    caption = "Area is bytes: models, each divided by how its data are stored. What is too small to be named is below."
    return Drawn(storage_figure(report.components, "sizes-map", said), caption)


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
        "fixed": fixed,
        "with_prompts": with_prompts,
        "db": shown_db,
        "floor": shown_floor,
        "size": shown_size,
        "versions": _versions,
        "shown_operators": shown_operators,
        "operators_label": _operators_label,
        "stored_bytes": _stored_bytes,
        "tool_names": _tool_names,
    }
    kinds, listened = _stored_types(report), _heard(report, heard, sample_rate)
    found = report.end_to_end
    caption = "Spectral distance from the reference's audio, mean over the window sizes."
    template = environment.from_string(_HERE.joinpath("page.html").read_text(encoding="utf-8"))
    page = template.render(
        report=report,
        style=_HERE.joinpath("style.css").read_text(encoding="utf-8"),
        components=_components(report),
        generations=list(_generations(report.generations)) if report.generations else [],
        end_to_end=Drawn(end_to_end_figure(found, "end-to-end", found.judgement), caption) if found else None,
        heard=listened,
        played=sum(player.bytes for case in listened for player in case.players),
        layers=[_layers(found) for found in report.bisections],
        storage=_storage(report),
        stored_types=kinds,
        legend=_legend(kinds),
    )
    return page + "\n"


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
    kinds = {stored.type for component in report.components for stored in component.stored}
    return sorted(kinds, key=lambda kind: (-sum(_stored_bytes(c, kind) for c in report.components), kind))


def _stored_bytes(component: ReportedModel, kind: str) -> int:
    return sum(stored.bytes for stored in component.stored if stored.type == kind)


def _legend(stored: list[str]) -> list[tuple[str, str]]:
    """Return stored types and the CSS variable of each colour."""
    names: dict[Ink, list[str]] = {}
    for kind in sorted(stored):
        names.setdefault(ink_of(kind), []).append(kind)
    return [(", ".join(kinds), ink.variable) for ink, kinds in names.items()]


def _tool_names(report: Report) -> list[str]:
    return sorted(report.made.converted_with.keys() | report.made.verified_with.keys(), key=str.lower)
