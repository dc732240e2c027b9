"""What a person sees on the terminal. Texts of reviews and models are never read as markup."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
from r4r_graph.ratings import RatingScale
from r4r_graph.recommender import Event, Question, RationaleToken, SummaryProgress
from r4r_graph.schema import Influence, Recommendation, ReviewAspects

BAR = 30
"""Width of a full bar."""

_STRONGEST = 10
"""Influences that are shown."""


def last(events: Iterable[Event]) -> Recommendation | Question:
    """What is at the end of a stream."""
    result = None
    for event in events:
        result = event
    assert isinstance(result, Recommendation | Question)
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


def show_failures(found: Mapping[str, tuple[int, str]], err: Console) -> None:
    """Why rows of a bulk run failed: a line a kind of error, with one of the reasons."""
    for kind, (count, reason) in found.items():
        err.print(safe(f"{count} failed, {kind}: {reason}", "red"), soft_wrap=True)
    if found:
        err.print("--retry-failed tries them again", style="dim")


def show_run(events: Iterable[Event], out: Console, err: Console) -> Recommendation | Question:
    """Show a run as it happens, then its result, or what it asks."""
    result: Recommendation | Question | None = None
    status = err.status("reading the reviews", spinner="line")
    status.start()
    written = ""
    try:
        for event in events:
            if isinstance(event, SummaryProgress):
                found = "kept" if event.cached else "summarized"
                status.update(f"{event.done} of {event.of} reviews {found}")
            elif isinstance(event, RationaleToken):
                if event.rationale == 0:
                    if not written:
                        status.stop()
                        out.print("\nWhy", style="bold")
                    out.print(safe(event.text), end="", soft_wrap=True)
                    written += event.text
            else:
                result = event
    finally:
        status.stop()
        if written:
            out.print()
    assert result is not None
    if isinstance(result, Question):
        show_question(result.asked, out, seen=written.strip())
    else:
        show_result(result, out)
    return result


def show_question(asked: Mapping[str, Any], out: Console, seen: str = "") -> None:
    """What a person is asked.

    Args:
        asked: see `graph.human.question`.
        out: where.
        seen: a rationale that they have just seen.
    """
    out.print()
    rationales = asked["rationales"]
    for number, text in enumerate(rationales, start=1):
        if [text] != [seen]:
            mark = f"{number}. " if len(rationales) > 1 else ""
            out.print(safe(mark + text), soft_wrap=True)
    if asked["about"] == "rating":
        sure = f"{asked['rating']:.2f}, sure to {100 * asked['confidence']:.0f} %"
        out.print(safe(f"{asked['user_id']} on {asked['title'] or asked['item_id']}: {sure}"))
        out.print(bars(asked["distribution"]))
    if "fault" in asked:
        out.print(safe(f"not an answer: {asked['fault']}", "red"))


def show_waiting(thread_id: str, asked: Mapping[str, Any], out: Console) -> None:
    """How to answer a question later."""
    out.print(safe(f"\nThe run waits as {thread_id}. Answer it with one of:"), style="bold")
    for action in asked["answers"]:
        more = {"edit": " --rationale TEXT", "rate": " --rating STARS"}.get(action, "")
        line = f"  r4r resume {shlex.quote(thread_id)} --answer {action}{more}"
        out.print(safe(line), soft_wrap=True)


def show_result(result: Recommendation, out: Console) -> None:
    """Stars, bars, what each side said, timings."""
    d, name = result.distribution, result.title or result.item_id
    out.print()
    out.print(safe(f"{result.user_id} on {name}"), style="bold")
    stars = Text(_stars(result.rating, d.scale), style="yellow")
    by_person = any("rating" in answer for answer in result.answers)
    source = "a person's rating" if by_person else result.readout
    out.print(stars, Text(f"{result.rating:.2f} of {d.scale.high:g} ({source})"))
    out.print(bars(d.to_dict()))
    out.print(
        f"mean {d.mean:.2f}   median {d.median:.2f}   mode {d.mode:g}   "
        f"entropy {d.entropy:.2f} nats   mass on ratings {d.mass:.3f}",
        style="dim",
    )
    if len(result.rationales) > 1:
        out.print(f"mixed over {len(result.rationales)} rationales", style="dim")
    _show_side("The user", result.user_aspects, out)
    _show_side("The item's reviewers", result.item_aspects, out)
    show_influence(result.influence, out)
    if result.cold_start:
        sides = {"user": "the user has", "item": "the item has", "both": "both sides have"}
        out.print(f"cold start: {sides[result.cold_start]} no earlier reviews", style="yellow")
    for warning in result.warnings:
        out.print(safe(f"warning: {warning}"), style="yellow")
    for cut in result.truncated:
        out.print(safe(f"cut: {cut.what}: {cut.detail}"), style="dim")
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
        counted = entry.name == "summaries" and summaries is not None
        count = f" ({summaries} summaries)" if counted else ""
        line = f"deleted {entry.name}{count}: {entry.bytes / 1e6:.1f} MB"
        out.print(Text(line), soft_wrap=True)


def _stars(rating: float, scale: RatingScale) -> str:
    """Five stars, filled in proportion; a scale that goes below zero begins at its low end."""
    nothing = min(0.0, scale.low)
    full = round(5 * (rating - nothing) / (scale.high - nothing))
    return "★" * full + "☆" * (5 - full)


def bars(distribution: Mapping[str, float]) -> Table:
    """A distribution, by rating value, the highest first."""
    table = Table.grid(padding=(0, 1))
    table.add_column(justify="right")
    for label, p in sorted(distribution.items(), key=lambda entry: -float(entry[0])):
        table.add_row(label, Text("█" * round(p * BAR), style="yellow"), f"{100 * p:.1f} %")
    return table


def show_influence(found: Sequence[Influence], out: Console) -> None:
    """The strongest influences: green bars raised the mean rating, red ones lowered it."""
    if not found:
        return
    out.print("\nWhat moved the mean rating", style="bold")
    table = Table.grid(padding=(0, 1))
    table.add_column(justify="right")
    widest = max(abs(one.change) for one in found) or 1.0
    for one in found[:_STRONGEST]:
        bar = "█" * round(abs(one.change) / widest * BAR / 2)
        style = "green" if one.change > 0 else "red"
        table.add_row(f"{one.change:+.2f}", Text(bar, style=style), safe(_influential(one)))
    out.print(Padding(table, (0, 0, 0, 2)))
    if len(found) > _STRONGEST:
        out.print(f"  and {len(found) - _STRONGEST} weaker ones", style="dim")


def _influential(one: Influence) -> str:
    """What has an influence, in words."""
    if one.what == "user_review":
        return f"their review of {one.title or one.item_id}"
    if one.what == "item_review":
        return f"the review by {one.user_id}"
    return {
        "rationale": "the rationale",
        "user_average": "the user's average rating",
        "item_average": "the item's average rating",
    }[one.what]


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
            out.print(Padding(safe(f"{sign} {phrase}", style), (0, 0, 0, 2)))


def safe(text: str, style: str = "") -> Text:
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
