"""What a person sees on the terminal. Texts of reviews and models are never read as markup."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from r4r_graph.caches import CacheEntry
from r4r_graph.cli.doctor import Finding
from r4r_graph.jobs import JobProgress, OnProgress
from r4r_graph.prompts import clean
from r4r_graph.ratings import RatingDistribution, RatingScale
from r4r_graph.recommender import Event, RationaleToken, SummaryProgress
from r4r_graph.schema import Recommendation, ReviewAspects

BAR = 30
"""Width of a full bar."""


def last(events: Iterable[Event]) -> Recommendation:
    """The recommendation at the end of a stream."""
    result = None
    for event in events:
        result = event
    assert isinstance(result, Recommendation)
    return result


@contextmanager
def progress(what: str, err: Console) -> Iterator[OnProgress]:
    """A bar on stderr with rate and time left."""
    columns = (
        TextColumn(what),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[failed]}", style="red"),
    )
    with Progress(*columns, console=err) as bar:
        task = bar.add_task(what, total=None, rate="", failed="")
        first: int | None = None

        def tell(now: JobProgress) -> None:
            nonlocal first
            first = now.done - 1 if first is None else first
            rate = (now.done - first) / now.seconds if now.seconds else 0.0
            failed = f"{now.failed} failed" if now.failed else ""
            bar.update(task, completed=now.done, total=now.of, rate=f"{rate:.2f}/s", failed=failed)

        yield tell


def show_run(events: Iterator[Event], out: Console, err: Console) -> Recommendation:
    """Show a run as it happens, then its result."""
    result: Recommendation | None = None
    status = err.status("reading the reviews", spinner="line")
    status.start()
    writing = False
    try:
        for event in events:
            if isinstance(event, SummaryProgress):
                found = "kept" if event.cached else "summarized"
                status.update(f"{event.done} of {event.of} reviews {found}")
            elif isinstance(event, RationaleToken):
                if event.rationale == 0:
                    if not writing:
                        status.stop()
                        out.print("\nWhy", style="bold")
                        writing = True
                    out.print(_safe(event.text), end="", soft_wrap=True)
            else:
                result = event
    finally:
        status.stop()
        if writing:
            out.print()
    assert result is not None
    show_result(result, out)
    return result


def show_result(result: Recommendation, out: Console) -> None:
    """Stars, bars, what each side said, timings."""
    d, name = result.distribution, result.title or result.item_id
    out.print()
    out.print(_safe(f"{result.user_id} on {name}"), style="bold")
    stars = Text(_stars(result.rating, d.scale), style="yellow")
    out.print(stars, Text(f"{result.rating:.2f} of {d.scale.high:g} ({result.readout})"))
    out.print(_bars(d))
    out.print(
        f"mean {d.mean:.2f}   median {d.median:.2f}   mode {d.mode:g}   "
        f"entropy {d.entropy:.2f} nats   mass on ratings {d.mass:.3f}",
        style="dim",
    )
    if len(result.rationales) > 1:
        out.print(f"mixed over {len(result.rationales)} rationales", style="dim")
    _show_side("The user", result.user_aspects, out)
    _show_side("The item's reviewers", result.item_aspects, out)
    if result.cold_start:
        sides = {"user": "the user has", "item": "the item has", "both": "both sides have"}
        out.print(f"cold start: {sides[result.cold_start]} no earlier reviews", style="yellow")
    for warning in result.warnings:
        out.print(_safe(f"warning: {warning}"), style="yellow")
    for cut in result.truncated:
        out.print(_safe(f"cut: {cut.what}: {cut.detail}"), style="dim")
    spent = [
        f"{node} {u.seconds:.1f} s ({u.calls} calls, {u.cache_hits} kept)"
        for node, u in result.usage.items()
    ]
    out.print("time: " + ", ".join(spent), style="dim")


def show_findings(findings: Sequence[Finding], out: Console) -> None:
    """One line a finding, and under it how to mend it."""
    for finding in findings:
        mark = Text("ok  ", style="green") if finding.works else Text("FAIL", style="red")
        out.print(mark, Text(f"{finding.what}: {finding.detail}"), soft_wrap=True)
        if finding.mend:
            out.print(Text(f"       {finding.mend}", style="yellow"), soft_wrap=True)


def show_cache(folder: Path, entries: Sequence[CacheEntry], summaries: int, out: Console) -> None:
    """What is kept."""
    out.print(Text(f"cache folder: {folder}"), soft_wrap=True)
    out.print(f"{summaries} summaries of reviews")
    for entry in entries:
        note = "  (from people's reviews)" if entry.holds_reviews else ""
        line = f"{entry.bytes / 1e6:10.1f} MB  {entry.name}{note}"
        out.print(Text(line), soft_wrap=True)


def show_cleared(deleted: Sequence[CacheEntry], summaries: int | None, out: Console) -> None:
    """What was deleted; `summaries` is None where they could not be counted."""
    if not deleted:
        out.print("nothing to delete")
    for entry in deleted:
        counted = entry.holds_reviews and summaries is not None
        count = f" ({summaries} summaries)" if counted else ""
        line = f"deleted {entry.name}{count}: {entry.bytes / 1e6:.1f} MB"
        out.print(Text(line), soft_wrap=True)


def _stars(rating: float, scale: RatingScale) -> str:
    """Five stars, filled in proportion; a scale that goes below zero begins at its low end."""
    nothing = min(0.0, scale.low)
    full = round(5 * (rating - nothing) / (scale.high - nothing))
    return "★" * full + "☆" * (5 - full)


def _bars(d: RatingDistribution) -> Table:
    table = Table.grid(padding=(0, 1))
    table.add_column(justify="right")
    for label, p in reversed(list(zip(d.scale.labels, d.probabilities, strict=True))):
        table.add_row(label, Text("█" * round(p * BAR), style="yellow"), f"{100 * p:.1f} %")
    return table


def _show_side(who: str, reviews: Sequence[ReviewAspects], out: Console) -> None:
    out.print(f"\n{who}", style="bold")
    if not reviews:
        out.print("  no earlier reviews", style="dim")
    for style, sign, field in (("green", "+", "positive"), ("red", "-", "negative")):
        # The newest reviews first; each phrase once.
        phrases = dict.fromkeys(
            phrase for review in reversed(reviews) for phrase in getattr(review.summary, field)
        )
        for phrase in list(phrases)[:5]:
            out.print(Padding(_safe(f"{sign} {phrase}", style), (0, 0, 0, 2)))


def _safe(text: str, style: str = "") -> Text:
    """A text without control characters, which could steer the terminal."""
    body = text.strip()
    before, _, after = text.partition(body) if body else (text, "", "")
    cleaned = clean(body).replace("‹", "<").replace("›", ">")
    return Text(f"{_spaces(before)}{cleaned}{_spaces(after)}", style=style)


def _spaces(text: str) -> str:
    """White space as it is; separators that are control characters become spaces."""
    return "".join(c if c in " \n" else " " for c in text)


def printable(text: str) -> str:
    """`text`, perhaps of several lines, with its control characters written out."""
    return "".join(c if c.isprintable() or c == "\n" else _escaped(c) for c in text)


def one_line_json(value: Any) -> str:
    """`value` as JSON in which a terminal finds no control character either."""
    text = json.dumps(value, ensure_ascii=False)
    return re.sub("[\x7f-\x9f\u2028-\u202e\u2066-\u2069]", lambda m: _escaped(m[0]), text)


def _escaped(character: str) -> str:
    code = ord(character)
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
