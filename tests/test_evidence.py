"""What the averages alone suggest, by hand and against the floor that it is."""

from __future__ import annotations

import numpy as np
import pytest

from r4r_graph.evaluation.floors import Floors, HistoryStats
from r4r_graph.evidence import SHRINKAGE, Evidence
from r4r_graph.ratings import RatingStats
from r4r_graph.reviews import TableReviewSource
from r4r_graph.schema import Item, Review
from tests.tiny_reviews import make_reviews


def evidence(user: RatingStats, item: RatingStats, overall: float | None) -> Evidence:
    return Evidence(Item("x"), (), (), user, item, overall)


def test_by_hand() -> None:
    five, fifteen = RatingStats(5, 4.0, 0.0), RatingStats(15, 2.0, 0.0)
    assert evidence(five, fifteen, 3.0).expected == pytest.approx(3.0 + 0.5 - 0.75)
    assert evidence(RatingStats(), fifteen, 3.0).expected == pytest.approx(2.25)
    assert evidence(RatingStats(), RatingStats(), 3.0).expected == 3.0
    assert evidence(five, fifteen, None).expected is None


def test_it_travels() -> None:
    for overall in (None, 3.5):
        whole = evidence(RatingStats(2, 4.5, 0.5), RatingStats(), overall)
        assert Evidence.from_dict(whole.to_dict()) == whole
        assert whole.without_texts().expected == whole.expected


def test_it_is_the_floor_of_shrunk_biases() -> None:
    reviews = [Review.from_dict(row) for row in make_reviews()]
    source = TableReviewSource.from_reviews(reviews)
    when = max(review.timestamp for review in reviews) + 1
    targets = [Review(f"u{n}", f"i{n}", 3.0, when) for n in range(8)]
    histories = HistoryStats.of(targets, source)
    overall = source.overall_stats(when).mean
    assert overall is not None
    floors = Floors(overall, overall, -99.0, 99.0, SHRINKAGE, SHRINKAGE)
    found = [
        evidence(
            source.user_stats(t.user_id, when, without_item=t.item_id),
            source.item_stats(t.item_id, when, without_user=t.user_id),
            overall,
        ).expected
        for t in targets
    ]
    np.testing.assert_allclose(found, floors.predict(histories)["shrunk_bias"])
