"""`r4r report` and `r4r diff`: kept runs as HTML files. Nothing is run for them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from r4r_graph.cli.options import ThreadArgument, err
from r4r_graph.cli.talk import kept_runs
from r4r_graph.errors import SettingError, UnknownRunError

if TYPE_CHECKING:
    from r4r_graph.graph import RatingGraph

OutOption = Annotated[
    Path | None, typer.Option("--out", "-o", help="A file for the page, instead of stdout.")
]


def report(thread_id: ThreadArgument, out: OutOption = None) -> None:
    """One HTML file about a kept run: why this rating, the path, every prompt and output."""
    from r4r_graph.debug.report import to_html
    from r4r_graph.debug.trace import trace

    _check(out)
    with kept_runs() as (_, graph):
        run = trace(graph, thread_id)
    _write(to_html(run), out)


def diff(
    first: Annotated[str, typer.Argument(metavar="A", help="A run, as `r4r runs` names it.")],
    second: Annotated[str, typer.Argument(metavar="B", help="Another one.")],
    out: OutOption = None,
) -> None:
    """One HTML file about two kept runs side by side, what differs first."""
    from r4r_graph.debug.diff import compare, to_html
    from r4r_graph.debug.trace import trace

    _check(out)
    with kept_runs() as (_, graph):
        difference = compare(trace(graph, first), trace(graph, second))
    _write(to_html(difference), out)


@contextmanager
def reported(graph: RatingGraph, thread_id: str, file: Path | None) -> Iterator[None]:
    """Write the report of a run that happens inside, also where it fails or stops to ask.

    Args:
        graph: what runs it, with a checkpointer.
        thread_id: under which it is kept.
        file: None writes nothing.

    Raises:
        SettingError: the file cannot be written.
    """
    from r4r_graph.debug.report import write_report
    from r4r_graph.debug.trace import trace

    try:
        yield
    finally:
        if file is not None:
            with suppress(UnknownRunError):  # it was refused before it began
                written = write_report(trace(graph, thread_id), file)
                err.print(f"wrote {written}", markup=False, soft_wrap=True)


def _check(out: Path | None) -> None:
    if out is None and sys.stdout.isatty():
        raise SettingError("a page of HTML is nothing for a terminal: give --out FILE")


def _write(html: str, out: Path | None) -> None:
    from r4r_graph.debug.page import write_page

    if out is None:
        typer.echo(html.encode(), nl=False)
    else:
        err.print(f"wrote {write_page(html, out)}", markup=False, soft_wrap=True)
