"""The gates that a candidate rationale passes, or not: two screens, repeats, and the judge.

A candidate's way ends where it gives a rating away, is no whole paragraph, repeats another, or is
no help to the prediction; what is left is kept, and the reasoner learns from it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from finetune.settings import Recipe
from r4r_graph.engine.base import TokenMeter
from r4r_graph.evaluation.words.leaks import form_faults, leaks
from r4r_graph.evidence import Evidence
from r4r_graph.experts import Predictor

Outcome = Literal["leaked", "malformed", "repeated", "rejected", "kept"]
"""Where a candidate's way ended."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A rationale and how far it came."""

    text: str
    outcome: Outcome
    hinted: bool = False
    reasons: tuple[str, ...] = ()
    """Why it was screened out."""
    error: float | None = None
    """|predicted - true rating| of the prediction made with it; None where it was not judged."""


def screened(
    text: str | None,
    evidence: Evidence,
    earlier: Iterable[str],
    recipe: Recipe,
    meter: TokenMeter,
    *,
    hinted: bool = False,
) -> Candidate | None:
    """Where a text's way ends before it is judged; None where it may be.

    The first reason counts: a leak, the form, a repeat of an `earlier` text. A text has to fit the
    token budget of a rationale together with its end, for it is learned as an answer.
    """
    text = (text or "").strip()
    titles = {evidence.item.title, *(review.title for review in evidence.user_reviews)} - {""}
    if found := leaks(text, recipe.rating_scale, titles=titles):
        return Candidate(text, "leaked", hinted, tuple(found))
    faults = form_faults(text, titles=titles)
    if meter.count(text) >= recipe.token_budgets.rationale and "too long" not in faults:
        faults.append("too long")
    if faults:
        return Candidate(text, "malformed", hinted, tuple(faults))
    if _words(text) in set(map(_words, earlier)):
        return Candidate(text, "repeated", hinted)
    return None


@dataclass
class Judge:
    """The reward model on one target. Its prompt is the predictor's, with a rationale in the
    rationale's slot, or with no slot at all."""

    predictor: Predictor
    evidence: Evidence
    rating: float
    baseline: float | None = None
    """Error without a rationale; known once a first one was judged."""

    async def judged(self, text: str, tau: float, *, hinted: bool) -> Candidate:
        """Whether the prediction gains by the text. An error of the engine goes to the caller: a
        text that could not be judged is never kept."""
        asked = [text] if self.baseline is not None else [None, text]
        results = await self.predictor.arate(self.evidence, asked)
        *first, error = (abs(result.distribution.mean - self.rating) for result in results)
        baseline = self.baseline = first[0] if first else self.baseline
        assert baseline is not None
        outcome: Outcome = "kept" if error - baseline < tau else "rejected"
        return Candidate(text, outcome, hinted, error=error)


def _words(text: str) -> str:
    return " ".join(text.lower().split())
