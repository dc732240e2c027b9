"""Floors: what simple arithmetic on the ratings of earlier reviews predicts.

An expert that does not beat them has learned nothing that was worth a language model. Each target
is predicted from what it may be predicted from by the rating graph: ratings strictly earlier, and
none by this user of this item. Whatever is fitted is fitted on training rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from r4r_graph.errors import DataError
from r4r_graph.evaluation.metrics import Floats
from r4r_graph.ratings import RatingStats
from r4r_graph.reviews.source import ReviewSource
from r4r_graph.schema import Review

FLOORS = (
    "global_mean",
    "global_median",
    "user_mean",
    "item_mean",
    "user_item_mean",
    "shrunk_bias",
)
"""Names of the floors, in the order of `floor_predictions`."""

SHRINKAGES = (0.0, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0)
"""What is tried for either side of `shrunk_bias`, in ratings."""

FIT_ROWS = 20_000
"""Training rows that the shrinkages are chosen on at most, drawn with a fixed seed."""


@dataclass(frozen=True, slots=True)
class SideStats:
    """What is known of one side of each target; all arrays (n,)."""

    count: Floats
    """Earlier ratings."""
    mean: Floats
    """nan without earlier ratings."""
    spread: Floats
    """Population standard deviation; nan without earlier ratings."""

    @classmethod
    def of(cls, stats: Sequence[RatingStats]) -> Self:
        """The columns of some statistics."""
        columns = [(s.count, s.mean, s.spread) for s in stats]
        return cls(*np.array(columns, dtype=np.float64).reshape(len(columns), 3).T)

    def mean_or(self, fallback: float) -> Floats:
        """The mean; where there is none, the fallback."""
        return np.where(self.count > 0, self.mean, fallback)

    def bias(self, centre: float, shrinkage: float) -> Floats:
        """The mean's distance from the centre, drawn towards 0 as if `shrinkage` more ratings
        stood there; 0 without earlier ratings."""
        weight = self.count / np.where(self.count > 0, self.count + shrinkage, 1.0)
        return weight * (self.mean_or(centre) - centre)


@dataclass(frozen=True, slots=True)
class HistoryStats:
    """Rating statistics of both histories of each target, as they stood then."""

    user: SideStats
    item: SideStats

    @classmethod
    def of(cls, targets: Sequence[Review], source: ReviewSource) -> Self:
        """Statistics strictly before each target, without this user's reviews of this item."""
        return cls(
            SideStats.of(
                [source.user_stats(t.user_id, t.timestamp, without_item=t.item_id) for t in targets]
            ),
            SideStats.of(
                [source.item_stats(t.item_id, t.timestamp, without_user=t.user_id) for t in targets]
            ),
        )


@dataclass(frozen=True, slots=True)
class Floors:
    """The fitted floors."""

    mean: float
    """Of the training rows; stands in wherever a history is empty."""
    median: float
    low: float
    """Smallest training rating; nothing below it is predicted."""
    high: float
    user_shrinkage: float
    item_shrinkage: float

    @classmethod
    def fit(cls, train: Sequence[Review], source: ReviewSource) -> Self:
        """Fit the constants, and choose from `SHRINKAGES` the two with the least squared error.

        Args:
            train: reviews to fit on, each predicted from its own earlier reviews.
            source: holds the histories.

        Raises:
            DataError: there are no training rows.
        """
        if not train:
            raise DataError("no training rows to fit the floors on")
        ratings = np.array([review.rating for review in train])
        centre = float(ratings.mean())
        some = list(train)
        if len(some) > FIT_ROWS:
            places = np.random.default_rng(0).choice(len(some), FIT_ROWS, replace=False)
            some, ratings = [train[at] for at in places.tolist()], ratings[places]
        histories = HistoryStats.of(some, source)
        users = [(s, histories.user.bias(centre, s)) for s in SHRINKAGES]
        items = [(s, histories.item.bias(centre, s)) for s in SHRINKAGES]
        _, user_shrinkage, item_shrinkage = min(
            (float(np.mean((centre + by_user + by_item - ratings) ** 2)), u, i)
            for u, by_user in users
            for i, by_item in items
        )
        whole = [review.rating for review in train]
        return cls(
            mean=centre,
            median=float(np.median(whole)),
            low=min(whole),
            high=max(whole),
            user_shrinkage=user_shrinkage,
            item_shrinkage=item_shrinkage,
        )

    def predict(self, histories: HistoryStats) -> dict[str, Floats]:
        """Each floor's predictions (n,), by name; finite for every target."""
        rows = len(histories.user.count)
        user, item = histories.user.mean_or(self.mean), histories.item.mean_or(self.mean)
        shrunk = (
            self.mean
            + histories.user.bias(self.mean, self.user_shrinkage)
            + histories.item.bias(self.mean, self.item_shrinkage)
        )
        columns = (
            np.full(rows, self.mean),
            np.full(rows, self.median),
            user,
            item,
            (user + item) / 2.0,
            np.clip(shrunk, self.low, self.high),
        )
        return dict(zip(FLOORS, columns, strict=True))


def floor_predictions(
    targets: Sequence[Review], source: ReviewSource, train: Sequence[Review]
) -> dict[str, Floats]:
    """Each floor's predictions for the targets (n,), by name.

    `global_mean` and `global_median` are those of the training rows. `user_mean` and `item_mean`
    are over all earlier ratings of the user or the item, `user_item_mean` is the mean of the two,
    and `shrunk_bias` adds to the training mean what user and item differ from it, each shrunk.
    Where a history is empty the training mean stands in.

    Args:
        targets: reviews to predict.
        source: holds their histories.
        train: reviews to fit on.

    Raises:
        DataError: there are no training rows, or a target is one of them.
    """
    check_apart(targets, train)
    return Floors.fit(train, source).predict(HistoryStats.of(targets, source))


def check_apart(targets: Sequence[Review], train: Sequence[Review]) -> None:
    """Refuse to fit on what is to be predicted.

    Raises:
        DataError: a target is a training row too.
    """
    fitted_on = {_pair(review) for review in train}
    if seen := [target for target in targets if _pair(target) in fitted_on]:
        first = seen[0]
        raise DataError(
            f"{len(seen)} of the {len(targets)} targets are training rows of the floors too (the "
            f"review of {first.item_id} by {first.user_id}); keep the two apart"
        )


def _pair(review: Review) -> tuple[str, str, float]:
    return review.user_id, review.item_id, float(review.timestamp)
