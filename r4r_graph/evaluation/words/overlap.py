"""How alike two aspect summaries are: the overlap of their phrases.

Phrases are compared by their words, without case, punctuation and the commonest function words,
and a plural counts as its singular. Of two phrases the overlap is the F1 of their word sets. In
each list every phrase is held against the best match on the other side; precision is the mean over
the one side's phrases, recall over the other's, and the list's figure their harmonic mean. Two
empty lists agree (1), an empty one and a full one do not (0). A summary's figure is the mean over
its three lists.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from r4r_graph.engine.aspects import SECTIONS
from r4r_graph.schema import AspectSummary

_FUNCTION_WORDS = frozenset(
    word
    for line in (
        "a an and are as at be but by for from had has have he her his i in is it its my not of on",
        "or our she so that the their them they this to was we were which who with you your",
    )
    for word in line.split()
)


def phrase_overlap(summary: AspectSummary, other: AspectSummary) -> float:
    """From 0 (nothing in common) to 1; symmetric. See this module."""
    mine, theirs = summary.to_dict(), other.to_dict()
    return sum(list_overlap(mine[name], theirs[name]) for name in SECTIONS) / len(SECTIONS)


def list_overlap(phrases: Sequence[str], others: Sequence[str]) -> float:
    """The overlap of two lists of phrases, from 0 to 1."""
    if not phrases or not others:
        return float(not phrases and not others)
    words, other_words = [content_words(p) for p in phrases], [content_words(p) for p in others]
    precision = sum(max(_f1(p, o) for o in other_words) for p in words) / len(words)
    recall = sum(max(_f1(o, p) for p in words) for o in other_words) / len(other_words)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _f1(a: frozenset[str], b: frozenset[str]) -> float:
    return 2 * len(a & b) / (len(a) + len(b)) if a or b else 0.0


def content_words(phrase: str) -> frozenset[str]:
    """The words that a phrase is compared by."""
    found = re.findall(r"[^\W_]+", phrase.lower().replace("'", ""))
    stems = [
        w[:-1] if len(w) > 3 and w.endswith("s") and not w.endswith("ss") else w for w in found
    ]
    return frozenset(stems) - _FUNCTION_WORDS or frozenset(stems)
