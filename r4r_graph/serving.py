"""The rating graph for LangGraph's development server and Studio: `langgraph.json` names `graph`.

    langgraph dev --no-browser

What it serves is looked up in the environment (`R4R_REVIEWS`, `R4R_BASE`, ...) and in `r4r.toml`:
see `r4r_graph.configuration`. Without reviews it is the sample of the package; `R4R_ENGINE=fake` is
an engine without a model, for a fast start. Knobs are a matter of each run's context.

The server keeps runs with a checkpointer of its own.
"""

from __future__ import annotations

import asyncio
import atexit
import functools
import os
import threading
from collections.abc import Mapping
from pathlib import Path

from r4r_graph.configuration import resolve
from r4r_graph.errors import SettingError
from r4r_graph.graph import RatingGraph
from r4r_graph.recommender import Recommender

_loading = threading.Lock()


async def graph() -> RatingGraph:
    """The rating graph, loaded by the first call (in a thread: the server's loop must not wait).

    Raises:
        SettingError: a bad setting; the message names it.
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


def load_from(environ: Mapping[str, str]) -> Recommender:
    """The recommender that these environment variables and the file describe; close it when done.

    Raises:
        SettingError, DataError, ModelError: see `graph`.
    """
    found = resolve(environ=environ)
    if found.reviews is None:
        if found.items is not None:
            origin = found.origin("items")
            raise SettingError(f"{origin} without reviews: set R4R_REVIEWS, too")
        sample = Path(__file__).with_name("_demo")
        found = resolve(
            environ=environ, reviews=sample / "reviews.jsonl", items=sample / "items.jsonl"
        )
    return found.load()
