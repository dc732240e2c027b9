"""Reliability: whether what is given a probability of 30 % comes true in 30 of 100 cases.

Every row forecasts each value of the scale, with the probability that its distribution gives it.
The forecast of the true value comes true and the others do not; of a fraction, its two neighbours
come true in part (`metrics.soft_targets`). The forecasts of all rows and values are put into bins
of equal width, and in each bin the mean forecast is held against the share that came true.

**A row without a distribution forecasts 0 for every value.** Its truth then came true against
certainty, which is seen in the lowest bin and in the expected error: were it left out, an expert
could be reliable by keeping silent. Its error is half of what a sure and wrong answer costs, for it
names no wrong value either.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from r4r_graph.errors import DataError, SettingError
from r4r_graph.evaluation.metrics import (
    RESAMPLES,
    Floats,
    bootstrap,
    covered,
    mean,
    missing,
    soft_targets,
)
from r4r_graph.evaluation.report import Reliability, ReliabilityBin
from r4r_graph.ratings import RatingScale

LEVELS = (0.5, 0.8, 0.9)
"""Nominal levels of the central intervals."""


def reliability(
    truths: Floats,
    probabilities: Floats,
    scale: RatingScale,
    *,
    bins: int = 10,
    levels: Sequence[float] = LEVELS,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Reliability:
    """The reliability table of predicted distributions, and how much their intervals cover.

    A bin holds the forecasts above its lower end up to its upper end, the first one 0 too, as in
    scikit-learn's `calibration_curve`. The expected error is the mean distance between forecast and
    share over the bins, weighted by their counts. Most forecasts are small, so it is no large
    number even for bad distributions: compare it with that of others on the same rows.

    Args:
        truths: true ratings (n,).
        probabilities: (n, values); a row of nan where there is no distribution.
        scale: of the ratings.
        bins: how many.
        levels: see `LEVELS`; for coverage see `metrics.covered`.
        seed: of the resampling.
        resamples: how many.

    Raises:
        DataError: there are no rows, they do not match, a truth is no finite number, or a row is no
            distribution over the scale.
        SettingError: there is no bin or no level, or a level is not between 0 and 1.
    """
    if bins < 1:
        raise SettingError(f"bad number of bins {bins}: must be 1 or more")
    if not levels or not all(0 < level < 1 for level in levels):
        raise SettingError(f"bad levels {list(levels)}: at least one, each between 0 and 1")
    _check_distributions(probabilities, scale)
    coverage = {
        f"{level:g}": bootstrap(
            mean, covered(truths, probabilities, scale, level), seed=seed, resamples=resamples
        )
        for level in levels
    }
    forecasts = np.where(missing(probabilities)[:, None], 0.0, probabilities).ravel()
    came_true = soft_targets(truths, scale).ravel()
    edges = np.linspace(0.0, 1.0, bins + 1)
    places = np.searchsorted(edges[1:-1], forecasts)
    counts = np.bincount(places, minlength=bins)
    predicted = np.bincount(places, forecasts, bins)
    observed = np.bincount(places, came_true, bins)
    table = tuple(
        ReliabilityBin(
            low=float(edges[at]),
            high=float(edges[at + 1]),
            count=int(count),
            predicted=float(predicted[at] / count) if count else np.nan,
            observed=float(observed[at] / count) if count else np.nan,
        )
        for at, count in enumerate(counts)
    )
    expected = float(np.abs(predicted - observed).sum() / counts.sum())
    return Reliability(bins=table, expected_error=expected, coverage=coverage)


def _check_distributions(probabilities: Floats, scale: RatingScale) -> None:
    if probabilities.ndim != 2 or probabilities.shape[1] != len(scale.values):
        raise DataError(
            f"probabilities of shape {probabilities.shape}: the scale has {len(scale.values)} "
            "values, and each row one probability for each"
        )
    wrong = (probabilities < 0).any(axis=1) | (np.abs(probabilities.sum(axis=1) - 1.0) > 1e-3)
    wrong &= ~missing(probabilities)
    if wrong.any():
        at = int(np.flatnonzero(wrong)[0])
        raise DataError(
            f"row {at + 1}: not a distribution over {scale.labels}: {probabilities[at].tolist()}"
        )
