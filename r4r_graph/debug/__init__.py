"""Looking at graphs and runs."""

from r4r_graph.debug.drawing import FORMATS, draw

__all__ = ["FORMATS", "draw"]
