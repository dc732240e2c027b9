"""The LangGraph state machine: reviews in, a rating distribution with its reason out."""

from r4r_graph.graph.build import RatingGraph, build_graph
from r4r_graph.graph.state import Knobs, RatingInput, RatingState

__all__ = ["Knobs", "RatingGraph", "RatingInput", "RatingState", "build_graph"]
