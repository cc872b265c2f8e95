"""The HTML reports in a real browser without a network: a phone and a desktop, light and dark, on screen and on paper.

Needs Chromium (Debian: `apt-get install chromium`); `KVLLM_CHROMIUM` names another one.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvllm.reports.render import render
from tests.reports.samples import HOSTILE, documents

CHROMIUM = os.environ.get("KVLLM_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
PLOTS = {
    "probe": {"distance", "retention", "collisions", "drift"},
    "drift": {"drift"},
    "regression": {"distance", "retention", "collisions", "drift"},
    "bisect": set(),
}
SIZES = {"phone": (390, 844), "desktop": (1280, 900)}
FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium, or set KVLLM_CHROMIUM")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("reports")
    written = {}
    for kind, document in documents().items():
        written[kind] = folder / f"{kind}.html"
        written[kind].write_text(render(document, "html"), encoding="utf-8")
    return written


class Page:
    """An open report, and what the browser complained about or asked the network for."""

    def __init__(self, browser: Any, file: Path, *, size: str = "desktop", scheme: str = "light") -> None:
        width, height = SIZES[size]
        self.context = browser.new_context(
            viewport={"width": width, "height": height}, color_scheme=scheme, offline=True
        )
        self.page = self.context.new_page()
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.said.append(dialog.message), dialog.dismiss()))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(file.as_uri())

    def __enter__(self) -> Any:
        return self.page

    def __exit__(self, *_: object) -> None:
        self.context.close()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", PLOTS)
def test_a_report_shows_its_plots_and_never_scrolls_sideways(
    browser: Any, files: dict[str, Path], kind: str, size: str
) -> None:
    opened = Page(browser, files[kind], size=size)
    with opened as page:
        width = SIZES[size][0]
        assert page.evaluate("document.documentElement.scrollWidth") == width
        # Also with everything open.
        page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
        assert page.evaluate("document.documentElement.scrollWidth") == width
        plots = page.locator("svg[data-plot]")
        assert {plot.get_attribute("data-plot") for plot in plots.all()} == PLOTS[kind]
        for plot in plots.all():
            box = plot.bounding_box()
            assert box["width"] >= 300
            assert box["height"] >= 150
            assert box["x"] >= 0
            assert box["x"] + box["width"] <= width
            marks = plot.locator("circle.dot, rect.share")
            assert marks.count() >= 2
            drawn = marks.first.bounding_box()
            assert drawn["width"] > 2
            letters = plot.locator("text").first.evaluate("t => t.getBoundingClientRect().height")
            assert letters >= 9
    assert opened.said == []
    assert opened.asked == [files[kind].as_uri()]


def test_hostile_words_are_read_and_not_run(browser: Any, files: dict[str, Path]) -> None:
    for kind in PLOTS:
        opened = Page(browser, files[kind])
        with opened as page:
            assert page.locator("script, img, a, iframe").count() == 0
            assert "<script>alert(1)</script>" in page.locator("body").inner_text() or kind == "drift"
        assert opened.said == []
    assert "<script>" in HOSTILE


def test_the_generated_text_is_one_click_away_from_its_score(browser: Any, files: dict[str, Path]) -> None:
    with Page(browser, files["regression"], size="phone") as page:
        answer = page.locator("details.answer").first
        said = answer.locator(".said").first
        assert not said.is_visible()
        answer.locator("summary").click()
        assert said.is_visible()
        labels = answer.locator("h3").all_inner_texts()
        assert labels[:2] == ["answer at edit 7", "answer at edit 12"]


@pytest.mark.parametrize("kind", PLOTS)
def test_dark_mode_is_dark_and_readable(browser: Any, files: dict[str, Path], kind: str) -> None:
    def colours(scheme: str) -> dict[str, float]:
        with Page(browser, files[kind], scheme=scheme) as page:
            found: dict[str, float] = page.evaluate(
                """() => {
                    const light = colour => {
                        const [r, g, b] = colour.match(/[\\d.]+/g).slice(0, 3).map(v => {
                            const c = Number(v) / 255;
                            return c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
                        });
                        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
                    };
                    const of = (selector, name) => {
                        const found = document.querySelector(selector);
                        return found ? light(getComputedStyle(found)[name]) : null;
                    };
                    return {
                        paper: of('body', 'backgroundColor'), ink: of('body', 'color'), note: of('.note', 'color'),
                        line: of('svg .line', 'stroke'), tick: of('svg .tick', 'fill'),
                    };
                }"""
            )
            return {name: value for name, value in found.items() if value is not None}

    light, dark = colours("light"), colours("dark")
    assert light["paper"] > 0.8
    assert dark["paper"] < 0.05
    for shades in (light, dark):
        for name in set(shades) - {"paper"}:
            brighter, darker = sorted((shades[name], shades["paper"]), reverse=True)
            # WCAG 2.2, contrast (minimum) for text; lines need 3.
            assert (brighter + 0.05) / (darker + 0.05) >= 4.5, name


def test_on_paper_every_answer_is_open(browser: Any, files: dict[str, Path]) -> None:
    with Page(browser, files["bisect"]) as page:
        page.emulate_media(media="print", color_scheme="dark")
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    with Page(browser, files["drift"]) as page:
        said = page.locator("details.answer .said").first
        assert said.evaluate("e => e.checkVisibility({contentVisibilityAuto: true})") is False
        page.emulate_media(media="print")
        assert said.evaluate("e => e.getBoundingClientRect().height") > 8
        assert page.locator("svg[data-plot]").first.bounding_box()["width"] > 300
