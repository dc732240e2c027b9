"""Candidates of one user, with contexts read once and with every prompt read from its beginning.

Both ways use the same model, adapters, prompts, graph and cached summaries, and rate all candidates
at once. What candidates of one user share is the system's turn and the user's side; where reasoner
and predictor are activated LoRA they share each candidate's whole context on top.
"""

from __future__ import annotations

import argparse
import json
import time
from importlib.resources import files
from pathlib import Path
from typing import Any

from langgraph.store.memory import InMemoryStore

from r4r_graph import Recommendation, Recommender, TableReviewSource, popular_items
from r4r_graph.engine.contexts import CONTEXT_CACHE_MB
from r4r_graph.engine.local import load_local_engine


def busiest_user(source: TableReviewSource) -> str:
    """The user with most reviews, the first by id among equals."""
    counted = {user: source.user_stats(user, float("inf")).count for user in source.user_ids()}
    return max(sorted(counted), key=counted.__getitem__)


def main() -> None:
    """Measure and print one JSON object."""
    sample = Path(str(files("r4r_graph") / "_demo"))
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--reviews", type=Path, default=sample / "reviews.jsonl")
    parser.add_argument("--items", type=Path, default=sample / "items.jsonl")
    parser.add_argument("--user")
    parser.add_argument("--candidates", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--adapters", default=None)
    parser.add_argument("--dtype", default=None)
    options = parser.parse_args()
    store = InMemoryStore()  # both ways find the summaries there
    seconds: dict[str, float] = {}
    results: dict[str, dict[str, Recommendation]] = {}
    reused = 0
    for name, megabytes in (("apart", 0), ("shared", CONTEXT_CACHE_MB)):
        engine, _ = load_local_engine(
            options.base,
            options.adapters,
            dtype=options.dtype,
            context_cache_mb=megabytes,
            allow_prompt_mismatch=True,
        )
        with Recommender.load(
            options.reviews, options.items, engine=engine, store=store
        ) as recommender:
            source: Any = recommender.reviews
            user = options.user or busiest_user(source)
            items = popular_items(source, user, options.candidates)
            recommender.rank(user, items)  # summaries are made, and what warms up is warm
            seconds[name] = float("inf")
            backend: Any = engine._backend
            for _ in range(options.rounds):
                if backend.contexts is not None:
                    backend.contexts.clear()
                    reused = backend.contexts.reused_tokens
                started = time.perf_counter()
                ranking = recommender.rank(user, items, top_k=None)
                seconds[name] = min(seconds[name], time.perf_counter() - started)
                results[name] = {best.item_id: best for best in ranking}
            if backend.contexts is not None:
                reused = backend.contexts.reused_tokens - reused
    pairs = [(one, results["shared"][item]) for item, one in results["apart"].items()]
    figures = {
        "candidates": len(pairs),
        "device": pairs[0][0].model["device"],
        "dtype": pairs[0][0].model["dtype"],
        "prompt_tokens": sum(
            usage.prompt_tokens for _, result in pairs for usage in result.usage.values()
        ),
        "tokens_not_read_again": reused,
        "apart_s": round(seconds["apart"], 2),
        "shared_s": round(seconds["shared"], 2),
        "ratio": round(seconds["apart"] / seconds["shared"], 2),
        "same_rationale": sum(a.rationale == b.rationale for a, b in pairs),
        "largest_difference_of_means": round(
            max(abs(a.distribution.mean - b.distribution.mean) for a, b in pairs), 6
        ),
    }
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
