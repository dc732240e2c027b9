"""From a run's state to its recommendation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from r4r_graph.evidence import Evidence
from r4r_graph.graph.state import Json, Knobs, RatingState
from r4r_graph.ratings import RatingDistribution, RatingScale, RatingStats
from r4r_graph.schema import (
    AspectSummary,
    Influence,
    Item,
    NodeUsage,
    Recommendation,
    Review,
    ReviewAspects,
    Truncation,
)

COSTLY_NODES = ("summarizer", "reasoner", "predictor")
ON_DEMAND = ("influence",)
"""Costly nodes that run only when asked for."""


def evidence_of(state: RatingState) -> Evidence:
    """What reasoner and predictor know, before it is cut to its token budgets."""
    case, summaries = state["case"], state.get("summaries", {})
    return Evidence(
        item=Item.from_dict(case["item"]),
        user_reviews=_aspects(state["user_reviews"], summaries),
        item_reviews=_aspects(state["item_reviews"], summaries),
        user_stats=RatingStats(**case["user_stats"]),
        item_stats=RatingStats(**case["item_stats"]),
        overall=case["overall"],
    )


def mixture(distributions: Iterable[Json], scale: RatingScale) -> RatingDistribution:
    """The mixture of the distributions rated so far."""
    parts = [RatingDistribution(scale, tuple(d["probabilities"]), d["mass"]) for d in distributions]
    return RatingDistribution.mix(parts)


def confidence(state: RatingState) -> float:
    """The mode's probability, of all that is rated so far."""
    return float(max(state["recommendation"]["distribution"].values()))


def recommend(
    state: RatingState, knobs: Knobs, scale: RatingScale, model: Mapping[str, Any]
) -> Recommendation:
    """The recommendation that this state amounts to."""
    case, evidence, spans = state["case"], evidence_of(state), state.get("spans", [])
    ran = {span["node"] for span in spans}
    nodes = (*COSTLY_NODES, *(node for node in ON_DEMAND if node in ran))
    return Recommendation(
        user_id=case["user_id"],
        item_id=case["item_id"],
        title=evidence.item.title,
        as_of=case["as_of"],
        readout=knobs.readout,
        distribution=mixture(state["distributions"], scale),
        rationales=tuple(drawn["text"] for drawn in state["rationales"]),
        user_aspects=evidence.user_reviews,
        item_aspects=evidence.item_reviews,
        cold_start=case["cold_start"],
        truncated=tuple(Truncation(**cut) for cut in state.get("truncated", [])),
        warnings=tuple(case["warnings"]),
        model={**model, "ratings_from": _source(state["distributions"])},
        usage={node: _usage(node, spans) for node in nodes},
        influence=tuple(Influence(**each) for each in state.get("influence") or ()),
        answers=tuple(state.get("answers", [])),
    )


def _source(distributions: Iterable[Json]) -> str:
    """Where the ratings come from (`RatingSource`); the least exact, where some differ."""
    found = {rated.get("source", "logits") for rated in distributions}
    return next((s for s in ("samples", "logprobs") if s in found), "logits")


def _aspects(entries: Iterable[Json], summaries: Mapping[str, Json]) -> tuple[ReviewAspects, ...]:
    """Reviews with their summaries; one without words has an empty summary."""
    found = []
    for entry in entries:
        review, summary = Review.from_dict(entry["review"]), summaries.get(entry["key"])
        found.append(
            ReviewAspects(
                user_id=review.user_id,
                item_id=review.item_id,
                title=review.title,
                timestamp=review.timestamp,
                rating=review.rating,
                summary=AspectSummary.from_dict(summary) if summary else AspectSummary(),
            )
        )
    return tuple(found)


def _usage(node: str, spans: Iterable[Json]) -> NodeUsage:
    """A node's costs summed; its seconds are those during which any of its steps was at work."""
    mine = sorted((s for s in spans if s["node"] == node), key=lambda s: s["started"])
    seconds, until = 0.0, float("-inf")
    for span in mine:
        seconds += max(0.0, span["ended"] - max(span["started"], until))
        until = max(until, span["ended"])
    counts = ("calls", "cache_hits", "prompt_tokens", "completion_tokens")
    return NodeUsage(
        **{name: sum(span[name] for span in mine) for name in counts}, seconds=round(seconds, 4)
    )
