"""Three reviews, a pair, and a recommender over a scripted engine that keeps its runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from langgraph.store.memory import InMemoryStore

from r4r_graph.engine.batching import BatchingEngine
from r4r_graph.recommender import Recommender
from r4r_graph.schema import Review
from tests.scripted import Script, at, review

Fake = Callable[..., BatchingEngine]

TABLE = [
    review("ann", "folk", 1, 5),
    review("ann", "rock", 2, 1),
    review("ben", "target", 1, 2),
]
OFF_SCALE = Review("ann", "poles", 99, at(1))
PAIR: Any = {"user_id": "ann", "item_id": "target", "as_of": at(9)}


def load(fake: Fake, saver: Any, script: Script | None = None, **settings: Any) -> Recommender:
    script = script or Script()
    engine = fake(write=script.write, rate=script.rate)
    settings = {"store": InMemoryStore(), **settings}
    return Recommender.load(TABLE, engine=engine, checkpointer=saver, **settings)
