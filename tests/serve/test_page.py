"""The page in headless Chromium: everything on it that a musician uses, and whom it asks."""

import asyncio
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio
import pytest
import soundfile

pytest.importorskip("playwright.sync_api")
from playwright.sync_api import Page, expect, sync_playwright

from sa3_convert.bundle.reader import Bundle
from sa3_convert.check.metrics import wilson
from sa3_convert.errors import UsageError
from sa3_convert.runtime.audio import read_metadata
from sa3_convert.serve.blind import BlindTest, Pair
from sa3_convert.serve.form import _regions
from sa3_convert.serve.page import GLANCE
from tests.browser import find_chromium
from tests.conftest import GOLDEN
from tests.serve.conftest import Serving, serving
from tests.serve.test_http import wav

PATIENCE = 60_000
LORA = GOLDEN / "small" / "lora" / "lora.safetensors"


@pytest.fixture(scope="module")
def opened() -> Iterator[Page]:
    path = find_chromium()
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1100, "height": 1000})
        page.set_default_timeout(PATIENCE)
        expect.set_options(timeout=PATIENCE)
        yield page
        browser.close()


@pytest.fixture
def page(opened: Page, served: Serving) -> Iterator[Page]:
    asked: list[str] = []
    opened.on("request", lambda request: asked.append(request.url))
    opened.goto(served.address)
    opened.get_by_label("Seconds, at most").fill("1")
    opened.get_by_role("button", name="More").click()
    opened.get_by_label("Steps").fill("2")
    opened.get_by_label("Prompt", exact=True).fill("warm pad")
    yield opened
    own = (served.address, "data:", f"blob:{served.address}")
    assert [url for url in asked if not url.startswith(own)] == []


def press(page: Page, name: str) -> None:
    page.get_by_role("button", name=name, exact=True).click()


def history(page: Page) -> list[str]:
    return page.locator("label:has(input[type=radio])").all_inner_texts()


def generate(page: Page, pieces: int = 1) -> None:
    before = len(history(page))
    press(page, "Generate")
    expect(page.locator("input[type=radio]")).to_have_count(before + pieces)
    expect(page.get_by_label("Status")).to_have_value("done")


def mark(page: Page, places: list[float]) -> None:
    """Click a waveform at parts of its width, and mark each."""
    waveform, regions = page.locator(".waveform-container").first, page.get_by_label("Regions in seconds")
    for number, place in enumerate(places, 1):
        box = waveform.bounding_box()
        assert box is not None
        waveform.click(position={"x": box["width"] * place, "y": box["height"] / 2})
        press(page, "Mark this place")
        begun = r"[\d.]+:" if number % 2 else ""
        expect(regions).to_have_value(re.compile(rf"^([\d.]+:[\d.]+(, )?){{{number // 2}}}{begun}$"))


def test_variations_come_with_all_that_belongs_to_them(page: Page, served: Serving) -> None:
    page.get_by_label("Prompt", exact=True).fill("<b>warm</b> <img src=x onerror=alert(1)>")
    page.get_by_label("Seed", exact=True).fill("5")
    page.get_by_label("Variations, at most").fill("2")
    generate(page, 2)
    assert [re.search(r"seed (\d+)", text)[1] for text in history(page)] == ["6", "5"]  # type: ignore[index]
    assert all(text.startswith("<b>warm</b>") for text in history(page))
    assert "LUFS" in page.get_by_label("Figures").input_value()
    expect(page.locator(".cm-content")).to_contain_text("--engine mnn")
    page.locator("input[type=radio]").nth(1).check()
    expect(page.get_by_label("Figures")).to_have_value(re.compile("seed 5"))
    with page.expect_download() as download:
        press(page, "FLAC")
    assert soundfile.info(download.value.path()).format == "FLAC"
    page.get_by_label("Seed", exact=True).fill("77")
    press(page, "Again with these settings")
    expect(page.get_by_label("Seed", exact=True)).to_have_value("5")
    press(page, "Roll the dice")
    expect(page.get_by_label("Seed", exact=True)).not_to_have_value("5")


def test_what_cannot_be_is_said_in_a_sentence(page: Page) -> None:
    page.get_by_label("Prompt", exact=True).fill("warm pad")
    page.get_by_role("button", name="Regenerate regions of audio").click()
    page.get_by_label("Seed", exact=True).fill("99999999999999999999")
    press(page, "Generate")
    expect(page.get_by_label("Status")).to_have_value(re.compile("seed is"))


def test_audio_is_started_from_and_two_regions_of_it_are_made_anew(page: Page, served: Serving, tmp_path: Path) -> None:
    (tmp_path / "<given>.wav").write_bytes(wav(1.5))
    page.get_by_role("button", name="Start from audio").click()
    page.locator("input[type=file]").first.set_input_files(tmp_path / "<given>.wav")
    expect(page.locator(".waveform-container").first).to_be_visible()
    page.get_by_label("Seconds, at most").fill("1.5")
    generate(page)
    first = next(reversed(served.jobs.known.values()))
    assert first.settings["init_noise_level"] == 0.9
    page.get_by_role("button", name="Clear").first.click()
    page.get_by_role("button", name="Regenerate regions of audio").click()
    press(page, "Regenerate regions of it")
    expect(page.locator(".waveform-container")).to_have_count(2)
    mark(page, [0.2, 0.4, 0.8, 0.6])
    generate(page)
    second = next(reversed(served.jobs.known.values()))
    assert second.settings["inpaint"] == [pytest.approx([0.3, 0.6], abs=0.02), pytest.approx([0.9, 1.2], abs=0.02)]
    assert "init_audio" not in second.settings
    assert served.jobs.audio(second.settings["inpaint_audio"]).read_bytes() == first.path.read_bytes()


def test_cancel_ends_what_runs(page: Page, served: Serving) -> None:
    page.get_by_label("Seconds, at most").fill("100")
    page.get_by_label("Steps").fill("1000")
    press(page, "Generate")
    expect(page.get_by_label("Status")).to_have_value(re.compile("step [2-9].* left"))
    press(page, "Cancel")
    expect(page.get_by_label("Status")).to_have_value("cancelled")
    assert not served.jobs.running


def test_two_models_are_compared_and_told_apart_blindly(page: Page, served: Serving) -> None:
    page.get_by_role("button", name="Compare two models").click()
    press(page, "Generate on both")
    expect(page.get_by_label("Comparison")).to_have_value("Listen.")
    press(page, "Blind test of 10 pairs")
    for number in range(1, 11):
        expect(page.get_by_label("Comparison")).to_have_value(f"Pair {number} of 10: which one is one?")
        press(page, "It is the first")
    expect(page.get_by_label("Comparison")).to_have_value(re.compile(r"of 10 right; .* \(95 %\)"))
    (path,) = served.folder.glob("blind-*.json")
    kept = json.loads(path.read_text())
    assert kept["right"] == [pair["first"] for pair in kept["pairs"]].count("one")
    assert [pair["seed"] for pair in kept["pairs"]] == list(range(10))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_and_is_dark_where_that_is_liked(page: Page, served: Serving, scheme: str) -> None:
    page.emulate_media(color_scheme="dark" if scheme == "dark" else "light")
    page.set_viewport_size({"width": 360, "height": 740})
    page.goto(served.address)
    page.get_by_label("Prompt", exact=True).wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert page.evaluate("document.body.classList.contains('dark')") == (scheme == "dark")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.tagName") in ("TEXTAREA", "INPUT", "BUTTON")
    page.set_viewport_size({"width": 1100, "height": 1000})
    page.emulate_media(color_scheme="light")


@pytest.mark.parametrize(
    ("right", "of", "low", "high"), [(10, 10, 0.722, 1.0), (5, 10, 0.237, 0.763), (0, 10, 0, 0.278)]
)
def test_the_interval_is_wilsons(right: int, of: int, low: float, high: float) -> None:
    assert wilson(right, of) == pytest.approx((low, high), abs=5e-4)


def test_an_answer_is_right_where_the_first_model_was_heard() -> None:
    pairs = [Pair(n, "a" if n % 2 else "b", [], "first") for n in range(10)]
    test = BlindTest("a", "b", {}, pairs)
    assert test.right == 5
    assert "chance explains it" in test.verdict()
    assert {test.order() for _ in range(100)} == {("a", "b"), ("b", "a")}


def test_an_address_in_place_of_audio_is_not_asked(served: Serving) -> None:
    text = Path(gradio.blocks.__file__).read_text(encoding="utf-8")
    fetching = set(re.findall(r"processing_utils\.(\w*(?:download|url_to_cache))\(", text))
    assert fetching
    for name in fetching:
        with pytest.raises(UsageError, match="address"):
            getattr(gradio.processing_utils, name)("https://example.com/a.wav", "nowhere")


def test_the_queue_of_the_page_rests_while_nobody_is_there(served: Serving) -> None:
    served.client.get("/")
    rest = asyncio.sleep
    rests: list[float] = []

    async def counted(seconds: float, *more: Any) -> Any:
        rests.append(seconds)
        return await rest(seconds, *more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gradio.queueing.asyncio, "sleep", counted)
        time.sleep(0.5)
    assert GLANCE in rests
    assert min(rests) >= GLANCE


def test_regions_are_read_as_the_command_line_does() -> None:
    assert _regions("2.5:4, 8:9,") == [[2.5, 4], [8, 9]]
    with pytest.raises(UsageError, match="START:END"):
        _regions("2.5")


def test_an_adapter_has_a_strength_on_the_page(opened: Page, toy_slots: Bundle, tmp_path: Path) -> None:
    with serving(toy_slots, tmp_path / "served", adapters={"warm": LORA}) as running:
        opened.goto(running.address)
        opened.get_by_label("Seconds, at most").fill("1")
        opened.get_by_role("button", name="More").click()
        opened.get_by_label("Steps").fill("2")
        opened.get_by_role("button", name="Adapters").click()
        strength = opened.get_by_label(re.compile("^number input for Strength of warm"))
        made = []
        for number in ("0", "0.5"):
            strength.fill(number)
            strength.press("Tab")
            generate(opened)
            made.append(opened.locator(".cm-content").inner_text())
        assert ["--adapter" in command for command in made] == [False, True]
        assert re.search(r"--adapter \S*small/lora/lora.safetensors:0.5", made[1].replace("\n", " "))
        strength.fill("-1")
        press(opened, "Again with these settings")
        expect(strength).to_have_value("0.5")
        found = [read_metadata(file) for file in sorted(running.folder.glob("*.wav"), key=lambda f: f.stat().st_mtime)]
        assert [told and told["request"].get("adapters") for told in found] == [[], ["warm:0.5"]]
