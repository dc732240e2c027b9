"""What a training step reads: targets with their histories, as they stood then.

A target is a review whose rating is to be predicted. Its evidence comes from the very function
that the rating graph recalls with (`r4r_graph.graph.recall`), as of the target's own time: only
strictly earlier reviews, and none by this user of this item. So no row can hold its own rating,
its own words or anything later; the reward model's own slot is the one exception, and it is filled
elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from finetune.settings import Recipe
from r4r_graph.engine.base import TokenMeter
from r4r_graph.evidence import Evidence, fit_evidence
from r4r_graph.graph.outcome import evidence_of
from r4r_graph.graph.recall import recall
from r4r_graph.graph.state import Knobs
from r4r_graph.reviews import ReviewSource
from r4r_graph.schema import AspectSummary, Review

Summaries = Mapping[str, AspectSummary]
"""Review key to aspect summary."""


def histories(target: Review, source: ReviewSource, recipe: Recipe) -> list[tuple[Review, str]]:
    """The reviews in a target's two histories, each with the kind of thing it is of."""
    state = _recalled(target, source, recipe)
    entries = [*state["user_reviews"], *state["item_reviews"]]
    return [(Review.from_dict(entry["review"]), entry["kind"]) for entry in entries]


def target_evidence(
    target: Review,
    source: ReviewSource,
    summaries: Summaries,
    meter: TokenMeter,
    recipe: Recipe,
) -> Evidence:
    """What the experts may know of a target, within the token budgets, as at inference.

    A review without a summary stands there with its rating alone, as one without words does.
    """
    state = _recalled(target, source, recipe)
    keys = {e["key"] for e in (*state["user_reviews"], *state["item_reviews"])}
    known = {key: summaries[key].to_dict() for key in keys if key in summaries}
    state["summaries"] = known
    evidence = evidence_of(state)
    return fit_evidence(evidence, meter, recipe.token_budgets)[0]


def reviews_to_summarize(
    targets: Iterable[Review], source: ReviewSource, recipe: Recipe
) -> list[tuple[Review, str]]:
    """Every review with words in the histories of the targets, once, by first appearance."""
    found: dict[str, tuple[Review, str]] = {}
    for target in targets:
        for review, kind in histories(target, source, recipe):
            if review.text.strip():
                found.setdefault(review.key, (review, kind))
    return list(found.values())


def is_cold(target: Review, source: ReviewSource) -> tuple[bool, bool]:
    """Whether the target's user, and its item, have no earlier review."""
    when = target.timestamp
    user = source.user_stats(target.user_id, when, without_item=target.item_id)
    item = source.item_stats(target.item_id, when, without_user=target.user_id)
    return user.count == 0, item.count == 0


def row_key(target: Review) -> dict[str, Any]:
    """The columns that name a target in every file of the pipeline."""
    return {
        "user_id": target.user_id,
        "item_id": target.item_id,
        "as_of": float(target.timestamp),
    }


def _recalled(target: Review, source: ReviewSource, recipe: Recipe) -> Any:
    given: Any = {
        "user_id": target.user_id,
        "item_id": target.item_id,
        "as_of": target.timestamp,
    }
    return recall(given, Knobs(history=recipe.history), source, recipe.rating_scale)
