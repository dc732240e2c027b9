"""Files of reviews, of items and of pairs, read strictly: one bad row and nothing is loaded.

All bad rows are counted and the first few are named by line, so that a file can be mended in one
go. `files` knows the formats.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from r4r_graph.errors import DataError
from r4r_graph.ratings import RatingScale
from r4r_graph.reviews.files import (
    NAMED,
    BadRows,
    Layout,
    Row,
    UseRow,
    file_parts,
    read_parquet,
    read_rows,
    shorten,
)
from r4r_graph.reviews.table import (
    REVIEW_SCHEMA,
    TableReviewSource,
    column_of_numbers,
    column_of_texts,
)
from r4r_graph.schema import Item, Pair, unix_seconds

Flags = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]

FIVE_STARS = RatingScale()
_EXACT = 2**53  # whole numbers below it survive as floats
_A_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}  # by Arrow's name of the unit


def load_reviews(
    path: str | os.PathLike[str],
    *,
    scale: RatingScale = FIVE_STARS,
    items: Mapping[str, Item] | None = None,
) -> TableReviewSource:
    """Reviews from a file, or from a folder of Parquet parts, indexed.

    Columns: user_id, item_id, rating and timestamp, filled in every row; title and review, which
    may be empty or absent. Others are ignored. Ids are texts or whole numbers. Timestamps are
    unix seconds, ISO 8601 texts (UTC where they name no zone) or Arrow times.

    Args:
        path: The file or folder.
        scale: Every rating must lie within it; fractions are fine.
        items: The item catalogue, by item id; see `load_items`.

    Raises:
        DataError: the path cannot be read as reviews, or any of its rows is bad.
    """
    bad = BadRows(path)
    rows: list[tuple[object, ...]] = []
    tables = []
    for part in file_parts(path):
        if part.suffix.lower() == ".parquet":
            tables.append(_parquet_reviews(part, scale, bad))
        else:
            read_rows(part, _REVIEWS, bad, lambda _, row: rows.append(_review(row, scale)))
    bad.check()
    if rows:
        columns = zip(*rows, strict=True)
        arrays = [pa.array(c, f.type) for c, f in zip(columns, REVIEW_SCHEMA, strict=True)]
        tables.append(pa.table(arrays, schema=REVIEW_SCHEMA))
    if not any(map(len, tables)):
        raise DataError(f"{path}: holds no reviews; expected at least one row")
    return TableReviewSource(pa.concat_tables(tables), items)


def load_items(path: str | os.PathLike[str]) -> dict[str, Item]:
    """An item catalogue from a file, or from a folder of Parquet parts, by item id.

    Columns: item_id, filled in every row; title, category and description, which may be empty or
    absent. Others are ignored. An item may be repeated, but not with other values.

    Raises:
        DataError: the path cannot be read as items, any of its rows is bad, or two rows differ
            on one item.
    """
    bad = BadRows(path)
    items: dict[str, Item] = {}
    places: dict[str, str] = {}

    def use(where: str, row: Row) -> None:
        texts = [_text(row, name) for name in ("title", "category", "description")]
        item = Item(_text(row, "item_id", required=True), *texts)
        if items.setdefault(item.item_id, item) != item:
            first = places[item.item_id]
            raise DataError(f"item_id {item.item_id!r} is described differently at {first}")
        places.setdefault(item.item_id, where)

    for part in file_parts(path):
        if part.suffix.lower() == ".parquet":
            _parquet_rows(part, _ITEMS, bad, use)
        else:
            read_rows(part, _ITEMS, bad, use)
    bad.check()
    if not items:
        raise DataError(f"{path}: holds no items; expected at least one row")
    return items


def load_pairs(path: str | os.PathLike[str]) -> list[Pair]:
    """Pairs to rate from a file, or from a folder of Parquet parts, in file order.

    Columns: user_id, item_id, and as_of or timestamp (the time before which reviews may be
    read), filled in every row. Others are ignored, so a file of reviews is one of pairs, too.

    Raises:
        DataError: the path cannot be read as pairs, or any of its rows is bad.
    """
    bad = BadRows(path)
    pairs: list[Pair] = []

    def use(_: str, row: Row) -> None:
        ids = _text(row, "user_id", required=True), _text(row, "item_id", required=True)
        when = row.get("as_of")
        if when is None or when == "":
            when = row.get("timestamp")
        pairs.append(Pair(*ids, _seconds(when)))

    for part in file_parts(path):
        if part.suffix.lower() == ".parquet":
            _parquet_rows(part, _PAIRS, bad, use)
        else:
            read_rows(part, _PAIRS, bad, use)
    bad.check()
    if not pairs:
        raise DataError(f"{path}: holds no pairs; expected at least one row")
    return pairs


_REVIEWS = Layout(("user_id", "item_id", "rating", "timestamp"), ("title", "review"))
_ITEMS = Layout(("item_id",), ("title", "category", "description"))
_PAIRS = Layout(("user_id", "item_id"), ("as_of", "timestamp"))


# --- one row ---------------------------------------------------------------------------------


def _review(row: Row, scale: RatingScale) -> tuple[object, ...]:
    """The row's values in the order of `REVIEW_SCHEMA`."""
    return (
        _text(row, "user_id", required=True),
        _text(row, "item_id", required=True),
        _text(row, "title"),
        scale.check(_rating(row.get("rating"))),
        _seconds(row.get("timestamp")),
        _text(row, "review"),
    )


def _text(row: Row, name: str, *, required: bool = False) -> str:
    value = row.get(name)
    if value is None or value != value:  # null or nan
        value = ""
    if isinstance(value, float):  # a whole number from a column that also had nulls
        if not value.is_integer() or abs(value) >= _EXACT:
            raise DataError(f"{name} {value!r} is no exact whole number; store it as text")
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise DataError(f"{name} {shorten(repr(value), 60)} is not text")
    text = str(value)
    if required and not text.strip():
        raise DataError(f"no {name}")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise DataError(f"{name} has half a surrogate pair, which is no character") from None
    return text


def _rating(value: object) -> float:
    if value is None or (isinstance(value, str) and not value.strip()):
        raise DataError("no rating")
    if isinstance(value, bool) or not isinstance(value, float | int | str):
        raise DataError(f"bad rating {shorten(repr(value), 60)}: not a number")
    try:
        number = float(value)
    except (ValueError, OverflowError):
        raise DataError(f"bad rating {shorten(repr(value), 60)}: not a number") from None
    if not math.isfinite(number):
        raise DataError(f"bad rating {value!r}: not a finite number")
    return number


def _seconds(value: object) -> float:
    if value is None or (isinstance(value, str) and not value.strip()):
        raise DataError("no timestamp")
    if not isinstance(value, float | int | str):
        raise DataError(f"bad timestamp {shorten(repr(value), 60)}: not a time")
    try:
        return unix_seconds(value)
    except OverflowError:
        raise DataError("bad timestamp: a number too large to be a time") from None


# --- Parquet -----------------------------------------------------------------------------------


def _parquet_rows(path: Path, layout: Layout, bad: BadRows, use: UseRow) -> None:
    table = read_parquet(path, layout)
    columns = {name: table.column(name) for name in table.column_names}
    for name, column in columns.items():
        if name in ("as_of", "timestamp"):
            times = _floats(path, table, name, _seconds).tolist()
            held = zip(times, column.is_valid().to_pylist(), strict=True)
            columns[name] = [time if valid else None for time, valid in held]
        else:
            columns[name] = column_of_texts(table, name, path).to_pylist()
    for number, values in enumerate(zip(*columns.values(), strict=True), 1):
        bad.guard(use, f"{path}: row {number}", dict(zip(columns, values, strict=True)))


def _parquet_reviews(path: Path, scale: RatingScale, bad: BadRows) -> pa.Table:
    """The reviews as a standard table. Whole columns are checked at once; only the first bad
    rows are then parsed one by one, for the reason."""
    table = read_parquet(path, _REVIEWS)
    texts = {
        name: column_of_texts(table, name, path)
        for name in ("user_id", "item_id", "title", "review")
    }
    ratings = _floats(path, table, "rating", _rating)
    times = _floats(path, table, "timestamp", _seconds)
    wrong = ~((ratings >= scale.low) & (ratings <= scale.high)) | _refused(times)
    for name in ("user_id", "item_id"):
        blank = pc.equal(pc.utf8_trim_whitespace(texts[name]), "")
        wrong |= pc.fill_null(blank, True).to_numpy()
    rows = np.flatnonzero(wrong).tolist()
    for row in rows[:NAMED]:
        values: dict[str, object] = {name: texts[name][row].as_py() for name in texts}
        for name, floats in (("rating", ratings), ("timestamp", times)):
            lost = math.isnan(floats[row])
            values[name] = table.column(name)[row].as_py() if lost else float(floats[row])
        try:
            _review(values, scale)
        except DataError as error:
            bad.add(f"{path}: row {row + 1}", error)
    bad.count += max(0, len(rows) - NAMED)
    return pa.table({**texts, "rating": ratings, "timestamp": times}).select(REVIEW_SCHEMA.names)


def _floats(path: Path, table: pa.Table, name: str, parse: Callable[[object], float]) -> Floats:
    """A column as numbers, or a column of texts or times made numbers (nan where it is no such)."""
    column, types = table.column(name), pa.types
    kind = column.type
    if types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind):
        encoded = column_of_texts(table, name, path).combine_chunks().dictionary_encode()
        known = [_attempt(parse, text) for text in encoded.dictionary.to_pylist()]
        places: npt.NDArray[np.int64] = pc.fill_null(encoded.indices, len(known)).to_numpy()
        return np.array([*known, math.nan])[places]
    if name in ("as_of", "timestamp") and (types.is_date(kind) or types.is_timestamp(kind)):
        unit = "s" if types.is_date32(kind) else "ms" if types.is_date64(kind) else kind.unit
        counts = column.cast(pa.timestamp(unit, getattr(kind, "tz", None))).cast(pa.int64())
        # a count of nanoseconds has too many digits for a float: split it first
        whole, part = np.divmod(pc.fill_null(counts, 0).to_numpy(), _A_SECOND[unit])
        times: Floats = whole + part / _A_SECOND[unit]
        return np.where(pc.is_null(column).to_numpy(), math.nan, times)
    return column_of_numbers(table, name, path)


def _refused(times: Floats) -> Flags:
    """Which of the times are no good. Looks one by one only where the extremes are bad."""
    if all(_is_time(end) for end in (times.min(initial=0.0), times.max(initial=0.0))):
        return np.zeros(len(times), dtype=np.bool_)
    distinct, places = np.unique(times, return_inverse=True)
    return ~np.array([_is_time(time) for time in distinct])[places]


def _is_time(value: float) -> bool:
    return not math.isnan(_attempt(_seconds, float(value)))


def _attempt(parse: Callable[[object], float], value: object) -> float:
    try:
        return parse(value)
    except DataError:
        return math.nan
