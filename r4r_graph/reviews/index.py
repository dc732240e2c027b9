"""The index of a table of reviews: flat arrays, so that they can lie on disk and be mapped.

Ids become small integers: their places in the order of their hashes, so that a binary search finds
one and no dictionary has to be filled first. The rows are ordered by (user, time), by (item, time),
by time, and by (user, item, time). Running sums of the ratings and of their squares follow the
first three orders. A question takes a few binary searches: O(log n).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from r4r_graph.errors import SettingError
from r4r_graph.ratings import RatingStats

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[Any]
"""Whole numbers; of 32 bits where they all fit."""


@dataclass(frozen=True, slots=True)
class Texts:
    """Single texts out of an Arrow array without nulls, some times faster than by its scalars."""

    ends: memoryview
    """Where each begins, and the last one ends."""
    data: memoryview
    """UTF-8."""

    @classmethod
    def of(cls, column: pa.LargeStringArray) -> Self:
        """Those of an array; nothing is copied."""
        if not len(column):
            return cls(memoryview(b""), memoryview(b""))
        _, ends, data = column.buffers()
        texts = memoryview(b"" if data is None else data)
        return cls(memoryview(ends).cast("q")[column.offset :], texts)

    def __getitem__(self, place: int) -> str:
        return str(self.data[self.ends[place] : self.ends[place + 1]], "utf-8")


@dataclass(frozen=True, slots=True)
class Ids:
    """Distinct ids, in the order of a hash of theirs, by which one is found in a few steps."""

    texts: pa.LargeStringArray
    hashes: npt.NDArray[np.uint64]
    each: Texts

    @classmethod
    def of(cls, column: pa.ChunkedArray) -> Self:
        """Those in a column of texts."""
        distinct = pc.unique(column)
        count = len(distinct)
        hashes = np.fromiter(map(_hash, distinct.to_pylist()), np.uint64, count)
        order = np.argsort(hashes, kind="stable")
        return cls.kept(distinct.take(pa.array(order)), hashes[order])

    @classmethod
    def kept(cls, texts: pa.LargeStringArray, hashes: npt.NDArray[np.uint64]) -> Self:
        """Those that were found and ordered before."""
        return cls(texts, hashes, Texts.of(texts))

    def __len__(self) -> int:
        return len(self.texts)

    def code(self, text: str | None) -> int | None:
        """The id's place; None where it is unknown."""
        if text is None:
            return None
        wanted = np.uint64(_hash(text))
        place = int(self.hashes.searchsorted(wanted))
        while place < len(self.hashes) and self.hashes[place] == wanted:
            if self.each[place] == text:
                return place
            place += 1  # two ids may have one hash
        return None

    def codes(self, column: pa.ChunkedArray) -> Ints:
        """The place of each id in a column, (n,)."""
        return np.asarray(pc.index_in(column, value_set=self.texts).to_numpy())


@dataclass(frozen=True, slots=True)
class Timeline:
    """All reviews in the order (id, time, place in the table), for users, for items, or for all."""

    starts: Ints
    """Where each id's reviews begin in the arrays below, and the end of the last one's."""
    rows: Ints
    """Places in the table, (n,)."""
    times: Floats
    sums: Floats
    """Sum of the id's ratings up to and with this review."""
    squares: Floats

    def earlier(self, code: int | None, before: float) -> tuple[int, int]:
        """Begin and end of an id's reviews before a time; an unknown id has none.

        Raises:
            SettingError: the time is nan.
        """
        check_time(before)
        if code is None:
            return 0, 0
        start, stop = int(self.starts[code]), int(self.starts[code + 1])
        return start, start + int(self.times[start:stop].searchsorted(before))

    def stats(self, code: int | None, before: float, left_out: list[float]) -> RatingStats:
        """Statistics of an id's ratings before a time, less some of them.

        Raises:
            SettingError: the time is nan.
        """
        start, stop = self.earlier(code, before)
        if stop == start:
            return RatingStats()
        return RatingStats.from_sums(
            stop - start - len(left_out),
            float(self.sums[stop - 1]) - sum(left_out),
            float(self.squares[stop - 1]) - sum(rating**2 for rating in left_out),
        )


@dataclass(frozen=True, slots=True)
class ReviewIndex:
    """Where to look in a table of reviews."""

    user_ids: Ids
    item_ids: Ids
    users: Timeline
    items: Timeline
    everyone: Timeline
    """The same over all reviews: its only id is 0."""
    pairs: Ints
    """Each review's `user code * number of items + item code`, in the order (pair, time)."""
    pair_rows: Ints
    """Their places in the table."""
    titled: Ints
    """By place in `items`: the last place up to and with it whose review has a title; -1: none."""

    @classmethod
    def of(cls, table: pa.Table) -> Self:
        """The index of a table with the columns of `REVIEW_SCHEMA`, checked before."""
        user_ids, item_ids = Ids.of(table.column("user_id")), Ids.of(table.column("item_id"))
        return cls.put_together(user_ids, item_ids, dict(arrays(table, user_ids, item_ids)))

    @classmethod
    def put_together(cls, user_ids: Ids, item_ids: Ids, found: Mapping[str, Ints]) -> Self:
        """The index of ids and of the `arrays` by name."""

        def timeline(side: str) -> Timeline:
            return Timeline(*(found[f"{side}_{field.name}"] for field in fields(Timeline)))

        sides = timeline("users"), timeline("items"), timeline("everyone")
        return cls(user_ids, item_ids, *sides, *(found[name] for name in _ALONE))

    def own_rows(self, user: int | None, item: int | None) -> list[int]:
        """Rows of the reviews by one user of one item, the oldest first."""
        if user is None or item is None:
            return []
        pair = user * len(self.item_ids) + item
        start, stop = self.pairs.searchsorted([pair, pair + 1])
        return self.pair_rows[start:stop].tolist()  # type: ignore[no-any-return]


_SIDES = ("users", "items", "everyone")
_ALONE = ("pairs", "pair_rows", "titled")
ARRAYS = (*(f"{side}_{field.name}" for side in _SIDES for field in fields(Timeline)), *_ALONE)
"""Names of the arrays of an index."""


def arrays(table: pa.Table, user_ids: Ids, item_ids: Ids) -> Iterator[tuple[str, Ints]]:
    """Each array of a table's index with its name, one at a time: whoever writes them down need
    not hold them all."""
    ratings = table.column("rating").to_numpy()
    times = table.column("timestamp").to_numpy()
    users = user_ids.codes(table.column("user_id"))
    items = item_ids.codes(table.column("item_id"))
    by_time = np.argsort(times, kind="stable").astype(_width(len(times)))

    def rows_by(codes: Ints) -> Ints:
        return by_time[np.argsort(codes[by_time], kind="stable")]

    def timeline(side: str, rows: Ints, codes: Ints, count: int) -> Iterator[tuple[str, Ints]]:
        starts = np.searchsorted(codes[rows], np.arange(count + 1)).astype(np.int64)
        yield f"{side}_starts", starts
        yield f"{side}_rows", rows
        yield f"{side}_times", times[rows]
        yield f"{side}_sums", _running_sums(ratings[rows], starts)
        yield f"{side}_squares", _running_sums(ratings[rows] ** 2, starts)

    yield from timeline("users", rows_by(users), users, len(user_ids))
    rows = rows_by(items)
    yield from timeline("items", rows, items, len(item_ids))
    titled = pc.not_equal(table.column("title"), "").to_numpy()
    places = np.where(titled[rows], np.arange(len(rows), dtype=rows.dtype), -1)
    yield "titled", np.maximum.accumulate(places)
    yield from timeline("everyone", by_time, np.zeros(len(times), np.int8), 1)
    pairs = users.astype(np.int64) * len(item_ids) + items
    rows = rows_by(pairs)
    yield "pairs", pairs[rows]
    yield "pair_rows", rows


def check_time(before: float) -> None:
    """Refuse what no time can be compared with.

    Raises:
        SettingError: it is nan.
    """
    if math.isnan(before):
        raise SettingError("bad time nan: 'before' must be a time in unix seconds")


def check_limit(limit: int) -> None:
    """Refuse a negative number of reviews.

    Raises:
        SettingError: it is one.
    """
    if limit < 0:
        raise SettingError(f"bad history limit {limit}: must be 0 or more")


def _hash(text: str) -> int:
    """64 bits of an id; half a surrogate pair has some, too, though no table holds it."""
    data = text.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def _width(count: int) -> type[np.signedinteger[Any]]:
    return np.int32 if count < 2**31 else np.int64


def _running_sums(values: Floats, starts: Ints) -> Floats:
    """Cumulated sums that begin anew at each start, as exact as if each were summed alone: the
    rounding errors of millions of rows must not reach the few ratings of a single user."""
    if not len(values):
        return values
    firsts = starts[:-1]
    steps = values.copy()
    steps[firsts[1:]] -= np.add.reduceat(values, firsts)[:-1]
    sums = np.cumsum(steps)
    drift: Floats = np.repeat(sums[firsts] - values[firsts], np.diff(starts))
    return sums - drift
