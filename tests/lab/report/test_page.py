"""The page as text: what it says, in which order, and that it needs nobody."""

import base64
import io
import re
from html import escape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import soundfile

from sa3_convert.components import Component
from sa3_convert.lab.report.page import Heard, render_page
from sa3_convert.lab.report.schema import NotRun, Problem, Report
from tests.lab.report import samples

RATE = 8000
STYLE = Path(__file__).parents[3] / "sa3_convert" / "lab" / "report" / "style.css"


class Elements(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


def noise(seed: int, seconds: float = 1.0) -> np.ndarray:
    return (0.2 * np.random.default_rng(seed).standard_normal((2, int(seconds * RATE)))).astype(np.float32)


def heard(seconds: float = 1.0) -> Heard:
    sides = {side: noise(i, seconds) for i, side in enumerate(("reference", "target", "chaos"))}
    return {case.case: sides for case in samples.end_to_end().cases}


def page_of(report: Report, audio: Heard | None = None) -> str:
    return render_page(report, {} if audio is None else audio, RATE)


@pytest.fixture(scope="module")
def page() -> str:
    return page_of(samples.report(), heard())


def test_the_verdict_comes_first_and_the_sections_in_order(page: str) -> None:
    titles = re.findall(r'<section id="([a-z-]+)"', page)
    assert titles == ["end-to-end", "components", "generations", "layers", "sizes", "origin"]
    assert page.index("Passed: all is well.") < page.index("<section")
    assert "<title>Passed: small-music" in page


def test_audio_and_spectrograms_come_before_the_first_table(page: str) -> None:
    assert page.index("Passed: all is well.") < page.index("<audio") < page.index("heard-0") < page.index("<table")


def test_cases_are_called_by_their_prompts_outside_of_commands(page: str) -> None:
    read = re.sub(r"<code>.*?</code>", "", page, flags=re.DOTALL)
    assert "prompt=" not in read
    assert "“雨の夜、静かなジャズトリオ、ブラシのドラムとウッドベース”, seed 0, 1 s" in read
    assert "no prompt, seed 0, 1 s" in read
    assert "“warm analog synth pad”, seed 0, 1 s, step 1" in read


def test_what_was_recognised_is_told_with_what_was_not(page: str) -> None:
    assert "Inpainting on mnn: 9 of 10 sounds are recognised (60% to 98%)." in page
    assert f"{escape(samples.NASTY, quote=True)} (silence)." in page.replace("&#34;", "&quot;").replace(
        "&#39;", "&#x27;"
    )


def test_the_models_files_are_there_with_their_hashes(page: str) -> None:
    assert f"<code>{'0f' * 32}</code>" in page
    assert page.index("decoder.mnn") > page.index("SHA-256 of the models")


def test_no_zero_has_a_sign_that_was_rounded_away(page: str) -> None:
    tiny = {"signal_to_noise_db": -0.004, "cosine": -1e-9, "max_abs_error": 0.0, "mean_abs_error": 0.0}
    spread = samples.Spread(count=1, mean=-0.01, percentile_5=-0.02, worst=-0.04)
    silent = samples.component(worst=samples.Figures(**tiny), spread=spread)
    for text in (page, page_of(samples.report(components=(silent,)), heard())):
        assert not re.search(r"[-−]0(\.0+)?(?![\d.])", re.sub(r"<(svg|style).*?</\1>", "", text, flags=re.DOTALL))
    assert "+0.00" in page


def test_nothing_is_loaded_and_nothing_runs(page: str) -> None:
    elements = Elements(page)
    assert elements.all("script") == []
    loaded = [
        value
        for _, attributes in elements.found
        for key, value in attributes.items()
        if key in ("src", "href", "xlink:href", "data", "poster") and value is not None
    ]
    assert loaded
    assert all(value.startswith(("data:", "#")) for value in loaded)
    assert not any(key.startswith("on") for _, attributes in elements.found for key in attributes)
    assert "@import" not in STYLE.read_text()
    assert "url(" not in STYLE.read_text()


def test_prompts_and_names_are_text(page: str) -> None:
    assert "<script" not in page
    assert page.count(escape(samples.NASTY, quote=False).split("&amp;")[0]) >= 3


def test_identifiers_are_unique(page: str) -> None:
    identifiers = [a["id"] for _, a in Elements(page).found if "id" in a]
    assert len(identifiers) == len(set(identifiers))


def test_every_figure_has_a_caption_and_a_label_and_every_table_a_caption(page: str) -> None:
    elements = Elements(page)
    assert len(elements.all("figure")) == len(elements.all("figcaption")) == len(elements.all("svg")) == 9
    assert all(svg["aria-label"] for svg in elements.all("svg"))
    assert len(elements.all("table")) == len(elements.all("caption"))
    assert all("scope" in cell for cell in elements.all("th"))
    assert all(player["aria-label"] for player in elements.all("audio"))


def test_a_failure_names_the_model_the_operator_and_the_command() -> None:
    short = samples.component(passed=False)
    problem = Problem(
        what="dit: generation prompt=3 seed=0 seconds=2 has 20 dB, the floor is 30 dB.",
        command="sa3-convert bisect b --component dit --seed 3",
    )
    page = page_of(
        samples.report(
            passed=False, problems=(problem,), components=(short,), bisections=(samples.bisection(own=20.0),)
        )
    )
    head = page[: page.index("<section")]
    assert "<title>Failed" in page
    assert "dit: generation “dog bark”, seed 0, 2 s has 20 dB, the floor is 30 dB." in head
    assert "is the worst." in head
    assert "--component dit --seed 3" in head
    assert "dit, which fell short" in page


def test_what_was_not_run_is_said_with_its_command() -> None:
    missing = [
        NotRun(part=part, what=f"No {part} here.", command=f"sa3-convert verify {part}")
        for part in ("components", "generations", "end_to_end", "layers")
    ]
    page = page_of(samples.report(generations=None, end_to_end=None, bisections=(), not_run=tuple(missing)), {})
    for part in ("components", "generations", "end_to_end", "layers"):
        assert f"Not run: No {part} here." in page
        assert f"<code>sa3-convert verify {part}</code>" in page


def test_players_hold_what_was_heard_losslessly_and_there_are_few() -> None:
    elements = Elements(page_of(samples.report(), heard(seconds=7)))
    sources = [player["src"] or "" for player in elements.all("audio")]
    assert len(sources) == 4
    for source, seed in zip(sources[:2], (0, 1), strict=True):
        data = base64.b64decode(source.removeprefix("data:audio/flac;base64,"))
        audio, rate = soundfile.read(io.BytesIO(data))
        assert rate == RATE
        assert audio.shape == (5 * RATE, 2)
        np.testing.assert_allclose(audio.T, noise(seed, 7)[:, : 5 * RATE], atol=2**-16)


def test_an_engine_other_than_mnn_is_named() -> None:
    both = (samples.component(), samples.component(engine="onnxruntime-int8", stored=()))
    page = page_of(samples.report(components=both, generations=None))
    assert "dit, onnxruntime-int8" in page
    assert Elements(page).all("audio") == []


def test_the_same_report_gives_the_same_page(page: str) -> None:
    assert page_of(samples.report(), heard()) == page


def test_bisections_of_all_models_have_their_figure() -> None:
    found = tuple(samples.bisection(component) for component in Component)
    page = page_of(samples.report(bisections=found, generations=None, end_to_end=None))
    assert [f"layers-{c.value}-" in page for c in Component] == [True] * 5


def _luminance(color: str) -> float:
    channels = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def _contrast(first: str, second: str) -> float:
    light, dark = sorted((_luminance(first), _luminance(second)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_text_has_enough_contrast_in_light_dark_and_print() -> None:
    blocks = re.findall(r":root \{(.*?)\}", STYLE.read_text(), re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        color = dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{6})", block))
        pairs = [(ink, ground) for ink in ("text", "muted", "link") for ground in ("surface", "page")]
        pairs += [("good", "good-surface"), ("bad", "bad-surface"), ("first", "surface"), ("second", "surface")]
        pairs += [("text", kind) for kind in ("integer", "half", "float", "scales", "other")]
        for ink, ground in pairs:
            assert _contrast(color[ink], color[ground]) >= 4.5, (ink, ground)
