"""A report on the terminal, as Markdown, as one HTML file, and as a folder of all of them.

Every rendering shows `document.document` and escapes it for itself: rich gets texts, never markup.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from r4r_graph.caches import write_atomically
from r4r_graph.errors import MissingExtraError, SettingError
from r4r_graph.evaluation.rendering import plots
from r4r_graph.evaluation.rendering.cells import INTERVAL, Table
from r4r_graph.evaluation.rendering.document import Section, document
from r4r_graph.evaluation.report import EvaluationReport

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table as RichTable

TITLE = "Evaluation"

_FIGURE = re.compile(r"[-–−+\d][-–−+\d.,%\[\] ]*( \*)?")
_COUNT = re.compile(r"[\d,]+|[\d.]+ %|–")
_STYLES = {"good": "bold cyan", "bad": "bold red", "best": "bold"}
_MARKUP = re.compile(r"[\\`*_~#$]|\[(?!95 %\]$)|(?<!\[95 %)\]|\](?!$)")
"""What Markdown could obey; a heading's `[95 %]` stays, which at the end can begin no link."""
_ENTITIES = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;", "|": "&#124;"})


def print_report(report: EvaluationReport, console: Console, *, whole: bool = True) -> None:
    """The report on a terminal; its main tables alone where `whole` is false.

    Where a table is wider than the console, intervals stand below their figures; where that is
    not enough, each row becomes a list.
    """
    from rich.text import Text

    for section in document(report):
        console.print()
        console.print(Text(section.title, style="bold underline"))
        console.print(Text(section.text, style="dim"))
        for table in section.tables:
            if table.aside and not whole:
                continue
            console.print()
            if table.title:
                console.print(Text(table.title, style="bold"))
            console.print(_fitting(table, console))
            if table.note:
                console.print(Text(table.note, style="dim"))


def to_markdown(report: EvaluationReport, figures: Mapping[str, str] | None = None) -> str:
    """Markdown with GitHub's tables.

    Args:
        report: what was found.
        figures: names of figures that lie beside it, as `figures/NAME.svg`.
    """
    parts = [f"# {TITLE}"]
    for section in document(report):
        parts += [f"## {_escaped(section.title)}", _escaped(section.text)]
        for table in section.tables:
            parts += [f"### {_escaped(table.title)}"] if table.title else []
            parts.append("\n".join(_markdown_lines(table)))
            parts += [_escaped(table.note)] if table.note else []
        parts += [
            f"![{_escaped(figure.caption)}](figures/{figure.name}.svg)"
            for figure in section.figures
            if figure.name in (figures or {})
        ]
    return "\n\n".join(parts) + "\n"


def to_html(report: EvaluationReport, figures: Mapping[str, str] | None = None) -> str:
    """One page that needs nothing beside it: no scripts, no network, light and dark.

    Args:
        report: what was found.
        figures: name to SVG text as `plots.figures` draws it; goes into the page as it is.
    """
    import jinja2
    from markupsafe import Markup

    inline = {
        name: Markup(re.sub(rf"(fill|stroke): {plots.INK}", r"\1: currentColor", svg))
        for name, svg in (figures or {}).items()
    }
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"anchor": _anchor, "counts": _counts}
    environment.tests["figure"] = is_figure
    body = resources.files("r4r_graph.evaluation.rendering").joinpath("report.html.jinja")
    template = environment.from_string(body.read_text(encoding="utf-8"))
    return template.render(title=TITLE, sections=document(report), figures=inline)


def write_report(
    report: EvaluationReport,
    folder: str | os.PathLike[str],
    figures: Mapping[str, str] | None = None,
) -> dict[str, Path]:
    """Write `report.json`, `report.md`, `report.html` and `figures/*.svg`, each atomically.

    Args:
        report: what was found.
        folder: made when it is not there; an older report in it is replaced.
        figures: drawn where None; without matplotlib the report has none, and says so.

    Returns:
        Name within the folder to path, in the order written.

    Raises:
        SettingError: the folder cannot be written to.
    """
    if figures is None:
        try:
            figures = plots.figures(report)
        except MissingExtraError as error:
            figures = {}
            notes = (*report.notes, f"left out: {error}")
            report = dataclasses.replace(report, notes=notes)
    placed = {figure.name for section in document(report) for figure in section.figures}
    texts = {
        "report.json": json.dumps(report.to_dict(), indent=2, allow_nan=False) + "\n",
        **{f"figures/{name}.svg": svg for name, svg in figures.items() if name in placed},
        "report.md": to_markdown(report, figures),
        "report.html": to_html(report, figures),
    }
    written = {name: Path(folder) / name for name in texts}
    try:
        for name, path in written.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, texts[name])
    except OSError as error:
        raise SettingError(
            f"cannot write the report to {os.fspath(folder)!r}: {error}; choose another folder"
        ) from error
    return written


def is_figure(text: str) -> bool:
    """Whether there is nothing but figures in it."""
    return _FIGURE.fullmatch(text) is not None


def _counts(table: Table) -> list[bool]:
    """For each column whether it holds plain numbers, which are set flush right."""
    columns = zip(*([cell.text for cell in row] for row in table.rows), strict=True)
    return [all(map(_COUNT.fullmatch, column)) for column in columns]


# The terminal ------------------------------------------------------------------------------------


def _fitting(table: Table, console: Console) -> RichTable:
    """The first of three shapes that breaks no figure; what has no intervals may break."""
    figures = any(INTERVAL in column for column in table.columns)
    unbounded = console.options.update(width=10_000)
    for made in (_rich_table(table), _rich_table(table, stacked=True)):
        if not figures or console.measure(made, options=unbounded).maximum <= console.width:
            return made
    return _rich_list(table)


def _rich_table(table: Table, *, stacked: bool = False) -> RichTable:
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    def text(shown: str, style: str = "", *, figure: bool = True) -> Text:
        return Text(shown.replace(" [", "\n[", 1) if stacked and figure else shown, style)

    made = RichTable(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for column, count in zip(table.columns, _counts(table), strict=True):
        made.add_column(text(column), justify="right" if count else "left", overflow="fold")
    for row in table.rows:
        made.add_row(
            *(text(c.text, _STYLES.get(c.tone, ""), figure=is_figure(c.text)) for c in row)
        )
    return made


def _rich_list(table: Table) -> RichTable:
    """Each row as lines of column and cell."""
    from rich.table import Table as RichTable
    from rich.text import Text

    made = RichTable.grid(padding=(0, 2, 0, 1))
    made.add_column(overflow="fold")
    made.add_column(overflow="fold")
    for row in table.rows:
        for at, (column, cell) in enumerate(zip(table.columns, row, strict=True)):
            style = _STYLES.get(cell.tone, "") if at else "bold"
            made.add_row(Text(column, "dim"), Text(cell.text, style))
        made.add_row("")
    return made


# Markdown ----------------------------------------------------------------------------------------


def _markdown_lines(table: Table) -> Iterator[str]:
    yield _markdown_row(map(_escaped, table.columns))
    yield _markdown_row("---:" if count else "---" for count in _counts(table))
    for row in table.rows:
        yield _markdown_row(
            f"**{_escaped(cell.text)}**" if cell.tone in ("good", "bad") else _escaped(cell.text)
            for cell in row
        )


def _markdown_row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _escaped(text: str) -> str:
    """A line that Markdown shows as it is; figures need no care, and stay readable."""
    if is_figure(text):
        return text
    return _MARKUP.sub(r"\\\g<0>", text).translate(_ENTITIES)


def _anchor(section: Section) -> str:
    return re.sub(r"[^a-z]+", "-", section.title.lower()).strip("-")
