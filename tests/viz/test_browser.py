"""Saved pages in a real browser, with the network off: nothing is asked for, nothing fails, nothing hostile runs.

Skips, with its reason, where no Chromium can be started; CI installs one.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from seeing_runs import run
from test_notebook import HOSTILE, hostile_picture

import birthlens
from birthlens.viz.notebook import save_pictures
from birthlens.viz.report import write_report

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (pip install playwright)")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
         "--disable-sync", "--no-first-run"]  # fmt: skip


@pytest.fixture(scope="module")
def browser() -> Iterator[None]:
    found = os.environ.get("CHROMIUM") or next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )
    with playwright.sync_playwright() as driver:
        try:
            opened = driver.chromium.launch(executable_path=found, args=FLAGS)
        except playwright.Error as error:
            pytest.skip(f"no Chromium could be started ({str(error).splitlines()[0]}); apt-get install chromium")
        yield opened
        opened.close()


class Visit:
    """A page opened from disk, offline, with everything it complains of and asks for on record."""

    def __init__(self, browser: Any, path: Any, **options: Any) -> None:
        self.context = browser.new_context(offline=True, **options)
        self.page = self.context.new_page()
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.dialogs: list[str] = []
        self.page.on("console", lambda m: self.complaints.append(m.text) if m.type in ("error", "warning") else None)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda r: self.requests.append(r.url))
        self.page.on("dialog", self._dismiss)
        self.url = path.resolve().as_uri()
        self.page.goto(self.url)

    def _dismiss(self, dialog: Any) -> None:
        self.dialogs.append(dialog.message)
        dialog.dismiss()

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *error: Any) -> None:
        try:
            if error[0] is None:
                assert self.complaints == [] and self.dialogs == []
                left = [url for url in self.requests if url != self.url and not url.startswith(("data:", "about:"))]
                assert left == []
        finally:
            self.context.close()


def drawn(page: Any, selector: Any) -> Any:
    """Wait until a canvas has colour in it, and return its picture."""
    page.wait_for_function(
        """(selector) => {
            const canvas = document.querySelector(selector);
            if (!canvas || !canvas.width) return false;
            const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
            const coloured = (i) => pixels[i + 3] > 0 && Math.abs(pixels[i] - pixels[i + 2]) > 20;
            return Array.from({ length: pixels.length / 4 }, (_, i) => 4 * i).some(coloured);
        }""",
        arg=selector,
        timeout=20_000,
    )
    return page.evaluate("(s) => document.querySelector(s).toDataURL()", selector)


def move(page: Any, selector: Any, value: Any) -> None:
    page.evaluate(
        "([s, v]) => { const e = document.querySelector(s); e.value = v; e.dispatchEvent(new Event('input')); }",
        [selector, value],
    )


def test_the_slider_moves_the_picture(browser: Any, tmp_path: Path) -> None:
    path = birthlens.show_attention(run(), heads=["L0H0"]).save(tmp_path / "attention.html")
    with Visit(browser, path) as visit:
        page = visit.page
        late = drawn(page, ".bl-heads canvas")
        weights = page.locator(".bl-token").first.get_attribute("style")
        reading = page.locator(".bl-reading").inner_text()
        move(page, ".bl-steps", 0)
        page.wait_for_function("(old) => document.querySelector('.bl-heads canvas').toDataURL() !== old", arg=late)
        assert page.locator(".bl-step").inner_text() == "0"
        assert page.locator(".bl-reading").inner_text() != reading
        assert page.locator(".bl-token").first.get_attribute("style") != weights
        page.locator(".bl-steps").focus()
        page.keyboard.press("ArrowRight")
        assert page.locator(".bl-step").inner_text() == "3"


def test_the_tokens_are_walked_by_keyboard(browser: Any, tmp_path: Path) -> None:
    path = birthlens.show_attention(run(), step=-1).save(tmp_path / "attention.html")
    with Visit(browser, path) as visit:
        page = visit.page
        page.locator(".bl-query").focus()
        page.keyboard.press("Home")
        assert page.evaluate("[...document.querySelectorAll('.bl-token')].indexOf(document.activeElement)") == 0
        page.keyboard.press("ArrowRight")
        assert page.evaluate("[...document.querySelectorAll('.bl-token')].indexOf(document.activeElement)") == 1
        token = birthlens.show_attention(run(), step=-1).frames.tokens[1]
        assert f"from {token} at 1:" in page.locator(".bl-reading").inner_text()
        page.locator("select.bl-head").select_option("L0H0")
        assert page.locator(".bl-reading").inner_text().startswith("L0H0")


def test_the_chosen_head_is_the_one_in_the_map(browser: Any, tmp_path: Path) -> None:
    picture = birthlens.show_attention(run("full"), step=[0, 12])
    heads = picture.frames.heads
    with Visit(browser, picture.save(tmp_path / "attention.html")) as visit:
        page = visit.page
        first = drawn(page, ".bl-heads canvas")
        assert page.locator("select.bl-head").input_value() == heads[-1]
        assert page.locator(".bl-shown").inner_text() == f"{heads[-1]} at step 12"
        page.locator("select.bl-head").focus()
        page.keyboard.press("ArrowUp")  # by keyboard alone
        page.wait_for_function("(old) => document.querySelector('.bl-heads canvas').toDataURL() !== old", arg=first)
        assert page.locator(".bl-shown").inner_text() == f"{heads[-2]} at step 12"
        assert page.locator(".bl-reading").inner_text().startswith(heads[-2])
        assert heads[-2] in page.locator(".bl-heads canvas").get_attribute("aria-label")
        now = "() => document.querySelector('.bl-heads canvas').toDataURL()"
        second = page.evaluate(now)
        page.locator(".bl-thumb[aria-pressed=true]").focus()
        page.keyboard.press("ArrowRight")
        assert page.locator("select.bl-head").input_value() == heads[-1]
        assert page.evaluate("document.activeElement.innerText").strip() == heads[-1]
        page.wait_for_function("(old) => document.querySelector('.bl-heads canvas').toDataURL() !== old", arg=second)
        assert page.evaluate(now) == first
        page.locator(".bl-thumb").first.click()
        assert page.locator(".bl-shown").inner_text() == f"{heads[0]} at step 12"


def test_everything_that_can_be_clicked_is_reached_by_keyboard(browser: Any, tmp_path: Path) -> None:
    with Visit(browser, birthlens.show_attention(run()).save(tmp_path / "attention.html")) as visit:
        page = visit.page
        drawn(page, ".bl-heads canvas")
        reached = []
        for _ in range(6):
            page.keyboard.press("Tab")
            reached.append(page.evaluate("document.activeElement.className.split(' ')[0]"))
        assert reached[:4] == ["bl-steps", "bl-head", "bl-token", "bl-thumb"]
        assert (
            page.evaluate("document.querySelectorAll('[role=img] :is(button, input, select, [onclick])').length") == 0
        )
        assert page.evaluate("[...document.querySelectorAll('[role=img]')].every((e) => e.ariaLabel.length > 20)")


def test_two_pictures_on_a_page_both_draw(browser: Any, tmp_path: Path) -> None:
    pictures = [birthlens.show_attention(run(), step=[0, 12], row=row) for row in (0, 1)]
    with Visit(browser, save_pictures(pictures, tmp_path / "two.html")) as visit:
        assert visit.page.locator("figure.bl-attention").count() == 2
        names = [visit.page.locator("figure.bl-attention").nth(i).get_attribute("id") for i in (0, 1)]
        first, second = (drawn(visit.page, f"#{name}-heads canvas") for name in names)
        assert first != second


def test_two_notebook_outputs_on_a_page_both_draw(browser: Any, tmp_path: Path) -> None:
    outputs = [birthlens.show_attention(run(), step=12, row=row)._repr_html_() for row in (0, 1)]
    path = tmp_path / "notebook.html"
    path.write_text(f"<!doctype html><meta charset=utf-8><body>{''.join(outputs)}")
    with Visit(browser, path) as visit:
        visit.page.wait_for_timeout(200)
        frames = visit.page.frames[1:]
        assert len(frames) == 2
        for frame in frames:
            drawn(frame, ".bl-heads canvas")


def test_hostile_tokens_are_shown_as_text_and_run_nothing(browser: Any, tmp_path: Path) -> None:
    path = hostile_picture().save(tmp_path / "hostile.html")
    with Visit(browser, path) as visit:
        drawn(visit.page, ".bl-heads canvas")
        shown = visit.page.locator(".bl-token bdi").all_inner_texts()
        assert shown == [
            HOSTILE[0],
            HOSTILE[1],
            HOSTILE[2],
            HOSTILE[3],
            "U+202E",
            HOSTILE[5].replace(" ", "␣"),
            "⏎",
            HOSTILE[7],
        ]
        assert visit.page.locator("script[src], img").count() == 0
        visit.page.locator(".bl-token").first.hover()


def test_a_page_cannot_ask_for_anything_even_if_told_to(browser: Any, tmp_path: Path) -> None:
    path = hostile_picture().save(tmp_path / "hostile.html")
    visit = Visit(browser, path)
    refused = visit.page.evaluate("fetch('https://example.org/').then(() => 'fetched', (error) => error.name)")
    visit.context.close()
    assert refused == "TypeError" and any("Content Security Policy" in text for text in visit.complaints)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return write_report([run()], tmp_path_factory.mktemp("report") / "report.html")


def test_the_reports_cursor_moves_curves_tables_and_patterns(browser: Any, report: Any) -> None:
    with Visit(browser, report) as visit:
        page = visit.page
        late, pattern = drawn(page, "figure.table canvas"), drawn(page, ".bl-heads canvas")
        value = page.locator("figure.chart output").first.inner_text()
        x = page.locator("figure.chart .cursor").first.get_attribute("x1")
        move(page, "#step", 0)
        assert page.locator("#at").inner_text() == "0"
        assert page.locator("figure.chart output").first.inner_text() != value
        assert float(page.locator("figure.chart .cursor").first.get_attribute("x1")) < float(x)
        assert page.evaluate("document.querySelector('figure.table canvas').toDataURL()") != late
        assert page.locator("figure.table .at").all_inner_texts() == ["0", "0", "0"]
        assert page.locator(".bl-step").inner_text() == "0"
        page.wait_for_function("(old) => document.querySelector('.bl-heads canvas').toDataURL() !== old", arg=pattern)
        move(page, ".bl-steps", 2)  # and the other way round
        assert page.locator("#at").inner_text() == page.locator(".bl-step").inner_text() == "6"
        page.locator("figure.chart svg").first.click(position={"x": 2, "y": 40})
        assert page.locator("#at").inner_text() == "0"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1200])
def test_the_report_fits_the_screen_and_can_be_read(browser: Any, report: Any, scheme: Any, width: Any) -> None:
    with Visit(browser, report, color_scheme=scheme, viewport={"width": width, "height": 800}) as visit:
        page = visit.page
        drawn(page, ".bl-heads canvas")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        scrolled = "[...document.querySelectorAll('.scroll')].filter((e) => e.scrollWidth > e.clientWidth + 1).length"
        assert page.evaluate(scrolled) == 0  # every table is whole, on a phone too
        ink, paper = page.evaluate(
            "(({color, backgroundColor}) => [color, backgroundColor])(getComputedStyle(document.body))"
        )
        assert contrast(ink, paper) > 7
        soft = page.evaluate("getComputedStyle(document.querySelector('.subtitle')).color")
        assert contrast(soft, paper) > 4.5
        sizes = page.evaluate(
            "[...document.querySelectorAll('svg text')].map((t) => t.getBoundingClientRect().height).filter((h) => h > 0)"
        )
        assert min(sizes) > 9


def test_the_report_is_printed_light_and_whole(browser: Any, report: Any) -> None:
    with Visit(
        browser, report, color_scheme="dark", viewport={"width": 718, "height": 900}
    ) as visit:  # A4 without margins
        page = visit.page
        page.emulate_media(media="print", color_scheme="dark")
        body = "getComputedStyle(document.body)"
        assert page.evaluate(f"[{body}.backgroundColor, {body}.color]") == ["rgb(255, 255, 255)", "rgb(26, 26, 26)"]
        assert not page.locator("#cursor").is_visible()
        assert page.evaluate("document.documentElement.scrollWidth") <= 718
        closed = "[...document.querySelectorAll('details:not([open])')].map((e) => e.getBoundingClientRect().height)"
        heights = page.evaluate(closed)
        assert heights and min(heights) > 60


def test_the_report_speaks_to_those_who_do_not_see_it(browser: Any, report: Any) -> None:
    with Visit(browser, report) as visit:
        page = visit.page
        drawn(page, ".bl-heads canvas")
        assert page.evaluate(
            "[...document.querySelectorAll('[role=img]')].every((e) => e.getAttribute('aria-label').length > 20)"
        )
        assert page.evaluate(
            "[...document.querySelectorAll('input, select')].every((e) => e.ariaLabel || e.labels.length)"
        )
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.className") == "jump"
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.id") == "step"
        page.keyboard.press("ArrowLeft")
        assert page.locator("#step").get_attribute("aria-valuetext") == "step 9"
        levels = page.evaluate(
            "[...document.querySelectorAll('h1, h2, h3')].filter((h) => !h.closest('.bl-heads')).map((h) => h.tagName)"
        )
        assert levels[0] == "H1" and levels.count("H1") == 1


def test_play_runs_through_the_steps_and_stops(browser: Any, report: Any) -> None:
    with Visit(browser, report) as visit:
        visit.page.locator("#play").click()
        visit.page.wait_for_function("() => document.getElementById('at').textContent === '0'")
        visit.page.wait_for_function("() => document.getElementById('at').textContent === '12'", timeout=10_000)
        visit.page.wait_for_function("() => document.getElementById('play').textContent === 'play'")


def test_a_comparison_draws(browser: Any, tmp_path: Path) -> None:
    path = write_report([run(), run("other")], tmp_path / "two.html")
    with Visit(browser, path) as visit:
        move(visit.page, "#step", 0)
        assert visit.page.locator("figure.chart").count() >= 5
        assert visit.page.locator("figure.chart output").count() >= 10


def contrast(first: Any, second: Any) -> Any:
    """The WCAG contrast ratio of two CSS colours."""

    def luminance(colour: Any) -> Any:
        parts = [int(part) / 255 for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(first), luminance(second)), reverse=True)
    return (high + 0.05) / (low + 0.05)
