"""Looking at graphs and runs."""

from r4r_graph.debug.diff import compare, write_diff
from r4r_graph.debug.drawing import FORMATS, draw
from r4r_graph.debug.report import write_report
from r4r_graph.debug.trace import RunTrace

__all__ = ["FORMATS", "RunTrace", "compare", "draw", "write_diff", "write_report"]
