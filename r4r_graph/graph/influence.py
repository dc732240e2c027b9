"""Which review did it? Everything that the predictor read is left out once, and rated without.

Reviews go one at a time, the averages staying as they are; so do the rationales and each side's
average. All of it is one call of the engine: a forward pass for each thing that is left out, times
the number of rationales. Where the rationales are to be written anew without the review, with the
seeds of those that they replace, each of them is one more generated text a review.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from r4r_graph.engine.base import RateResult
from r4r_graph.evidence import Evidence
from r4r_graph.experts import RatingCase, Rationale, Sampling
from r4r_graph.graph.state import Json
from r4r_graph.ratings import RatingDistribution, RatingStats
from r4r_graph.schema import Influence, InfluenceKind, ReviewAspects


@dataclass(frozen=True, slots=True)
class LeftOut:
    """The evidence without one thing."""

    what: InfluenceKind
    evidence: Evidence
    review: ReviewAspects | None = None
    """Which review it is, where it is one."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be written and rated."""

    parts: Sequence[LeftOut]
    rationales: Sequence[Json]
    """Those of the run, as the state has them."""
    anew: Sampling | None
    """How those that no person wrote are drawn again without a review; None: all stay."""

    @property
    def to_write(self) -> list[Evidence]:
        """The evidence without each review, where rationales are written anew."""
        return [part.evidence for part in self.parts if self.anew and part.review]

    def cases(self, fresh: Sequence[Sequence[Rationale]]) -> list[list[RatingCase]]:
        """What is to be rated for each part: a case a rationale, in the run's order.

        Args:
            fresh: the rationales written for each of `to_write`.
        """
        rounds = iter(fresh)
        found: list[list[RatingCase]] = []
        for part in self.parts:
            if part.what == "rationale":
                found.append([(part.evidence, None)])
                continue
            new = iter(next(rounds)) if self.anew and part.review else None
            texts = [
                drawn["text"] if new is None or drawn.get("edited") else next(new).text
                for drawn in self.rationales
            ]
            found.append([(part.evidence, text) for text in texts])
        return found


def left_out(evidence: Evidence) -> list[LeftOut]:
    """All that can be left out: reviews of the user, of the item, the rationale, the averages.

    Args:
        evidence: what the predictor read, within its token budgets.
    """
    found: list[LeftOut] = []
    for review, others in _each(evidence.user_reviews):
        found.append(LeftOut("user_review", replace(evidence, user_reviews=others), review))
    for review, others in _each(evidence.item_reviews):
        found.append(LeftOut("item_review", replace(evidence, item_reviews=others), review))
    found.append(LeftOut("rationale", evidence))
    if evidence.user_stats.count:
        found.append(LeftOut("user_average", replace(evidence, user_stats=RatingStats())))
    if evidence.item_stats.count:
        found.append(LeftOut("item_average", replace(evidence, item_stats=RatingStats())))
    return found


def influences(
    parts: Sequence[LeftOut], rated: Sequence[Sequence[RateResult]], mean: float
) -> list[Influence]:
    """The influence of each part, the strongest first.

    Args:
        parts: see `left_out`.
        rated: each part's ratings, one a rationale; they are mixed.
        mean: the mean rating with everything.
    """
    found = []
    for part, results in zip(parts, rated, strict=True):
        without = RatingDistribution.mix([result.distribution for result in results]).mean
        one = Influence(part.what, without, mean - without)
        if (review := part.review) is not None:
            one = replace(
                one,
                user_id=review.user_id,
                item_id=review.item_id,
                title=review.title,
                timestamp=review.timestamp,
            )
        found.append(one)
    return sorted(found, key=lambda one: -math.fabs(one.change))


def _each(
    reviews: tuple[ReviewAspects, ...],
) -> list[tuple[ReviewAspects, tuple[ReviewAspects, ...]]]:
    """Each review and all others."""
    return [(review, reviews[:at] + reviews[at + 1 :]) for at, review in enumerate(reviews)]
