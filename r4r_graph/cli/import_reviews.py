"""`r4r import`: public data sets, or any table, into a file of reviews and one of items."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from r4r_graph.cli.options import JsonOption, err, out

if TYPE_CHECKING:
    from r4r_graph.importing.report import ImportProgress, ImportReport, OnProgress

_STAGES = {"reading": "reading reviews", "items": "reading items", "writing": "writing reviews"}


def import_reviews(
    format: Annotated[
        str,
        typer.Argument(
            metavar="FORMAT",
            help="amazon-2014, amazon-2018, amazon-2023, yelp, goodreads, or table: any CSV, JSON "
            "lines or Parquet.",
        ),
    ],
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILES...",
            help="Files of reviews and of items, in any order; gz, zst and bz2 too.",
        ),
    ],
    file: Annotated[Path, typer.Option("--out", "-o", help="The Parquet of reviews to write.")],
    items_out: Annotated[
        Path | None, typer.Option(help="The Parquet of items to write; beside --out if left out.")
    ] = None,
    rejects: Annotated[
        Path | None,
        typer.Option(help="Bad rows, with line and reason, as JSON lines; beside --out."),
    ] = None,
    columns: Annotated[
        str | None,
        typer.Option(help="For table: OURS=THEIRS, as user_id=reviewer,rating=stars,review=text."),
    ] = None,
    item_columns: Annotated[
        str | None, typer.Option(help="For table, of files of items: item_id=id,title=name.")
    ] = None,
    scale: Annotated[
        str, typer.Option(help="Rating values: 1-5, 1-10, a rising list, or thumbs.")
    ] = "1-5",
    k_core: Annotated[
        int, typer.Option(help="Keep users and items with at least so many reviews.")
    ] = 0,
    since: Annotated[
        str | None, typer.Option(help="Leave out earlier reviews: unix seconds or ISO 8601.")
    ] = None,
    until: Annotated[str | None, typer.Option(help="Leave out reviews then or later.")] = None,
    with_text: Annotated[
        bool, typer.Option("--with-text", help="Leave out reviews without a text.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Import public data sets: reviews joined with the titles of their items."""
    from r4r_graph.importing import import_reviews as run
    from r4r_graph.importing.cleaning import parse_scale
    from r4r_graph.importing.formats import parse_columns

    settings: dict[str, Any] = {
        "items_out": items_out,
        "rejects_out": rejects,
        "columns": parse_columns(columns, "--columns") if columns else None,
        "item_columns": parse_columns(item_columns, "--item-columns") if item_columns else None,
        "scale": parse_scale(scale),
        "k": k_core,
        "since": _moment(since, "--since"),
        "until": _moment(until, "--until"),
        "with_text": with_text,
    }
    try:
        with progress(err) as tell:
            report = run(format, files, file, **settings, on_progress=tell)
    except KeyboardInterrupt:
        err.print("stopped; nothing was written")
        raise
    if as_json:
        typer.echo(json.dumps(report.to_dict()))
    else:
        show_import(report, out)


def _moment(text: str | None, option: str) -> float | None:
    from r4r_graph.errors import DataError, SettingError
    from r4r_graph.importing.cleaning import seconds_of

    if text is None:
        return None
    try:
        return seconds_of(text)
    except DataError as error:
        raise SettingError(f"bad {option}: {error}") from None


@contextmanager
def progress(console: Console) -> Iterator[OnProgress]:
    """A bar on stderr, by bytes of the files, with the rows read and those rejected."""
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[rows]:,} rows"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[rejected]}", style="red"),
    )
    with Progress(*columns, console=console) as bar:
        tasks = {}

        def tell(now: ImportProgress) -> None:
            if now.stage not in tasks:
                tasks[now.stage] = bar.add_task(_STAGES[now.stage], total=None, rows=0, rejected="")
            rejected = f"{now.rejected:,} rejected" if now.rejected else ""
            bar.update(
                tasks[now.stage],
                completed=now.done,
                total=now.of,
                rows=now.rows,
                rejected=rejected,
            )

        yield tell


def show_import(report: ImportReport, console: Console) -> None:
    """What was written, and what became of the rest."""
    from rich.table import Table

    table = Table.grid(padding=(0, 1))
    table.add_column(justify="right")
    left_out = {
        "rows read": report.read,
        "rejected": report.rejected,
        "without a rating": report.unrated,
        "duplicates": report.duplicates,
        "without a text": report.no_text,
        "outside the window of time": report.outside_window,
        "outside the k-core": report.outside_core,
        "reviews written": report.reviews,
    }
    for name, count in left_out.items():
        if count or name in ("rows read", "reviews written"):
            table.add_row(f"{count:,}", name)
    console.print(table)
    console.print(
        f"of {report.users:,} users and {report.items:,} items, {_day(report.first)} to "
        f"{_day(report.last)}, mean rating {report.mean_rating:.2f}; {report.titled:,} with the "
        f"item's title, {report.empty_texts:,} with an empty text, {report.further:,} by a user of "
        "an item that they also reviewed otherwise",
        soft_wrap=True,
    )
    files = [f"reviews: {report.out}"]
    if report.items_out is not None:
        files.append(f"items: {report.items_out} ({report.items_written:,} described)")
    if report.rejects is not None:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in report.reasons.items())
        files.append(f"bad rows: {report.rejects} ({reasons})")
    console.print("\n".join(files), markup=False, soft_wrap=True)
    rate = report.read / report.seconds if report.seconds else 0.0
    console.print(f"{report.seconds:.1f} s, {rate:,.0f} rows a second", style="dim")


def _day(seconds: float) -> str:
    try:
        return datetime.fromtimestamp(seconds, tz=UTC).date().isoformat()
    except (ValueError, OverflowError, OSError):
        return f"{seconds:g}"  # a year that no calendar here has
