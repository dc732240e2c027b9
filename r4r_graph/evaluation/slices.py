"""The same rows, part by part: where predictions are good, and where they only seem so.

By cold start, by the length of either history, and by the true rating. **The last one misleads.**
It selects on the truth: whoever predicts well with little to go by stays near the middle of what
is usual, and so is far off at the ends of the scale and close in between. It shows where the errors
lie, not what would be better, for a predictor that runs to the ends gains there and loses overall.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import numpy.typing as npt

from r4r_graph.errors import DataError
from r4r_graph.evaluation.floors import HistoryStats
from r4r_graph.evaluation.metrics import (
    RESAMPLES,
    Estimate,
    Floats,
    Statistic,
    bootstrap,
    errors,
    mean,
    missing,
    paired_difference,
    root_mean_square,
)
from r4r_graph.evaluation.report import Difference, Slice
from r4r_graph.ratings import RatingScale, Readout

Flags = npt.NDArray[np.bool_]

FEWEST = 10
"""Rows below which a slice has no intervals: resampling so few makes any difference look sure."""

_LENGTHS = (
    ("0", 0, 0),
    ("1-4", 1, 4),
    ("5-9", 5, 9),
    ("10-29", 10, 29),
    ("30 or more", 30, np.inf),
)


def slices(
    truths: Floats,
    points: Mapping[Readout, Floats],
    floor: Floats,
    histories: HistoryStats,
    scale: RatingScale,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> tuple[Slice, ...]:
    """Scores of each part of the rows, and its paired differences from a floor.

    The parts, each under its heading: `cold start` (which side has no earlier reviews: `none`,
    `user`, `item`, `both`), `reviews by the user` and `reviews of the item` (`0`, `1-4`, `5-9`,
    `10-29`, `30 or more`), and `true rating` (the nearest value of the scale, the lower one on a
    tie). Under every heading each row is in one part; parts without rows are left out. Slices by
    true rating select on the truth: they must not be read as strengths and weaknesses, see this
    module.

    Args:
        truths: true ratings (n,).
        points: predictions by read-out (n,), the median for the MAE and the mean for the RMSE;
            nan where there is none.
        floor: predictions of the floor (n,).
        histories: of these rows.
        scale: of the ratings.
        seed: of the resampling.
        resamples: how many.

    Returns:
        The slices by heading, in the order above. One of fewer than `FEWEST` rows has nan for the
        ends of its intervals, so that no verdict comes of it.

    Raises:
        DataError: there are no rows, they do not match, or a true rating is no finite number.
    """
    distance, deviation = (errors(truths, points[name], scale) for name in ("median", "mean"))
    by_floor = errors(truths, floor, scale)
    void = missing(points["median"]) | missing(points["mean"])
    if len(histories.user.count) != len(truths):
        raise DataError(f"{len(truths)} truths and {len(histories.user.count)} histories")

    def estimate(statistic: Statistic, first: Floats, second: Floats | None = None) -> Estimate:
        if second is None:
            found = bootstrap(statistic, first, seed=seed, resamples=resamples)
        else:
            found = paired_difference(first, second, statistic, seed=seed, resamples=resamples)
        return found if len(first) >= FEWEST else Estimate(found.value, np.nan, np.nan)

    return tuple(
        Slice(
            by=by,
            label=label,
            rows=int(part.sum()),
            missing=int(void[part].sum()),
            mae=estimate(mean, distance[part]),
            rmse=estimate(root_mean_square, deviation[part]),
            difference=Difference(
                mae=estimate(mean, distance[part], by_floor[part]),
                rmse=estimate(root_mean_square, deviation[part], by_floor[part]),
            ),
        )
        for by, label, part in _parts(truths, histories, scale)
        if part.any()
    )


def _parts(
    truths: Floats, histories: HistoryStats, scale: RatingScale
) -> Iterator[tuple[str, str, Flags]]:
    """Heading, label and rows of every part."""
    user, item = histories.user.count, histories.item.count
    yield "cold start", "none", (user > 0) & (item > 0)
    yield "cold start", "user", (user == 0) & (item > 0)
    yield "cold start", "item", (user > 0) & (item == 0)
    yield "cold start", "both", (user == 0) & (item == 0)
    for by, counts in (("reviews by the user", user), ("reviews of the item", item)):
        for label, least, most in _LENGTHS:
            yield by, label, (counts >= least) & (counts <= most)
    nearest = np.abs(truths[:, None] - np.array(scale.values)).argmin(axis=1)
    for at, label in enumerate(scale.labels):
        yield "true rating", label, nearest == at
