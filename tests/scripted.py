"""Hand-made reviews, and a rating graph over a scripted engine that remembers what it was asked."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from langgraph.store.base import BaseStore
from langgraph.store.memory import InMemoryStore

from r4r_graph.engine.aspects import format_aspects
from r4r_graph.engine.base import GenerateRequest, RateRequest
from r4r_graph.engine.batching import BatchingEngine
from r4r_graph.experts import Experts
from r4r_graph.graph import RatingGraph, build_graph
from r4r_graph.reviews import ReviewSource, TableReviewSource
from r4r_graph.schema import AspectSummary, Item, Review

Request = GenerateRequest | RateRequest


def at(day: float) -> float:
    """Unix seconds of a day; day 0 begins at 2020-09-13T12:26:40Z."""
    return 1_600_000_000 + 86_400 * day


def mark(user: str, item: str) -> str:
    """A word by which a review can be traced through summaries and prompts."""
    return f"mark_{user}_{item}"


def review(
    user: str,
    item: str,
    day: float,
    rating: float = 4,
    text: str | None = None,
    title: str | None = None,
) -> Review:
    """A review whose text holds its mark."""
    words = f"So much {mark(user, item)} in it." if text is None else text
    return Review(user, item, rating, at(day), item.title() if title is None else title, words)


def prompt(request: Request) -> str:
    """All turns of a prompt."""
    return "\n".join(message.content for message in request.messages)


@dataclass
class Script:
    """What a fake engine answers, and what it was asked."""

    rationale: Callable[[GenerateRequest], str] = lambda request: f"Reason {request.seed}."
    weights: Callable[[RateRequest], Sequence[float]] = lambda request: [
        1.0 for _ in request.scale.values
    ]
    before: Callable[[Request], None] = lambda _: None
    """Called first; may raise."""
    asked: list[Request] = field(default_factory=list)

    def write(self, request: GenerateRequest) -> str:
        """A summary that praises the marks in a review, or a rationale."""
        self.asked.append(request)
        self.before(request)
        if request.format == "text":
            return self.rationale(request)
        marks = re.findall(r"mark_\w+", request.messages[1].content)
        return format_aspects(AspectSummary(positive=tuple(marks)))

    def rate(self, request: RateRequest) -> Sequence[float]:
        """A distribution."""
        self.asked.append(request)
        self.before(request)
        return self.weights(request)

    @property
    def summaries(self) -> list[GenerateRequest]:
        """The summarizer's requests, in the order in which they were computed."""
        made = (r for r in self.asked if isinstance(r, GenerateRequest))
        return [request for request in made if request.format == "aspects"]

    @property
    def rationales(self) -> list[GenerateRequest]:
        """The reasoner's requests."""
        made = (r for r in self.asked if isinstance(r, GenerateRequest))
        return [request for request in made if request.format == "text"]

    @property
    def ratings(self) -> list[RateRequest]:
        """The predictor's requests."""
        return [r for r in self.asked if isinstance(r, RateRequest)]


@dataclass
class Bench:
    """A graph, and the script behind it."""

    script: Script
    engine: BatchingEngine
    experts: Experts
    graph: RatingGraph

    def run(self, user: str, item: str, as_of: Any = None, **context: Any) -> dict[str, Any]:
        """The state after a run."""
        given: Any = {"user_id": user, "item_id": item, "as_of": as_of}
        return self.graph.invoke(given, context=context)  # type: ignore[arg-type]

    def rate(self, user: str, item: str, as_of: Any = None, **context: Any) -> dict[str, Any]:
        """The recommendation of a run."""
        found: dict[str, Any] = self.run(user, item, as_of, **context)["recommendation"]
        return found


def make_bench(
    fake: Callable[..., BatchingEngine],
    reviews: Iterable[Review] | ReviewSource | None = None,
    *,
    items: Iterable[Item] = (),
    script: Script | None = None,
    store: BaseStore | None = None,
    checkpointer: Any = None,
    delay: float = 0.0,
    adapters: Sequence[str] = (),
    **experts: Any,
) -> Bench:
    """A rating graph over a scripted engine; `fake` is the fixture that closes it afterwards."""
    script = script or Script()
    engine = fake(write=script.write, rate=script.rate, delay=delay, adapters=adapters)
    if reviews is not None and not isinstance(reviews, ReviewSource):
        reviews = TableReviewSource.from_reviews(reviews, items)
    store = InMemoryStore() if store is None else store
    parts = Experts(engine, store, **experts)
    return Bench(script, engine, parts, build_graph(parts, reviews, checkpointer=checkpointer))
