"""The page in a browser: on a phone and on a desktop, in light and dark."""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest

from sa3_convert.lab.report.build import PAGE, write_report
from tests.browser import Browser, browser
from tests.lab.report.conftest import Verified

_SIZES = "[...document.querySelectorAll('{}')].map(e => e.getBoundingClientRect()).map(r => [r.width, r.height])"


@pytest.fixture(scope="module")
def page(verified: Verified, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report") / "report"
    write_report(folder, verified.bundle, verified.findings, layers=verified.layers, heard=verified.heard)
    return folder / PAGE


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with browser() as started:
        yield started


@pytest.mark.parametrize(("width", "scheme"), [(375, "dark"), (375, "light"), (1180, "light")])
def test_the_page_stands_whole_without_a_network_or_a_complaint(
    chromium: Browser, page: Path, width: int, scheme: Literal["light", "dark"]
) -> None:
    chromium.events.clear()
    chromium.open(page, width=width, scheme=scheme)
    assert chromium.complaints() == []
    assert {address.split(":")[0] for address in chromium.requests()} <= {"file", "data"}
    assert [address for address in chromium.requests() if address.startswith("file:")] == [page.resolve().as_uri()]
    # No sideways scrolling: what is wider than the window scrolls inside its box.
    assert chromium.evaluate("document.documentElement.scrollWidth") <= width
    assert chromium.evaluate("innerWidth") == width

    figures = chromium.evaluate(_SIZES.format("figure svg"))
    assert len(figures) == 12
    assert all(w > 280 and h > 60 for w, h in figures)
    pictures = chromium.evaluate(_SIZES.format("figure svg image"))
    # Four spectrograms for each of two generations; the rest are colour bars.
    assert sum(w > 50 and h > 50 for w, h in pictures) == 8
    players = (
        "Promise.all([...document.querySelectorAll('audio')].map(a => a.readyState > 0 ? a.duration : new Promise("
    )
    players += "(done, fail) => { a.onloadedmetadata = () => done(a.duration); a.onerror = () => fail(a.error) })))"
    assert chromium.evaluate(players) == pytest.approx([1.0] * 4, abs=0.01)


def test_colours_follow_the_scheme_and_print_is_light(chromium: Browser, page: Path) -> None:
    color = "getComputedStyle(document.querySelector('section')).backgroundColor"
    ink = "getComputedStyle(document.querySelector('figure svg text')).fill"
    seen = []
    for scheme in ("light", "dark"):
        chromium.open(page, width=375, scheme=scheme)  # type: ignore[arg-type]
        seen.append((chromium.evaluate(color), chromium.evaluate(ink)))
    chromium("Emulation.setEmulatedMedia", media="print", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    printed = chromium.evaluate(color), chromium.evaluate(ink)
    assert chromium.evaluate("getComputedStyle(document.querySelector('.players')).display") == "none"
    # Commands keep their lines on paper.
    assert chromium.evaluate("getComputedStyle(document.querySelector('pre')).whiteSpace") == "pre-wrap"
    assert printed == seen[0]
    assert all(light != dark for light, dark in zip(*seen, strict=True))


def test_a_page_that_misbehaves_is_noticed(chromium: Browser, tmp_path: Path) -> None:
    bad = tmp_path / "bad.html"
    bad.write_text("<div style='width: 900px'>wide</div><img src='https://example.invalid/x.png'><script>no()</script>")
    chromium.events.clear()
    chromium.open(bad, width=375)
    assert any("no is not defined" in complaint for complaint in chromium.complaints())
    assert "https://example.invalid/x.png" in chromium.requests()
    assert chromium.evaluate("document.documentElement.scrollWidth") > 375
