"""Files of reviews and of items, read strictly: one bad row and nothing is loaded.

A format is known by its suffix: `.parquet`, `.csv`, `.jsonl` or `.ndjson`, the row formats also
with `.gz`; a folder is read as the Parquet parts that lie directly in it. All bad rows are
counted and the first few are named by line, so that a file can be mended in one go.
"""

from __future__ import annotations

import csv
import gzip
import json
import math
import os
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from r4r_graph.errors import DataError
from r4r_graph.reviews.table import (
    REVIEW_SCHEMA,
    TableReviewSource,
    column_of_numbers,
    column_of_texts,
    plain_column,
)
from r4r_graph.schema import Item, RatingScale, unix_seconds

Flags = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]
Row = Mapping[str, object]
UseRow = Callable[[str, Row], None]
"""Takes where a row is (`path:line`) and its values; raises DataError where they are bad."""

FIVE_STARS = RatingScale()
_ROW_SUFFIXES = (".csv", ".jsonl", ".ndjson", ".csv.gz", ".jsonl.gz", ".ndjson.gz")
_FORMATS = ".parquet, .csv, .jsonl or .ndjson (the last three also with .gz)"
_NAMED = 5  # bad rows named in an error
_LONGEST_FIELD = 2**31 - 1  # characters in a CSV field; the most that every platform takes
_EXACT = 2**53  # whole numbers below it survive as floats
_A_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}  # by Arrow's name of the unit
_csv_limit = threading.Lock()


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
    bad = _BadRows(path)
    rows: list[tuple[object, ...]] = []
    tables = []
    for part in _parts(path):
        if part.suffix.lower() == ".parquet":
            tables.append(_parquet_reviews(part, scale, bad))
        else:
            _read_rows(part, _REVIEWS, bad, lambda _, row: rows.append(_review(row, scale)))
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
    bad = _BadRows(path)
    items: dict[str, Item] = {}
    places: dict[str, str] = {}

    def use(where: str, row: Row) -> None:
        texts = [_text(row, name) for name in ("title", "category", "description")]
        item = Item(_text(row, "item_id", required=True), *texts)
        if items.setdefault(item.item_id, item) != item:
            first = places[item.item_id]
            raise DataError(f"item_id {item.item_id!r} is described differently at {first}")
        places.setdefault(item.item_id, where)

    for part in _parts(path):
        if part.suffix.lower() == ".parquet":
            _parquet_items(part, bad, use)
        else:
            _read_rows(part, _ITEMS, bad, use)
    bad.check()
    if not items:
        raise DataError(f"{path}: holds no items; expected at least one row")
    return items


@dataclass(frozen=True, slots=True)
class _Layout:
    """Columns of a file."""

    required: tuple[str, ...]
    optional: tuple[str, ...]

    def check(self, path: Path, found: list[str]) -> list[str]:
        """The columns in use; DataError where a required one is missing or one is there twice."""
        known = self.required + self.optional
        missing = [name for name in self.required if name not in found]
        if missing:
            seen = _shorten(", ".join(map(repr, found)) or "none", 300)
            raise DataError(
                f"{path}: no column {', '.join(missing)}; found {seen}. "
                f"The columns have to be named {', '.join(known)}"
            )
        for name in known:
            if found.count(name) > 1:
                raise DataError(f"{path}: column {name} is there twice; keep one of them")
        return [name for name in known if name in found]


_REVIEWS = _Layout(("user_id", "item_id", "rating", "timestamp"), ("title", "review"))
_ITEMS = _Layout(("item_id",), ("title", "category", "description"))


@dataclass(slots=True)
class _BadRows:
    """Counts bad rows and keeps the first few, for one error about them all."""

    path: str | os.PathLike[str]
    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, where: str, reason: object) -> None:
        self.count += 1
        if len(self.first) < _NAMED:
            self.first.append(f"{where}: {_shorten(str(reason), 240)}")

    def guard(self, use: UseRow, where: str, row: Row) -> None:
        try:
            use(where, row)
        except DataError as error:
            self.add(where, error)

    def check(self) -> None:
        if self.count:
            rows = "1 bad row" if self.count == 1 else f"{self.count} bad rows"
            hidden = self.count - len(self.first)
            more = [f"and {hidden} more"] if hidden else []
            lines = [f"{self.path}: {rows}; correct or remove:", *self.first, *more]
            raise DataError("\n  ".join(lines))


def _parts(path: str | os.PathLike[str]) -> list[Path]:
    """The files to read, each of a known format."""
    path = Path(path)
    try:
        if path.is_dir():
            inside = [p for p in sorted(path.iterdir()) if p.suffix.lower() == ".parquet"]
            parts = [p for p in inside if p.is_file() and not p.name.startswith((".", "_"))]
            if not parts:
                raise DataError(f"{path}: a folder without .parquet files; pass a file: {_FORMATS}")
            return parts
        if not path.exists():
            raise DataError(f"{path}: no such file; pass {_FORMATS} or a folder of .parquet files")
        if not path.name.lower().endswith((".parquet", *_ROW_SUFFIXES)):
            raise DataError(f"{path}: unknown kind of file; expected {_FORMATS}")
        if path.stat().st_size == 0:
            raise DataError(f"{path}: the file is empty")
    except OSError as error:
        raise _unreadable(path, error) from None
    return [path]


def _unreadable(path: Path, error: Exception) -> DataError:
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return DataError(
        f"{path}: cannot be read ({_shorten(reason.splitlines()[0], 160)}); "
        "is the file whole, and does its suffix fit its format?"
    )


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
        raise DataError(f"{name} {_shorten(repr(value), 60)} is not text")
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
        raise DataError(f"bad rating {_shorten(repr(value), 60)}: not a number")
    try:
        number = float(value)
    except (ValueError, OverflowError):
        raise DataError(f"bad rating {_shorten(repr(value), 60)}: not a number") from None
    if not math.isfinite(number):
        raise DataError(f"bad rating {value!r}: not a finite number")
    return number


def _seconds(value: object) -> float:
    if value is None or (isinstance(value, str) and not value.strip()):
        raise DataError("no timestamp")
    if not isinstance(value, float | int | str):
        raise DataError(f"bad timestamp {_shorten(repr(value), 60)}: not a time")
    try:
        return unix_seconds(value)
    except OverflowError:
        raise DataError("bad timestamp: a number too large to be a time") from None


def _shorten(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 3] + "..."


# --- CSV and JSON lines ------------------------------------------------------------------------


def _read_rows(path: Path, layout: _Layout, bad: _BadRows, use: UseRow) -> None:
    name = path.name.lower()
    read = _read_csv if name.removesuffix(".gz").endswith(".csv") else _read_json_lines
    try:
        with gzip.open(path) if name.endswith(".gz") else path.open("rb") as file:
            read(path, _lines(path, file), layout, bad, use)
    except (OSError, EOFError, zlib.error) as error:
        raise _unreadable(path, error) from None


def _lines(path: Path, file: Iterable[bytes]) -> Iterator[str]:
    for number, line in enumerate(file, 1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path}:{number}: byte 0x{line[error.start]:02x} is not UTF-8; "
                "save the file as UTF-8"
            ) from None


def _read_csv(
    path: Path, lines: Iterator[str], layout: _Layout, bad: _BadRows, use: UseRow
) -> None:
    header: list[str] = []
    places: dict[str, int] = {}
    start = 1  # the line on which the row begins that comes next
    with _long_csv_fields():
        reader = csv.reader(lines, strict=True)
        try:
            for cells in reader:
                where, start = f"{path}:{start}", reader.line_num + 1
                if not cells:
                    continue
                if not header:
                    header = [cell.strip() for cell in cells]
                    places = {name: header.index(name) for name in layout.check(path, header)}
                elif len(cells) == len(header):
                    bad.guard(use, where, {name: cells[place] for name, place in places.items()})
                else:
                    bad.add(where, f"{len(cells)} fields, where the header has {len(header)}")
        except csv.Error as error:
            raise DataError(f"{path}:{start}: not CSV from here on ({error})") from None
    if not header:
        raise DataError(f"{path}: the file is empty")


@contextmanager
def _long_csv_fields() -> Iterator[None]:
    """Lets CSV fields be long. The limit is one for the process, so one reader at a time."""
    with _csv_limit:
        before = csv.field_size_limit(_LONGEST_FIELD)
        try:
            yield
        finally:
            csv.field_size_limit(before)


def _read_json_lines(
    path: Path, lines: Iterator[str], layout: _Layout, bad: _BadRows, use: UseRow
) -> None:
    found: dict[str, None] = {}
    for number, line in enumerate(lines, 1):
        where = f"{path}:{number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line.rstrip("\r\n"))
        except json.JSONDecodeError as error:
            reason = error.msg.removesuffix(" at")
            bad.add(where, f"not JSON ({reason} at character {error.pos + 1})")
            continue
        except (ValueError, RecursionError) as error:
            bad.add(where, f"not JSON ({error})")
            continue
        if not isinstance(row, dict):
            bad.add(where, "expected one JSON object a line")
            continue
        found.update(dict.fromkeys(row))
        bad.guard(use, where, row)
    if found:
        layout.check(path, list(found))


# --- Parquet -----------------------------------------------------------------------------------


def _read_parquet(path: Path, layout: _Layout) -> pa.Table:
    """The layout's columns; nulls where a column is absent."""
    try:
        with pq.ParquetFile(path, memory_map=True) as file:
            used = layout.check(path, file.schema_arrow.names)
            table = file.read(columns=used)
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(path, error) from None
    columns = {name: pa.nulls(len(table)) for name in layout.required + layout.optional}
    return pa.table(columns | {name: plain_column(table, name) for name in used})


def _parquet_items(path: Path, bad: _BadRows, use: UseRow) -> None:
    table = _read_parquet(path, _ITEMS)
    columns = [column_of_texts(table, name, path).to_pylist() for name in table.column_names]
    for number, values in enumerate(zip(*columns, strict=True), 1):
        bad.guard(use, f"{path}: row {number}", dict(zip(table.column_names, values, strict=True)))


def _parquet_reviews(path: Path, scale: RatingScale, bad: _BadRows) -> pa.Table:
    """The reviews as a standard table. Whole columns are checked at once; only the first bad
    rows are then parsed one by one, for the reason."""
    table = _read_parquet(path, _REVIEWS)
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
    for row in rows[:_NAMED]:
        values: dict[str, object] = {name: texts[name][row].as_py() for name in texts}
        for name, floats in (("rating", ratings), ("timestamp", times)):
            lost = math.isnan(floats[row])
            values[name] = table.column(name)[row].as_py() if lost else float(floats[row])
        try:
            _review(values, scale)
        except DataError as error:
            bad.add(f"{path}: row {row + 1}", error)
    bad.count += max(0, len(rows) - _NAMED)
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
    if name == "timestamp" and (types.is_date(kind) or types.is_timestamp(kind)):
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
