"""Reviews in an Arrow table, found by an index that is built once.

`index` says where to look; only the texts of the reviews that an answer holds are read from the
table, which may be one in memory or one mapped from disk (see `stored`): O(log n + limit).
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from r4r_graph.errors import DataError
from r4r_graph.ratings import RatingStats
from r4r_graph.reviews.index import (
    Floats,
    Ids,
    ReviewIndex,
    Texts,
    Timeline,
    check_limit,
)
from r4r_graph.schema import Item, Review, unix_seconds

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

_AT_ONCE = 4096
"""Rows that are made reviews at once when all are listed."""


class TableReviewSource:
    """A `ReviewSource` over an Arrow table.

    Reviews with the same timestamp keep the order they have in the table. The source is read-only
    once built, so threads may share it. `len()` is the number of reviews, and iterating gives all
    of them in the table's order.
    """

    def __init__(
        self,
        table: pa.Table,
        items: Mapping[str, Item] | None = None,
        *,
        index: ReviewIndex | None = None,
    ) -> None:
        """Check and index a table.

        Args:
            table: Has the columns of `REVIEW_SCHEMA` (others are ignored). Texts and ids may be
                of any string type, dictionary-encoded too, or whole numbers. Numbers may be of
                any width. Titles and reviews may be null.
            items: The item catalogue, by item id.
            index: Of this very table, which is then one that was checked before and is of
                `REVIEW_SCHEMA`, without nulls.

        Raises:
            DataError: a column is missing or not of such a type, an id is null or empty, or a
                rating or a timestamp is null, not finite or in milliseconds.
        """
        if index is None:
            table = _checked(table)
            index = ReviewIndex.of(table)
        self._rows = _Rows.of(table)
        self._index = index
        self._items = dict(items or {})

    @classmethod
    def from_reviews(cls, reviews: Iterable[Review], items: Iterable[Item] = ()) -> Self:
        """A source of the reviews given, with a catalogue of the items given.

        Raises:
            DataError: a review without an id, with a rating or timestamp that is not finite, or
                with a text that is no Unicode.
        """
        rows = [(r.user_id, r.item_id, r.title, r.rating, r.timestamp, r.text) for r in reviews]
        columns = list(zip(*rows, strict=True)) or [()] * len(REVIEW_SCHEMA)
        try:
            arrays = [pa.array(c, f.type) for c, f in zip(columns, REVIEW_SCHEMA, strict=True)]
        except (UnicodeEncodeError, OverflowError, pa.ArrowInvalid) as error:
            raise DataError(f"a text that is no Unicode, or no number: {error}") from None
        return cls(pa.table(arrays, schema=REVIEW_SCHEMA), {i.item_id: i for i in items})

    def __len__(self) -> int:
        return self._rows.starts[-1]

    def __iter__(self) -> Iterator[Review]:
        return iter(self._rows)

    def user_ids(self) -> list[str]:
        """Everyone who wrote a review, by first appearance in the table."""
        return _by_appearance(self._index.user_ids, self._index.users)

    def item_ids(self) -> list[str]:
        """All items that are known: the reviewed ones by first appearance, then the others."""
        reviewed = _by_appearance(self._index.item_ids, self._index.items)
        return list(dict.fromkeys([*reviewed, *self._items]))

    def user_history(
        self, user_id: str, before: float, limit: int, *, without_item: str | None = None
    ) -> list[Review]:
        """The user's latest reviews before a time, oldest first; see `ReviewSource`."""
        user = self._index.user_ids.code(user_id)
        own = self._own_rows(user, self._index.item_ids.code(without_item), before)
        return self._history(self._index.users, user, before, limit, own)

    def item_history(
        self, item_id: str, before: float, limit: int, *, without_user: str | None = None
    ) -> list[Review]:
        """The latest reviews of an item before a time, oldest first; see `ReviewSource`."""
        item = self._index.item_ids.code(item_id)
        own = self._own_rows(self._index.user_ids.code(without_user), item, before)
        return self._history(self._index.items, item, before, limit, own)

    def user_stats(
        self, user_id: str, before: float, *, without_item: str | None = None
    ) -> RatingStats:
        """Statistics of all ratings by the user before a time; see `ReviewSource`."""
        user = self._index.user_ids.code(user_id)
        own = self._own_rows(user, self._index.item_ids.code(without_item), before)
        return self._index.users.stats(user, before, self._ratings(own))

    def item_stats(
        self, item_id: str, before: float, *, without_user: str | None = None
    ) -> RatingStats:
        """Statistics of all ratings of an item before a time; see `ReviewSource`."""
        item = self._index.item_ids.code(item_id)
        own = self._own_rows(self._index.user_ids.code(without_user), item, before)
        return self._index.items.stats(item, before, self._ratings(own))

    def overall_stats(
        self, before: float, *, without_pair: tuple[str, str] | None = None
    ) -> RatingStats:
        """Statistics of all ratings before a time; see `ReviewSource`."""
        user_id, item_id = without_pair or (None, None)
        index = self._index
        own = self._own_rows(index.user_ids.code(user_id), index.item_ids.code(item_id), before)
        return index.everyone.stats(0, before, self._ratings(own))

    def knows_user(self, user_id: str) -> bool:
        """Whether the user wrote any review, at whatever time."""
        return self._index.user_ids.code(user_id) is not None

    def knows_item(self, item_id: str) -> bool:
        """Whether the item has any review, at whatever time, or is in the item catalogue."""
        return item_id in self._items or self._index.item_ids.code(item_id) is not None

    def item(self, item_id: str, before: float | None) -> Item:
        """The catalogue's entry, if need be with a title from a review; see `ReviewSource`."""
        entry, items = self._items.get(item_id, Item(item_id)), self._index.items
        code = None if entry.title else self._index.item_ids.code(item_id)
        for moment in (math.inf if before is None else before, math.inf):
            start, stop = items.earlier(code, moment)
            place = int(self._index.titled[stop - 1]) if stop > start else -1
            if place >= start and code is not None:
                return replace(entry, title=self._rows.review(int(items.rows[place])).title)
        return entry

    def _history(
        self, side: Timeline, code: int | None, before: float, limit: int, own: list[int]
    ) -> list[Review]:
        check_limit(limit)
        start, stop = side.earlier(code, before)
        left_out = set(own)
        window = side.rows[max(start, stop - limit - len(left_out)) : stop].tolist()
        kept = [row for row in window if row not in left_out]
        return [self._rows.review(row) for row in kept[max(0, len(kept) - limit) :]]

    def _own_rows(self, user: int | None, item: int | None, before: float) -> list[int]:
        """Rows of one pair's reviews before a time; none where either side is unknown."""
        rows = self._index.own_rows(user, item)
        return [row for row in rows if self._rows.number("timestamp", row) < before]

    def _ratings(self, rows: list[int]) -> list[float]:
        return [self._rows.number("rating", row) for row in rows]


@dataclass(frozen=True, slots=True)
class _Rows:
    """Single rows out of a table of `REVIEW_SCHEMA`, without joining its chunks."""

    batches: list[pa.RecordBatch]
    columns: list[list[Texts | memoryview]]
    """Of each batch, in the order of `REVIEW_SCHEMA`."""
    starts: list[int]
    """Row at which each batch begins, and the number of all rows."""

    @classmethod
    def of(cls, table: pa.Table) -> Self:
        batches = table.select(REVIEW_SCHEMA.names).to_batches()
        ends = np.cumsum([len(batch) for batch in batches], dtype=np.int64)
        columns = [[_single(column) for column in batch.columns] for batch in batches]
        return cls(batches, columns, [0, *ends.tolist()])

    def review(self, row: int) -> Review:
        chunk = bisect_right(self.starts, row) - 1
        place = row - self.starts[chunk]
        return _review(*[column[place] for column in self.columns[chunk]])

    def number(self, name: str, row: int) -> float:
        chunk = bisect_right(self.starts, row) - 1
        column = self.columns[chunk][REVIEW_SCHEMA.get_field_index(name)]
        return float(column[row - self.starts[chunk]])

    def __iter__(self) -> Iterator[Review]:
        for batch in self.batches:
            for start in range(0, len(batch), _AT_ONCE):
                some = batch.slice(start, _AT_ONCE)
                yield from map(_review, *[column.to_pylist() for column in some.columns])


def _single(column: pa.Array) -> Texts | memoryview:
    """What gives a column's values one by one."""
    if column.type == pa.large_string():
        return Texts.of(column)
    return memoryview(column.to_numpy())


def _review(*values: Any) -> Review:
    """A row's values as a review."""
    user_id, item_id, title, rating, timestamp, text = values
    return Review(user_id, item_id, rating, timestamp, title, text)


def _by_appearance(ids: Ids, side: Timeline) -> list[str]:
    if not len(ids):
        return []
    firsts = np.minimum.reduceat(side.rows, side.starts[:-1])
    return ids.texts.take(pa.array(np.argsort(firsts))).to_pylist()  # type: ignore[no-any-return]


def _checked(table: pa.Table) -> pa.Table:
    """The table in the types of `REVIEW_SCHEMA`; DataError where it cannot be used."""
    missing = [name for name in REVIEW_SCHEMA.names if name not in table.column_names]
    if missing:
        raise DataError(
            f"the table has no column {', '.join(missing)}; it has "
            f"{', '.join(table.column_names) or 'none at all'}"
        )
    columns: dict[str, Any] = {}
    for name in ("user_id", "item_id", "title", "review"):
        columns[name] = column_of_texts(table, name)
    for name in ("user_id", "item_id"):
        empty = pc.fill_null(pc.equal(columns[name], ""), True)
        if pc.any(empty).as_py():
            raise DataError(f"row {pc.index(empty, True).as_py() + 1} of the table has no {name}")
    for name in ("title", "review"):
        columns[name] = pc.fill_null(columns[name], "")
    for name in ("rating", "timestamp"):
        columns[name] = _finite(table, name)
    if len(table):
        unix_seconds(float(columns["timestamp"].min()))
        unix_seconds(float(columns["timestamp"].max()))
    return pa.table({name: columns[name] for name in REVIEW_SCHEMA.names}, schema=REVIEW_SCHEMA)


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
