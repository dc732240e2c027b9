"""Reports in a real browser, where there is one: Debian's package `chromium` will do."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from r4r_graph.debug.diff import write_diff
from r4r_graph.debug.report import write_report
from r4r_graph.debug.trace import trace
from r4r_graph.engine.aspects import format_aspects
from r4r_graph.engine.base import GenerateRequest
from r4r_graph.errors import EngineFailure, RunPausedError
from r4r_graph.schema import AspectSummary, Review
from tests.browser import Browser, Page, binary, open_browser
from tests.kept_runs import Fake, load, run, weights
from tests.pages import HOSTILE
from tests.scripted import Script, at, prompt

CONTRAST = """
(() => {
  const number = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => {
    const [x, y, z] = [r, g, b].map((v) => v / 255)
      .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * x + 0.7152 * y + 0.0722 * z;
  };
  const behind = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const box = at.tagName === "g" && at.querySelector("rect");
      if (box) return number(getComputedStyle(box).fill);
      const colour = number(getComputedStyle(at).backgroundColor);
      if (colour.length < 4 || colour[3] > 0) return colour;
    }
    return [255, 255, 255];
  };
  const found = {};
  for (const element of document.querySelectorAll("body, body *")) {
    const written = [...element.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
    const style = getComputedStyle(element);
    if (!written || ["SCRIPT", "title"].includes(element.tagName)) continue;
    if (!element.getClientRects().length || element.closest(".unseen, .skip")) continue;
    const svg = element instanceof SVGElement;
    const pair = [light(number(svg ? style.fill : style.color)), light(behind(element))];
    const ratio = (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
    const name = `${element.tagName}.${element.getAttribute("class") || ""}`;
    found[name] = Math.min(found[name] ?? 99, ratio);
  }
  return JSON.stringify(found);
})()
"""
"""The least contrast of text to what is behind it, by kind of element (as WCAG 2 counts it)."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if binary() is None:
        pytest.skip("there is no Chromium: apt-get install chromium")
    with open_browser() as started:
        yield started


@pytest.fixture
def report(fake: Fake, tmp_path: Path) -> Path:
    recommender = load(fake)
    run(recommender, "mon", rationales=4, round_size=2, sure=1.0, influence="same")
    return write_report(trace(recommender.graph, "mon"), tmp_path / "run.html")


@pytest.fixture
def difference(fake: Fake, tmp_path: Path) -> Path:
    recommender = load(fake)
    run(recommender, "mon", influence="same")
    name = recommender.fork("mon", {"without": [("ann", "folk")], "knobs": {"readout": "mode"}})
    recommender.resume(name)
    pair = (trace(recommender.graph, each) for each in ("mon", name))
    return write_diff(*pair, tmp_path / "diff.html")


@pytest.fixture
def unfinished(fake: Fake, tmp_path: Path) -> dict[str, Path]:
    """Reports of a run that failed, and of one that waits."""

    def before(request: Any) -> None:
        if "mark_ben" in prompt(request):
            raise EngineFailure("out of memory")

    script = Script(weights=weights, before=before)
    recommender = load(fake, script)
    with pytest.raises(EngineFailure):
        run(recommender, "failed")
    script.before = lambda _: None
    with pytest.raises(RunPausedError):
        run(recommender, "waiting", ask=True)
    return {
        name: write_report(trace(recommender.graph, name), tmp_path / f"{name}.html")
        for name in ("failed", "waiting")
    }


def is_calm(page: Page) -> None:
    """It complained of nothing and asked for nothing."""
    assert page.console == []
    assert page.requests == []


# The detector itself -----------------------------------------------------------------------------


def test_the_browser_tells_what_a_page_does(browser: Browser, tmp_path: Path) -> None:
    file = tmp_path / "wild.html"
    file.write_text(
        "<script>console.log('said', 7); fetch('http://127.0.0.1:9/a').catch(() => 0);"
        "setTimeout(() => { throw Error('thrown') })</script><img src='http://127.0.0.1:9/b.png'>"
    )
    page = browser.open(file.as_uri())
    page.run("new Promise((done) => setTimeout(done, 200))")
    assert "said 7" in page.console
    assert any("thrown" in line for line in page.console)
    assert {"http://127.0.0.1:9/a", "http://127.0.0.1:9/b.png"} <= set(page.requests)


def test_the_policy_stops_what_is_put_into_a_page(browser: Browser, report: Path) -> None:
    wild = (
        "<script>document.title = 'HOSTILE'</script><img src='http://127.0.0.1:9/a.png'>"
        "<img src='data:image/gif;base64,R0lGODlhAQABAAAAACw=' onload='document.title=\"HOSTILE\"'>"
        "<style>body { display: none }</style><p style='position: fixed'>x</p>"
    )
    html = report.read_text(encoding="utf-8")
    report.write_text(html.replace("</main>", f"{wild}</main>"), encoding="utf-8")
    page = browser.open(report.as_uri())
    assert page.run("document.title").startswith("ann on Target")
    assert page.run("getComputedStyle(document.body).display") != "none"
    assert page.run("getComputedStyle(document.querySelector('main > p')).position") == "static"
    assert sum("Content Security Policy" in line for line in page.console) >= 4
    assert not page.run("document.querySelector('main > img').naturalWidth")


# Our pages ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_pages_are_calm_fit_a_phone_and_can_be_read(
    browser: Browser, report: Path, difference: Path, unfinished: dict[str, Path], dark: bool
) -> None:
    for file in (report, difference, *unfinished.values()):
        page = browser.open(file.as_uri())
        for width in (1280, 390):
            page.show(width, dark=dark)
            page.run("document.querySelectorAll('details').forEach((d) => { d.open = true })")
            assert page.run("document.documentElement.scrollWidth") <= width, file.name
            poor = {
                name: round(ratio, 2)
                for name, ratio in json.loads(page.run(CONTRAST)).items()
                if ratio < 4.5
            }
            assert poor == {}, (file.name, width)
        is_calm(page)


def test_hostile_texts_do_nothing(browser: Browser, fake: Fake, tmp_path: Path) -> None:
    words = "\n".join(HOSTILE)
    script = Script(weights=weights)

    def write(request: GenerateRequest) -> str:
        if request.format == "text":
            return words
        return format_aspects(AspectSummary((HOSTILE[0],), (HOSTILE[1],), (HOSTILE[4],)))

    script.write = write  # type: ignore[method-assign]
    reviews = [
        Review("ann", f"i{n}", 3, at(n), text, f"{text} {words}") for n, text in enumerate(HOSTILE)
    ]
    recommender = load(fake, script, reviews=reviews)
    run(recommender, "mon", item_history=[], influence="same")
    file = write_report(trace(recommender.graph, "mon"), tmp_path / "run.html")
    page = browser.open(file.as_uri())
    is_calm(page)
    assert page.run("document.title").startswith("ann on target")
    assert page.run("document.scripts.length") == 1
    assert page.run("document.images.length + document.querySelectorAll('main style').length") == 0
    assert page.run("[...document.links].every((a) => a.hash)")
    shown = page.run("document.querySelector('blockquote').textContent")
    assert "<script>document.title='HOSTILE'</script>" in shown
    written = json.loads(page.run("document.querySelector('textarea').value"))
    assert written["rationales"][0]["text"] == words.strip()


def test_twenty_reviews_open_in_a_moment(
    browser: Browser, fake: Fake, tmp_path: Path, record_property: Any
) -> None:
    text = "A long evening of songs about harbours, some of them warm. " * 20
    reviews = [
        *(Review("ann", f"i{n}", 1 + n % 5, at(n), f"Title {n}", text) for n in range(10)),
        *(Review(f"u{n}", "target", 1 + n % 5, at(n), "Target", text) for n in range(10)),
    ]
    script = Script(weights=weights, rationale=lambda request: f"Because {request.seed}. " * 30)
    recommender = load(fake, script, reviews=reviews)
    run(recommender, "mon", rationales=4, sure=1.0, influence="same")
    file = write_report(trace(recommender.graph, "mon"), tmp_path / "run.html")
    page = browser.open(file.as_uri())
    timing = "performance.getEntriesByType('navigation')[0].loadEventEnd"
    milliseconds = page.run(timing)
    record_property("milliseconds until loaded", milliseconds)
    assert 0 < milliseconds < 5_000, "under a second where the machine has time for it"
    assert file.stat().st_size < 1_000_000
    is_calm(page)


# Using them --------------------------------------------------------------------------------------


def test_the_keyboard_is_enough(browser: Browser, report: Path) -> None:
    page = browser.open(report.as_uri())
    page.show(1280)
    page.press("Tab", 9)
    assert page.run("document.activeElement.className") == "skip"
    assert page.run("document.activeElement.getBoundingClientRect().top") >= 0
    page.press("Enter", 13, "\r")
    assert page.run("document.activeElement.id") == "main"
    reached = set()
    for _ in range(80):
        page.press("Tab", 9)
        reached.add(page.run("document.activeElement.tagName"))
        if page.run("document.activeElement.matches('.step > summary')"):
            break
    assert page.run("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.press("Enter", 13, "\r")
    assert page.run("document.activeElement.parentElement.open")
    assert {"A", "BUTTON", "SUMMARY", "DIV"} <= reached


def test_a_bar_leads_to_its_step(browser: Browser, report: Path) -> None:
    page = browser.open(report.as_uri())
    opened = "[...document.querySelectorAll('.step')].map((fold) => fold.open).indexOf(true)"
    assert page.run(opened) == -1
    page.run("document.querySelector('#time a[href=\"#step-3\"]').click()")
    page.run("new Promise((done) => setTimeout(done, 100))")
    assert page.run(opened) == 2


def test_buttons_open_and_copy(browser: Browser, report: Path) -> None:
    page = browser.open(report.as_uri())
    folds = "[...document.querySelectorAll('.step')].map((fold) => fold.open)"
    open_all, close_all = (f"document.querySelectorAll('.buttons button')[{n}]" for n in (0, 1))
    page.run(f"{open_all}.click()")
    assert all(page.run(folds))
    page.run(f"{close_all}.click()")
    assert not any(page.run(folds))
    page.run("document.querySelector('.copy button').click()")
    page.run("new Promise((done) => setTimeout(done, 100))")
    said = page.run("document.querySelector('.copy button').textContent")
    assert said in ("Copied", "Press Ctrl+C")
    is_calm(page)


def test_without_javascript_everything_can_be_read(browser: Browser, report: Path) -> None:
    page = browser.open(report.as_uri(), javascript=False)
    answer = page.call("DOM.getDocument", depth=0)
    found = page.call("DOM.querySelectorAll", nodeId=answer["root"]["nodeId"], selector="button")
    assert found["nodeIds"] == []
    html = page.call("DOM.getOuterHTML", nodeId=answer["root"]["nodeId"])["outerHTML"]
    assert "<textarea" in html
    assert "This page loads nothing" in html
    is_calm(page)
