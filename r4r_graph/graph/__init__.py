"""The LangGraph state machine: reviews in, a rating distribution with its reason out."""

from r4r_graph.graph.build import RatingGraph, build_graph
from r4r_graph.graph.rank import RankingGraph, RankingInput, build_ranking_graph
from r4r_graph.graph.state import Knobs, RatingInput, RatingState

__all__ = [
    "Knobs",
    "RankingGraph",
    "RankingInput",
    "RatingGraph",
    "RatingInput",
    "RatingState",
    "build_graph",
    "build_ranking_graph",
]
