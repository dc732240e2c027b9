"""Reviews for bulk jobs, pairs to rate, and a recommender without a model."""

from __future__ import annotations

from typing import Any

from langgraph.store.memory import InMemoryStore

from r4r_graph import Recommender, Review, fake_engine
from r4r_graph.schema import Pair

REVIEWS = [
    Review(f"u{u}", f"i{i}", 1 + (u + i) % 5, 1000.0 + 10 * u + i, f"Title {i}", f"Words {u} {i}.")
    for u in range(6)
    for i in range(6)
]


def pairs_to_rate(count: int) -> list[Pair]:
    """Each at a later time than the one before it."""
    return [Pair(f"u{n % 6}", f"i{n % 5}", 1030.0 + n) for n in range(count)]


PAIRS = pairs_to_rate(40)


def recommender(**scripts: Any) -> Recommender:
    """Over `REVIEWS`, its summaries in memory; `scripts` are for `fake_engine`."""
    return Recommender.load(REVIEWS, engine=fake_engine(**scripts), store=InMemoryStore())
