"""Figures take their colours from the page, keep to themselves, and are the same every time."""

import re
import xml.etree.ElementTree as ET
from functools import cache

import numpy as np
import pytest

from sa3_convert.components import Component
from sa3_convert.lab.report.figures import (
    Strip,
    end_to_end_figure,
    layers_figure,
    levels,
    spectrogram_figure,
    steps_figure,
    storage_figure,
    strips_figure,
)
from sa3_convert.lab.report.theme import Ink
from tests.lab.report import samples

RATE = 8000
SVG = "{http://www.w3.org/2000/svg}"


def tone(hertz: float, level: float = 0.5) -> np.ndarray:
    wave = level * np.sin(2 * np.pi * hertz * np.arange(RATE) / RATE)
    return np.stack([wave, wave]).astype(np.float32)


@cache
def drawn(name: str) -> str:
    return draw(name)


def draw(name: str) -> str:
    generations = samples.report().generations
    assert generations is not None
    sides = {"reference": tone(440), "target": tone(450), "chaos": tone(440.1)}
    makers = {
        "strips": lambda: strips_figure([Strip(samples.NASTY, [30.0, 300.0], 25.0)], name, "a <label>"),
        "steps": lambda: steps_figure(generations.distributions[:2], name, "a <label>"),
        "end": lambda: end_to_end_figure(samples.end_to_end(), name, "a <label>"),
        "layers": lambda: layers_figure(samples.bisection(own=20.0), name, "a <label>"),
        "storage": lambda: storage_figure(samples.report().components, name, "a <label>"),
        "spectrogram": lambda: spectrogram_figure(sides, RATE, name, "a <label>"),
    }
    return makers[name]()


@pytest.mark.parametrize("name", ["strips", "steps", "end", "layers", "storage", "spectrogram"])
def test_a_figure_is_one_labelled_svg_that_is_the_same_every_time(name: str) -> None:
    svg = drawn(name)
    root = ET.fromstring(svg)
    assert root.tag == f"{SVG}svg"
    assert root.get("role") == "img"
    assert root.get("aria-label") == "a <label>"
    assert draw(name) == svg
    assert not re.search(r"20\d\d-\d\d", re.sub(r"base64,[^\"]*", "", svg))


@pytest.mark.parametrize("name", ["strips", "steps", "end", "layers", "storage", "spectrogram"])
def test_colours_are_variables_and_identifiers_the_figures_own(name: str) -> None:
    svg = drawn(name)
    assert not any(ink.value in svg for ink in Ink)
    outside = re.sub(r"base64,[^\"]*", "", svg)
    assert "var(--" in outside
    assert "#000000" not in outside
    assert "DejaVu" not in outside
    identifiers = re.findall(r'\bid="([^"]+)"', outside)
    assert all(identifier.startswith(f"{name}-") for identifier in identifiers)
    assert len(identifiers) == len(set(identifiers))
    referred = set(re.findall(r"url\(#([^)]+)\)", outside)) | set(re.findall(r'xlink:href="#([^"]+)"', outside))
    assert referred == set(identifiers)


def test_names_are_text_and_not_markup() -> None:
    root = ET.fromstring(drawn("strips"))
    assert samples.NASTY in [text.text for text in root.iter(f"{SVG}text")]


def test_text_is_large_enough_to_read_on_a_phone() -> None:
    for name in ("strips", "steps", "layers", "storage", "spectrogram"):
        root = ET.fromstring(drawn(name))
        width = float(root.get("viewBox", "").split()[2])
        sizes = [float(size) for size in re.findall(r"font[^\"]*?([\d.]+)px", drawn(name))]
        assert width < 350
        assert min(sizes) >= 10


def test_every_operator_with_an_error_has_a_bar() -> None:
    found = samples.bisection()
    assert len([o for o in found.operators if o.own_error_db < 140]) == 21
    assert layers_figure(found, "a", "").count('style="fill: var(--first)"') == 21
    assert drawn("layers").count('style="fill: var(--bad)"') == 1


def test_what_lies_below_its_floor_stands_out() -> None:
    above, below = (strips_figure([Strip("s", [30.0, 40.0], floor)], "s", "") for floor in (25.0, 35.0))
    # The floor's bar has the colour too.
    assert below.count("var(--bad)") > above.count("var(--bad)") > 0


def test_areas_of_the_map_are_as_the_bytes() -> None:
    large = samples.component(bytes=3_000_000, stored=(samples.StoredType(type="int8", bytes=3_000_000),))
    small = samples.component(
        Component.DECODER, bytes=1_000_000, stored=(samples.StoredType(type="fp16", bytes=1_000_000),)
    )
    svg = storage_figure((small, large), "s", "")
    areas = {}
    for path, style in re.findall(r'<path d="([^"]*)"[^>]*style="fill: (var\(--[a-z]+\))', svg):
        points = np.array(re.findall(r"(-?[\d.]+) (-?[\d.]+)", path), float)
        areas[style] = float(np.prod(points.max(axis=0) - points.min(axis=0)))
    assert areas["var(--integer)"] / areas["var(--half)"] == pytest.approx(3, rel=0.01)


def test_a_tone_stands_in_its_band() -> None:
    spectrum = levels(tone(440), RATE)
    edges = np.geomspace(40, RATE / 2, spectrum.shape[0] + 1)
    band = int(spectrum.mean(axis=1).argmax())
    assert edges[band] <= 440 * 1.06
    assert edges[band + 1] >= 440 / 1.06


def test_silence_and_a_single_sample_have_a_picture() -> None:
    for audio in (np.zeros((2, RATE), np.float32), np.ones((2, 1), np.float32)):
        sides = dict.fromkeys(("reference", "target", "chaos"), audio)
        ET.fromstring(spectrogram_figure(sides, RATE, "s", ""))


def test_a_prompt_in_any_letters_is_text_and_raises_no_warning(recwarn: pytest.WarningsRecorder) -> None:
    texts = [text.text or "" for text in ET.fromstring(draw("end")).iter(f"{SVG}text")]
    assert "“雨の夜、静かなジャズトリオ、ブラシのドラムとウ…”" in texts
    assert "no prompt" in texts
    assert list(recwarn) == []
