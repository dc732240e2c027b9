"""What `Recommender.load` reads: the local engine with its adapters, and the review source."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from r4r_graph.engine.base import Engine
from r4r_graph.errors import SettingError
from r4r_graph.evidence import TokenBudgets
from r4r_graph.prompts import EXPERT_PROMPTS, prompt_digests
from r4r_graph.ratings import RatingScale
from r4r_graph.reviews import ReviewSource, TableReviewSource, load_items, load_reviews
from r4r_graph.schema import Item, Review

_log = logging.getLogger(__name__)

PathLike = str | os.PathLike[str]


def local_engine(
    base: PathLike, adapters: PathLike | Mapping[str, PathLike | None] | None, **settings: Any
) -> Engine:
    """The local engine; what is amiss with its adapters goes to the log.

    Raises:
        ModelError, SettingError: see `load_local_engine`.
    """
    from r4r_graph.engine.local import load_local_engine

    engine, warnings = load_local_engine(
        os.fspath(base), _adapter_paths(adapters), prompts=prompt_digests(), **settings
    )
    for warning in warnings:
        _log.warning("%s", warning)
    bare = [name for name in EXPERT_PROMPTS if name not in engine.info.adapters]
    if bare:
        _log.warning(
            "no adapter for %s: the base model %s answers untrained; expect valid but poor results",
            ", ".join(bare),
            engine.info.base,
        )
    return engine


def budgets_of(engine: Engine) -> TokenBudgets:
    """The token budgets that the engine's adapters were trained with, else the usual ones."""
    known = engine.info.trained_with.get("budgets", {})
    return TokenBudgets(
        **{name: known[name] for name in TokenBudgets.__dataclass_fields__ if name in known}
    )


def review_source(
    reviews: PathLike | ReviewSource | Iterable[Review] | None,
    items: PathLike | Mapping[str, Item] | None,
    scale: RatingScale,
) -> ReviewSource | None:
    """Where histories come from; None where every run brings its own.

    Raises:
        DataError: a file cannot be read, or a rating is off the scale.
        SettingError: items beside a review source.
    """
    if isinstance(items, str | os.PathLike):
        items = load_items(items)
    if isinstance(reviews, str | os.PathLike):
        return load_reviews(reviews, scale=scale, items=items)
    if reviews is None:
        return TableReviewSource.from_reviews((), items.values()) if items else None
    if isinstance(reviews, ReviewSource):
        if items is not None:
            raise SettingError("items belong to the review source: give them to it, not here")
        return reviews
    return TableReviewSource.from_reviews(
        (_checked(review, scale) for review in reviews), (items or {}).values()
    )


def _checked(review: Review, scale: RatingScale) -> Review:
    scale.check(review.rating)
    return review


def _adapter_paths(
    adapters: PathLike | Mapping[str, PathLike | None] | None,
) -> str | Mapping[str, str | Path | None] | None:
    if adapters is None or isinstance(adapters, str | os.PathLike):
        return None if adapters is None else os.fspath(adapters)
    return {name: None if path is None else os.fspath(path) for name, path in adapters.items()}
