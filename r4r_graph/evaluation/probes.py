"""Are the words used? The same rows rated once more, with something taken away or exchanged.

A predictor that rates alike whatever the rationale says does not use it. One that gets worse
without it may use it, or may only be lost in a prompt of a kind that it never met in training. So a
probe says how far the rating *moves*; whether the part *helps* is said by a predictor that was
trained without it, at equal budget: rate with that one under the condition that it was trained for.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from r4r_graph.bulk import rate_pairs
from r4r_graph.errors import R4RError, SettingError
from r4r_graph.evaluation.predictions import Predictions, from_rows
from r4r_graph.evaluation.targets import RowKey, as_pairs, by_lot, digest_targets, row_key
from r4r_graph.evidence import Evidence
from r4r_graph.graph import Knobs
from r4r_graph.graph.outcome import evidence_of
from r4r_graph.graph.recall import recall
from r4r_graph.graph.state import RatingState
from r4r_graph.jobs import Columns, OnProgress, digest_rows, read_job, run_job
from r4r_graph.ratings import RatingDistribution
from r4r_graph.recommender import Recommender, check_knobs
from r4r_graph.schema import Review

AS_IS = "as_is"
CONDITIONS: Mapping[str, str] = {
    "without_rationale": "the rationale is left out",
    "swapped_rationale": "the rationale is another row's, of another user and another item",
    "true_review": "the rationale is what the user wrote about the item later",
    "without_texts": "ratings and averages alone: no word of a review, no rationale",
    "averages_only": "the two averages alone",
}
"""What can be changed before rating, and how."""

BY_ITSELF = ("without_rationale", "without_texts", "averages_only", "true_review")
"""Conditions that need no rationale."""

NOT_APPLICABLE = "the condition does not apply"
"""Reason of a row that has nothing to exchange or to show; it is in no comparison."""

Rationales = Mapping[RowKey, Sequence[str]]

SCHEMA = pa.schema(
    [
        ("user_id", pa.string()),
        ("item_id", pa.string()),
        ("as_of", pa.float64()),
        ("distribution", pa.list_(pa.float64())),
        ("rating_mass", pa.float64()),
        ("rationales", pa.list_(pa.string())),
        ("error", pa.string()),
    ]
)


def rate_targets(
    recommender: Recommender,
    targets: Sequence[Review],
    out: str | os.PathLike[str],
    *,
    name: str,
    condition: str = AS_IS,
    own: Rationales | None = None,
    seed: int = 0,
    concurrency: int = 64,
    on_progress: OnProgress | None = None,
    **knobs: Any,
) -> Predictions:
    """Rate all targets into the folder `out/CONDITION`, resumably.

    Args:
        recommender: rates, from reviews before each target's time.
        targets: what is predicted; under `true_review` its own words are read, otherwise never.
        out: the folder of this set of predictions.
        name: what these predictions are called.
        condition: `as_is` runs the graph (`rate_pairs`); others are in `CONDITIONS`.
        own: what was written for each target as it is; `swapped_rationale` needs it.
        seed: decides who gets whose rationale, and what is sampled.
        concurrency: rows in flight.
        on_progress: called after each row.
        **knobs: other fields of `Knobs`.

    Raises:
        SettingError: an unknown condition, or one that lacks its rationales.
        InputError: the folder holds another job.
    """
    settings = check_knobs({**knobs, "seed": seed}).settled(recommender.experts.history)
    folder = Path(out) / condition
    if condition == AS_IS:
        rate_pairs(
            recommender,
            as_pairs(targets),
            folder,
            concurrency=concurrency,
            on_progress=on_progress,
            seed=seed,
            **knobs,
        )
    else:
        texts = _texts(condition, targets, own, seed)

        async def rate(target: Review) -> Columns:
            return await _rated(recommender, target, condition, texts[row_key(target)], settings)

        run_job(
            targets,
            rate,
            folder,
            schema=SCHEMA,
            manifest=_manifest(recommender, targets, condition, texts, settings),
            concurrency=concurrency,
            on_progress=on_progress,
        )
    rows = {(row["user_id"], row["item_id"], row["as_of"]): row for row in read_job(folder)}
    return from_rows(
        rows,
        targets,
        recommender.experts.scale,
        name=name,
        condition=condition,
        model=recommender.experts.model_card(),
    )


def written(predictions: Predictions, targets: Sequence[Review]) -> Rationales:
    """The rationales of predictions, by target."""
    return {row_key(t): texts for t, texts in zip(targets, predictions.rationales, strict=True)}


def exchanged(rationales: Rationales, targets: Sequence[Review], seed: int) -> Rationales:
    """Each target with the rationales of another user's row about another item.

    The rows go round in an order by lot, each to the next one that differs in both. A target for
    which there is no such row has none.
    """
    order = [t for t in by_lot(targets, seed, "exchange") if rationales.get(row_key(t))]
    found: dict[RowKey, Sequence[str]] = {row_key(target): () for target in targets}
    for at, target in enumerate(order):
        for step in range(1, len(order)):
            other = order[(at + step) % len(order)]
            if other.user_id != target.user_id and other.item_id != target.item_id:
                found[row_key(target)] = rationales[row_key(other)]
                break
    return found


def changed(evidence: Evidence, condition: str) -> Evidence:
    """The evidence under a condition."""
    if condition == "without_texts":
        return evidence.without_texts()
    if condition == "averages_only":
        return replace(evidence.without_texts(), user_reviews=(), item_reviews=())
    return evidence


async def evidence_before(recommender: Recommender, target: Review, settings: Knobs) -> Evidence:
    """What the predictor knows of a target in the graph: the same recall, the same summaries, the
    same token budgets."""
    experts = recommender.experts
    given: RatingState = {
        "user_id": target.user_id,
        "item_id": target.item_id,
        "as_of": target.timestamp,
    }
    state: Any = recall(given, settings, recommender.reviews, experts.scale)
    summaries = {}
    for entry in (*state["user_reviews"], *state["item_reviews"]):
        review = Review.from_dict(entry["review"])
        if review.text.strip():
            made = await experts.summarizer.asummarize(review, entry["kind"])
            summaries[entry["key"]] = made.summary.to_dict()
    state["summaries"] = summaries
    return experts.fit(evidence_of(state))[0]


async def _rated(
    recommender: Recommender,
    target: Review,
    condition: str,
    texts: Sequence[str | None],
    settings: Knobs,
) -> Columns:
    columns: Columns = dict.fromkeys(SCHEMA.names)
    columns |= dict(zip(("user_id", "item_id", "as_of"), row_key(target), strict=True))
    columns["rationales"] = [text for text in texts if text]
    if not texts:
        return columns | {"error": NOT_APPLICABLE}
    try:
        evidence = changed(await evidence_before(recommender, target, settings), condition)
        rated = await recommender.experts.predictor.arate(evidence, texts)
    except R4RError as error:
        return columns | {"error": f"{type(error).__name__}: {error}"}
    mixed = RatingDistribution.mix([result.distribution for result in rated])
    return columns | {"distribution": list(mixed.probabilities), "rating_mass": mixed.mass}


def _texts(
    condition: str, targets: Sequence[Review], own: Rationales | None, seed: int
) -> Mapping[RowKey, Sequence[str | None]]:
    """What stands in the rationale's place, by target; None leaves the place out."""
    if condition not in CONDITIONS:
        raise SettingError(f"unknown condition {condition!r}; there are: {', '.join(CONDITIONS)}")
    if condition == "true_review":
        # Without words there is no review to show.
        return {row_key(t): [t.text] if t.text.strip() else [] for t in targets}
    if condition in BY_ITSELF:
        return {row_key(target): [None] for target in targets}
    if own is None:
        raise SettingError(f"the condition {condition!r} needs the rationales written as it is")
    return exchanged(own, targets, seed)


def _manifest(
    recommender: Recommender,
    targets: Sequence[Review],
    condition: str,
    texts: Mapping[RowKey, Sequence[str | None]],
    settings: Knobs,
) -> dict[str, Any]:
    """What makes two runs the same job."""
    experts = recommender.experts
    model = experts.model_card()
    return {
        "condition": condition,
        "targets": digest_targets(targets),
        "texts": digest_rows([*row_key(t), list(texts[row_key(t)])] for t in targets),
        "scale": list(experts.scale.values),
        "budgets": asdict(experts.budgets),
        "history": settings.history,
        "model": {name: model[name] for name in ("base", "base_digest", "adapters", "prompts")},
    }
