"""What `Recommender.load` opens: engines, local or elsewhere, and the review source."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from langchain_core.language_models import BaseChatModel

from r4r_graph.engine.base import Engine
from r4r_graph.errors import SettingError
from r4r_graph.evidence import TokenBudgets
from r4r_graph.prompts import EXPERT_PROMPTS, prompt_digests
from r4r_graph.ratings import RatingScale
from r4r_graph.reviews import ReviewSource, TableReviewSource, load_items, open_reviews
from r4r_graph.schema import Item, Review

_log = logging.getLogger(__name__)

PathLike = str | os.PathLike[str]

AnyEngine = Engine | BaseChatModel | str
"""An engine; a chat model; the address of a model server; or a chat model's `provider:name`."""


def open_engine(
    engine: AnyEngine | None,
    base: PathLike,
    adapters: PathLike | Mapping[str, PathLike | None] | None,
    *,
    allow_prompt_mismatch: bool = False,
    **settings: Any,
) -> Engine:
    """The engine that this means; None is the local one, and `settings` are its alone.

    Raises:
        ModelError, SettingError: see `load_local_engine`, `open_server_engine`, `open_chat_model`.
        EngineError: a model server cannot be reached.
        MissingExtraError: a chat model by name without its package.
    """
    if engine is None:
        return local_engine(base, adapters, allow_prompt_mismatch=allow_prompt_mismatch, **settings)
    if isinstance(engine, str) and "://" in engine:
        return _server_engine(engine, base, adapters, allow_prompt_mismatch)
    if isinstance(engine, str):
        from r4r_graph.chat_models import open_chat_model

        if ":" not in engine:
            raise SettingError(
                f"bad engine {engine!r}: the address of a model server (http://HOST:PORT), or a "
                "chat model as provider:name"
            )
        engine = open_chat_model(engine, role="engine")
    if isinstance(engine, BaseChatModel):
        from r4r_graph.engine.chat_engine import chat_engine

        return chat_engine(engine)
    return engine


def open_engines(
    engine: AnyEngine | None,
    experts: Mapping[str, AnyEngine] | None,
    base: PathLike,
    adapters: PathLike | Mapping[str, PathLike | None] | None,
    **settings: Any,
) -> tuple[Engine, dict[str, Engine]]:
    """The engine, and those of single experts, each given one opened once. Where every expert has
    one of its own and none is given beside, the predictor's is also the engine.

    Raises: as `open_engine`.
    """
    opened: dict[int, Engine] = {}
    try:
        for given in (experts or {}).values():
            if id(given) not in opened:
                opened[id(given)] = open_engine(given, base, adapters, **settings)
        others = {name: opened[id(given)] for name, given in (experts or {}).items()}
        if engine is None and set(others) >= set(EXPERT_PROMPTS):
            return others["predictor"], others
        return open_engine(engine, base, adapters, **settings), others
    except BaseException:
        for one in opened.values():
            one.close()
        raise


def _server_engine(
    url: str,
    base: PathLike,
    adapters: PathLike | Mapping[str, PathLike | None] | None,
    allow_prompt_mismatch: bool,
) -> Engine:
    from r4r_graph.engine.server_connect import open_server_engine

    engine, warnings = open_server_engine(
        url,
        os.fspath(base),
        _adapter_paths(adapters),
        prompts=prompt_digests(),
        allow_prompt_mismatch=allow_prompt_mismatch,
    )
    for warning in warnings:
        _log.warning("%s", warning)
    return engine


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
        return open_reviews(reviews, scale=scale, items=items)
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
