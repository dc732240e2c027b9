"""Reviews that can each be traced, and a scripted engine that remembers what it was asked.

Every review has a word and a rating of its own (a fraction with two digits), so a prompt tells
which reviews went into it. Some share a day, and one user reviews an item twice.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from finetune.domains import review_source
from finetune.settings import Recipe, parse_recipe
from finetune.splits import make_splits
from finetune.summaries import make_summaries
from r4r_graph.engine.aspects import format_aspects
from r4r_graph.engine.base import GenerateRequest, RateRequest
from r4r_graph.engine.batching import BatchingEngine
from r4r_graph.schema import AspectSummary, Review
from tests.scripted import at, prompt

HELPFUL = "The quiet songs that they keep praising are all here, so it will suit them well."
USELESS = "The sleeve shows a house beside a river, and the river runs down towards the sea."
HINT = "turned out to rate the candidate"


def canary_reviews() -> list[dict[str, Any]]:
    """Five users and six items; ratings from 2.61 to 3.23, words `canaryNwords`."""
    pairs = [(user, item) for day in range(6) for user in range(5) for item in [(user + day) % 6]]
    pairs += [(0, 0), (2, 2)]  # a second review of the same item
    return [
        {
            "user_id": f"u{user}",
            "item_id": f"i{item}",
            "title": f"Album {'abcdef'[item]}",
            "rating": round(2.61 + n * 0.02, 2),
            "timestamp": at(n // 2),  # two a day
            "review": f"So much canary{n}words in it.",
        }
        for n, (user, item) in enumerate(pairs)
    ]


def canaries(text: str) -> set[str]:
    """The traceable words in a text."""
    return set(re.findall(r"canary\d+words", text))


def ratings(text: str) -> list[str]:
    """The numbers with two digits behind the point in a text."""
    return re.findall(r"\d\.\d\d", text)


def allowed(target: Review, reviews: Sequence[Review]) -> list[Review]:
    """What may be known of a target: strictly earlier, on either side, not of this very pair."""
    return [
        review
        for review in reviews
        if review.timestamp < target.timestamp
        and (review.user_id == target.user_id) != (review.item_id == target.item_id)
    ]


@dataclass
class Desk:
    """A recipe over the canaries, splits and summaries made, and the engine that was scripted."""

    recipe: Recipe
    engine: BatchingEngine
    asked: list[GenerateRequest | RateRequest] = field(default_factory=list)

    @property
    def written(self) -> list[GenerateRequest]:
        """Requests for rationales, in order."""
        made = (request for request in self.asked if isinstance(request, GenerateRequest))
        return [request for request in made if request.format == "text"]

    @property
    def rated(self) -> list[RateRequest]:
        """Requests for ratings, in order."""
        return [request for request in self.asked if isinstance(request, RateRequest)]

    @property
    def reviews(self) -> list[Review]:
        """All reviews of the recipe."""
        return list(review_source(self.recipe))


def make_desk(
    folder: Path,
    fake: Callable[..., BatchingEngine],
    *,
    write: Callable[[GenerateRequest], str] = lambda _: HELPFUL,
    rate: Callable[[RateRequest], Sequence[float]] | None = None,
    summarized: bool = True,
    **sections: Any,
) -> Desk:
    """Splits and summaries of the canaries; `fake` is the fixture that closes the engine.

    Unless told otherwise the judge says 4 where it reads `HELPFUL` words, and 1 otherwise: every
    true rating is nearer to 4.
    """
    folder.mkdir(exist_ok=True)
    file = folder / "reviews.parquet"
    pq.write_table(pa.Table.from_pylist(canary_reviews()), file)
    tree = {
        "reviews": str(file),
        "work": str(folder / "work"),
        "splits": {"train": 0.7, "validation": 0.15, "reward_rows": 6, "instruction_rows": 12},
        "rejection": {"concurrency": 1, "tau": 0.0, "hinted_draws": 4},
        **{key: value for key, value in sections.items() if key != "rejection"},
    }
    tree["rejection"] = {**tree["rejection"], **sections.get("rejection", {})}  # type: ignore[dict-item]
    desk: list[Desk] = []

    def wrote(request: GenerateRequest) -> str:
        desk[0].asked.append(request)
        if request.format == "aspects":
            found = sorted(canaries(prompt(request)))
            return format_aspects(AspectSummary(positive=tuple(found)))
        return write(request)

    def gave(request: RateRequest) -> Sequence[float]:
        desk[0].asked.append(request)
        if rate is not None:
            return rate(request)
        return (0, 0, 0, 1, 0) if "keep praising" in prompt(request) else (1, 0, 0, 0, 0)

    engine = fake(write=wrote, rate=gave, adapters=("summarizer", "reasoner", "predictor"))
    desk.append(Desk(parse_recipe(tree), engine))
    make_splits(desk[0].recipe)
    if summarized:
        make_summaries(desk[0].recipe, engine)
        desk[0].asked.clear()
    return desk[0]
