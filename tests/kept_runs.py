"""Runs of a scripted graph that are kept, for the tests of what is told about them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from langgraph.checkpoint.memory import InMemorySaver
from langgraph.store.memory import InMemoryStore

from r4r_graph.engine.batching import BatchingEngine
from r4r_graph.recommender import Recommender
from r4r_graph.runs import thread
from r4r_graph.schema import Review
from tests.scripted import Request, Script, prompt, review

Fake = Callable[..., BatchingEngine]

TABLE = [
    review("ann", "folk", 1, 5),
    review("ann", "rock", 2, 1),
    review("ben", "target", 1, 2.5),
    review("cy", "target", 3, 4),
]
"""Ann is to rate `target`: two reviews on either side."""


def load(
    fake: Fake,
    script: Script | None = None,
    *,
    reviews: Sequence[Review] = TABLE,
    saver: Any = None,
    **settings: Any,
) -> Recommender:
    """A recommender over a scripted engine that keeps its runs."""
    script = script or Script(weights=weights)
    engine = fake(write=lambda r: script.write(r), rate=lambda r: script.rate(r))
    settings = {"store": InMemoryStore(), "checkpointer": saver or InMemorySaver(), **settings}
    return Recommender.load(reviews, engine=engine, **settings)


def weights(request: Request) -> list[float]:
    """A distribution that depends on what was read."""
    text = prompt(request)
    return [1, 1, 2, 3 + text.count("folk"), 1 + 2 * text.count("Reason 1")]


def run(recommender: Recommender, thread_id: str, **options: Any) -> Any:
    """Ann's rating of `target`, kept under this name with its prompts."""
    config = thread(thread_id)
    return recommender.rate("ann", "target", **{"record": True, "config": config, **options})
