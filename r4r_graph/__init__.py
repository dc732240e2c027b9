"""Deliberative recommendation: reviews in, a reasoned rating distribution out.

`Recommender.load(reviews=...)` is where most people start; `build_graph` is the LangGraph below
it. Importing this package loads no model library.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from r4r_graph.configuration import Configuration, load_configured
    from r4r_graph.engine import Engine, fake_engine, load_local_engine
    from r4r_graph.errors import R4RError, RunTimeoutError
    from r4r_graph.evidence import TokenBudgets
    from r4r_graph.experts import Experts
    from r4r_graph.graph import Knobs, build_graph, build_ranking_graph
    from r4r_graph.ranking import CandidateProgress, Ranking, popular_items
    from r4r_graph.ratings import RatingDistribution, RatingScale
    from r4r_graph.recommender import Question, RationaleToken, Recommender, SummaryProgress
    from r4r_graph.reviews import (
        ReviewSource,
        TableReviewSource,
        load_items,
        load_reviews,
        open_reviews,
    )
    from r4r_graph.reviews.sql import SqlReviewSource
    from r4r_graph.runs import list_runs, open_runs
    from r4r_graph.schema import AspectSummary, Item, Recommendation, Review

_HOMES = {
    "AspectSummary": "schema",
    "CandidateProgress": "ranking",
    "Configuration": "configuration",
    "Engine": "engine",
    "Experts": "experts",
    "Item": "schema",
    "Knobs": "graph",
    "Question": "recommender",
    "R4RError": "errors",
    "Ranking": "ranking",
    "RatingDistribution": "ratings",
    "RatingScale": "ratings",
    "RationaleToken": "recommender",
    "Recommendation": "schema",
    "Recommender": "recommender",
    "Review": "schema",
    "ReviewSource": "reviews",
    "RunTimeoutError": "errors",
    "SqlReviewSource": "reviews.sql",
    "SummaryProgress": "recommender",
    "TableReviewSource": "reviews",
    "TokenBudgets": "evidence",
    "build_graph": "graph",
    "build_ranking_graph": "graph",
    "fake_engine": "engine",
    "list_runs": "runs",
    "load_configured": "configuration",
    "load_items": "reviews",
    "load_local_engine": "engine",
    "load_reviews": "reviews",
    "open_reviews": "reviews",
    "open_runs": "runs",
    "popular_items": "ranking",
}

__all__ = [
    "AspectSummary",
    "CandidateProgress",
    "Configuration",
    "Engine",
    "Experts",
    "Item",
    "Knobs",
    "Question",
    "R4RError",
    "Ranking",
    "RatingDistribution",
    "RatingScale",
    "RationaleToken",
    "Recommendation",
    "Recommender",
    "Review",
    "ReviewSource",
    "RunTimeoutError",
    "SqlReviewSource",
    "SummaryProgress",
    "TableReviewSource",
    "TokenBudgets",
    "build_graph",
    "build_ranking_graph",
    "fake_engine",
    "list_runs",
    "load_configured",
    "load_items",
    "load_local_engine",
    "load_reviews",
    "open_reviews",
    "open_runs",
    "popular_items",
]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"r4r_graph.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
