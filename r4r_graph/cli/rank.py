"""`r4r rank`: the best of several items for one user."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from r4r_graph.cli.options import (
    AdaptersOption,
    BaseOption,
    BudgetsOption,
    DeviceOption,
    DtypeOption,
    EngineOption,
    HistoryOption,
    ItemsOption,
    JsonOption,
    MismatchOption,
    RationalesOption,
    ReadoutOption,
    ReviewsOption,
    ScaleOption,
    SeedOption,
    Sources,
    TimeoutOption,
    checked_knobs,
    err,
    moment,
    out,
)
from r4r_graph.errors import DataError, InputError, SettingError

if TYPE_CHECKING:
    from r4r_graph.ranking import CandidateProgress, Ranking
    from r4r_graph.schema import Item

_TABLES = (".parquet", ".csv", ".jsonl", ".gz")
"""Endings of a file of items; any other is one id a line."""

_MOST_FAILURES = 10


def rank(
    reviews: ReviewsOption,
    user: Annotated[str, typer.Option(help="For whom.")],
    items_file: Annotated[
        Path | None,
        typer.Option(help="The candidates: one item id a line, or a file as for --items."),
    ] = None,
    candidates: Annotated[
        int | None,
        typer.Option(
            help="In their place: so many items, the most reviewed of those that the "
            "user has not reviewed."
        ),
    ] = None,
    top_k: Annotated[int, typer.Option(help="How many to show, best first.")] = 10,
    items: ItemsOption = None,
    as_of: Annotated[
        str | None,
        typer.Option(help="Read only reviews before this time: unix seconds or ISO 8601."),
    ] = None,
    history: HistoryOption = None,
    rationales: RationalesOption = 1,
    readout: ReadoutOption = "mean",
    base: BaseOption = "smollm2-135m",
    adapters: AdaptersOption = None,
    scale: ScaleOption = "1-5",
    seed: SeedOption = 0,
    timeout: TimeoutOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    engine: EngineOption = None,
    budgets: BudgetsOption = None,
    concurrency: Annotated[
        int | None, typer.Option(help="Candidates rated at the same time; default 32.")
    ] = None,
    allow_prompt_mismatch: MismatchOption = False,
    as_json: JsonOption = False,
) -> None:
    """Rate several items for one user, and show the best, with reasons. Runs are not kept."""
    from r4r_graph.ranking import check_count, popular_items

    knobs = checked_knobs(
        history=history, rationales=rationales, readout=readout, seed=seed, timeout=timeout
    )
    check_count("--top-k", top_k)
    if concurrency is not None:
        knobs["config"] = {"max_concurrency": concurrency}
    for name, count in (("--candidates", candidates), ("--concurrency", concurrency)):
        if count is not None:
            check_count(name, count)
    if (items_file is None) == (candidates is None):
        raise SettingError("give the candidates as --items-file FILE, or a number of --candidates")
    # One time for the choice of candidates and for all that is read.
    when = time.time() if as_of is None else moment(as_of)
    chosen = [] if items_file is None else read_candidates(items_file)
    paths = (str(reviews), None if items is None else str(items))
    sources = Sources(
        *paths, base, adapters, scale, device, budgets, allow_prompt_mismatch, dtype, engine
    )
    with sources.load() as recommender:
        if candidates is not None:
            chosen = [*popular_items(recommender.reviews, user, candidates, as_of=when)]
            if not chosen:
                raise InputError(
                    f"no candidates for user {user!r}: no item that others reviewed by then is "
                    "left; name some with --items-file"
                )
        events = recommender.stream_rank(user, chosen, top_k, as_of=when, **knobs)
        ranking = _last(events)
    from r4r_graph.cli import display

    if as_json:
        typer.echo(display.one_line_json(ranking.to_dict()))
    else:
        show_ranking(ranking, out)


def read_candidates(path: Path) -> list[str | Item]:
    """The candidates in a file: one id a line, or a table of items.

    Raises:
        DataError: it cannot be read, or holds none.
    """
    from r4r_graph.reviews import load_items
    from r4r_graph.schema import Item

    if path.is_dir() or path.suffix.lower() in _TABLES:
        # An item without any word is an id: the catalogue may know more of it.
        return [
            each.item_id if each == Item(each.item_id) else each
            for each in load_items(path).values()
        ]
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
        raise DataError(f"cannot read the candidates in {path}: {reason}") from None
    ids: list[str | Item] = [id_ for line in lines if (id_ := line.strip())]
    if not ids:
        raise DataError(f"{path}: holds no candidates; expected an item id a line")
    return ids


def _last(events: Iterable[CandidateProgress | Ranking]) -> Ranking:
    """The ranking at the end, with a bar on stderr until then."""
    from r4r_graph.cli import display
    from r4r_graph.jobs import JobProgress
    from r4r_graph.ranking import Failure, Ranking

    started, failed, found = time.monotonic(), 0, None
    with display.progress("candidates", err) as tell:
        for event in events:
            if isinstance(event, Ranking):
                found = event
                continue
            failed += isinstance(event.outcome, Failure)
            tell(JobProgress(event.done, event.of, failed, time.monotonic() - started))
    assert found is not None
    return found


def show_ranking(ranking: Ranking, console: Console) -> None:
    """A table of the best, what failed, and the best in words."""
    from r4r_graph.cli.display import safe
    from r4r_graph.ranking import first_sentence

    table = Table(box=None, padding=(0, 1), header_style="dim")
    for name, justify in (("", "right"), ("mean", "right"), ("item", "left"), ("why", "left")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for place, each in enumerate(ranking, start=1):
        table.add_row(
            f"{place}",
            f"{each.distribution.mean:.2f}",
            safe(each.title or each.item_id, "bold"),
            safe(first_sentence(each.rationale)),
        )
    console.print(table)
    for failure in ranking.failures[:_MOST_FAILURES]:
        line = safe(f"not rated: {failure.item_id}: {failure.reason}", "yellow")
        console.print(line, soft_wrap=True)
    if (more := len(ranking.failures) - _MOST_FAILURES) > 0:
        console.print(f"and {more} more that were not rated", style="yellow")
    console.print()
    console.print(safe(ranking.summary), soft_wrap=True)
