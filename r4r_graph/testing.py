"""For tests of programs that embed this library: no model, no network, milliseconds a test.

    pytest_plugins = ["r4r_graph.testing"]          # in your root conftest.py

    def test_my_agent(r4r_recommender):
        assert 1 <= r4r_recommender.rate("mara", "glass-harbour").rating <= 5

Fixtures: `r4r_reviews`, `r4r_engine`, `r4r_recommender`, `r4r_make_recommender`. Nothing is read or
written but the sample that comes with the package. The fake engine's answers are decided by the
prompts alone, so they are the same in every run and process, but they mean nothing: where a test
needs a certain rating or rationale, it says which.

(PYTEST_DONT_REWRITE: there are no assertions here, and whoever imports a name of this module before
pytest does would be warned.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from langgraph.store.memory import InMemoryStore

from r4r_graph.engine.aspects import format_aspects
from r4r_graph.engine.base import GenerateRequest, RateRequest
from r4r_graph.engine.batching import BatchingEngine
from r4r_graph.engine.fake import fake_engine
from r4r_graph.recommender import Recommender
from r4r_graph.reviews import TableReviewSource, load_items, load_reviews
from r4r_graph.schema import AspectSummary

SAMPLE_USER, SAMPLE_ITEM = "mara", "glass-harbour"
"""A pair of the sample that nobody has rated: both have earlier reviews."""

Rating = float | Sequence[float] | Callable[[RateRequest], Sequence[float]]
Rationale = str | Callable[[GenerateRequest], str]
Summary = AspectSummary | Callable[[GenerateRequest], AspectSummary]

MakeRecommender = Callable[..., Recommender]
"""Takes the arguments of `fake_recommender`."""


def sample_reviews() -> TableReviewSource:
    """The sample that comes with the package: invented albums, reviewed by invented people."""
    folder = Path(__file__).with_name("_demo")
    return load_reviews(folder / "reviews.jsonl", items=load_items(folder / "items.jsonl"))


def scripted_engine(
    *,
    rating: Rating | None = None,
    rationale: Rationale | None = None,
    summary: Summary | None = None,
    **settings: Any,
) -> BatchingEngine:
    """A fake engine that says what it is told to, each as a value or as a function of the request.

    Args:
        rating: the rating, which must be one of the scale's values; or weights, one a value.
        rationale: what the reasoner writes.
        summary: what the summarizer finds in every review.
        **settings: further ones of `fake_engine`.

    What is left out is invented, the same in every run.
    """
    if rating is not None:
        settings["rate"] = lambda request: _weights(rating, request)
    if rationale is None and summary is None:
        return fake_engine(**settings)

    def write(request: GenerateRequest) -> str:
        if request.format == "aspects":
            found = summary(request) if callable(summary) else summary
            return format_aspects(found or AspectSummary())
        text = rationale(request) if callable(rationale) else rationale
        return "They may like it." if text is None else text

    return fake_engine(write=write, **settings)


def fake_recommender(
    reviews: Any = None,
    *,
    rating: Rating | None = None,
    rationale: Rationale | None = None,
    summary: Summary | None = None,
    **settings: Any,
) -> Recommender:
    """A recommender without a model; close it when done.

    Args:
        reviews: as for `Recommender.load`; default is the sample.
        rating: see `scripted_engine`; so for the next two.
        rationale: see there.
        summary: see there.
        **settings: further ones of `Recommender.load`, such as `items` or `checkpointer`.

    Summaries are kept in memory unless a `store` is given.
    """
    settings.setdefault("store", InMemoryStore())
    if "engine" not in settings:
        settings["engine"] = scripted_engine(rating=rating, rationale=rationale, summary=summary)
    return Recommender.load(sample_reviews() if reviews is None else reviews, **settings)


def _weights(rating: Rating, request: RateRequest) -> Sequence[float]:
    if callable(rating):
        return rating(request)
    if isinstance(rating, int | float):
        weights = [float(value == rating) for value in request.scale.values]
        if not any(weights):
            raise ValueError(f"rating {rating:g} is none of {', '.join(request.scale.labels)}")
        return weights
    return rating


# Fixtures ----------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def r4r_reviews() -> TableReviewSource:
    """The sample's reviews; they cannot be changed."""
    return sample_reviews()


@pytest.fixture
def r4r_engine() -> Iterator[BatchingEngine]:
    """A fake engine."""
    with fake_engine() as engine:
        yield engine


@pytest.fixture
def r4r_recommender(r4r_reviews: TableReviewSource, r4r_engine: BatchingEngine) -> Recommender:
    """A recommender over the fixtures `r4r_reviews` and `r4r_engine`: define one of these in your
    conftest.py, and this one follows."""
    return Recommender.load(r4r_reviews, engine=r4r_engine, store=InMemoryStore())


@pytest.fixture
def r4r_make_recommender(r4r_reviews: TableReviewSource) -> Iterator[MakeRecommender]:
    """Makes recommenders (arguments of `fake_recommender`), and closes them afterwards."""
    made: list[Recommender] = []

    def make(reviews: Any = None, **settings: Any) -> Recommender:
        made.append(fake_recommender(r4r_reviews if reviews is None else reviews, **settings))
        return made[-1]

    yield make
    for recommender in made:
        recommender.close()
