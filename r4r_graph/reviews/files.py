"""The file formats of reviews, items and pairs: rows with their places, bad rows counted.

A format is known by its suffix: `.parquet`, `.csv`, `.jsonl` or `.ndjson`, the row formats also
with `.gz`; a folder is read as the Parquet parts that lie directly in it.
"""

from __future__ import annotations

import csv
import gzip
import json
import os
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from r4r_graph.errors import DataError
from r4r_graph.reviews.table import plain_column

Row = Mapping[str, object]
UseRow = Callable[[str, Row], None]
"""Takes where a row is (`path:line`) and its values; raises DataError where they are bad."""

ROW_SUFFIXES = (".csv", ".jsonl", ".ndjson", ".csv.gz", ".jsonl.gz", ".ndjson.gz")
_FORMATS = ".parquet, .csv, .jsonl or .ndjson (the last three also with .gz)"
NAMED = 5
"""Bad rows named in an error."""
AT_ONCE = 1 << 16
"""Rows that are read and checked at once."""
_LONGEST_FIELD = 2**31 - 1  # characters in a CSV field; the most that every platform takes
_csv_limit = threading.Lock()


@dataclass(frozen=True, slots=True)
class Layout:
    """Columns of a file."""

    required: tuple[str, ...]
    optional: tuple[str, ...]

    def check(self, path: Path, found: list[str]) -> list[str]:
        """The columns in use; DataError where a required one is missing or one is there twice."""
        known = self.required + self.optional
        missing = [name for name in self.required if name not in found]
        if missing:
            seen = shorten(", ".join(map(repr, found)) or "none", 300)
            raise DataError(
                f"{path}: no column {', '.join(missing)}; found {seen}. "
                f"The columns have to be named {', '.join(known)}"
            )
        for name in known:
            if found.count(name) > 1:
                raise DataError(f"{path}: column {name} is there twice; keep one of them")
        return [name for name in known if name in found]


@dataclass(slots=True)
class BadRows:
    """Counts bad rows and keeps the first few, for one error about them all."""

    path: str | os.PathLike[str]
    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, where: str, reason: object) -> None:
        """Count a bad row."""
        self.count += 1
        if len(self.first) < NAMED:
            self.first.append(f"{where}: {shorten(str(reason), 240)}")

    def guard(self, use: UseRow, where: str, row: Row) -> None:
        """Use a row; one that is refused is counted."""
        try:
            use(where, row)
        except DataError as error:
            self.add(where, error)

    def check(self) -> None:
        """Raise one error about all bad rows, if there were any."""
        if self.count:
            rows = "1 bad row" if self.count == 1 else f"{self.count} bad rows"
            hidden = self.count - len(self.first)
            more = [f"and {hidden} more"] if hidden else []
            lines = [f"{self.path}: {rows}; correct or remove:", *self.first, *more]
            raise DataError("\n  ".join(lines))


def file_parts(path: str | os.PathLike[str]) -> list[Path]:
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
        if not path.name.lower().endswith((".parquet", *ROW_SUFFIXES)):
            raise DataError(f"{path}: unknown kind of file; expected {_FORMATS}")
        if path.stat().st_size == 0:
            raise DataError(f"{path}: the file is empty")
    except OSError as error:
        raise unreadable(path, error) from None
    return [path]


def unreadable(path: Path, error: Exception) -> DataError:
    """The error for a file that cannot be read at all."""
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return DataError(
        f"{path}: cannot be read ({shorten(reason.splitlines()[0], 160)}); "
        "is the file whole, and does its suffix fit its format?"
    )


def shorten(text: str, most: int) -> str:
    """`text` in at most `most` characters."""
    return text if len(text) <= most else text[: most - 3] + "..."


def read_rows(path: Path, layout: Layout, bad: BadRows, use: UseRow) -> None:
    """Feed each row of a CSV or JSONL file to `use`.

    Raises:
        DataError: the file cannot be read, or lacks a column.
    """
    name = path.name.lower()
    read = _read_csv if name.removesuffix(".gz").endswith(".csv") else _read_json_lines
    try:
        with gzip.open(path) if name.endswith(".gz") else path.open("rb") as file:
            read(path, _lines(path, file), layout, bad, use)
    except (OSError, EOFError, zlib.error) as error:
        raise unreadable(path, error) from None


def _lines(path: Path, file: Iterable[bytes]) -> Iterator[str]:
    for number, line in enumerate(file, 1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path}:{number}: byte 0x{line[error.start]:02x} is not UTF-8; "
                "save the file as UTF-8"
            ) from None


def _read_csv(path: Path, lines: Iterator[str], layout: Layout, bad: BadRows, use: UseRow) -> None:
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
    path: Path, lines: Iterator[str], layout: Layout, bad: BadRows, use: UseRow
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


def read_parquet(path: Path, layout: Layout) -> pa.Table:
    """The layout's columns; nulls where a column is absent."""
    try:
        with pq.ParquetFile(path, memory_map=True) as file:
            used = layout.check(path, file.schema_arrow.names)
            return _all_columns(file.read(columns=used), layout)
    except (pa.ArrowException, OSError) as error:
        raise unreadable(path, error) from None


def parquet_batches(path: Path, layout: Layout) -> Iterator[tuple[int, pa.Table]]:
    """As `read_parquet`, some rows at a time, each with the number of the rows before."""
    before = 0
    try:
        with pq.ParquetFile(path, memory_map=True) as file:
            used = layout.check(path, file.schema_arrow.names)
            for batch in file.iter_batches(AT_ONCE, columns=used):
                yield before, _all_columns(pa.Table.from_batches([batch]), layout)
                before += len(batch)
    except (pa.ArrowException, OSError) as error:
        raise unreadable(path, error) from None


def _all_columns(table: pa.Table, layout: Layout) -> pa.Table:
    columns = {name: pa.nulls(len(table)) for name in layout.required + layout.optional}
    return pa.table(columns | {name: plain_column(table, name) for name in table.column_names})
