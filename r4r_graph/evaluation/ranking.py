"""The ranking view: in which order predictions put the items that one user rated.

Each user's held-out rows are one list, ranked by prediction. **Who counts.** Only users whose true
ratings differ: any order of the others is right. Of these, the hit rate leaves out those who like
all of their items or none, whom every order hits, or no order.

**Ties.** Rows of one prediction stand in random order, and what is reported is the exact
expectation over it. So a constant predictor has precisely the figures of a shuffled list, and none
gains by the order of a file. Rows without a prediction rank below all that have one, in random
order among themselves.

NDCG (Järvelin and Kekäläinen 2002) gains what a rating has over the scale's lowest value,
discounted by the binary logarithm of the rank plus one, over that of the best order; it is
scikit-learn's `ndcg_score` of each user's list, ties included.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from r4r_graph.errors import DataError, SettingError
from r4r_graph.evaluation.metrics import (
    RESAMPLES,
    Estimate,
    Floats,
    bootstrap,
    mean,
    missing,
    paired_difference,
)
from r4r_graph.evaluation.report import RankingScores
from r4r_graph.ratings import RatingScale

Ints = npt.NDArray[np.int64]

KS = (1, 3, 5, 10)
"""Lengths of the beginnings of a list that are looked at."""


def ranking(
    users: Sequence[str],
    truths: Floats,
    points: Floats,
    scale: RatingScale,
    *,
    ks: Sequence[int] = KS,
    liked: float | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> tuple[RankingScores, ...]:
    """NDCG and hit rate of point predictions, one a k; empty where no user's ratings differ.

    NDCG@k is the mean over users. The hit rate HR@k is the share of users with a liked item among
    their first k, of those who like some of their items and not all: the higher k, the surer a hit
    in any order, so it says something only beside the figure of a constant predictor. Where nobody
    is left it is nan. Intervals are over users; `RankingScores.users` are those of NDCG.

    Args:
        users: whose row it is (n).
        truths: true ratings (n,); what is off the scale counts as its end.
        points: predictions (n,); nan where there is none.
        scale: of the ratings.
        ks: see `KS`.
        liked: least rating of an item that is liked; by default three quarters up the scale,
            which is 4 from 1 to 5.
        seed: of the resampling.
        resamples: how many.

    Raises:
        DataError: the rows do not match, or a true rating is no finite number.
        SettingError: a k is below 1.
    """
    lists = _Lists.of(users, truths, scale, ks)
    scores = lists.take(points)
    if not lists.users:
        return ()
    least = scale.low + 0.75 * (scale.high - scale.low) if liked is None else liked
    good = (lists.gains >= least - scale.low).astype(np.float64)
    share = lists.per_user(good) / lists.per_user(np.ones(len(good)))
    divided = (share > 0) & (share < 1)
    ranked = _Ranked.of(lists, scores)

    def averaged(figures: Floats) -> Estimate:
        if not len(figures):
            return Estimate(np.nan, np.nan, np.nan)
        return bootstrap(mean, figures, seed=seed, resamples=resamples)

    return tuple(
        RankingScores(
            k=k,
            users=lists.users,
            ndcg=averaged(_ndcg(lists, ranked, k)),
            hit_rate=averaged(ranked.hits(good, k)[divided]),
        )
        for k in ks
    )


def ranking_differences(
    users: Sequence[str],
    truths: Floats,
    first: Floats,
    second: Floats,
    scale: RatingScale,
    *,
    ks: Sequence[int] = KS,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> tuple[Estimate, ...]:
    """NDCG of the first predictions less that of the second, paired by user, one a k: above zero,
    zero outside the interval, the first is better. Empty where no user's ratings differ.

    Raises:
        DataError: as `ranking`.
        SettingError: as `ranking`.
    """
    lists = _Lists.of(users, truths, scale, ks)
    scores = lists.take(first), lists.take(second)
    if not lists.users:
        return ()
    one, other = (_Ranked.of(lists, own) for own in scores)
    return tuple(
        paired_difference(
            _ndcg(lists, one, k), _ndcg(lists, other, k), seed=seed, resamples=resamples
        )
        for k in ks
    )


def _ndcg(lists: _Lists, ranked: _Ranked, k: int) -> Floats:
    """Each user's (users,). The best order gains something, for the ratings differ."""
    best = _Ranked.of(lists, lists.gains)
    return ranked.discounted(lists.gains, k) / best.discounted(lists.gains, k)


@dataclass(frozen=True, slots=True)
class _Lists:
    """The rows of the users who count, user by user."""

    rows: Ints
    """Places of these rows in the input."""
    size: int
    """Rows of the input."""
    owners: Ints
    """Number of each row's user, rising."""
    gains: Floats
    """Each row's rating less the scale's lowest value."""
    users: int

    @classmethod
    def of(
        cls, users: Sequence[str], truths: Floats, scale: RatingScale, ks: Sequence[int]
    ) -> Self:
        if any(k < 1 for k in ks):
            raise SettingError(f"bad ranks {list(ks)}: each must be 1 or more")
        if len(users) != len(truths):
            raise DataError(f"{len(users)} users and {len(truths)} truths")
        if not np.isfinite(truths).all():
            at = int(np.flatnonzero(~np.isfinite(truths))[0])
            raise DataError(f"row {at + 1}: the true rating {truths[at]} is no finite number")
        gains = np.clip(truths, scale.low, scale.high) - scale.low
        codes: dict[str, int] = {}
        owners = np.array([codes.setdefault(user, len(codes)) for user in users], dtype=np.int64)
        least, most = np.full(len(codes), np.inf), np.full(len(codes), -np.inf)
        np.minimum.at(least, owners, gains)
        np.maximum.at(most, owners, gains)
        rows = np.argsort(owners, kind="stable")
        rows = rows[(least < most)[owners[rows]]]
        kept, numbers = np.unique(owners[rows], return_inverse=True)
        return cls(rows, len(users), numbers, gains[rows], len(kept))

    def take(self, points: Floats) -> Floats:
        """The lists' predictions, below all others where there is none."""
        if len(points) != self.size:
            raise DataError(f"{self.size} truths and {len(points)} predictions")
        return np.where(missing(points), -np.inf, points)[self.rows]

    def per_user(self, figures: Floats) -> Floats:
        """Sums over each user's rows (users,)."""
        return np.asarray(np.bincount(self.owners, figures, self.users), dtype=np.float64)


@dataclass(frozen=True, slots=True)
class _Ranked:
    """Ranked lists, cut into groups of one score; a group has one user."""

    order: Ints
    """The lists' rows, each user's best first."""
    starts: Ints
    """Where each group begins in `order`."""
    sizes: Ints
    """Rows of each group."""
    ranks: Ints
    """Rows of the same user that stand before the group."""
    owners: Ints
    """Each group's user."""

    @classmethod
    def of(cls, lists: _Lists, scores: Floats) -> Self:
        """The lists by falling score."""
        order = np.lexsort((-scores, lists.owners))
        ranked = scores[order]
        new_user = np.diff(lists.owners, prepend=-1) > 0
        starts = np.flatnonzero(new_user | np.append(True, ranked[1:] != ranked[:-1]))
        owners = lists.owners[starts]
        ranks = starts - np.flatnonzero(new_user)[owners]
        return cls(order, starts, np.diff(starts, append=len(order)), ranks, owners)

    def discounted(self, gains: Floats, k: int) -> Floats:
        """Each user's expected discounted gain in the first k (users,)."""
        summed = np.append(0.0, np.cumsum(1.0 / np.log2(np.arange(k) + 2.0)))
        share = summed[np.minimum(self.ranks + self.sizes, k)] - summed[np.minimum(self.ranks, k)]
        means = np.add.reduceat(gains[self.order], self.starts) / self.sizes
        return np.asarray(np.bincount(self.owners, means * share), dtype=np.float64)

    def hits(self, good: Floats, k: int) -> Floats:
        """Each user's chance of a good row in the first k (users,): one less that of drawing none
        out of any group, without replacement."""
        bad = self.sizes - np.add.reduceat(good[self.order], self.starts)
        taken = np.clip(k - self.ranks, 0, self.sizes)
        none = np.ones(len(self.sizes))
        for drawn in range(int(taken.max())):
            left = np.maximum(bad - drawn, 0.0) / np.maximum(self.sizes - drawn, 1)
            none *= np.where(drawn < taken, left, 1.0)
        return 1.0 - np.multiply.reduceat(none, np.flatnonzero(self.ranks == 0))
