"""Errors of predicted ratings, and how sure one may be of them.

Everything works on arrays with one entry a row: `truths` (n,), point predictions (n,), or
probabilities (n, values) over a scale. **A row without a prediction is nan, and it counts as an
error**: the largest that the scale allows, the likelihood of the least probability, not covered by
any interval. It is never left out and never right, and its number is reported beside the result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from r4r_graph.errors import DataError
from r4r_graph.ratings import READOUTS, RatingDistribution, RatingScale, Readout

Floats = npt.NDArray[np.float64]
Statistic = Callable[..., Floats]
"""Reduces the last axis of each of its arrays."""

LEAST_LIKELIHOOD = 1e-6
"""A likelihood below this counts as this: one row can cost 13.8 nats at most."""
RESAMPLES = 2000
_AT_ONCE = 1 << 21  # resampled entries held in memory


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure with its bootstrap interval."""

    value: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether zero is outside the interval; of a paired difference: whether it is one."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True, slots=True)
class PointScores:
    """How far point predictions are from the truth."""

    rows: int
    missing: int
    """Rows without a prediction; each counts as the largest error of the scale."""
    mae: Estimate
    rmse: Estimate

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Scores:
    """How good predicted distributions are."""

    rows: int
    missing: int
    """Rows without a prediction; see this module's rule for them."""
    mae: dict[Readout, Estimate]
    rmse: dict[Readout, Estimate]
    nll: Estimate
    """Mean negative log-likelihood, nats."""
    coverage: Estimate
    """Share of truths inside the central 80 %; 0.8 where the distributions are calibrated."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


# Rows --------------------------------------------------------------------------------------------


def stack(distributions: Sequence[RatingDistribution | None], scale: RatingScale) -> Floats:
    """Probabilities (n, values); a row of nan where there is no distribution.

    Raises:
        DataError: a distribution is over another scale.
    """
    rows = np.full((len(distributions), len(scale.values)), np.nan)
    for at, distribution in enumerate(distributions):
        if distribution is None:
            continue
        if distribution.scale != scale:
            raise DataError(f"row {at + 1}: a distribution over another scale")
        rows[at] = distribution.probabilities
    return rows


def missing(predictions: Floats) -> npt.NDArray[np.bool_]:
    """Which rows hold no prediction: a point or any probability that is no finite number (n,)."""
    finite = np.isfinite(predictions)
    return np.asarray(~finite.all(axis=tuple(range(1, finite.ndim))))


def readings(probabilities: Floats, scale: RatingScale) -> dict[Readout, Floats]:
    """Each row's mean, median and mode, by the definitions of `RatingDistribution`; nan where the
    distribution is missing.

    Raises:
        DataError: a row is no distribution.
    """
    found = {readout: np.full(len(probabilities), np.nan) for readout in READOUTS}
    for at in np.flatnonzero(~missing(probabilities)).tolist():
        try:
            row = RatingDistribution(scale, tuple(probabilities[at].tolist()))
        except ValueError as error:
            raise DataError(f"row {at + 1}: {error}") from None
        for readout in READOUTS:
            found[readout][at] = row.read(readout)
    return found


def soft_targets(truths: Floats, scale: RatingScale) -> Floats:
    """Ratings as weights on the scale's values (n, values): a fraction lies on its two
    neighbours, so that the weights' mean is the rating; what is off the scale, on its end."""
    values = np.asarray(scale.values)
    inside = np.clip(truths, values[0], values[-1])
    upper = np.clip(np.searchsorted(values, inside), 1, len(values) - 1)
    share = (inside - values[upper - 1]) / (values[upper] - values[upper - 1])
    weights = np.zeros((len(truths), len(values)))
    rows = np.arange(len(truths))
    weights[rows, upper - 1] = 1.0 - share
    weights[rows, upper] = share
    return weights


# One figure a row --------------------------------------------------------------------------------


def errors(truths: Floats, points: Floats, scale: RatingScale) -> Floats:
    """Distance of each prediction from the truth (n,); where there is none, the whole width of
    the scale, which no prediction within the scale can exceed.

    Raises:
        DataError: there are no rows, a truth is no finite number, or the rows do not match.
    """
    _check(truths, points)
    return np.where(missing(points), scale.high - scale.low, np.abs(points - truths))


def likelihood_losses(truths: Floats, probabilities: Floats, scale: RatingScale) -> Floats:
    """Each row's negative log-likelihood (nats, (n,)): that of the truth, or for a fraction the
    weighted mean over its two neighbours. A row without a distribution has the least likelihood.

    Raises:
        DataError: as `errors`.
    """
    _check(truths, probabilities)
    known = np.where(missing(probabilities)[:, None], 0.0, probabilities)
    losses = -np.log(np.maximum(known, LEAST_LIKELIHOOD))
    return np.asarray((soft_targets(truths, scale) * losses).sum(axis=1))


def covered(
    truths: Floats, probabilities: Floats, scale: RatingScale, level: float = 0.8
) -> Floats:
    """How much of each truth lies inside the central interval (n,), from 0 to 1.

    A value of a discrete scale owns a stretch of the cumulative distribution, as long as its
    probability; what counts is the share of that stretch inside the interval (the nonrandomized
    probability integral transform: Czado, Gneiting and Held 2009). So the mean of calibrated
    distributions is `level`, whatever the scale; below it they are too sure, above it not sure
    enough. A fraction is shared between its neighbours; a row without a distribution is outside.

    Raises:
        DataError: as `errors`.
    """
    _check(truths, probabilities)
    tail = (1.0 - level) / 2.0
    ends = np.cumsum(probabilities, axis=1)
    starts = ends - probabilities
    inside = np.minimum(ends, 1.0 - tail) - np.maximum(starts, tail)
    owned = probabilities > 0
    share = np.where(
        owned,
        np.maximum(inside, 0.0) / np.where(owned, probabilities, 1.0),
        (ends > tail) & (ends < 1.0 - tail),
    )
    within = (soft_targets(truths, scale) * share).sum(axis=1)
    return np.where(missing(probabilities), 0.0, within)


# Figures over rows -------------------------------------------------------------------------------


def mean(values: Floats) -> Floats:
    """Mean over the last axis; of `errors` it is the mean absolute error."""
    return np.asarray(np.mean(values, axis=-1))


def root_mean_square(values: Floats) -> Floats:
    """Root of the mean square over the last axis; of `errors` it is the RMSE."""
    return np.asarray(np.sqrt(np.mean(np.square(values), axis=-1)))


def bootstrap(
    statistic: Statistic,
    *columns: Floats,
    seed: int = 0,
    resamples: int = RESAMPLES,
    level: float = 0.95,
) -> Estimate:
    """A statistic of some columns (each (n,)) with its percentile bootstrap interval.

    All columns are resampled by the same rows, and the same rows again for every call with this
    seed and number of rows.

    Raises:
        DataError: there are no rows, or the columns are not of one length.
    """
    rows = len(columns[0])
    if rows == 0 or any(len(column) != rows for column in columns):
        raise DataError(f"cannot score columns of {[len(c) for c in columns]} rows")
    dice = np.random.default_rng(seed)
    drawn: list[Floats] = []
    left = resamples
    while left:
        some = min(left, max(1, _AT_ONCE // rows))
        places = dice.integers(0, rows, size=(some, rows))
        drawn.append(statistic(*(column[places] for column in columns)))
        left -= some
    tail = (1.0 - level) / 2.0
    low, high = np.quantile(np.concatenate(drawn), [tail, 1.0 - tail])
    return Estimate(float(statistic(*columns)), float(low), float(high))


def paired_difference(
    first: Floats,
    second: Floats,
    statistic: Statistic = mean,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Estimate:
    """The statistic of `first` less that of `second`, two figures of the same rows: below zero,
    zero outside the interval, the first is better.

    Raises:
        DataError: as `bootstrap`.
    """

    def difference(a: Floats, b: Floats) -> Floats:
        return statistic(a) - statistic(b)

    return bootstrap(difference, first, second, seed=seed, resamples=resamples)


def score_points(
    truths: Floats,
    points: Floats,
    scale: RatingScale,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> PointScores:
    """Scores of point predictions.

    Raises:
        DataError: as `errors`.
    """
    wrong = errors(truths, points, scale)
    return PointScores(
        rows=len(truths),
        missing=int(missing(points).sum()),
        mae=bootstrap(mean, wrong, seed=seed, resamples=resamples),
        rmse=bootstrap(root_mean_square, wrong, seed=seed, resamples=resamples),
    )


def score(
    truths: Floats,
    probabilities: Floats,
    scale: RatingScale,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Scores:
    """Scores of predicted distributions.

    Raises:
        DataError: as `errors`; or a row is no distribution.
    """
    _check(truths, probabilities)
    points = readings(probabilities, scale)
    by_point = {
        readout: score_points(truths, points[readout], scale, seed=seed, resamples=resamples)
        for readout in READOUTS
    }

    def averaged(figures: Floats) -> Estimate:
        return bootstrap(mean, figures, seed=seed, resamples=resamples)

    return Scores(
        rows=len(truths),
        missing=int(missing(probabilities).sum()),
        mae={readout: scores.mae for readout, scores in by_point.items()},
        rmse={readout: scores.rmse for readout, scores in by_point.items()},
        nll=averaged(likelihood_losses(truths, probabilities, scale)),
        coverage=averaged(covered(truths, probabilities, scale)),
    )


def _check(truths: Floats, predictions: Floats) -> None:
    if len(truths) == 0:
        raise DataError("no rows to score")
    if len(truths) != len(predictions):
        raise DataError(f"{len(truths)} truths and {len(predictions)} predictions")
    if not np.isfinite(truths).all():
        at = int(np.flatnonzero(~np.isfinite(truths))[0])
        raise DataError(f"row {at + 1}: the true rating {truths[at]} is no finite number")
