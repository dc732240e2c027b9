"""Predictions of the targets' ratings, from a file or a folder of anybody's making.

    predictions = read_predictions("ratings/", targets, scale, name="ours")

A folder that `r4r bulk` wrote is such, and so is any Parquet, CSV or JSONL file with a row a pair
and one rating or a distribution in it. Rows are matched to targets by user, item and time. A target
without a row, or with one that holds an error, has no prediction, and that is an error of the
predictor: it is kept with its reason.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from r4r_graph.errors import DataError
from r4r_graph.evaluation.metrics import Floats, readings, stack
from r4r_graph.evaluation.targets import RowKey, row_key
from r4r_graph.ratings import READOUTS, RatingDistribution, RatingScale, Readout
from r4r_graph.reviews.files import BadRows, Layout, Row, file_parts, read_parquet, read_rows
from r4r_graph.schema import Review, unix_seconds

_LAYOUT = Layout(
    ("user_id", "item_id"),
    (
        "as_of",
        "timestamp",
        "rating",
        *READOUTS,
        "distribution",
        "rating_mass",
        "rationale",
        "rationales",
        "error",
    ),
)


@dataclass(frozen=True)
class Predictions:
    """One prediction a target, in the targets' order."""

    name: str
    points: Mapping[Readout, Floats]
    """Read-out to ratings (n,); nan where there is no prediction. Where only one number was
    predicted, all read-outs are that number."""
    probabilities: Floats | None = None
    """(n, values); a row of nan where there is none. None: the predictions are no distributions."""
    reasons: tuple[str | None, ...] = ()
    """Why there is no prediction; None where there is one."""
    rationales: tuple[tuple[str, ...], ...] = ()
    """Those of each row; empty where there are none."""
    mass: Floats | None = None
    """Raw probability of the rating tokens (n,), nan where it is not known."""
    condition: str = "as_is"
    """What was changed before rating; see `evaluation.probes`."""
    model: Mapping[str, Any] = field(default_factory=dict)
    """Base model, adapters and prompt digests, where they are known."""


def from_rows(
    rows: Mapping[RowKey, Mapping[str, Any]],
    targets: Sequence[Review],
    scale: RatingScale,
    *,
    name: str,
    condition: str = "as_is",
    model: Mapping[str, Any] | None = None,
) -> Predictions:
    """Predictions out of rows of plain values, as bulk writes them, by user, item and time."""
    found = [_prediction(rows.get(row_key(target)), scale) for target in targets]
    points, probabilities = _numbers(found, scale)
    masses = np.array([one.mass for one in found], dtype=np.float64)
    return Predictions(
        name=name,
        points=points,
        probabilities=probabilities,
        reasons=tuple(one.reason for one in found),
        rationales=tuple(one.rationales for one in found),
        mass=None if np.isnan(masses).all() else masses,
        condition=condition,
        model=model or {},
    )


def read_predictions(
    path: str | os.PathLike[str],
    targets: Sequence[Review],
    scale: RatingScale,
    *,
    name: str,
) -> Predictions:
    """Predictions from a file or a folder of Parquet parts.

    Columns: `user_id`, `item_id`; the time as `as_of` or `timestamp`, which may be absent where no
    pair is there twice; and `distribution` (a list of probabilities over the scale's values, as
    JSON in CSV) or `mean`, `median` and `mode` or `rating`. `error`, `rationale`, `rationales` and
    `rating_mass` are read where they are there. Rows of other pairs are not looked at.

    Raises:
        DataError: it cannot be read; a prediction is off the scale, or no distribution over it; a
            pair is there twice; or not one row is of a target.
    """
    bad = BadRows(path)
    timed: dict[RowKey, dict[str, Any]] = {}
    untimed: dict[tuple[str, str], dict[str, Any]] = {}
    wanted = {row_key(target) for target in targets}
    pairs = {key[:2] for key in wanted}

    def use(_: str, row: Row) -> None:
        pair = str(row.get("user_id")), str(row.get("item_id"))
        if pair not in pairs:
            return
        when = row.get("as_of") if row.get("as_of") not in (None, "") else row.get("timestamp")
        values = _values(row, scale)
        if when in (None, ""):
            if untimed.setdefault(pair, values) is not values:
                raise DataError(f"user {pair[0]!r} and item {pair[1]!r} are there twice, untimed")
            return
        key = *pair, unix_seconds(when)  # type: ignore[arg-type]
        if timed.setdefault(key, values) is not values:
            raise DataError(f"user {pair[0]!r} and item {pair[1]!r} are there twice at one time")

    for part in file_parts(path):
        if part.suffix.lower() == ".parquet":
            for at, row in enumerate(read_parquet(part, _LAYOUT).to_pylist(), start=1):
                bad.guard(use, f"{part}: row {at}", row)
        else:
            read_rows(part, _LAYOUT, bad, use)
    bad.check()
    if untimed and len(pairs) < len(wanted):
        raise DataError(
            f"{path}: rows without a time, and targets that differ in their time alone; give the "
            "predictions a column as_of"
        )
    rows = {key: timed.get(key, untimed.get(key[:2])) for key in wanted}
    known = {key: row for key, row in rows.items() if row is not None}
    if not known:
        raise DataError(
            f"{path}: not one of its rows is of a target; ids and times (as_of) have to be those "
            "of the targets"
        )
    return from_rows(known, targets, scale, name=name)


@dataclass(frozen=True, slots=True)
class _One:
    """A target's prediction: a distribution, or points, or the reason for neither."""

    distribution: RatingDistribution | None = None
    points: Mapping[Readout, float] | None = None
    mass: float = math.nan
    rationales: tuple[str, ...] = ()
    reason: str | None = None


def _prediction(row: Mapping[str, Any] | None, scale: RatingScale) -> _One:
    if row is None:
        return _One(reason="no row for this target")
    rationales = tuple(text for text in row.get("rationales") or () if text and text.strip())
    mass = row.get("rating_mass")
    known = math.nan if mass is None else float(mass)
    if row.get("error"):
        return _One(reason=str(row["error"]), rationales=rationales)
    if row.get("distribution") is not None:
        distribution = RatingDistribution(scale, tuple(row["distribution"]))
        return _One(distribution=distribution, mass=known, rationales=rationales)
    if row.get("points"):
        return _One(points=row["points"], mass=known, rationales=rationales)
    return _One(reason="the row holds no rating", rationales=rationales)


def _numbers(
    found: Sequence[_One], scale: RatingScale
) -> tuple[dict[Readout, Floats], Floats | None]:
    """All as distributions, where no row is points alone; else all as points."""
    if not any(one.points for one in found):
        probabilities = stack([one.distribution for one in found], scale)
        return readings(probabilities, scale), probabilities
    points: dict[Readout, Floats] = {}
    for readout in READOUTS:
        read = [
            one.distribution.read(readout)
            if one.distribution is not None
            else (one.points or {}).get(readout, math.nan)
            for one in found
        ]
        points[readout] = np.array(read, dtype=np.float64)
    return points, None


def _values(row: Row, scale: RatingScale) -> dict[str, Any]:
    """A file's row, checked: its distribution or points, its rationales, its error."""
    rationales = _list(row.get("rationales"), "rationales")
    if rationales is None and row.get("rationale"):
        rationales = [row["rationale"]]
    values: dict[str, Any] = {
        "rationales": [str(text) for text in rationales or () if text],
        "error": row.get("error") or None,
        "rating_mass": _number(row.get("rating_mass"), "rating_mass"),
        "distribution": None,
        "points": None,
    }
    if values["error"]:
        return values
    distribution = _list(row.get("distribution"), "distribution")
    if distribution is not None:
        shares = tuple(_number(p, "distribution") for p in distribution)
        try:
            RatingDistribution(scale, shares)  # type: ignore[arg-type]
        except (ValueError, TypeError):
            raise DataError(
                f"{list(shares)} is no distribution over {', '.join(scale.labels)}"
            ) from None
        return values | {"distribution": shares}
    points = {readout: _point(row.get(readout), readout, scale) for readout in READOUTS}
    rating = _point(row.get("rating"), "rating", scale)
    whole = {
        readout: rating if point is None else point
        for readout, point in points.items()
        if point is not None or rating is not None
    }
    if whole and len(whole) < len(READOUTS):
        raise DataError(f"holds {', '.join(whole)}, but not all of {', '.join(READOUTS)}")
    return values | {"points": whole}


def _point(value: object, name: str, scale: RatingScale) -> float | None:
    number = _number(value, name)
    return None if number is None else scale.check(number)


def _number(value: object, name: str) -> float | None:
    if value is None or value == "" or value != value:
        return None
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise DataError(f"bad {name} {value!r:.60}: not a number") from None
    if not math.isfinite(number):
        raise DataError(f"bad {name} {value!r}: not a finite number")
    return number


def _list(value: object, name: str) -> list[Any] | None:
    if value is None or value == "":
        return None
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise DataError(f"bad {name} {value!r:.60}: not a list in JSON") from None
    if not isinstance(value, list):
        raise DataError(f"bad {name} {value!r:.60}: not a list")
    return value
