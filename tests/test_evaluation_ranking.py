"""The ranking view against values worked out by hand, scikit-learn and all orders of a list."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import ndcg_score

from r4r_graph.errors import DataError, SettingError
from r4r_graph.evaluation.ranking import ranking, ranking_differences
from r4r_graph.ratings import RatingScale

FIVE = RatingScale()
NAN = math.nan
LOG3 = math.log2(3)


def array(*values: Any) -> Any:
    return np.array(values, dtype=np.float64)


def figures(users: Any, truths: Any, points: Any, **settings: Any) -> list[tuple[float, float]]:
    """NDCG and hit rate, one pair a k."""
    found = ranking(users, array(*truths), array(*points), FIVE, resamples=20, **settings)
    return [(scores.ndcg.value, scores.hit_rate.value) for scores in found]


def by_orders(truths: list[float], points: list[float], k: int, liked: float) -> Any:
    """NDCG and hit rate of one user, the mean over all orders that put no higher prediction
    below a lower one."""
    best = sum((t - 1) / math.log2(at + 2) for at, t in enumerate(sorted(truths)[: -k - 1 : -1]))
    found = []
    for order in itertools.permutations(range(len(truths))):
        if all(points[a] >= points[b] for a, b in itertools.pairwise(order)):
            top = [truths[at] for at in order[:k]]
            gained = sum((t - 1) / math.log2(at + 2) for at, t in enumerate(top))
            found.append((gained / best, any(t >= liked for t in top)))
    return np.mean(found, axis=0)


# By hand -----------------------------------------------------------------------------------------


def test_one_user_by_hand() -> None:
    """Ratings 5, 2, 3 ranked 2, 5, 3: gains 1, 4, 2 where 4, 2, 1 is best."""
    found = figures(["ann"] * 3, [5, 2, 3], [3, 4, 1], ks=(1, 2, 3, 10))
    best = 4 + 2 / LOG3 + 1 / 2
    assert found == [
        pytest.approx((1 / 4, 0)),
        pytest.approx(((1 + 4 / LOG3) / (4 + 2 / LOG3), 1)),
        pytest.approx(((1 + 4 / LOG3 + 2 / 2) / best, 1)),
        pytest.approx(((1 + 4 / LOG3 + 2 / 2) / best, 1)),
    ]


def test_users_count_alike_and_rows_may_stand_in_any_order() -> None:
    """Ann's two rows are ranked wrong, Bob's three are ranked right: the mean of two users."""
    users, truths, points = ["bob", "ann", "bob", "ann", "bob"], [5, 5, 1, 3, 2], [9, 1, 1, 2, 3]
    assert figures(users, truths, points, ks=(1,)) == [pytest.approx(((0.5 + 1) / 2, 0.5))]
    again = [4, 1, 3, 0, 2]
    moved = [[column[at] for at in again] for column in (users, truths, points)]
    assert figures(*moved, ks=(1, 3)) == figures(users, truths, points, ks=(1, 3))


def test_who_is_left_out() -> None:
    """One row, and equal ratings: no order is wrong. Dan likes nothing and Eve everything: they
    have a best order, but no hit to miss."""
    users = ["ann", "bob", "bob", "cat", "cat", "dan", "dan", "eve", "eve"]
    truths = [5, 3, 3, 5, 1, 1, 2, 4, 5]
    right = array(*truths)
    [found] = ranking(users, right, right, FIVE, ks=(1,))
    assert (found.k, found.users) == (1, 3)
    assert found.ndcg.value == found.hit_rate.value == 1
    [found] = ranking(users, right, -right, FIVE, ks=(1,))
    assert found.ndcg.value == pytest.approx((0 / 4 + 0 / 1 + 3 / 4) / 3)
    assert found.hit_rate.value == 0


def test_nobody_to_rank() -> None:
    same = array(3, 3, 5)
    assert ranking(["ann", "ann", "bob"], same, same, FIVE) == ()
    assert ranking_differences(["ann", "ann", "bob"], same, same, same, FIVE) == ()
    assert ranking([], np.zeros(0), np.zeros(0), FIVE) == ()


def test_nobody_who_could_be_missed() -> None:
    [found] = ranking(["ann", "ann"], array(1, 2), array(1, 2), FIVE, ks=(1,))
    assert (found.users, found.ndcg.value) == (1, 1.0)
    assert math.isnan(found.hit_rate.value)


def test_what_is_liked() -> None:
    users, truths, points = ["ann"] * 3, [3, 3.9, 4], [3, 2, 1]
    assert [hit for _, hit in figures(users, truths, points, ks=(1, 2, 3))] == [0, 0, 1]
    assert [hit for _, hit in figures(users, truths, points, ks=(1, 2), liked=3.5)] == [0, 1]
    ten = RatingScale(tuple(map(float, range(11))))
    found = ranking(users, array(7, 7.4, 7.5), array(*points), ten, ks=(2, 3))
    assert [scores.hit_rate.value for scores in found] == [0, 1]


def test_what_is_off_the_scale_is_its_end() -> None:
    users, points = ["ann"] * 3, [1, 3, 2]
    assert figures(users, [0, 9, 3], points) == figures(users, [1, 5, 3], points)
    assert ranking(["ann", "ann"], array(5, 9), array(1, 2), FIVE) == ()


# Ties and missing predictions --------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 3, 5, 7])
def test_ties_are_the_mean_over_all_orders(k: int) -> None:
    dice = np.random.default_rng(k)
    for _ in range(10):
        truths = [1.0, 5.0, *dice.integers(1, 6, size=4).astype(float).tolist()]
        points = dice.integers(0, 3, size=6).astype(float).tolist()
        found = figures(["ann"] * 6, truths, points, ks=(k,))
        assert found == [pytest.approx(by_orders(truths, points, k, liked=4))]


@pytest.mark.parametrize("k", [1, 2, 4])
def test_a_constant_is_a_shuffled_list(k: int) -> None:
    truths = [5.0, 1.0, 2.0, 4.0, 2.5]
    expected = by_orders(truths, [0.0] * 5, k, liked=4)
    assert figures(["ann"] * 5, truths, [3.3] * 5, ks=(k,)) == [pytest.approx(expected)]
    assert expected[1] == pytest.approx(1 - math.comb(3, k) / math.comb(5, k))


def test_a_row_without_a_prediction_is_last() -> None:
    users, truths = ["ann"] * 4, [5, 4, 1, 2]
    for void in (NAN, math.inf, -math.inf):
        found = figures(users, truths, [void, void, -7, 1], ks=(1, 2, 3))
        assert found == figures(users, truths, [-9, -9, -7, 1], ks=(1, 2, 3))
        assert [hit for _, hit in found] == [0, 0, 1]


def test_a_predictor_that_is_silent_on_half_the_rows_is_seen() -> None:
    """It would be perfect with the rows left out."""
    users, truths = ["ann", "ann", "bob", "bob"], array(5, 1, 4, 2)
    points = np.where(array(1, 0, 1, 0) > 0, NAN, truths)
    [found] = ranking(users, truths, points, FIVE, ks=(1,))
    assert found.users == 2
    assert found.ndcg.value == pytest.approx((0 / 4 + 1 / 3) / 2)
    assert found.hit_rate.value == 0


# scikit-learn ------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 3, 5, 10, 50])
def test_ndcg_is_that_of_scikit_learn(k: int) -> None:
    dice = np.random.default_rng(k)
    users = dice.integers(0, 60, size=500)
    truths = dice.choice([1, 1.5, 2, 3, 4, 5], size=500)
    points = dice.integers(0, 6, size=500).astype(float)
    alone = [
        ndcg_score([truths[users == user] - 1], [points[users == user]], k=k)
        for user in range(60)
        if len(set(truths[users == user])) > 1
    ]
    [found] = ranking([f"u{user}" for user in users], truths, points, FIVE, ks=(k,), resamples=50)
    assert found.users == len(alone)
    assert found.ndcg.value == pytest.approx(np.mean(alone))


# Differences -------------------------------------------------------------------------------------


def crowd(users: int = 80, each: int = 6, seed: int = 0) -> tuple[list[str], Any, Any]:
    dice = np.random.default_rng(seed)
    names = [f"u{at // each}" for at in range(users * each)]
    truths = dice.integers(1, 6, size=users * each).astype(float)
    return names, truths, dice.normal(size=users * each)


def test_differences_are_those_of_the_figures() -> None:
    names, truths, noise = crowd()
    good, bad = truths + noise, truths + 4 * noise
    first, second = (ranking(names, truths, points, FIVE) for points in (good, bad))
    found = ranking_differences(names, truths, good, bad, FIVE)
    assert len(found) == 4
    for scores, others, difference in zip(first, second, found, strict=True):
        assert difference.value == pytest.approx(scores.ndcg.value - others.ndcg.value)
        assert difference.low > 0
    back = ranking_differences(names, truths, bad, good, FIVE)
    assert [d.value for d in back] == pytest.approx([-d.value for d in found])


def test_differences_are_paired_by_user() -> None:
    """The same order twice has no noise at all, though its own figure has; and noise against other
    noise shows nothing."""
    names, truths, noise = crowd()
    [same] = ranking_differences(names, truths, noise, 2 * noise + 1, FIVE, ks=(3,))
    assert (same.value, same.low, same.high) == (0, 0, 0)
    [own] = ranking(names, truths, noise, FIVE, ks=(3,))
    assert own.ndcg.high - own.ndcg.low > 0.02
    other = np.random.default_rng(9).normal(size=len(noise))
    [nothing] = ranking_differences(names, truths, noise, other, FIVE, ks=(3,))
    assert not nothing.excludes_zero


def test_a_perfect_predictor_and_a_constant_one() -> None:
    names, truths, _ = crowd()
    constant = np.full(len(truths), 3.0)
    for scores in ranking(names, truths, truths, FIVE):
        assert scores.ndcg.value == scores.ndcg.low == pytest.approx(1.0)
        assert scores.hit_rate.value == scores.hit_rate.low == pytest.approx(1.0)
    for difference in ranking_differences(names, truths, truths, constant, FIVE):
        assert difference.low > 0


def test_a_user_is_one_case_however_many_rows_he_has() -> None:
    """Intervals are over users: twice the rows of a user in the same order add no certainty."""
    names, truths, noise = crowd(users=30, each=2)
    [once] = ranking(names, truths, noise, FIVE, ks=(1,))
    [twice] = ranking(names * 2, np.tile(truths, 2), np.tile(noise, 2), FIVE, ks=(1,))
    assert twice == once


def test_many_rows_take_no_time() -> None:
    names, truths, noise = crowd(users=20_000, each=5)
    found = ranking(names, truths, np.round(noise), FIVE, resamples=2)
    assert found[0].users > 19_000


# What cannot be ranked ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("users", "truths", "points", "reason"),
    [
        (["a"], array(1, 2), array(1, 2), "1 users and 2 truths"),
        (["a", "a"], array(1, 2), array(1), "2 truths and 1 predictions"),
        (["a", "a"], array(1, 1), array(1), "2 truths and 1 predictions"),
        (["a", "a"], array(1, NAN), array(1, 2), "row 2: the true rating nan"),
    ],
)
def test_rows_that_do_not_match(users: Any, truths: Any, points: Any, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        ranking(users, truths, points, FIVE)
    with pytest.raises(DataError, match=reason):
        ranking_differences(users, truths, points, points, FIVE)


def test_a_rank_below_one() -> None:
    with pytest.raises(SettingError, match=r"bad ranks \[3, 0\]"):
        ranking(["a", "a"], array(1, 2), array(1, 2), FIVE, ks=(3, 0))
