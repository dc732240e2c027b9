"""The rating graph for LangGraph's development server and Studio: `langgraph.json` names `graph`.

    langgraph dev --no-browser

What it serves is told by environment variables, all of them optional:

    R4R_REVIEWS, R4R_ITEMS      files of reviews and items; default: the sample of the package
    R4R_BASE, R4R_ADAPTERS      base model and adapters, as for `Recommender.load`
    R4R_SCALE                   rating values; default 1-5
    R4R_ENGINE                  `local`, or `fake`: an engine without a model, for a fast start

The server keeps runs with a checkpointer of its own.
"""

from __future__ import annotations

import asyncio
import atexit
import functools
import os
import threading
from pathlib import Path
from typing import Any

from r4r_graph.errors import SettingError
from r4r_graph.graph import RatingGraph
from r4r_graph.recommender import Recommender

_SAMPLE = Path(__file__).with_name("_demo")
_loading = threading.Lock()


async def graph() -> RatingGraph:
    """The rating graph, loaded by the first call (in a thread: the server's loop must not wait).

    Raises:
        SettingError: a bad environment variable.
        DataError: reviews or items cannot be read.
        ModelError: base model or adapters cannot be used.
    """
    return (await asyncio.to_thread(_loaded)).graph


def _loaded() -> Recommender:
    with _loading:  # two first calls load one model
        return _load()


@functools.cache
def _load() -> Recommender:
    recommender = load_from(os.environ)
    atexit.register(recommender.close)
    return recommender


def load_from(environ: Any) -> Recommender:
    """The recommender that these environment variables describe; close it when done.

    Raises:
        SettingError, DataError, ModelError: see `graph`.
    """
    reviews, items = environ.get("R4R_REVIEWS"), environ.get("R4R_ITEMS")
    if not reviews:
        if items:
            raise SettingError("R4R_ITEMS without R4R_REVIEWS: name the reviews, too")
        reviews, items = _SAMPLE / "reviews.jsonl", _SAMPLE / "items.jsonl"
    engine = environ.get("R4R_ENGINE") or "local"
    if engine not in ("local", "fake"):
        raise SettingError(f"bad R4R_ENGINE {engine!r}: local or fake")
    settings: dict[str, Any] = {"scale": environ.get("R4R_SCALE") or "1-5"}
    if engine == "fake":
        from langgraph.store.memory import InMemoryStore

        from r4r_graph.engine.fake import fake_engine

        settings |= {"engine": fake_engine(), "store": InMemoryStore()}
    base = environ.get("R4R_BASE") or "smollm2-135m"
    return Recommender.load(
        reviews, items or None, base, environ.get("R4R_ADAPTERS") or None, **settings
    )
