"""The hardest floor: gradient boosting on statistics of the earlier ratings.

What a tree ensemble can make of numbers alone. Each row is described by what `HistoryStats` knows
of its two histories (counts, means, spreads), by the biases and their sum as `shrunk_bias` shrinks
them, and by the last ratings of either side. No text is read, nor anything else of the item: what
an expert gains over this, it has from words or from what its base model knew.

scikit-learn is an extra, and needed for nothing but this floor.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from r4r_graph.errors import MissingExtraError
from r4r_graph.evaluation.floors import Floors, HistoryStats, check_apart
from r4r_graph.evaluation.metrics import Floats
from r4r_graph.reviews.source import ReviewSource
from r4r_graph.schema import Review

BOOSTINGS = ("boosting_squared", "boosting_absolute")
"""Names of the two, in the order of `boosting_predictions`; the first aims at the RMSE, the second
at the MAE."""

FIT_ROWS = 50_000
"""Training rows that are fitted on at most, drawn by the seed."""

RECENT = 5
"""Last ratings of either side that are shown one by one, and as their mean."""

_LOSSES = ("squared_error", "absolute_error")
# Chosen on one dense and one sparse data set, on parts in time before the last tenth: more leaves
# and more rounds overfit the sparse one and did not help on the dense one; nor did longer `RECENT`.
_LEARNING_RATE = 0.05
_LEAVES = 8
_ROUNDS = 100


def boosting_predictions(
    targets: Sequence[Review], source: ReviewSource, train: Sequence[Review], *, seed: int = 0
) -> dict[str, Floats]:
    """Predictions of gradient boosting (scikit-learn's `HistGradientBoostingRegressor`) for the
    targets (n,), by the names in `BOOSTINGS`.

    Every row, of the targets as of the training rows, is described by its own earlier reviews: the
    rules of `HistoryStats`. An empty history is a missing value, which the trees know how to treat.
    The rounds are of a fixed number, so that no row is put aside, and one seed always gives one
    result. What is predicted lies within the training ratings.

    Args:
        targets: reviews to predict.
        source: holds their histories.
        train: reviews to fit on; of more than `FIT_ROWS` so many are drawn.
        seed: of that drawing.

    Raises:
        DataError: there are no training rows, or a target is one of them.
        MissingExtraError: scikit-learn is not installed.
    """
    try:
        from sklearn.ensemble import HistGradientBoostingRegressor
    except ImportError:
        raise MissingExtraError("the floor of gradient boosting", "evaluation") from None

    check_apart(targets, train)
    floors = Floors.fit(train, source)
    if not targets:
        return {name: np.zeros(0) for name in BOOSTINGS}
    some = list(train)
    if len(some) > FIT_ROWS:
        places = np.random.default_rng(seed).choice(len(some), FIT_ROWS, replace=False)
        some = [train[at] for at in places.tolist()]
    ratings = np.array([review.rating for review in some])
    known, asked = history_features(some, source, floors), history_features(targets, source, floors)
    told = np.isfinite(known).any(axis=0)  # scikit-learn's bins need one value in each column
    found = {}
    for name, loss in zip(BOOSTINGS, _LOSSES, strict=True):
        booster = HistGradientBoostingRegressor(
            loss=loss,
            learning_rate=_LEARNING_RATE,
            max_leaf_nodes=_LEAVES,
            max_iter=_ROUNDS,
            early_stopping=False,
            random_state=seed,
        ).fit(known[:, told], ratings)
        found[name] = np.clip(booster.predict(asked[:, told]), floors.low, floors.high)
    return found


def history_features(rows: Sequence[Review], source: ReviewSource, floors: Floors) -> Floats:
    """What is known of each row before it was written (n, 9 + 2 (`RECENT` + 1)); nan where a
    history is too short to say.

    Counts are logarithms (of one more). The last ratings stand latest first, after their mean.
    """
    histories = HistoryStats.of(rows, source)
    user, item = histories.user, histories.item
    user_bias = user.bias(floors.mean, floors.user_shrinkage)
    item_bias = item.bias(floors.mean, floors.item_shrinkage)
    by_user = _recent(
        source.user_history(row.user_id, row.timestamp, RECENT, without_item=row.item_id)
        for row in rows
    )
    of_item = _recent(
        source.item_history(row.item_id, row.timestamp, RECENT, without_user=row.user_id)
        for row in rows
    )
    columns = (
        np.log1p(user.count),
        np.log1p(item.count),
        user.mean,
        item.mean,
        user.spread,
        item.spread,
        user_bias,
        item_bias,
        user_bias + item_bias,
    )
    return np.column_stack([*columns, by_user, of_item])


def _recent(histories: Iterable[list[Review]]) -> Floats:
    """Mean and latest ratings of each history (n, 1 + `RECENT`)."""
    rows = []
    for history in histories:
        ratings = [review.rating for review in reversed(history)]
        mean = sum(ratings) / len(ratings) if ratings else np.nan
        rows.append([mean, *ratings, *[np.nan] * (RECENT - len(ratings))])
    return np.array(rows, dtype=np.float64).reshape(len(rows), 1 + RECENT)
