"""Where earlier reviews come from: sources that answer strictly before a time, and files."""

from r4r_graph.reviews.loading import load_items, load_pairs, load_reviews, open_reviews
from r4r_graph.reviews.source import ListedReviews, ReviewSource
from r4r_graph.reviews.table import TableReviewSource

__all__ = [
    "ListedReviews",
    "ReviewSource",
    "TableReviewSource",
    "load_items",
    "load_pairs",
    "load_reviews",
    "open_reviews",
]
