"""Floors against values worked out by hand, and what they may not see."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from r4r_graph.errors import DataError
from r4r_graph.evaluation import FLOORS, Floors, HistoryStats, floor_predictions
from r4r_graph.evaluation import floors as module
from r4r_graph.reviews import TableReviewSource
from r4r_graph.schema import Review
from tests.four_ratings import EARLIER, TARGET, review


def predicted(
    targets: Iterable[Review], reviews: Iterable[Review], train: Iterable[Review]
) -> dict[str, Any]:
    source = TableReviewSource.from_reviews(reviews)
    found = floor_predictions(list(targets), source, list(train))
    return {name: values.tolist() for name, values in found.items()}


def test_floors_by_hand() -> None:
    found = predicted([TARGET], [*EARLIER, TARGET], EARLIER)
    assert tuple(found) == FLOORS
    assert found["global_mean"] == [3.0]
    assert found["global_median"] == [3.0]
    assert found["user_mean"] == [4.5]
    assert found["item_mean"] == [2.0]
    assert found["user_item_mean"] == [3.25]


def test_the_shrunk_bias_by_hand() -> None:
    """Ann's two ratings are 1.5 above the mean, the item's one is 1 below it."""
    source = TableReviewSource.from_reviews(EARLIER)
    floors = Floors(3.0, 3.0, 1.0, 5.0, user_shrinkage=1.0, item_shrinkage=3.0)
    found = floors.predict(HistoryStats.of([TARGET], source))
    assert found["shrunk_bias"] == pytest.approx([3.0 + 2 / 3 * 1.5 - 1 / 4 * 1.0])


def test_an_empty_history_falls_back_to_the_training_mean() -> None:
    """A guard: never nan."""
    cold = [review("new", "new", 1, 50), review("ann", "new", 1, 50), review("new", "x", 1, 50)]
    found = predicted(cold, EARLIER, EARLIER)
    assert found["user_mean"] == [3.0, 4.5, 3.0]
    assert found["item_mean"] == [3.0, 3.0, 3.0]
    assert found["user_item_mean"] == [3.0, 3.75, 3.0]
    assert found["shrunk_bias"][0] == 3.0
    assert all(math.isfinite(value) for values in found.values() for value in values)


def test_no_shrinkage_and_no_history_divide_nothing_by_nothing() -> None:
    source = TableReviewSource.from_reviews(EARLIER)
    floors = Floors(3.0, 3.0, 1.0, 5.0, user_shrinkage=0.0, item_shrinkage=0.0)
    found = floors.predict(HistoryStats.of([review("new", "new", 1, 50)], source))
    assert found["shrunk_bias"].tolist() == [3.0]


def test_nothing_from_the_targets_time_on_is_seen() -> None:
    later = [
        review("ann", "w", 1, TARGET.timestamp),
        review("cat", "z", 5, TARGET.timestamp),
        review("ann", "v", 1, 60),
        review("dan", "z", 5, 60),
    ]
    plain = predicted([TARGET], [*EARLIER, TARGET], EARLIER)
    assert predicted([TARGET], [*EARLIER, TARGET, *later], EARLIER) == plain


def test_this_users_other_reviews_of_this_item_are_not_seen() -> None:
    before = review("ann", "z", 1, 45)
    plain = predicted([TARGET], EARLIER, EARLIER)
    assert predicted([TARGET], [*EARLIER, before], EARLIER) == plain


def test_the_targets_own_rating_does_not_matter() -> None:
    other = replace(TARGET, rating=1.0)
    first = predicted([TARGET], [*EARLIER, TARGET], EARLIER)
    assert predicted([other], [*EARLIER, other], EARLIER) == first


def test_a_target_among_the_training_rows_is_refused() -> None:
    with pytest.raises(DataError, match=r"1 of the 2 targets are training rows.*of z by bob"):
        predicted([TARGET, EARLIER[3]], EARLIER, EARLIER)
    with pytest.raises(DataError, match="no training rows"):
        predicted([TARGET], EARLIER, [])


def test_no_targets() -> None:
    assert predicted([], EARLIER, EARLIER) == {name: [] for name in FLOORS}


# The shrinkages ----------------------------------------------------------------------------------


def world(
    user_spread: float, item_spread: float, noise: float, seed: int = 0
) -> tuple[TableReviewSource, list[Review], list[Review]]:
    """Reviews whose ratings are a user's plus an item's bias plus noise, in random order."""
    dice = np.random.default_rng(seed)
    users, items = dice.normal(0, user_spread, 40), dice.normal(0, item_spread, 40)
    pairs = dice.permutation(1600)[:1200]
    reviews = [
        Review(
            f"u{at // 40}",
            f"i{at % 40}",
            float(np.clip(3 + users[at // 40] + items[at % 40] + dice.normal(0, noise), 1, 5)),
            float(when),
        )
        for when, at in enumerate(pairs.tolist())
    ]
    return TableReviewSource.from_reviews(reviews), reviews[:900], reviews[900:]


def test_a_side_that_says_nothing_is_shrunk_away() -> None:
    source, train, _ = world(user_spread=0.0, item_spread=0.8, noise=0.6)
    fitted = Floors.fit(train, source)
    assert fitted.user_shrinkage == max(module.SHRINKAGES)
    assert fitted.item_shrinkage <= 5


def test_it_beats_the_other_floors_where_both_sides_speak() -> None:
    source, train, targets = world(user_spread=0.6, item_spread=0.6, noise=0.4)
    truths = np.array([target.rating for target in targets])
    found = floor_predictions(targets, source, train)
    wrong = {name: float(np.mean((points - truths) ** 2)) for name, points in found.items()}
    assert min(wrong, key=lambda name: wrong[name]) == "shrunk_bias"
    assert wrong["shrunk_bias"] < 0.85 * wrong["user_item_mean"]


def test_the_fit_never_sees_the_targets() -> None:
    """Other ratings on the rows to predict, and everything later, leave the fit as it is."""
    source, train, targets = world(0.6, 0.6, 0.4)
    changed = [replace(target, rating=6 - target.rating) for target in targets]
    other = TableReviewSource.from_reviews([*train, *changed])
    assert Floors.fit(train, source) == Floors.fit(train, other)


def test_nothing_off_the_training_ratings_is_predicted() -> None:
    source = TableReviewSource.from_reviews(EARLIER)
    floors = Floors(3.0, 3.0, 1.0, 3.5, user_shrinkage=0.0, item_shrinkage=100.0)
    found = floors.predict(HistoryStats.of([TARGET], source))
    assert found["shrunk_bias"].tolist() == [3.5]


def test_many_training_rows_are_sampled_the_same_way_each_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source, train, _ = world(0.6, 0.6, 0.4)
    whole = Floors.fit(train, source)
    monkeypatch.setattr(module, "FIT_ROWS", 200)
    some = Floors.fit(train, source)
    assert some == Floors.fit(train, source)
    assert (some.mean, some.median, some.low, some.high) == (
        whole.mean,
        whole.median,
        whole.low,
        whole.high,
    )
