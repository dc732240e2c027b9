"""The floor of gradient boosting: what it sees, what it must not see, and that it learns."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from r4r_graph.errors import DataError, MissingExtraError
from r4r_graph.evaluation import Floors, floor_predictions
from r4r_graph.evaluation import boosting as module
from r4r_graph.evaluation.boosting import BOOSTINGS, boosting_predictions, history_features
from r4r_graph.reviews import TableReviewSource
from r4r_graph.schema import Review
from tests.four_ratings import EARLIER, TARGET, review

FLOORS = Floors(3.0, 3.0, 1.0, 5.0, user_shrinkage=1.0, item_shrinkage=3.0)


def world(seed: int = 0, rows: int = 1500) -> tuple[list[Review], list[Review]]:
    """Reviews to fit on and to predict. Items differ, and users of even number turn it round: what
    counts is how the two go together, which no sum of biases can say."""
    dice = np.random.default_rng(seed)
    pairs = dice.permutation(40 * 60)[:rows]
    reviews = []
    for when, at in enumerate(pairs.tolist()):
        user, item = at // 60, at % 60
        level = 5.0 if item % 4 == 0 else 3.0
        if user % 2:
            level = 3.0 if item % 4 == 0 else 1.5
        rating = np.clip(level + dice.normal(0, 0.4), 1, 5)
        reviews.append(review(f"u{user}", f"i{item}", float(rating), float(when)))
    return reviews[: rows * 4 // 5], reviews[rows * 4 // 5 :]


def predicted(targets: list[Review], reviews: list[Review], train: list[Review]) -> Any:
    found = boosting_predictions(targets, TableReviewSource.from_reviews(reviews), train)
    return {name: values.tolist() for name, values in found.items()}


def squared_error(points: Any, targets: list[Review]) -> float:
    return float(np.mean((np.array(points) - [target.rating for target in targets]) ** 2))


# What it sees ------------------------------------------------------------------------------------


def test_features_by_hand() -> None:
    """Ann's two ratings are 1.5 above the mean, the item's one is 1 below it; the rest is empty."""
    source = TableReviewSource.from_reviews([*EARLIER, TARGET])
    [row] = history_features([TARGET], source, FLOORS).tolist()
    user_bias, item_bias = 2 / 3 * 1.5, -1 / 4
    assert row[:4] == pytest.approx([math.log(3), math.log(2), 4.5, 2.0])
    assert row[4:9] == pytest.approx([0.5, 0, user_bias, item_bias, user_bias + item_bias])
    nan = math.nan
    assert row[9:] == pytest.approx(
        [4.5, 4, 5, nan, nan, nan, 2, 2, nan, nan, nan, nan], nan_ok=True
    )


def test_the_latest_ratings_come_first() -> None:
    ratings = [1, 2, 3, 4, 5, 1, 2]
    known = [review("ann", f"i{at}", rating, at) for at, rating in enumerate(ratings)]
    source = TableReviewSource.from_reviews(known)
    [row] = history_features([review("ann", "new", 3, 99)], source, FLOORS).tolist()
    assert row[9:15] == [3.0, 2, 1, 5, 4, 3]


def test_an_empty_history_is_missing() -> None:
    source = TableReviewSource.from_reviews(EARLIER)
    features = history_features([review("new", "new", 3, 50)], source, FLOORS)
    assert features.shape == (1, 9 + 2 * (module.RECENT + 1))
    known = np.flatnonzero(np.isfinite(features[0])).tolist()
    assert known == [0, 1, 6, 7, 8]
    assert not features[0, known].any()
    assert history_features([], source, FLOORS).shape == (0, 21)


def test_nothing_is_seen_that_must_not_be() -> None:
    """From the target's time on, this user's other reviews of this item, its own rating."""
    train, targets = world(rows=400)
    one = targets[40]
    hidden = [
        review(one.user_id, "later", 1, one.timestamp),
        review("later", one.item_id, 5, one.timestamp),
        review("later", one.item_id, 5, one.timestamp + 1),
        review(one.user_id, one.item_id, 1, one.timestamp - 0.5),
    ]
    plain = predicted([one], [*train, *targets], train)
    assert predicted([one], [*train, *targets, *hidden], train) == plain
    other = replace(one, rating=1.0)
    changed = [other if target is one else target for target in targets]
    assert predicted([other], [*train, *changed], train) == plain


def test_a_fit_never_sees_the_targets() -> None:
    train, targets = world(rows=400)
    changed = [replace(target, rating=6 - target.rating) for target in targets[1:]]
    plain = predicted(targets[:1], [*train, *targets], train)
    assert predicted(targets[:1], [*train, targets[0], *changed], train) == plain


# What it predicts --------------------------------------------------------------------------------


def test_it_beats_the_other_floors_where_sides_go_together() -> None:
    train, targets = world()
    source = TableReviewSource.from_reviews([*train, *targets])
    found = boosting_predictions(targets, source, train)
    assert tuple(found) == BOOSTINGS
    shrunk = squared_error(floor_predictions(targets, source, train)["shrunk_bias"], targets)
    assert squared_error(found["boosting_squared"], targets) < 0.8 * shrunk


def test_each_loss_aims_at_its_own_middle() -> None:
    """Two of three ratings are 5 and one is 1, and nothing tells which: the mean or the median."""
    dice = np.random.default_rng(0)
    ratings = np.where(dice.random(900) < 2 / 3, 5.0, 1.0).tolist()
    rows = [review(f"u{at}", f"i{at}", rating, at) for at, rating in enumerate(ratings)]
    found = predicted(rows[800:], rows, rows[:800])
    mean = sum(ratings[:800]) / 800
    assert found["boosting_squared"] == pytest.approx([mean] * 100)
    assert found["boosting_absolute"] == pytest.approx([5.0] * 100)


def test_nothing_off_the_training_ratings_is_predicted(monkeypatch: pytest.MonkeyPatch) -> None:
    """With so long a step every tree overshoots."""
    monkeypatch.setattr(module, "_LEARNING_RATE", 1.9)
    train, targets = world()
    found = predicted(targets, [*train, *targets], train)
    low, high = (pick(r.rating for r in train) for pick in (min, max))
    for points in found.values():
        assert low <= min(points) <= max(points) <= high
    assert {low, high} & {*found["boosting_squared"]}


def test_a_handful_of_training_rows_and_cold_targets() -> None:
    cold = [review("new", "new", 1, 50), TARGET]
    found = predicted(cold, EARLIER, EARLIER)
    assert all(math.isfinite(value) for points in found.values() for value in points)
    assert predicted([], EARLIER, EARLIER) == {name: [] for name in BOOSTINGS}
    [one] = predicted([TARGET], EARLIER, EARLIER[:1])["boosting_squared"]
    assert one == 5


def test_many_training_rows_are_drawn_by_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    train, targets = world()
    source = TableReviewSource.from_reviews([*train, *targets])

    def points(seed: int) -> Any:
        return boosting_predictions(targets, source, train, seed=seed)["boosting_squared"].tolist()

    assert points(0) == points(0) == points(1)
    monkeypatch.setattr(module, "FIT_ROWS", 300)
    assert points(0) == points(0) != points(1)


# What it refuses ---------------------------------------------------------------------------------


def test_a_target_among_the_training_rows_is_refused() -> None:
    with pytest.raises(DataError, match=r"1 of the 2 targets are training rows.*of z by bob"):
        predicted([TARGET, EARLIER[3]], EARLIER, EARLIER)
    with pytest.raises(DataError, match="no training rows"):
        predicted([TARGET], EARLIER, [])


def test_scikit_learn_is_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.ensemble", None)
    with pytest.raises(MissingExtraError, match=r"gradient boosting.*r4r-graph\[evaluation\]"):
        predicted([TARGET], EARLIER, EARLIER)
