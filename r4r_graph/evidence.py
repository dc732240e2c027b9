"""What reasoner and predictor know of a pair, and how it is made to fit the token budgets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

from r4r_graph import prompts
from r4r_graph.engine.base import TokenMeter
from r4r_graph.errors import SettingError
from r4r_graph.ratings import RatingStats
from r4r_graph.schema import AspectSummary, Item, ReviewAspects, Truncation, plain_number

DEFAULT_KIND = "item"
"""Names the kind of thing where an item has no category."""

SHRINKAGE = 5.0
"""Ratings at the mean that are added to a side's own, for `Evidence.expected`. Of 1 to 20 for
either side, 5 and 5 was within 0.005 RMSE of the best pair on a dense and on a sparse data set."""


HISTORY = 10
"""Latest reviews read on each side, where neither a run nor the adapters say otherwise."""


@dataclass(frozen=True)
class TokenBudgets:
    """How long each part of a prompt, and each answer, may be (tokens of the engine)."""

    title: int = 24
    """A title or a category."""
    review: int = 320
    """The text of a review to summarize."""
    description: int = 96
    """An item's description."""
    side: int = 512
    """The lines of one side's history; the oldest reviews go first."""
    summary: int = 80
    """An aspect summary, as an answer."""
    rationale: int = 128
    """A rationale, as an answer and as the predictor reads it."""

    def __post_init__(self) -> None:
        """Refuse budgets in which nothing fits."""
        for name, least in (("summary", 40), ("rationale", 8), ("review", 8), ("side", 32)):
            if getattr(self, name) < least:
                raise SettingError(f"token budget {name}={getattr(self, name)} is under {least}")


@dataclass(frozen=True, slots=True)
class Evidence:
    """All that reasoner and predictor know of a pair."""

    item: Item
    user_reviews: tuple[ReviewAspects, ...]
    """Oldest first, as all histories."""
    item_reviews: tuple[ReviewAspects, ...]
    user_stats: RatingStats
    item_stats: RatingStats
    overall: float | None = None
    """Mean of all earlier ratings by anyone of anything; None where no review source knows it."""

    @property
    def expected(self) -> float | None:
        """What the averages alone suggest: the overall mean, plus how far user and item lie from
        it, each drawn towards 0 as if `SHRINKAGE` more ratings stood at the mean (the floor
        `shrunk_bias`, with constants that are not fitted to the data)."""
        if self.overall is None:
            return None
        return self.overall + sum(
            stats.count / (stats.count + SHRINKAGE) * (stats.mean - self.overall)
            for stats in (self.user_stats, self.item_stats)
            if stats.mean is not None
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "item": self.item.to_dict(),
            "user_reviews": [review.to_dict() for review in self.user_reviews],
            "item_reviews": [review.to_dict() for review in self.item_reviews],
            "user_stats": self.user_stats.to_dict(),
            "item_stats": self.item_stats.to_dict(),
            "overall": self.overall,
        }

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> Self:
        """Back from `to_dict`."""
        return cls(
            Item.from_dict(row["item"]),
            tuple(map(ReviewAspects.from_dict, row["user_reviews"])),
            tuple(map(ReviewAspects.from_dict, row["item_reviews"])),
            RatingStats(**row["user_stats"]),
            RatingStats(**row["item_stats"]),
            row.get("overall"),
        )

    def without_texts(self) -> Self:
        """The ratings and averages alone: no word of any review, no description."""
        return replace(
            self,
            item=replace(self.item, description=""),
            user_reviews=tuple(replace(r, summary=AspectSummary()) for r in self.user_reviews),
            item_reviews=tuple(replace(r, summary=AspectSummary()) for r in self.item_reviews),
        )


def fit_evidence(
    evidence: Evidence, meter: TokenMeter, budgets: TokenBudgets
) -> tuple[Evidence, tuple[Truncation, ...]]:
    """The evidence within its token budgets, each side by itself, and what was cut.

    The oldest reviews go first; a newest review that alone is too long loses its last phrases.
    """
    cuts: list[Truncation] = []
    description, cut = shortened(evidence.item.description, meter, budgets.description)
    if cut:
        cuts.append(Truncation("description", cut))
    item = replace(
        evidence.item,
        title=shortened(evidence.item.title, meter, budgets.title)[0],
        category=shortened(evidence.item.category, meter, budgets.title)[0],
        description=description,
    )
    user, user_cut = _fit_side(evidence.user_reviews, meter, budgets, named=True)
    others, item_cut = _fit_side(evidence.item_reviews, meter, budgets, named=False)
    if user_cut:
        cuts.append(Truncation("user_history", user_cut))
    if item_cut:
        cuts.append(Truncation("item_history", item_cut))
    return replace(evidence, item=item, user_reviews=user, item_reviews=others), tuple(cuts)


def evidence_inputs(evidence: Evidence) -> dict[str, Any]:
    """The template inputs that show the evidence, ratings and averages included."""
    return {
        "kind": evidence.item.category or DEFAULT_KIND,
        "item": evidence.item.to_dict(),
        "user_reviews": [_line_inputs(review) for review in evidence.user_reviews],
        "item_reviews": [_line_inputs(review) for review in evidence.item_reviews],
        "user_stats": evidence.user_stats.to_dict(),
        "item_stats": evidence.item_stats.to_dict(),
        "expected": evidence.expected,
    }


def without_ratings(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What the reasoner may see: a template that asks for a rating fails to render."""
    sides = ("user_reviews", "item_reviews")
    bare = {
        side: [{k: v for k, v in row.items() if k != "rating"} for row in inputs[side]]
        for side in sides
    }
    return {"kind": inputs["kind"], "item": inputs["item"], **bare}


def _line_inputs(review: ReviewAspects) -> dict[str, Any]:
    return {
        "title": review.title,
        "rating": plain_number(round(review.rating, 2)),
        **review.summary.to_dict(),
    }


def shortened(text: str, meter: TokenMeter, limit: int) -> tuple[str, str]:
    """Cleaned `text` within `limit` tokens, and in words what was cut (empty: nothing)."""
    text = prompts.clean(text, meter.special_tokens)
    size = meter.count(text)
    if size <= limit:
        return text, ""
    return meter.head(text, limit).strip(), f"cut from {size} to {limit} tokens"


def _fit_side(
    reviews: tuple[ReviewAspects, ...], meter: TokenMeter, budgets: TokenBudgets, *, named: bool
) -> tuple[tuple[ReviewAspects, ...], str]:
    """The newest reviews whose lines fit the side's budget, and in words what was cut."""

    def cost(review: ReviewAspects) -> int:
        line = prompts.history_line(
            _line_inputs(review), named=named, special_tokens=meter.special_tokens
        )
        return meter.count(line) + 3  # its number and its new line

    kept: list[ReviewAspects] = []
    left, notes = budgets.side, []
    for review in reversed(reviews):
        short = replace(review, title=shortened(review.title, meter, budgets.title)[0])
        if not kept and cost(short) > left:
            short = _fewer_phrases(short, cost, left)
            notes.append("phrases of the newest review left out")
        if cost(short) > left:
            break
        left -= cost(short)
        kept.append(short)
    if len(kept) < len(reviews):
        notes.insert(0, f"{len(reviews) - len(kept)} oldest of {len(reviews)} reviews left out")
    detail = f"{'; '.join(notes)} ({budgets.side} tokens a side)" if notes else ""
    return tuple(reversed(kept)), detail


def _fewer_phrases(review: ReviewAspects, cost: Any, limit: int) -> ReviewAspects:
    while cost(review) > limit and any(review.summary.to_dict().values()):
        lists = review.summary.to_dict()
        longest = max(lists, key=lambda name: sum(map(len, lists[name])))
        lists[longest] = lists[longest][:-1]
        review = replace(review, summary=AspectSummary.from_dict(lists))
    return review
