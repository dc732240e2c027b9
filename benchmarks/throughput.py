"""Ratings per second with summaries cached: batched through the graph against one row at a time.

Both ways use the same model, prompts, graph and cached summaries. One at a time, every forward
pass holds one row; batched, `--concurrency` runs are in flight and the micro-batcher joins their
rationales and ratings.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import time
from importlib.resources import files
from pathlib import Path

from r4r_graph import Recommendation, Recommender, TableReviewSource

Pair = tuple[str, str]


def some_pairs(source: TableReviewSource, count: int) -> list[Pair]:
    """Pairs that nobody has rated yet, spread over users and items."""
    rated = {(review.user_id, review.item_id) for review in source}
    users, items = sorted(source.user_ids()), sorted(source.item_ids())
    diagonal = (
        (users[(i + shift) % len(users)], item)
        for shift in range(len(users))
        for i, item in enumerate(items)
    )
    return list(itertools.islice((pair for pair in diagonal if pair not in rated), count))


async def batched(
    recommender: Recommender, pairs: list[Pair], concurrency: int
) -> list[Recommendation]:
    """All pairs, `concurrency` at a time."""
    gate = asyncio.Semaphore(concurrency)

    async def one(pair: Pair) -> Recommendation:
        async with gate:
            return await recommender.arate(*pair)

    return await asyncio.gather(*map(one, pairs))


def main() -> None:
    """Measure and print one JSON object."""
    sample = files("r4r_graph") / "_demo"
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--reviews", type=Path, default=Path(str(sample / "reviews.jsonl")))
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--adapters", default=None)
    options = parser.parse_args()
    with Recommender.load(options.reviews, base=options.base, adapters=options.adapters) as r4r:
        assert isinstance(r4r.reviews, TableReviewSource)
        pairs = some_pairs(r4r.reviews, options.pairs)
        asyncio.run(batched(r4r, pairs, options.concurrency))  # fills the summary cache

        started = time.perf_counter()
        alone = [r4r.rate(*pair) for pair in pairs]
        seconds_alone = time.perf_counter() - started

        started = time.perf_counter()
        together = asyncio.run(batched(r4r, pairs, options.concurrency))
        seconds_together = time.perf_counter() - started

    tokens = sum(
        usage.prompt_tokens + usage.completion_tokens
        for result in together
        for usage in result.usage.values()
    )
    apart = [
        abs(a.distribution.mean - b.distribution.mean) for a, b in zip(alone, together, strict=True)
    ]
    figures = {
        "pairs": len(pairs),
        "concurrency": options.concurrency,
        "device": alone[0].model["device"],
        "one_at_a_time_per_s": round(len(pairs) / seconds_alone, 3),
        "batched_per_s": round(len(pairs) / seconds_together, 3),
        "ratio": round(seconds_alone / seconds_together, 2),
        "tokens_per_rating": round(tokens / len(pairs)),
        "summaries_made": sum(r.usage["summarizer"].calls for r in (*alone, *together)),
        "same_rationale": sum(
            a.rationale == b.rationale for a, b in zip(alone, together, strict=True)
        ),
        "largest_difference_of_means": round(max(apart), 6),
    }
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
