"""Two runs side by side, as one HTML file: what differs comes first.

write_diff(trace(graph, first), trace(graph, second), "diff.html")
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

from r4r_graph.debug import page
from r4r_graph.debug.trace import RunTrace
from r4r_graph.schema import Influence, InfluenceKind, ReviewAspects

CONTENTS = (
    ("differs", "What differs"),
    ("ratings", "Ratings"),
    ("rationales", "Rationales"),
    ("influence", "What moved them"),
    ("work", "Path and times"),
    ("same", "What is the same"),
    ("json", "JSON"),
)
"""Sections: what links to them, and their short names."""

_MOST_WORDS = 2_000
"""Longer texts are not compared word by word: it takes the square of their length."""

_ALIKE = 0.3
"""Texts that share less than this are told apart as wholes."""

_WORD = r"\S+\s*|\s+"

Pieces = tuple[tuple[Literal["same", "changed"], str], ...]
"""A text in order, its pieces joined; `changed` are those that the other text has not."""


@dataclass(frozen=True, slots=True)
class Fact:
    """Something that both runs have, such as a setting."""

    name: str
    a: Any
    b: Any


@dataclass(frozen=True, slots=True)
class RationalePair:
    """The rationales of one number."""

    a: Pieces | None
    """None where the run has no rationale of this number."""
    b: Pieces | None
    compared: bool
    """Whether they share enough to be compared word by word."""


@dataclass(frozen=True, slots=True)
class InfluencePair:
    """How far one thing moved the mean rating of either run."""

    what: InfluenceKind
    user_id: str
    item_id: str
    title: str
    a: float | None
    """None where it was not left out of that run: not read, or not asked for."""
    b: float | None


@dataclass(frozen=True, slots=True)
class RunDiff:
    """Two runs, compared."""

    a: RunTrace
    b: RunTrace
    differing: tuple[Fact, ...]
    """Pair, time, settings, model and prompts."""
    same: tuple[Fact, ...]
    only_a: tuple[ReviewAspects, ...]
    """Reviews that only the first one read."""
    only_b: tuple[ReviewAspects, ...]
    resummarized: tuple[tuple[ReviewAspects, ReviewAspects], ...]
    """Reviews that both read, with other summaries."""
    readouts: tuple[Fact, ...]
    """Rating, mean, median, mode, confidence, entropy, mass; None before a run has rated."""
    rationales: tuple[RationalePair, ...]
    influence: tuple[InfluencePair, ...]
    """Those whose changes differ most come first."""
    nodes: tuple[Fact, ...]
    """`GraphNode`s by name."""
    edges: tuple[Fact, ...]
    """How often each edge was taken, of those that either run took, as `source → target`."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; what both runs have in common is left out."""
        return {
            "a": self.a.thread_id,
            "b": self.b.thread_id,
            "differing": [asdict(fact) for fact in self.differing],
            "only_a": [review.to_dict() for review in self.only_a],
            "only_b": [review.to_dict() for review in self.only_b],
            "resummarized": [[one.to_dict() for one in pair] for pair in self.resummarized],
            "readouts": [asdict(fact) for fact in self.readouts],
            "distributions": [
                run.distribution and run.distribution.to_dict() for run in (self.a, self.b)
            ],
            "rationales": [[drawn.text for drawn in run.rationales] for run in (self.a, self.b)],
            "influence": [asdict(pair) for pair in self.influence],
            "nodes": [asdict(fact) for fact in self.nodes],
            "edges": [asdict(fact) for fact in self.edges],
        }


def compare(a: RunTrace, b: RunTrace) -> RunDiff:
    """Two runs compared, of one pair or of two."""
    facts = [Fact(name, x, y) for name, x, y in _both(_facts(a), _facts(b))]
    reviews_a, reviews_b = _reviews(a), _reviews(b)
    shared = [(reviews_a[key], reviews_b[key]) for key in reviews_a if key in reviews_b]
    nodes = _both({node.name: node for node in a.nodes}, {node.name: node for node in b.nodes})
    edges = _both(_taken(a), _taken(b))
    return RunDiff(
        a=a,
        b=b,
        differing=tuple(fact for fact in facts if fact.a != fact.b),
        same=tuple(fact for fact in facts if fact.a == fact.b),
        only_a=tuple(review for key, review in reviews_a.items() if key not in reviews_b),
        only_b=tuple(review for key, review in reviews_b.items() if key not in reviews_a),
        resummarized=tuple((x, y) for x, y in shared if x.summary != y.summary),
        readouts=tuple(Fact(name, x, y) for name, x, y in _both(_readouts(a), _readouts(b))),
        rationales=tuple(
            _compare_words(x, y)
            for x, y in zip_longest((d.text for d in a.rationales), (d.text for d in b.rationales))
        ),
        influence=_influence(a, b),
        nodes=tuple(Fact(name, x, y) for name, x, y in nodes if not name.startswith("__")),
        edges=tuple(Fact(name, x or 0, y or 0) for name, x, y in edges if x or y),
    )


def to_html(difference: RunDiff) -> str:
    """One page about two runs; as that of `report.to_html`."""
    a, b = difference.a, difference.b
    changes = [c for pair in difference.influence for c in (pair.a, pair.b) if c is not None]
    nodes = [node for fact in difference.nodes for node in (fact.a, fact.b) if node]
    return page.render(
        "diff.html.jinja",
        contents=CONTENTS,
        diff=difference,
        runs=(("a", a), ("b", b)),
        labels=_labels(a, b),
        most_likely=max((r.distribution.confidence for r in (a, b) if r.distribution), default=1),
        most_change=max(map(abs, changes), default=0.0),
        most_seconds=max((node.seconds for node in nodes), default=0.0),
    )


def write_diff(a: RunTrace, b: RunTrace, file: str | os.PathLike[str]) -> Path:
    """Write the page about two runs, atomically.

    Raises:
        SettingError: it cannot be written.
    """
    return page.write_page(to_html(compare(a, b)), file)


# What is compared --------------------------------------------------------------------------------


def _both(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """What stands under each name of either, in the order of the first."""
    return [(name, a.get(name), b.get(name)) for name in dict.fromkeys((*a, *b))]


def _facts(run: RunTrace) -> dict[str, Any]:
    return {
        "user": run.user_id,
        "item": run.item_id,
        "title": run.title,
        "status": run.status,
        "reviews before": page.moment(run.as_of),
        "cold start": run.cold_start,
        **run.knobs,
        **page.flat_model(run.model),
        "warnings": "; ".join(run.warnings),
        "cut": "; ".join(f"{cut.what}: {cut.detail}" for cut in run.truncated),
    }


def _readouts(run: RunTrace) -> dict[str, float]:
    mixed, rated = run.distribution, run.recommendation
    if mixed is None or rated is None:
        return {}
    return {
        "rating": rated.rating,
        "mean": mixed.mean,
        "median": mixed.median,
        "mode": mixed.mode,
        "probability of the mode": mixed.confidence,
        "entropy (nats)": mixed.entropy,
        "mass on ratings": mixed.mass,
    }


def _reviews(run: RunTrace) -> dict[tuple[Any, ...], ReviewAspects]:
    both = (*run.user_reviews, *run.item_reviews)
    return {(r.user_id, r.item_id, r.timestamp, r.rating): r for r in both}


def _taken(run: RunTrace) -> dict[str, int]:
    return {f"{page.end_name(e.source)} → {page.end_name(e.target)}": e.taken for e in run.edges}


def _labels(a: RunTrace, b: RunTrace) -> list[tuple[str, float | None, float | None]]:
    """The scale's values, the highest first, with either run's probability."""
    known = [run.distribution.to_dict() if run.distribution else {} for run in (a, b)]
    found = _both(*known)
    return sorted(found, key=lambda row: -float(row[0]))


def _influence(a: RunTrace, b: RunTrace) -> tuple[InfluencePair, ...]:
    def by_thing(run: RunTrace) -> dict[tuple[Any, ...], Influence]:
        found = run.recommendation.influence if run.recommendation else ()
        return {(i.what, i.user_id, i.item_id, i.timestamp): i for i in found}

    of_a, of_b = by_thing(a), by_thing(b)
    pairs = []
    for key in dict.fromkeys((*of_a, *of_b)):
        one, x, y = of_a.get(key) or of_b[key], of_a.get(key), of_b.get(key)
        pairs.append(
            InfluencePair(
                *(one.what, one.user_id, one.item_id, one.title),
                a=x.change if x else None,
                b=y.change if y else None,
            )
        )
    return tuple(sorted(pairs, key=lambda pair: -abs((pair.a or 0.0) - (pair.b or 0.0))))


# Words -------------------------------------------------------------------------------------------


def _compare_words(a: str | None, b: str | None) -> RationalePair:
    if a is None or b is None or a == b:
        return RationalePair(_whole(a), _whole(b), compared=a == b)
    words_a, words_b = re.findall(_WORD, a), re.findall(_WORD, b)
    matcher = difflib.SequenceMatcher(None, words_a, words_b, autojunk=False)
    if max(len(words_a), len(words_b)) > _MOST_WORDS or matcher.ratio() < _ALIKE:
        return RationalePair(_whole(a), _whole(b), compared=False)
    codes = matcher.get_opcodes()
    return RationalePair(
        _pieces(words_a, ((kind, start, end) for kind, start, end, _, _ in codes)),
        _pieces(words_b, ((kind, start, end) for kind, _, _, start, end in codes)),
        compared=True,
    )


def _whole(text: str | None) -> Pieces | None:
    return None if text is None else (("same", text),)


def _pieces(words: Sequence[str], parts: Iterable[tuple[str, int, int]]) -> Pieces:
    return tuple(
        ("same" if kind == "equal" else "changed", "".join(words[start:end]))
        for kind, start, end in parts
        if end > start
    )
