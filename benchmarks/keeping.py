"""What keeping a run costs: ratings kept in SQLite, prompts and outputs too, against plain ones.

The fake engine takes no time, so what is left is the graph and, kept, its checkpoints: ten reviews
a side, each with the summary, the prompt and the output of its own. With `--real N` the same pair
is rated N times by the real model as well, its summaries cached, and the cost is told as a share.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.store.memory import InMemoryStore

from r4r_graph import Recommender, Review, fake_engine
from r4r_graph.engine.base import Engine
from r4r_graph.runs import history, list_runs, open_runs

NOW = 1_700_000_000.0
WORDS = "Warm voice and honest words, though the second half drags on for far too long. " * 12


def reviews(history: int) -> list[Review]:
    """A user and an item with `history` reviews each, of about a thousand characters."""
    user = [
        Review("u", f"i{n}", 4, NOW - 1000 + n, f"Album {n}", f"{n} {WORDS}")
        for n in range(history)
    ]
    item = [Review(f"u{n}", "i", 3, NOW - 500 + n, "Album", f"{n} {WORDS}") for n in range(history)]
    return user + item


def load(engine: Engine, side: int, saver: BaseCheckpointSaver[str] | None = None) -> Recommender:
    """A recommender with a summary cache of its own."""
    store = InMemoryStore()
    return Recommender.load(reviews(side), engine=engine, store=store, checkpointer=saver)


def alternating(
    first: Callable[[], object], second: Callable[[], object], runs: int
) -> list[float]:
    """Median milliseconds of either, called in turn, so that both meet the same machine."""
    times: list[list[float]] = [[], []]
    for at in range(2 * (runs + 1)):
        started = time.perf_counter()
        (first, second)[at % 2]()
        times[at % 2].append(1000 * (time.perf_counter() - started))
    return [statistics.median(one[1:]) for one in times]  # without the first: it warms up


def kept_and_not(side: int, runs: int) -> dict[str, float]:
    """Milliseconds of a rating that is kept and of one that is not, and what is kept."""
    with (
        fake_engine() as engine,
        tempfile.TemporaryDirectory() as folder,
        open_runs(Path(folder) / "runs.sqlite") as saver,
    ):
        plain, kept = load(engine, side), load(engine, side, saver)
        bare, whole = alternating(
            lambda: plain.rate("u", "i", as_of=NOW),
            lambda: kept.rate("u", "i", as_of=NOW, record=True),
            runs,
        )
        started = time.perf_counter()
        found = list_runs(kept.graph)
        listing = 1000 * (time.perf_counter() - started)
        state = history(kept.graph, found[0].thread_id)[-1].values
        size = (Path(folder) / "runs.sqlite").stat().st_size
        return {
            "reviews_a_side": side,
            "not_kept_ms": round(bare, 1),
            "kept_ms": round(whole, 1),
            "keeping_ms": round(whole - bare, 1),
            "ratio": round(whole / bare, 2),
            "state_kb": round(len(json.dumps(state)) / 1e3, 1),
            "file_kb_a_run": round(size / len(found) / 1e3),
            "listing_ms_a_run": round(listing / len(found), 2),
        }


def real(side: int, runs: int, keeping_ms: float) -> dict[str, float]:
    """Seconds of a rating by the default model, summaries cached, and the share of keeping it."""
    from r4r_graph.engine.local import load_local_engine

    with load_local_engine("smollm2-135m", "none")[0] as engine:
        rater = load(engine, side)
        rater.rate("u", "i", as_of=NOW)  # summarizes
        ratings, influences = [], []
        for _ in range(runs):
            started = time.perf_counter()
            spent = rater.rate("u", "i", as_of=NOW, influence="same").usage["influence"]
            ratings.append(time.perf_counter() - started - spent.seconds)
            influences.append(spent.seconds)
    rating = statistics.median(ratings)
    return {
        "real_rating_s": round(rating, 2),
        "keeping_share": round(keeping_ms / (1000 * rating), 4),
        "real_influence_s": round(statistics.median(influences), 2),
        "influence_calls": spent.calls,
    }


def main() -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--history", type=int, default=10, help="reviews on each side")
    parser.add_argument("--real", type=int, default=0, help="ratings by the real model, too")
    options = parser.parse_args()
    figures = kept_and_not(options.history, options.runs)
    if options.real:
        figures |= real(options.history, options.real, figures["keeping_ms"])
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
