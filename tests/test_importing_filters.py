"""Repetitions, windows, k-cores: against the plainest code that does the same."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest

from r4r_graph.importing.filters import distinct_pairs, in_window, k_core, repeated


def test_repetitions() -> None:
    dice = random.Random(1)
    rows = [tuple(dice.randrange(3) for _ in range(4)) for _ in range(200)]
    users, items, times, texts = (np.array(column, dtype=np.int64) for column in zip(*rows))  # noqa: B905
    seen: set[tuple[int, ...]] = set()
    expected = [row in seen or bool(seen.add(row)) for row in rows]  # type: ignore[func-returns-value]
    assert repeated(users, items, times.astype(float), texts).tolist() == expected
    assert distinct_pairs(users, items) == len({row[:2] for row in rows})


def test_a_window_holds_its_beginning_and_not_its_end() -> None:
    times = np.array([1.0, 2.0, 3.0])
    assert in_window(times, 2.0, 3.0).tolist() == [False, True, False]
    assert in_window(times, None, None).all()
    assert in_window(times, 2.0, None).tolist() == [False, True, True]


@pytest.mark.parametrize("k", [0, 1, 2, 3, 5, 100])
def test_k_core(k: int) -> None:
    dice = random.Random(k)
    pairs = [(dice.randrange(40), int(dice.paretovariate(1)) % 30) for _ in range(150)]
    left = set(range(len(pairs)))
    while True:
        by_user = Counter(pairs[n][0] for n in left)
        by_item = Counter(pairs[n][1] for n in left)
        few = {n for n in left if by_user[pairs[n][0]] < k or by_item[pairs[n][1]] < k}
        if not few:
            break
        left -= few
    users, items = (np.array(side, dtype=np.int64) * 2**40 - 7 for side in zip(*pairs))  # noqa: B905
    assert set(np.flatnonzero(k_core(users, items, k)).tolist()) == left


def test_nothing_at_all() -> None:
    none = np.array([], dtype=np.int64)
    assert len(repeated(none, none, none.astype(float), none)) == 0
    assert len(k_core(none, none, 5)) == 0
    assert distinct_pairs(none, none) == 0
