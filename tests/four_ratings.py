"""Four ratings by two users, and a fifth one to predict."""

from __future__ import annotations

from r4r_graph.schema import Review


def review(user: str, item: str, rating: float, when: float) -> Review:
    return Review(user, item, rating, when)


EARLIER = [
    review("ann", "x", 5, 10),
    review("ann", "y", 4, 20),
    review("bob", "x", 1, 30),
    review("bob", "z", 2, 40),
]
TARGET = review("ann", "z", 3, 50)
