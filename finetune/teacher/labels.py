"""The teacher's labels: how they are made to fit the summarizer, and how an answer is read.

Ready-made ones and the teacher's own are files of one kind; `evaluation.words.labels` reads them.
"""

from __future__ import annotations

import re

from r4r_graph.engine.aspects import SECTIONS, format_aspects
from r4r_graph.engine.base import TokenMeter
from r4r_graph.engine.decoding import MAX_PHRASE_TOKENS
from r4r_graph.evaluation.words.labels import normalized
from r4r_graph.evidence import TokenBudgets
from r4r_graph.schema import AspectSummary

_LINE = re.compile(r"[\s>#*_`-]*(positive|negative|values)[\s*_`]*:[\s*_`]*(.*?)[\s*_`]*", re.I)


def fit_summary(summary: AspectSummary, meter: TokenMeter, budgets: TokenBudgets) -> AspectSummary:
    """The summary within what the engine lets the summarizer write.

    Phrases that decoding would end half-way (`MAX_PHRASE_TOKENS`) go; the first of a list with no
    other is ended there. Then the last phrases of the longest lists go, until the text and an end
    token fit the budget; a list's only phrase goes last.
    """
    lists = summary.to_dict()
    for phrases in lists.values():
        short = [p for p in phrases if meter.count(p) <= MAX_PHRASE_TOKENS]
        phrases[:] = short or [_ended(phrase, meter) for phrase in phrases[:1]]
    fitting = normalized(AspectSummary.from_dict(lists))
    while meter.count(format_aspects(fitting)) >= budgets.summary:
        lists = fitting.to_dict()
        longest = max(
            lists.values(), key=lambda phrases: (len(phrases) > 1, sum(map(len, phrases)))
        )
        if not longest:
            break
        longest.pop()
        fitting = AspectSummary.from_dict(lists)
    return fitting


def read_answer(text: str) -> AspectSummary:
    """The summary in the answer of a general chat model, which may put words around the three
    lines and marks (of Markdown, say) on them.

    Raises:
        ValueError: a line is missing, there twice, or left empty (an empty list has to be said).
    """
    found: dict[str, str] = {}
    for line in text.splitlines():
        if match := _LINE.fullmatch(line):
            name = match[1].lower()
            if name in found:
                raise ValueError(f"{name!r} is there twice")
            if not match[2].strip(" .…"):
                raise ValueError(f"{name!r} is left empty")
            found[name] = match[2]
    if missing := [name for name in SECTIONS if name not in found]:
        raise ValueError(f"no line {', '.join(map(repr, missing))}")
    return normalized(AspectSummary(*(tuple(found[name].split(";")) for name in SECTIONS)))


def _ended(phrase: str, meter: TokenMeter) -> str:
    """The beginning of a phrase that is too long, in whole words."""
    head = meter.head(phrase, MAX_PHRASE_TOKENS)
    if not phrase[len(head) :].startswith(" "):
        head = head.rpartition(" ")[0] or head
    return head
