"""Which reviews are kept: no repetitions, a window of time, a k-core.

Users, items and texts are 64-bit numbers here, one a review (see `importer`).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Flags = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


def repeated(users: Ints, items: Ints, times: Floats, texts: Ints) -> Flags:
    """Which rows repeat an earlier row in everything."""
    order = np.lexsort((texts, times, items, users))  # stable: the first of equals stays first
    again = np.ones(max(0, len(order) - 1), dtype=np.bool_)
    for column in (users, items, times, texts):
        ordered = column[order]
        again &= ordered[1:] == ordered[:-1]
    flags = np.zeros(len(order), dtype=np.bool_)
    flags[order[1:][again]] = True
    return flags


def distinct_pairs(users: Ints, items: Ints) -> int:
    """How many pairs of a user and an item there are."""
    order = np.lexsort((items, users))
    users, items = users[order], items[order]
    return int(np.count_nonzero((np.diff(users) != 0) | (np.diff(items) != 0))) + bool(len(order))


def in_window(times: Floats, since: float | None, until: float | None) -> Flags:
    """Which times (unix seconds) lie in [since, until)."""
    flags = np.ones(len(times), dtype=np.bool_)
    if since is not None:
        flags &= times >= since
    if until is not None:
        flags &= times < until
    return flags


def k_core(users: Ints, items: Ints, k: int) -> Flags:
    """Which reviews are left when users and items with fewer than `k` reviews are taken away,
    again and again until there are none: the largest such set."""
    kept = np.ones(len(users), dtype=np.bool_)
    if k <= 1 or not len(users):
        return kept
    sides = [np.unique(side, return_inverse=True)[1] for side in (users, items)]
    sizes = [int(side.max()) + 1 for side in sides]
    left = -1
    while left != (left := int(kept.sum())):
        for side, size in zip(sides, sizes, strict=True):
            kept &= (np.bincount(side[kept], minlength=size) >= k)[side]
    return kept
