"""Terminal, Markdown and HTML: all say the same, and nobody's text becomes more than text."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt
from rich.console import Console

from r4r_graph.errors import SettingError
from r4r_graph.evaluation.rendering.document import document
from r4r_graph.evaluation.rendering.outputs import print_report, to_html, to_markdown, write_report
from r4r_graph.evaluation.report import EvaluationReport
from tests import evaluation_reports as made

Report = Callable[[], EvaluationReport]

REPORTS = pytest.mark.parametrize(
    "report", [made.full, made.report, made.hostile, lambda: made.report(made.points_only())]
)
NAMES = ("errors", "ratings", "reliability-1", "reliability-2", "probes")
DRAWN = {
    name: f'<svg xmlns="http://www.w3.org/2000/svg"><text>{name}</text></svg>' for name in NAMES
}


def grids(report: EvaluationReport) -> list[list[list[str]]]:
    """Each table's headings and rows, as texts."""
    return [
        [list(table.columns), *([cell.text for cell in row] for row in table.rows)]
        for section in document(report)
        for table in section.tables
    ]


def paragraphs(report: EvaluationReport) -> set[str]:
    """What stands outside of the tables."""
    found = set()
    for section in document(report):
        found |= {section.title, section.text}
        found |= {text for table in section.tables for text in (table.title, table.note)}
    return found - {""}


# Markdown ----------------------------------------------------------------------------------------


def parsed(markdown: str) -> tuple[list[list[list[str]]], set[str], list[str]]:
    """Tables, other texts and pictures, as a reader of Markdown sees them."""
    tables: list[list[list[str]]] = []
    others: set[str] = set()
    pictures: list[str] = []
    parser = MarkdownIt("commonmark").enable(["table", "strikethrough"])
    for token in parser.parse(markdown):
        if token.type == "table_open":
            tables.append([])
        elif token.type == "tr_open":
            tables[-1].append([])
        elif token.type == "inline":
            kinds = {child.type for child in token.children or []}
            assert kinds <= {"text", "text_special", "strong_open", "strong_close", "image"}
            text = "".join(c.content for c in token.children or [] if c.type != "image")
            if token.level == 4:
                tables[-1][-1].append(text)
            elif text:
                others.add(text)
            pictures += [str(c.attrs["src"]) for c in token.children or [] if c.type == "image"]
        else:
            assert token.type.split("_")[0] in {
                "heading",
                "paragraph",
                "table",
                "thead",
                "tbody",
                "tr",
                "th",
                "td",
            }
    return tables, others, pictures


@REPORTS
def test_markdown_says_what_the_document_says(report: Report) -> None:
    """Read back by a parser, every text is what it was, also a hostile one."""
    tables, others, pictures = parsed(to_markdown(report()))
    assert tables == grids(report())
    assert others == {"Evaluation", *paragraphs(report())}
    assert pictures == []


@REPORTS
def test_markdown_tables_have_as_many_cells_in_each_row(report: Report) -> None:
    blocks = re.findall(r"(?:^\|.*\n)+", to_markdown(report()), re.MULTILINE)
    assert len(blocks) == len(grids(report()))
    for block in blocks:
        lines = block.splitlines()
        assert len({line.count("|") for line in lines}) == 1
        assert re.fullmatch(r"\|( -+:? \|)+", lines[1])


def test_figures_stay_readable_in_the_markdown_itself() -> None:
    markdown = to_markdown(made.report())
    assert "| ours | mean | 0.644 [0.604, 0.684] | 0.944 [0.884, 1.004] * | 2 |" in markdown
    assert "| floor | MAE, median [95 %] | verdict |" in markdown
    assert "| −0.111 [−0.171, −0.051] | **better** |" in markdown


def test_figures_are_referenced_where_they_are() -> None:
    *_, pictures = parsed(to_markdown(made.full(), DRAWN))
    assert pictures == [f"figures/{name}.svg" for name in NAMES]
    *_, pictures = parsed(to_markdown(made.full(), {"errors": "", "unknown": ""}))
    assert pictures == ["figures/errors.svg"]
    tables, _, pictures = parsed(to_markdown(made.hostile(), DRAWN))
    assert tables == grids(made.hostile())
    assert len(pictures) == 5


@pytest.mark.parametrize(
    "text",
    [
        "1*2*",
        "[1](2)",
        "[1][2]",
        "- 1",
        "# x",
        "1. x",
        "> x",
        "--- | ---",
        "\\",
        "\\|",
        "`|`",
        "&lt;b&gt;",
        "<b>",
        "![x](y)",
        "x  ",
        "**x**",
        "a_b_c",
        "www.x.y",
        "0.5 [0.4, 0.6](x)",
        "x [95 %]",
        "[95 %](x)",
        "![95 %][95 %]",
        "[95 %]: x",
        "",
    ],
)
def test_a_text_in_markdown_stays_that_text(text: str) -> None:
    tables, *_ = parsed(to_markdown(made.report(notes=(text,))))
    assert tables[1] == [["note"], [text.strip()]]


# HTML --------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """What is in a page; fails where tags are not nested."""

    VOID = frozenset({"meta", "link", "br", "hr", "img", "input"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: list[list[list[str]]] = []
        self.texts: set[str] = set()
        self.open: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("th", "td"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("th", "td"):
            self.tables[-1][-1][-1] += data
        elif data.strip():
            self.texts.add(data)

    def attributes(self) -> Iterator[tuple[str, str, str]]:
        for tag, attributes in self.tags:
            for name, value in attributes.items():
                yield tag, name, value or ""


@REPORTS
def test_html_says_what_the_document_says(report: Report) -> None:
    page = Page(to_html(report()))
    assert page.tables == grids(report())
    assert paragraphs(report()) <= page.texts


@REPORTS
def test_html_is_one_page_without_scripts_or_references(report: Report) -> None:
    html = to_html(report(), DRAWN)
    page = Page(html)
    assert "<script" not in html.lower()
    assert "@import" not in html
    assert "url(" not in html
    assert {tag for tag, _ in page.tags} <= {
        *("html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "p", "nav", "ul"),
        *("li", "a", "main", "section", "div", "table", "thead", "tbody", "tr", "th", "td"),
        *("details", "summary", "figure", "figcaption", "svg", "text"),
    }
    for _, name, value in page.attributes():
        assert not name.startswith("on")
        if name in ("src", "href", "data", "action", "xlink:href"):
            assert value.startswith("#")
        if "http:" in value or "https:" in value:
            # A caption's text may hold anything; only namespaces may refer.
            assert name in ("xmlns", "aria-label")


def test_html_has_its_policy_and_is_made_for_phones() -> None:
    metas = [attributes for tag, attributes in Page(to_html(made.report())).tags if tag == "meta"]
    assert {
        "http-equiv": "Content-Security-Policy",
        "content": "default-src 'none'; style-src 'unsafe-inline'; img-src data:",
    } in metas
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in metas
    assert {"name": "color-scheme", "content": "light dark"} in metas


def test_the_contents_lead_to_the_sections() -> None:
    page = Page(to_html(made.full()))
    ids = [value for _, name, value in page.attributes() if name == "id"]
    assert len(ids) == len(set(ids)) == len(document(made.full()))
    assert [value[1:] for _, name, value in page.attributes() if name == "href"] == ids
    assert "is-the-rationale-used" in ids


def test_figures_stand_in_the_page_in_its_own_ink() -> None:
    svg = '<svg><text style="font-size: 9px; fill: #787878">#787878</text></svg>'
    html = to_html(made.report(), {"errors": svg, "unknown": "<svg><text>nowhere</text></svg>"})
    assert '<svg><text style="font-size: 9px; fill: currentColor">#787878</text></svg>' in html
    assert "nowhere" not in html
    assert "<figure" not in to_html(made.report())


def test_what_is_beside_the_point_is_folded_away() -> None:
    page = Page(to_html(made.report()))
    aside = [t for s in document(made.report()) for t in s.tables if t.aside]
    assert [tag for tag, _ in page.tags].count("details") == len(aside) > 3


def test_verdicts_have_their_tones() -> None:
    html = to_html(made.report())
    assert '<td class="short good">better</td>' in html
    assert '<td class="short bad">worse</td>' in html
    assert '<td class="short plain">undecided</td>' in html


def test_a_browser_shows_it_without_a_complaint(tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium on this machine")
    pytest.importorskip("matplotlib")

    def opened(page: Path) -> subprocess.CompletedProcess[str]:
        options = ("--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr")
        command = [browser, *options, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
        url = page.absolute().as_uri()
        return subprocess.run(
            [*command, url], capture_output=True, text=True, check=True, timeout=120
        )

    for name, report in (("hostile", made.hostile()), ("full", made.full())):
        page = write_report(report, tmp_path / name)["report.html"]
        found = opened(page)
        assert "CONSOLE" not in found.stderr
        assert Page(found.stdout).tables == grids(report)
    # A guard of the guard: this browser would have said so.
    bad = page.read_text(encoding="utf-8").replace("<main>", '<main><img src="http://x.invalid/">')
    page.write_text(bad, encoding="utf-8")
    assert "CONSOLE" in opened(page).stderr


# The terminal ------------------------------------------------------------------------------------


def printed(report: EvaluationReport, width: int, *, colours: bool = False) -> str:
    out = io.StringIO()
    console = Console(
        file=out,
        width=width,
        force_terminal=colours,
        color_system="truecolor" if colours else None,
        highlight=False,
    )
    print_report(report, console)
    return out.getvalue()


@pytest.mark.parametrize("width", [60, 80, 100, 140])
@REPORTS
def test_it_fits_the_terminal(report: Report, width: int) -> None:
    text = printed(report(), width)
    assert max(len(line) for line in text.splitlines()) <= width
    assert "…" not in text


@pytest.mark.parametrize("width", [60, 80, 100])
def test_no_figure_breaks_in_the_middle(width: int) -> None:
    for report in (made.full(), made.report(made.points_only())):
        text = printed(report, width)
        cells = [cell for grid in grids(report) for row in grid[1:] for cell in row]
        for cell in cells:
            if re.fullmatch(r"[+−]?\d\.\d{3} \[.*\]( \*)?", cell):
                value, interval = cell.split(" ", 1)
                assert value in text
                assert interval in text


def test_a_hundred_columns_hold_the_main_tables_on_single_lines() -> None:
    lines = [line.rstrip() for line in printed(made.full(), 100).splitlines()]
    for grid in grids(made.full())[3:8]:
        for row in grid:
            pattern = r" +".join(map(re.escape, row))
            assert any(re.fullmatch(pattern, line) for line in lines), row


def test_intervals_move_below_and_rows_become_lists() -> None:
    lines = printed(made.full(), 80).splitlines()
    at = next(n for n, line in enumerate(lines) if line.startswith("global mean          −0.111"))
    assert lines[at + 1].split() == ["[−0.171,", "−0.051]", "[−0.172,", "−0.052]"]
    assert "condition            without the rationale" in {
        line.strip() for line in printed(made.full(), 60).splitlines()
    }


@pytest.mark.parametrize("colours", [False, True])
def test_no_text_steers_the_terminal(colours: bool) -> None:
    text = printed(made.hostile(), 100, colours=colours)
    plain = re.sub(r"\x1b\[[\d;]*m", "", text) if colours else text
    assert all(c.isprintable() or c == "\n" for c in plain)
    assert r"\x1b[31mk" in plain.replace("\n", "")
    assert "\x1b[31mk" not in text


def test_markup_is_text_on_the_terminal() -> None:
    """A guard: rich reads [red] and :smile: out of plain strings."""
    report = made.report(notes=("[red]a[/red] :smile: [link=x]y[/link]",))
    assert "[red]a[/red] :smile: [link=x]y[/link]" in printed(report, 100)


# The folder --------------------------------------------------------------------------------------


def test_a_folder_of_everything(tmp_path: Path) -> None:
    report = made.full()
    files = write_report(report, tmp_path / "new" / "folder", DRAWN)
    names = ["report.json", *(f"figures/{name}.svg" for name in NAMES), "report.md", "report.html"]
    assert list(files) == names
    assert files == {name: tmp_path / "new" / "folder" / name for name in names}
    there = [p for p in (tmp_path / "new" / "folder").rglob("*") if p.is_file()]
    assert sorted(there) == sorted(files.values())
    assert files["report.md"].read_text(encoding="utf-8") == to_markdown(report, DRAWN)
    assert files["report.html"].read_text(encoding="utf-8") == to_html(report, DRAWN)
    assert files["figures/probes.svg"].read_text(encoding="utf-8") == DRAWN["probes"]


def test_figures_are_drawn(tmp_path: Path) -> None:
    plots = pytest.importorskip("r4r_graph.evaluation.rendering.plots")
    pytest.importorskip("matplotlib")
    files = write_report(made.full(), tmp_path)
    drawn = plots.figures(made.full())
    assert {name: files[f"figures/{name}.svg"].read_text("utf-8") for name in NAMES} == drawn
    html = files["report.html"].read_text(encoding="utf-8")
    assert html.count("<svg ") == 5
    assert plots.INK not in html
    ids = [value for _, name, value in Page(html).attributes() if name == "id"]
    assert len(ids) == len(set(ids))


@REPORTS
def test_the_json_is_the_report(report: Report, tmp_path: Path) -> None:
    path = write_report(report(), tmp_path, {})["report.json"]

    def never(text: str) -> Any:
        raise AssertionError(f"{text} is no JSON")

    found = json.loads(path.read_text(encoding="utf-8"), parse_constant=never)
    assert found == json.loads(json.dumps(report().to_dict(), allow_nan=False))
    assert found["facts"]["rows"] == 300


def test_what_is_no_json_is_not_written(tmp_path: Path) -> None:
    """A guard: no figure is infinite."""
    with pytest.raises(ValueError, match="JSON compliant"):
        write_report(made.report(made.predictor(mass=float("inf"))), tmp_path, {})
    assert list(tmp_path.iterdir()) == []


def test_an_older_report_is_replaced(tmp_path: Path) -> None:
    write_report(made.full(), tmp_path, DRAWN)
    files = write_report(made.report(made.points_only()), tmp_path, {})
    assert "from a file" in files["report.md"].read_text(encoding="utf-8")
    assert "ours" not in files["report.html"].read_text(encoding="utf-8")
    assert "figures/" not in files["report.md"].read_text(encoding="utf-8")


def test_only_figures_that_have_a_place_are_written(tmp_path: Path) -> None:
    """A guard: a name is a part of a path."""
    files = write_report(made.report(), tmp_path, {"../../x": "<svg/>", "errors": "<svg/>"})
    assert [name for name in files if name.endswith("svg")] == ["figures/errors.svg"]


def test_without_matplotlib_the_report_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    files = write_report(made.full(), tmp_path)
    assert list(files) == ["report.json", "report.md", "report.html"]
    note = "pip install 'r4r-graph[evaluation]'"
    assert note in json.loads(files["report.json"].read_text("utf-8"))["notes"][-1]
    tables, _, pictures = parsed(files["report.md"].read_text(encoding="utf-8"))
    assert pictures == []
    assert note in tables[1][-1][0]
    html = Page(files["report.html"].read_text(encoding="utf-8"))
    assert note in html.tables[1][-1][0]
    assert "svg" not in {tag for tag, _ in html.tags}


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingError, match=r"cannot write the report to .*choose another folder"):
        write_report(made.report(), tmp_path / "file", {})
