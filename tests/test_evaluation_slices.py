"""Slices against values worked out by hand: every row in its part, and no verdict on a handful."""

from __future__ import annotations

import math
from itertools import groupby
from typing import Any

import numpy as np
import pytest

from r4r_graph.errors import DataError
from r4r_graph.evaluation import HistoryStats, paired_difference, root_mean_square, score_points
from r4r_graph.evaluation.floors import SideStats
from r4r_graph.evaluation.report import Slice
from r4r_graph.evaluation.slices import FEWEST, slices
from r4r_graph.ratings import RatingScale

FIVE = RatingScale()
NAN = math.nan


def array(*values: Any) -> Any:
    return np.array(values, dtype=np.float64)


def histories(users: Any, items: Any) -> HistoryStats:
    """Histories of so many ratings by the user and of the item."""
    sides = []
    for counts in (users, items):
        known = np.where(array(*counts) > 0, 3.0, NAN)
        sides.append(SideStats(array(*counts), known, 0 * known))
    return HistoryStats(*sides)


def sliced(
    truths: Any, points: Any, floor: Any, users: Any, items: Any, **settings: Any
) -> dict[str, dict[str, Slice]]:
    """The slices by heading and label; one column of points is every read-out."""
    by = points if isinstance(points, dict) else dict.fromkeys(("mean", "median", "mode"), points)
    found = slices(truths, by, floor, histories(users, items), FIVE, **settings)
    headings = groupby(found, key=lambda part: part.by)
    return {name: {part.label: part for part in parts} for name, parts in headings}


def rows(parts: dict[str, Slice]) -> dict[str, int]:
    return {label: part.rows for label, part in parts.items()}


def test_every_row_is_in_its_part() -> None:
    users = [0, 0, 1, 4, 5, 9, 10, 29, 30, 400]
    items = [0, 3, 0, 1, 1, 1, 1, 1, 1, 1]
    truths = array(1, 1.4, 1.5, 1.6, 2, 2.5, 3.2, 4, 4.6, 5)
    found = sliced(truths, truths, truths, users, items)
    assert list(found) == [
        "cold start",
        "reviews by the user",
        "reviews of the item",
        "true rating",
    ]
    assert rows(found["cold start"]) == {"none": 7, "user": 1, "item": 1, "both": 1}
    lengths = {"0": 2, "1-4": 2, "5-9": 2, "10-29": 2, "30 or more": 2}
    assert rows(found["reviews by the user"]) == lengths
    assert rows(found["reviews of the item"]) == {"0": 2, "1-4": 8}
    assert rows(found["true rating"]) == {"1": 3, "2": 3, "3": 1, "4": 1, "5": 2}
    for parts in found.values():
        assert sum(rows(parts).values()) == 10


def test_parts_without_rows_are_left_out() -> None:
    found = sliced(array(3, 3), array(3, 3), array(3, 3), [1, 2], [50, 50])
    assert {by: list(parts) for by, parts in found.items()} == {
        "cold start": ["none"],
        "reviews by the user": ["1-4"],
        "reviews of the item": ["30 or more"],
        "true rating": ["3"],
    }


def test_figures_by_hand() -> None:
    """The median has errors 1 and 3, the mean 1 and 2, the floor 0 and 4."""
    points = {"median": array(2, 4), "mean": array(2, 3), "mode": array(5, 5)}
    part = sliced(array(1, 1), points, array(1, 5), [0, 0], [1, 1])["cold start"]["user"]
    assert (part.rows, part.missing) == (2, 0)
    assert part.mae.value == pytest.approx(2)
    assert part.rmse.value == pytest.approx(math.sqrt(2.5))
    assert part.difference.mae.value == pytest.approx(2 - 2)
    assert part.difference.rmse.value == pytest.approx(math.sqrt(2.5) - math.sqrt(8))


def test_a_slice_is_scored_as_its_rows_alone() -> None:
    dice = np.random.default_rng(0)
    truths = dice.integers(1, 6, size=200).astype(float)
    points, floor = (np.clip(truths + dice.normal(0, s, size=200), 1, 5) for s in (0.5, 1.0))
    points[::7] = NAN
    users = [0] * 60 + [7] * 140
    part = sliced(truths, points, floor, users, [3] * 200)["reviews by the user"]["5-9"]
    alone = score_points(truths[60:], points[60:], FIVE)
    assert (part.rows, part.missing) == (140, alone.missing)
    assert (part.mae, part.rmse) == (alone.mae, alone.rmse)
    wrong = np.where(np.isnan(points), 4, np.abs(points - truths))[60:]
    by_floor = np.abs(floor - truths)[60:]
    assert part.difference.mae == paired_difference(wrong, by_floor)
    assert part.difference.rmse == paired_difference(wrong, by_floor, root_mean_square)
    other = sliced(truths, points, floor, users, [3] * 200, seed=1, resamples=50)
    assert other["reviews by the user"]["5-9"].mae != part.mae


def test_silence_is_the_largest_error_where_it_happens() -> None:
    """Answers only where the user is known; the floor answers always."""
    n = 2 * FEWEST
    users = [0] * FEWEST + [5] * FEWEST
    truths = np.full(n, 3.0)
    points = np.where(array(*users) > 0, truths, NAN)
    parts = sliced(truths, points, truths + 1, users, [5] * n)["cold start"]
    assert (parts["user"].missing, parts["user"].mae.value) == (FEWEST, 4)
    assert parts["user"].difference.verdict("mae") == "worse"
    assert (parts["none"].missing, parts["none"].mae.value) == (0, 0)
    assert parts["none"].difference.verdict("mae") == "better"


def test_a_row_that_lacks_one_read_out_is_missing() -> None:
    points = {"median": array(NAN, 3, 3), "mean": array(3, NAN, 3), "mode": array(3, 3, NAN)}
    part = sliced(array(3, 3, 3), points, array(3, 3, 3), [1] * 3, [1] * 3)["cold start"]["none"]
    assert part.missing == 2
    assert part.mae.value == pytest.approx(4 / 3)


@pytest.mark.parametrize("size", [1, FEWEST - 1, FEWEST])
def test_no_verdict_on_a_handful_of_rows(size: int) -> None:
    """One perfect row against a bad floor is no evidence, though every resample agrees."""
    truths = np.full(size, 3.0)
    part = sliced(truths, truths, truths + 1, [1] * size, [1] * size)["cold start"]["none"]
    assert part.difference.mae.value == -1
    sure = size >= FEWEST
    assert part.difference.verdict("mae") == ("better" if sure else "undecided")
    assert part.difference.verdict("rmse") == ("better" if sure else "undecided")
    for estimate in (part.mae, part.rmse, part.difference.mae, part.difference.rmse):
        assert math.isfinite(estimate.low) == math.isfinite(estimate.high) == sure


def test_the_true_rating_flatters_the_middle() -> None:
    """What the docstring warns of: the best constant looks bad at the ends and good between."""
    truths = np.repeat(array(1, 2, 3, 4, 5), 20)
    constant, noisy = np.full(100, 3.0), truths[::-1]
    parts = sliced(truths, constant, noisy, [1] * 100, [1] * 100)
    by_rating = {label: part.mae.value for label, part in parts["true rating"].items()}
    assert by_rating == {"1": 2, "2": 1, "3": 0, "4": 1, "5": 2}
    assert parts["cold start"]["none"].difference.verdict("mae") == "better"


def test_another_scale() -> None:
    scale = RatingScale((0.5, 1.0, 1.5))
    truths = array(0.5, 0.7, 0.8, 1.5)
    points = dict.fromkeys(("mean", "median", "mode"), truths)
    found = slices(truths, points, truths, histories([1] * 4, [1] * 4), scale)  # type: ignore[arg-type]
    labels = {part.label: part.rows for part in found if part.by == "true rating"}
    assert labels == {"0.5": 2, "1": 1, "1.5": 1}


@pytest.mark.parametrize(
    ("truths", "points", "floor", "known", "reason"),
    [
        (np.zeros(0), np.zeros(0), np.zeros(0), [], "no rows"),
        (array(3, 3), array(3), array(3, 3), [1, 1], "2 truths and 1 predictions"),
        (array(3, 3), array(3, 3), array(3), [1, 1], "2 truths and 1 predictions"),
        (array(3, 3), array(3, 3), array(3, 3), [1], "2 truths and 1 histories"),
        (array(3, NAN), array(3, 3), array(3, 3), [1, 1], "row 2: the true rating nan"),
    ],
)
def test_rows_that_do_not_match(
    truths: Any, points: Any, floor: Any, known: Any, reason: str
) -> None:
    with pytest.raises(DataError, match=reason):
        sliced(truths, points, floor, known, known)
