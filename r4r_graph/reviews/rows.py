"""What a good row of a review file is: one by one, and whole columns of Parquet at once."""

from __future__ import annotations

import math
from collections.abc import Callable
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
    parquet_batches,
    shorten,
)
from r4r_graph.reviews.table import REVIEW_SCHEMA, column_of_numbers, column_of_texts
from r4r_graph.schema import unix_seconds

Flags = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]

REVIEWS = Layout(("user_id", "item_id", "rating", "timestamp"), ("title", "review"))
"""Columns of a file of reviews."""

_EXACT = 2**53  # whole numbers below it survive as floats
_A_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}  # by Arrow's name of the unit

# One row -----------------------------------------------------------------------------------------


def checked_review(row: Row, scale: RatingScale) -> tuple[object, ...]:
    """The row's values in the order of `REVIEW_SCHEMA`.

    Raises:
        DataError: one of them is bad.
    """
    return (
        checked_text(row, "user_id", required=True),
        checked_text(row, "item_id", required=True),
        checked_text(row, "title"),
        scale.check(checked_rating(row.get("rating"))),
        checked_seconds(row.get("timestamp")),
        checked_text(row, "review"),
    )


def checked_text(row: Row, name: str, *, required: bool = False) -> str:
    """A text or a whole number, as text; empty where it is absent.

    Raises:
        DataError: it is neither, or is required and blank.
    """
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


def checked_rating(value: object) -> float:
    """A finite number.

    Raises:
        DataError: it is none.
    """
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


def checked_seconds(value: object) -> float:
    """A time in unix seconds.

    Raises:
        DataError: it is none.
    """
    if value is None or (isinstance(value, str) and not value.strip()):
        raise DataError("no timestamp")
    if not isinstance(value, float | int | str):
        raise DataError(f"bad timestamp {shorten(repr(value), 60)}: not a time")
    try:
        return unix_seconds(value)
    except OverflowError:
        raise DataError("bad timestamp: a number too large to be a time") from None


# Parquet -----------------------------------------------------------------------------------------


def parquet_rows(path: Path, layout: Layout, bad: BadRows, use: UseRow) -> None:
    """Feed each row of a Parquet file to `use`.

    Raises:
        DataError: the file cannot be read, or lacks a column.
    """
    for before, table in parquet_batches(path, layout):
        columns = {name: table.column(name) for name in table.column_names}
        for name, column in columns.items():
            if name in ("as_of", "timestamp"):
                times = _floats(path, table, name, checked_seconds).tolist()
                held = zip(times, column.is_valid().to_pylist(), strict=True)
                columns[name] = [time if valid else None for time, valid in held]
            else:
                columns[name] = column_of_texts(table, name, path).to_pylist()
        for number, values in enumerate(zip(*columns.values(), strict=True), before + 1):
            bad.guard(use, f"{path}: row {number}", dict(zip(columns, values, strict=True)))


def parquet_reviews(
    path: Path, table: pa.Table, before: int, scale: RatingScale, bad: BadRows
) -> pa.Table:
    """Some reviews as a standard table. Whole columns are checked at once; only the first bad
    rows are then parsed one by one, for the reason."""
    texts = {
        name: column_of_texts(table, name, path)
        for name in ("user_id", "item_id", "title", "review")
    }
    ratings = _floats(path, table, "rating", checked_rating)
    times = _floats(path, table, "timestamp", checked_seconds)
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
            checked_review(values, scale)
        except DataError as error:
            bad.add(f"{path}: row {before + row + 1}", error)
    bad.count += max(0, len(rows) - NAMED)
    words = {name: pc.fill_null(texts[name], "") for name in ("title", "review")}
    columns = {**texts, **words, "rating": ratings, "timestamp": times}
    return pa.table({name: columns[name] for name in REVIEW_SCHEMA.names}, schema=REVIEW_SCHEMA)


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
    return not math.isnan(_attempt(checked_seconds, float(value)))


def _attempt(parse: Callable[[object], float], value: object) -> float:
    try:
        return parse(value)
    except DataError:
        return math.nan
