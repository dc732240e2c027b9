"""Milliseconds that the graph adds to a rating: LangGraph against the same experts called directly.

The engine is the fake one (microseconds a request) and all summaries are cached, so what is left
is orchestration: the state machine, its fan-out over ten to twenty reviews, streams, callbacks.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from collections.abc import Callable

from langgraph.store.memory import InMemoryStore

from r4r_graph import Knobs, Recommender, Review, fake_engine
from r4r_graph.graph.outcome import evidence_of
from r4r_graph.graph.recall import recall

NOW = 1_700_000_000.0


def reviews(history: int) -> list[Review]:
    """A user and an item with `history` reviews each."""
    words = "Warm voice and honest words, though the second half drags on for too long."
    user = [Review("u", f"i{n}", 4, NOW - 1000 + n, f"Album {n}", words) for n in range(history)]
    item = [Review(f"u{n}", "i", 3, NOW - 500 + n, "Album", words) for n in range(history)]
    return user + item


def direct(recommender: Recommender) -> None:
    """What the graph does, without the graph."""
    experts = recommender.experts
    given = {"user_id": "u", "item_id": "i", "as_of": NOW}
    state = recall(given, Knobs(), recommender.reviews, experts.scale)
    summaries = {}
    for entry in (*state["user_reviews"], *state["item_reviews"]):
        review = Review.from_dict(entry["review"])
        made = experts.summarizer.summarize(review, entry["kind"])
        summaries[entry["key"]] = made.summary.to_dict()
    evidence, _ = experts.fit(evidence_of({**state, "summaries": summaries}))
    drawn = experts.reasoner.write(evidence)
    experts.predictor.rate(evidence, [rationale.text for rationale in drawn])


def milliseconds(once: Callable[[], object], runs: int) -> float:
    """Median time of a call."""
    once()
    times = []
    for _ in range(runs):
        started = time.perf_counter()
        once()
        times.append(time.perf_counter() - started)
    return 1000 * statistics.median(times)


async def concurrent(recommender: Recommender, runs: int) -> None:
    """Many runs at once."""
    await asyncio.gather(*(recommender.arate("u", "i", as_of=NOW) for _ in range(runs)))


def main() -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--history", type=int, default=10, help="reviews on each side")
    options = parser.parse_args()
    recommender = Recommender.load(
        reviews(options.history), engine=fake_engine(), store=InMemoryStore()
    )
    with recommender:
        graph = milliseconds(lambda: recommender.rate("u", "i", as_of=NOW), options.runs)
        bare = milliseconds(lambda: direct(recommender), options.runs)
        asyncio.run(concurrent(recommender, 8))
        started = time.perf_counter()
        asyncio.run(concurrent(recommender, options.runs))
        together = 1000 * (time.perf_counter() - started) / options.runs
    figures = {
        "reviews_a_side": options.history,
        "graph_ms": round(graph, 2),
        "direct_ms": round(bare, 2),
        "added_ms": round(graph - bare, 2),
        "ratio": round(graph / bare, 2),
        "graph_async_concurrent_ms": round(together, 2),
    }
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
