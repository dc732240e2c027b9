"""Metrics against values worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from r4r_graph.errors import DataError
from r4r_graph.evaluation import (
    Estimate,
    bootstrap,
    covered,
    errors,
    likelihood_losses,
    mean,
    paired_difference,
    readings,
    root_mean_square,
    score,
    score_points,
    soft_targets,
    stack,
)
from r4r_graph.ratings import READOUTS, RatingDistribution, RatingScale

FIVE = RatingScale()
TWO = RatingScale((1.0, 2.0))
NAN = math.nan
NONE = [NAN] * 5


def array(*values: Any) -> Any:
    return np.array(values, dtype=np.float64)


def certain(*ratings: int) -> Any:
    return np.eye(5)[array(*ratings).astype(int) - 1]


# By hand -----------------------------------------------------------------------------------------


def test_errors_by_hand() -> None:
    found = score_points(array(1, 2, 5, 4.5), array(2, 2, 3, 4), FIVE)
    assert (found.rows, found.missing) == (4, 0)
    assert found.mae.value == pytest.approx((1 + 0 + 2 + 0.5) / 4)
    assert found.rmse.value == pytest.approx(math.sqrt((1 + 0 + 4 + 0.25) / 4))


def test_read_outs_by_hand() -> None:
    """Half of the first row's mass lies up to 4.5, where the cell of 4 ends, and half on 5; more
    than half of the second's on 1."""
    p = array([0, 0.1, 0.2, 0.2, 0.5], [0.6, 0.4, 0, 0, 0], NONE)
    found = readings(p, FIVE)
    assert found["mean"][:2] == pytest.approx([4.1, 1.4])
    assert found["mode"][:2].tolist() == [5, 1]
    alone = [RatingDistribution(FIVE, tuple(row)).median for row in p[:2].tolist()]
    assert found["median"][:2].tolist() == alone == pytest.approx([4.75, 1.0])
    assert all(math.isnan(found[readout][2]) for readout in READOUTS)


def test_each_read_out_has_its_own_error() -> None:
    p = array([0, 0.35, 0.4, 0, 0.25])
    found = score(array(4.0), p, FIVE)
    assert found.mae["mean"].value == pytest.approx(4 - 3.15)
    assert found.mae["mode"].value == 1
    assert found.mae["median"].value == pytest.approx(4 - (2.5 + 0.15 / 0.4))
    assert found.rmse["mean"].value == pytest.approx(4 - 3.15)


def test_likelihoods_by_hand() -> None:
    p = array([0.1, 0.2, 0.3, 0.3, 0.1])
    p = np.repeat(p, 3, axis=0)
    losses = likelihood_losses(array(2, 3.25, 5), p, FIVE)
    by_hand = [-math.log(0.2), -(0.75 * math.log(0.3) + 0.25 * math.log(0.3)), -math.log(0.1)]
    assert losses == pytest.approx(by_hand)
    mixed = likelihood_losses(array(1.25), array([0.4, 0.6, 0, 0, 0]), FIVE)
    assert mixed == pytest.approx([-(0.75 * math.log(0.4) + 0.25 * math.log(0.6))])


def test_a_likelihood_of_zero_costs_much_but_not_everything() -> None:
    [loss] = likelihood_losses(array(1), certain(5), FIVE)
    assert loss == pytest.approx(-math.log(1e-6))


def test_coverage_by_hand() -> None:
    """The central 80 % of (0.05, 0.15, 0.6, 0.2): 1 is outside, 2 owns 0.05 to 0.2 of which 0.1 to
    0.2 is inside, 3 is inside, 4 owns 0.8 to 1 of which half is inside; 5 has no stretch at all."""
    p = np.repeat(array([0.05, 0.15, 0.6, 0.2, 0.0]), 6, axis=0)
    found = covered(array(1, 2, 3, 4, 5, 2.5), p, FIVE)
    assert found == pytest.approx([0, 2 / 3, 1, 0.5, 0, (2 / 3 + 1) / 2])


def test_a_gap_inside_the_interval_is_inside() -> None:
    p = array([0.5, 0, 0.5, 0, 0])
    assert covered(array(2.0), p, FIVE) == pytest.approx([1.0])


def test_calibrated_distributions_cover_four_of_five() -> None:
    dice = np.random.default_rng(0)
    p = dice.dirichlet([0.5] * 5, size=40_000)
    truths = 1.0 + (p.cumsum(axis=1) < dice.random((len(p), 1))).sum(axis=1)
    assert covered(truths, p, FIVE).mean() == pytest.approx(0.8, abs=0.005)
    sharper = p**3 / (p**3).sum(axis=1, keepdims=True)
    flatter = p**0.3 / (p**0.3).sum(axis=1, keepdims=True)
    assert covered(truths, sharper, FIVE).mean() < 0.72
    assert covered(truths, flatter, FIVE).mean() > 0.83


def test_soft_targets_lie_on_the_two_neighbours() -> None:
    found = soft_targets(array(4.0, 3.25, 0.5, 9.0), FIVE)
    expected = [[0, 0, 0, 1, 0], [0, 0, 0.75, 0.25, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 1]]
    assert found.tolist() == expected
    uneven = RatingScale((0.5, 1.0, 3.0, 10.0))
    for scale in (FIVE, TWO, uneven):
        truths = array(*np.linspace(0.2, 11, 55), *scale.values)
        inside = np.clip(truths, scale.low, scale.high)
        assert soft_targets(truths, scale) @ np.array(scale.values) == pytest.approx(inside)


# Planted predictors ------------------------------------------------------------------------------


def test_a_perfect_predictor() -> None:
    truths = array(1, 2, 3, 4, 5, 5)
    found = score(truths, certain(1, 2, 3, 4, 5, 5), FIVE)
    for readout in READOUTS:
        assert found.mae[readout] == found.rmse[readout] == Estimate(0.0, 0.0, 0.0)
    assert found.nll.value == 0
    assert found.missing == 0


def test_one_that_fails_on_half_of_the_rows_is_seen() -> None:
    """A guard: answers that cannot be used are neither perfect nor left out of the numerator."""
    truths = array(5, 5, 5, 5)
    found = score(truths, array([0, 0, 0, 0, 1], NONE, [0, 0, 0, 0, 1], NONE), FIVE)
    assert (found.rows, found.missing) == (4, 2)
    for readout in READOUTS:
        assert found.mae[readout].value == pytest.approx(2.0)
        assert found.rmse[readout].value == pytest.approx(math.sqrt(8))
    assert found.nll.value == pytest.approx(-math.log(1e-6) / 2)
    assert found.coverage.value == pytest.approx(0.4)
    points = score_points(truths, array(5, NAN, 5, math.inf), FIVE)
    assert (points.rows, points.missing, points.mae.value) == (4, 2, pytest.approx(2.0))


@pytest.mark.parametrize("truth", [1.0, 3.0, 5.0])
def test_no_answer_is_never_better_than_any_answer(truth: float) -> None:
    nothing, answers = array(NONE), np.vstack([certain(1, 2, 3, 4, 5), array([0.2] * 5)])
    truths = np.full(len(answers), truth)
    silent = np.repeat(nothing, len(answers), axis=0)
    points, void = readings(answers, FIVE), np.full(len(answers), NAN)
    for readout in READOUTS:
        worst = errors(truths, void, FIVE)
        assert (worst >= errors(truths, points[readout], FIVE)).all()
        assert (worst == 4).all()
    losses = likelihood_losses(truths, answers, FIVE)
    assert (likelihood_losses(truths, silent, FIVE) >= losses - 1e-12).all()
    assert (covered(truths, silent, FIVE) == 0).all()


def test_a_half_missing_distribution_is_missing() -> None:
    found = score(array(1.0), array([0.5, NAN, 0.5, 0, 0]), FIVE)
    assert (found.missing, found.mae["mean"].value, found.coverage.value) == (1, 4.0, 0.0)
    assert found.nll.value == pytest.approx(-math.log(1e-6))


def test_nothing_is_ever_nan() -> None:
    found = score(array(3, 4), array(NONE, NONE), FIVE).to_dict()
    figures = [found["nll"], found["coverage"], *found["mae"].values(), *found["rmse"].values()]
    assert all(math.isfinite(value) for figure in figures for value in figure.values())


@pytest.mark.parametrize(
    ("truths", "p", "reason"),
    [
        (np.zeros(0), np.zeros((0, 5)), "no rows"),
        (array(3, 4), certain(3), "2 truths and 1 predictions"),
        (array(3, NAN), certain(3, 3), "row 2: the true rating nan"),
        (array(3, math.inf), certain(3, 3), "row 2: the true rating inf"),
        (array(3, 3), array([0, 0, 1, 0, 0], [0, 0, 2, 0, 0]), "row 2: not a distribution"),
    ],
)
def test_rows_that_cannot_be_scored(truths: Any, p: Any, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        score(truths, p, FIVE)


def test_stacked_distributions() -> None:
    one = RatingDistribution(TWO, (0.25, 0.75))
    rows = stack([one, None], TWO)
    assert rows[0].tolist() == [0.25, 0.75]
    assert np.isnan(rows[1]).all()
    with pytest.raises(DataError, match="row 1: a distribution over another scale"):
        stack([one], FIVE)


# Intervals ---------------------------------------------------------------------------------------


def test_the_interval_of_a_mean_is_that_of_theory() -> None:
    values = np.random.default_rng(1).normal(3.0, 2.0, size=400)
    found = bootstrap(mean, values)
    half = 1.96 * values.std() / math.sqrt(400)
    assert found.value == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - half, abs=0.03)
    assert found.high == pytest.approx(values.mean() + half, abs=0.03)


def test_intervals_hold_what_they_promise() -> None:
    dice = np.random.default_rng(2)
    hits = 0
    for seed in range(200):
        found = bootstrap(mean, dice.exponential(1.0, size=120), seed=seed, resamples=400)
        hits += found.low <= 1.0 <= found.high
    assert 0.89 <= hits / 200 <= 0.98


def test_one_seed_repeats_and_two_differ() -> None:
    values = np.random.default_rng(3).normal(size=50)
    assert bootstrap(mean, values, seed=1) == bootstrap(mean, values, seed=1)
    assert bootstrap(mean, values, seed=1) != bootstrap(mean, values, seed=2)


def test_memory_bounds_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(3).normal(size=50)
    whole = bootstrap(root_mean_square, values)
    monkeypatch.setattr("r4r_graph.evaluation.metrics._AT_ONCE", 333)
    assert bootstrap(root_mean_square, values) == whole


def test_pairs_are_resampled_together() -> None:
    """Two noisy columns that differ by a constant: their difference has no noise at all."""
    first = np.random.default_rng(4).normal(0, 10, size=100)
    found = paired_difference(first + 0.5, first)
    assert (found.value, found.low, found.high) == pytest.approx((0.5, 0.5, 0.5))
    assert found.excludes_zero
    unpaired = bootstrap(mean, first)
    assert unpaired.high - unpaired.low > 2


def test_a_difference_of_roots_is_no_root_of_differences() -> None:
    first, second = array(3, 4), array(1, 1)
    found = paired_difference(first, second, root_mean_square)
    assert found.value == pytest.approx(math.sqrt(12.5) - 1)
    assert not paired_difference(array(1, -1), array(0, 0)).excludes_zero
    assert paired_difference(array(0, 0), array(1, 1)).excludes_zero


def test_columns_that_do_not_pair() -> None:
    with pytest.raises(DataError, match=r"columns of \[2, 1\] rows"):
        paired_difference(array(1, 2), array(1))
    with pytest.raises(DataError, match=r"columns of \[0\] rows"):
        bootstrap(mean, np.zeros(0))


# Against other libraries -------------------------------------------------------------------------


def some_points(rows: int = 200) -> tuple[Any, Any, Any]:
    dice = np.random.default_rng(5)
    truths = dice.integers(1, 6, rows).astype(float)
    return truths, *(np.clip(truths + dice.normal(0, s, rows), 1, 5) for s in (0.7, 1.0))


def test_errors_are_those_of_scikit_learn() -> None:
    from sklearn.metrics import log_loss, mean_absolute_error, root_mean_squared_error

    truths, points, _ = some_points()
    scores = score_points(truths, points, FIVE, resamples=10)
    assert scores.mae.value == pytest.approx(mean_absolute_error(truths, points))
    assert scores.rmse.value == pytest.approx(root_mean_squared_error(truths, points))
    shares = np.random.default_rng(6).dirichlet(np.ones(5), len(truths))
    nll = score(truths, shares, FIVE, resamples=10).nll.value
    assert nll == pytest.approx(log_loss(truths, shares, labels=[1, 2, 3, 4, 5]))


def test_intervals_are_those_of_scipy() -> None:
    """Two bootstraps draw different rows; with many resamples their ends agree closely."""
    from scipy import stats

    truths, points, others = some_points()
    wrong, worse = errors(truths, points, FIVE), errors(truths, others, FIVE)
    mine = paired_difference(wrong, worse, root_mean_square, resamples=8000)

    def difference(a: Any, b: Any, axis: int = -1) -> Any:
        return np.sqrt(np.mean(a * a, axis=axis)) - np.sqrt(np.mean(b * b, axis=axis))

    theirs = stats.bootstrap(
        (wrong, worse), difference, paired=True, method="percentile", n_resamples=8000,
        vectorized=True, rng=np.random.default_rng(7),
    ).confidence_interval  # fmt: skip
    width = theirs.high - theirs.low
    assert mine.value == pytest.approx(difference(wrong, worse))
    assert mine.low == pytest.approx(theirs.low, abs=0.04 * width)
    assert mine.high == pytest.approx(theirs.high, abs=0.04 * width)
