"""Reviews in an Arrow table, indexed once.

The index is built with numpy: ids become small integers, and the rows are ordered by
(user, time), by (item, time) and by (user, item, time). Running sums of the ratings and of their
squares follow the first two orders. A question then takes a few binary searches and reads from
the table only the texts of the reviews that it returns: O(log n + limit).
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from r4r_graph.errors import DataError, SettingError
from r4r_graph.ratings import RatingStats
from r4r_graph.schema import Item, Review, unix_seconds

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

REVIEW_SCHEMA = pa.schema(
    {
        "user_id": pa.large_string(),
        "item_id": pa.large_string(),
        "title": pa.large_string(),
        "rating": pa.float64(),
        "timestamp": pa.float64(),
        "review": pa.large_string(),
    }
)
"""The standard columns of a table of reviews; `timestamp` in unix seconds."""


_EVERYONE = ""
"""No user has this id: ids are never empty."""


class TableReviewSource:
    """A `ReviewSource` over an Arrow table.

    Reviews with the same timestamp keep the order they have in the table. The source is read-only
    once built, so threads may share it. `len()` is the number of reviews, and iterating gives all
    of them in the table's order.
    """

    def __init__(self, table: pa.Table, items: Mapping[str, Item] | None = None) -> None:
        """Index a table.

        Args:
            table: Has the columns of `REVIEW_SCHEMA` (others are ignored). Texts and ids may be
                of any string type, dictionary-encoded too, or whole numbers. Numbers may be of
                any width. Titles and reviews may be null.
            items: The item catalogue, by item id.

        Raises:
            DataError: a column is missing or not of such a type, an id is null or empty, or a
                rating or a timestamp is null, not finite or in milliseconds.
        """
        missing = [name for name in REVIEW_SCHEMA.names if name not in table.column_names]
        if missing:
            raise DataError(
                f"the table has no column {', '.join(missing)}; it has "
                f"{', '.join(table.column_names) or 'none at all'}"
            )
        self._items = dict(items or {})
        self._ratings = _finite(table, "rating")
        self._times = _finite(table, "timestamp")
        if len(self._times):
            unix_seconds(float(self._times.min()))
            unix_seconds(float(self._times.max()))
        titles = column_of_texts(table, "title")
        self._titles = _Texts.of(titles)
        self._texts = _Texts.of(column_of_texts(table, "review"))
        user_ids, self._user_codes = _encode(table, "user_id")
        item_ids, self._item_codes = _encode(table, "item_id")

        by_time = np.argsort(self._times, kind="stable")
        self._users = _Side.of(user_ids, self._user_codes, by_time, self._times, self._ratings)
        self._rated = _Side.of(item_ids, self._item_codes, by_time, self._times, self._ratings)
        one = np.zeros(len(self._ratings), dtype=np.int64)
        self._all = _Side.of([_EVERYONE], one, by_time, self._times, self._ratings)
        pairs = self._user_codes * len(item_ids) + self._item_codes
        self._pair_rows = by_time[np.argsort(pairs[by_time], kind="stable")]
        self._pairs = pairs[self._pair_rows]

        titled = pc.fill_null(pc.not_equal(titles, ""), False).to_numpy()
        places = np.where(titled[self._rated.rows], np.arange(len(self)), -1)
        self._last_titled = np.maximum.accumulate(places)

    @classmethod
    def from_reviews(cls, reviews: Iterable[Review], items: Iterable[Item] = ()) -> Self:
        """A source of the reviews given, with a catalogue of the items given.

        Raises:
            DataError: a review without an id, or with a rating or timestamp that is not finite.
        """
        rows = [(r.user_id, r.item_id, r.title, r.rating, r.timestamp, r.text) for r in reviews]
        columns = list(zip(*rows, strict=True)) or [()] * len(REVIEW_SCHEMA)
        arrays = [pa.array(c, f.type) for c, f in zip(columns, REVIEW_SCHEMA, strict=True)]
        return cls(pa.table(arrays, schema=REVIEW_SCHEMA), {i.item_id: i for i in items})

    def __len__(self) -> int:
        return len(self._ratings)

    def __iter__(self) -> Iterator[Review]:
        return map(self._review, range(len(self)))

    def user_ids(self) -> list[str]:
        """Everyone who wrote a review, by first appearance in the table."""
        return list(self._users.ids)

    def item_ids(self) -> list[str]:
        """All items that are known: the reviewed ones by first appearance, then the others."""
        return list(dict.fromkeys([*self._rated.ids, *self._items]))

    def user_history(
        self, user_id: str, before: float, limit: int, *, without_item: str | None = None
    ) -> list[Review]:
        """The user's latest reviews before a time, oldest first; see `ReviewSource`."""
        own = self._own_rows(user_id, without_item, before)
        return self._history(self._users, user_id, before, limit, own)

    def item_history(
        self, item_id: str, before: float, limit: int, *, without_user: str | None = None
    ) -> list[Review]:
        """The latest reviews of an item before a time, oldest first; see `ReviewSource`."""
        own = self._own_rows(without_user, item_id, before)
        return self._history(self._rated, item_id, before, limit, own)

    def user_stats(
        self, user_id: str, before: float, *, without_item: str | None = None
    ) -> RatingStats:
        """Statistics of all ratings by the user before a time; see `ReviewSource`."""
        own = self._own_rows(user_id, without_item, before)
        return self._users.stats(user_id, before, self._ratings[own])

    def item_stats(
        self, item_id: str, before: float, *, without_user: str | None = None
    ) -> RatingStats:
        """Statistics of all ratings of an item before a time; see `ReviewSource`."""
        own = self._own_rows(without_user, item_id, before)
        return self._rated.stats(item_id, before, self._ratings[own])

    def overall_stats(
        self, before: float, *, without_pair: tuple[str, str] | None = None
    ) -> RatingStats:
        """Statistics of all ratings before a time; see `ReviewSource`."""
        user_id, item_id = without_pair or (None, None)
        own = self._own_rows(user_id, item_id, before)
        return self._all.stats(_EVERYONE, before, self._ratings[own])

    def knows_user(self, user_id: str) -> bool:
        """Whether the user wrote any review, at whatever time."""
        return user_id in self._users.codes

    def knows_item(self, item_id: str) -> bool:
        """Whether the item has any review, at whatever time, or is in the item catalogue."""
        return item_id in self._rated.codes or item_id in self._items

    def item(self, item_id: str, before: float | None) -> Item:
        """The catalogue's entry, if need be with a title from a review; see `ReviewSource`."""
        entry = self._items.get(item_id, Item(item_id))
        for moment in (math.inf if before is None else before, math.inf):
            start, stop = self._rated.earlier(item_id, moment)
            if entry.title:
                break
            place = self._last_titled[stop - 1] if stop > start else -1
            if place >= start:
                return replace(entry, title=self._titles.at(int(self._rated.rows[place])))
        return entry

    def _history(
        self, side: _Side, name: str, before: float, limit: int, own: Ints
    ) -> list[Review]:
        if limit < 0:
            raise SettingError(f"bad history limit {limit}: must be 0 or more")
        start, stop = side.earlier(name, before)
        left_out = set(own.tolist())
        window = side.rows[max(start, stop - limit - len(left_out)) : stop].tolist()
        kept = [row for row in window if row not in left_out]
        return [self._review(row) for row in kept[max(0, len(kept) - limit) :]]

    def _own_rows(self, user_id: str | None, item_id: str | None, before: float) -> Ints:
        """Rows of one pair's reviews before a time; none where either side is None or unknown."""
        user = self._users.codes.get(user_id) if user_id is not None else None
        item = self._rated.codes.get(item_id) if item_id is not None else None
        if user is None or item is None:
            return self._pair_rows[:0]
        pair = user * len(self._rated.ids) + item
        start, stop = np.searchsorted(self._pairs, [pair, pair + 1])
        rows = self._pair_rows[start:stop]
        return rows[: np.searchsorted(self._times[rows], before)]

    def _review(self, row: int) -> Review:
        return Review(
            user_id=self._users.ids[self._user_codes[row]],
            item_id=self._rated.ids[self._item_codes[row]],
            rating=float(self._ratings[row]),
            timestamp=float(self._times[row]),
            title=self._titles.at(row),
            text=self._texts.at(row),
        )


@dataclass(frozen=True, slots=True)
class _Side:
    """All reviews in the order (id, time, place in the table), for users or for items."""

    ids: list[str]
    codes: dict[str, int]
    """Place of each id in `ids`."""
    starts: Ints
    """Where each id's reviews begin in the arrays below, and the end of the last one's."""
    rows: Ints
    times: Floats
    sums: Floats
    """Sum of the id's ratings up to and with this review."""
    squares: Floats

    @classmethod
    def of(
        cls, ids: list[str], row_codes: Ints, by_time: Ints, times: Floats, ratings: Floats
    ) -> Self:
        """The index, given each row's code and the rows in time order."""
        rows = by_time[np.argsort(row_codes[by_time], kind="stable")]
        starts = np.searchsorted(row_codes[rows], np.arange(len(ids) + 1)).astype(np.int64)
        return cls(
            ids=ids,
            codes={name: code for code, name in enumerate(ids)},
            starts=starts,
            rows=rows,
            times=times[rows],
            sums=_running_sums(ratings[rows], starts),
            squares=_running_sums(ratings[rows] ** 2, starts),
        )

    def earlier(self, name: str, before: float) -> tuple[int, int]:
        """Begin and end of the id's reviews before a time."""
        if math.isnan(before):
            raise SettingError("bad time nan: 'before' must be a time in unix seconds")
        code = self.codes.get(name)
        if code is None:
            return 0, 0
        start, stop = int(self.starts[code]), int(self.starts[code + 1])
        return start, start + int(np.searchsorted(self.times[start:stop], before))

    def stats(self, name: str, before: float, left_out: Floats) -> RatingStats:
        """Statistics of the id's ratings before a time, less some of them."""
        start, stop = self.earlier(name, before)
        if stop == start:
            return RatingStats()
        return RatingStats.from_sums(
            stop - start - len(left_out),
            float(self.sums[stop - 1] - left_out.sum()),
            float(self.squares[stop - 1] - (left_out**2).sum()),
        )


@dataclass(frozen=True, slots=True)
class _Texts:
    """One text at a time out of a chunked column, without joining the chunks."""

    chunks: list[Any]
    starts: list[int]
    """Row at which each chunk begins."""

    @classmethod
    def of(cls, column: pa.ChunkedArray) -> Self:
        ends = np.cumsum([len(chunk) for chunk in column.chunks], dtype=np.int64)
        return cls(column.chunks, [0, *ends.tolist()])

    def at(self, row: int) -> str:
        """The text in a row; empty where it is null."""
        chunk = bisect_right(self.starts, row) - 1
        return str(self.chunks[chunk][row - self.starts[chunk]].as_py() or "")


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


def _encode(table: pa.Table, name: str) -> tuple[list[str], Ints]:
    """The distinct ids of a column, by first appearance, and each row's place among them."""
    column = column_of_texts(table, name).combine_chunks()
    empty = pc.fill_null(pc.equal(column, ""), True)
    if pc.any(empty).as_py():
        raise DataError(f"row {empty.index(True).as_py() + 1} of the table has no {name}")
    encoded = column.dictionary_encode()
    return encoded.dictionary.to_pylist(), encoded.indices.to_numpy().astype(np.int64)


def _finite(table: pa.Table, name: str) -> Floats:
    values = column_of_numbers(table, name)
    bad = np.flatnonzero(~np.isfinite(values))
    if len(bad):
        raise DataError(f"row {bad[0] + 1} of the table has no finite {name}")
    return values


def plain_column(table: pa.Table, name: str) -> pa.ChunkedArray:
    """A column, decoded where it is dictionary-encoded."""
    column = table.column(name)
    encoded = pa.types.is_dictionary(column.type)
    return column.cast(column.type.value_type) if encoded else column


def column_of_texts(table: pa.Table, name: str, where: object = "the table") -> pa.ChunkedArray:
    """A column as `large_string`; whole numbers become texts without a decimal point.

    Raises:
        DataError: it holds neither text nor whole numbers, or its text is not UTF-8.
    """
    column, types = plain_column(table, name), pa.types
    kind = column.type
    try:
        if types.is_floating(kind):  # what pandas makes of whole numbers where some are missing
            column = column.cast(pa.float64())
            column = pc.if_else(pc.is_nan(column), None, column)
            if pc.any(pc.greater_equal(pc.abs(column), 2**53)).as_py():
                raise pa.ArrowInvalid("the numbers are too large to be exact")
            column = column.cast(pa.int64())
        elif types.is_boolean(kind) or types.is_temporal(kind) or types.is_decimal(kind):
            raise pa.ArrowInvalid("neither text nor whole numbers")
        texts = column.cast(pa.large_string())
        texts.validate(full=True)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise DataError(
            f"{where}: column {name} is of type {kind} and cannot be read as text "
            f"({str(error).splitlines()[0]:.160}); store it as text"
        ) from None
    return texts


def column_of_numbers(table: pa.Table, name: str, where: object = "the table") -> Floats:
    """A column of numbers as float64; nan where it is null.

    Raises:
        DataError: it holds something else than numbers.
    """
    column, types = plain_column(table, name), pa.types
    kind = column.type
    numbers = types.is_integer(kind) or types.is_floating(kind) or types.is_decimal(kind)
    if not (numbers or types.is_null(kind)):
        raise DataError(f"{where}: column {name} is of type {kind}; expected numbers")
    floats = pc.fill_null(column.cast(pa.float64(), safe=False), math.nan)
    return np.asarray(floats.to_numpy(), dtype=np.float64)
