"""Reliability against values worked out by hand and against scikit-learn."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from sklearn.calibration import calibration_curve

from r4r_graph.errors import DataError, SettingError
from r4r_graph.evaluation.reliability import reliability
from r4r_graph.ratings import RatingScale

FIVE = RatingScale()
TWO = RatingScale((1.0, 2.0))
NAN = math.nan


def array(*values: Any) -> Any:
    return np.array(values, dtype=np.float64)


def drawn(rows: int, seed: int = 0) -> tuple[Any, Any]:
    """Ratings, and the distributions that they were drawn from."""
    dice = np.random.default_rng(seed)
    p = dice.dirichlet([0.7] * 5, size=rows)
    below = p.cumsum(axis=1)[:, :4] < dice.random((rows, 1))
    return 1.0 + below.sum(axis=1), p


def test_a_table_by_hand() -> None:
    """Forecasts 0.2 and 0.8, then 0.4 and 0.6; the truth is 2, then 1.25: three quarters of it on
    1, one quarter on 2."""
    p = array([0.2, 0.8], [0.4, 0.6])
    found = reliability(array(2, 1.25), p, TWO, bins=2)
    low, high = found.bins
    assert (low.low, low.high, high.low, high.high) == (0, 0.5, 0.5, 1)
    assert (low.count, high.count) == (2, 2)
    assert (low.predicted, low.observed) == pytest.approx((0.3, 0.375))
    assert (high.predicted, high.observed) == pytest.approx((0.7, 0.625))
    assert found.expected_error == pytest.approx(0.075)


def test_bins_are_weighted_by_their_forecasts() -> None:
    """Nine forecasts lie in the lower bin and one in the upper."""
    p = array([0.9, 0.1, 0, 0, 0], [0.3, 0.3, 0.2, 0.1, 0.1])
    low, high = (found := reliability(array(2, 1), p, FIVE, bins=2)).bins
    assert (low.count, high.count) == (9, 1)
    assert (low.predicted, low.observed) == pytest.approx((1.1 / 9, 2 / 9))
    assert (high.predicted, high.observed) == pytest.approx((0.9, 0))
    assert found.expected_error == pytest.approx((0.9 + 0.9) / 10)


def test_an_empty_bin_has_no_figures() -> None:
    found = reliability(array(1, 2), array([1, 0], [0, 1]), TWO, bins=4)
    assert [entry.count for entry in found.bins] == [2, 0, 0, 2]
    assert math.isnan(found.bins[1].predicted)
    assert math.isnan(found.bins[1].observed)


@pytest.mark.parametrize("bins", [5, 10, 13])
def test_the_table_is_that_of_scikit_learn(bins: int) -> None:
    """Some forecasts lie on the very edges of the bins."""
    truths, p = drawn(400)
    p[:50] = [0.1, 0.2, 0.4, 0.3, 0]
    observed, predicted = calibration_curve(
        (truths[:, None] == np.arange(1, 6)).ravel(), p.ravel(), n_bins=bins
    )
    filled = [entry for entry in reliability(truths, p, FIVE, bins=bins).bins if entry.count]
    assert sum(entry.count for entry in filled) == 5 * 400
    assert [entry.predicted for entry in filled] == pytest.approx(predicted)
    assert [entry.observed for entry in filled] == pytest.approx(observed)


def test_the_truths_own_distributions_are_reliable_and_others_not() -> None:
    truths, p = drawn(20_000)
    sharper = p**3 / (p**3).sum(axis=1, keepdims=True)
    flatter = p**0.3 / (p**0.3).sum(axis=1, keepdims=True)
    own, sure, unsure = (reliability(truths, q, FIVE, resamples=100) for q in (p, sharper, flatter))
    assert own.expected_error < 0.01 < 0.05 < min(sure.expected_error, unsure.expected_error)
    assert sure.bins[8].observed < 0.7 < 0.8 < sure.bins[8].predicted
    assert unsure.bins[4].observed > 0.5 > unsure.bins[4].predicted
    for name, level in {"0.5": 0.5, "0.8": 0.8, "0.9": 0.9}.items():
        assert own.coverage[name].low < level < own.coverage[name].high
        assert sure.coverage[name].high < level < unsure.coverage[name].low


def test_a_perfect_predictor() -> None:
    truths = array(1, 2, 5, 5, 3.5)
    p = np.eye(5)[[0, 1, 4, 4, 2]]
    p[4] = [0, 0, 0.5, 0.5, 0]
    found = reliability(truths, p, FIVE)
    assert found.expected_error == 0
    assert (found.bins[0].observed, found.bins[9].observed) == (0, 1)


def test_a_constant_distribution_of_the_ratings_is_reliable() -> None:
    """Reliable is not good: it says nothing of any row."""
    truths = array(1, 2, 2, 4, 5, 5, 5, 5, 3, 4)
    p = np.tile(array(0.1, 0.2, 0.1, 0.2, 0.4), (10, 1))
    assert reliability(truths, p, FIVE).expected_error == pytest.approx(0)


def test_silence_is_an_error() -> None:
    """Half of the rows are perfect and half are missing: five forecasts of 0 each, one came true.
    It costs half of what as many sure and wrong answers cost."""
    truths = array(5, 5, 4, 4)
    p = np.eye(5)[[4, 4, 3, 3]]
    silent, wrong = p.copy(), p.copy()
    silent[2:] = NAN
    wrong[2:] = np.eye(5)[0]
    found = reliability(truths, silent, FIVE)
    assert sum(entry.count for entry in found.bins) == 20
    lowest = found.bins[0]
    assert (lowest.count, lowest.predicted, lowest.observed) == (18, 0, pytest.approx(2 / 18))
    assert found.expected_error == pytest.approx(0.1)
    assert reliability(truths, wrong, FIVE).expected_error == pytest.approx(0.2)
    perfect = reliability(truths, p, FIVE).coverage["0.8"].value
    assert found.coverage["0.8"].value == pytest.approx(perfect / 2)


def test_a_half_missing_distribution_is_missing() -> None:
    found = reliability(array(1), array([0.5, NAN, 0.5, 0, 0]), FIVE)
    assert found.bins[0].count == 5
    assert found.coverage["0.9"].value == 0


def test_intervals_and_their_names() -> None:
    truths, p = drawn(200)
    found = reliability(truths, p, FIVE, levels=(0.25, 0.95), resamples=100)
    assert list(found.coverage) == ["0.25", "0.95"]
    assert found == reliability(truths, p, FIVE, levels=(0.25, 0.95), resamples=100)
    assert found != reliability(truths, p, FIVE, levels=(0.25, 0.95), resamples=100, seed=1)


@pytest.mark.parametrize(
    ("truths", "p", "reason"),
    [
        (np.zeros(0), np.zeros((0, 5)), "no rows"),
        (array(3, 4), np.eye(5)[:1], "2 truths and 1 predictions"),
        (array(3, NAN), np.eye(5)[:2], "row 2: the true rating nan"),
        (array(3, 3), np.eye(5)[:2] * array([1], [2]), "row 2: not a distribution"),
        (array(3), array([1.5, -0.5, 0, 0, 0]), "row 1: not a distribution"),
        (array(3), array([0.5, 0.5]), r"shape \(1, 2\): the scale has 5 values"),
        (array(3), array(3), r"shape \(1,\)"),
    ],
)
def test_rows_that_are_no_forecasts(truths: Any, p: Any, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        reliability(truths, p, FIVE)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"bins": 0}, "bad number of bins 0"),
        ({"levels": ()}, r"bad levels \[\]"),
        ({"levels": (0.5, 1.0)}, r"bad levels \[0.5, 1.0\]"),
    ],
)
def test_settings_out_of_range(settings: Any, reason: str) -> None:
    with pytest.raises(SettingError, match=reason):
        reliability(array(3), np.eye(5)[:1], FIVE, **settings)
