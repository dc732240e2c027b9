"""Where reviews come from: the protocol, the Arrow table behind it, and the file loaders."""

from r4r_graph.reviews.loading import load_items, load_reviews
from r4r_graph.reviews.source import ReviewSource
from r4r_graph.reviews.table import TableReviewSource

__all__ = ["ReviewSource", "TableReviewSource", "load_items", "load_reviews"]
