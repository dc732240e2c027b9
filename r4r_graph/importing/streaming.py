"""Files of rows, read one row at a time: JSON lines, CSV and Parquet, plain or compressed.

What a file is, is seen from its first bytes; names do not matter. Arrow decompresses (gzip, zstd,
bzip2; files of several members too) and notices where a file ends too early.
"""

from __future__ import annotations

import ast
import csv
import io
import json
import re
import stat
import warnings
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq

from r4r_graph.errors import DataError
from r4r_graph.reviews.files import shorten

Row = Mapping[str, object]

LONGEST_LINE = 2**26
"""Bytes in a line at most, so that a file without line ends does not fill the memory."""
_LONGEST_LITERAL = 2**20  # a Python literal is parsed into a tree many times its size
_HEAD = 2**16
_BATCH = 4096
_ESCAPED = re.compile("[\udc80-\udcff]")  # what a byte that is no UTF-8 is decoded to
_COMPRESSIONS = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bz2"}
_ARCHIVES = {b"PK\x03\x04": "a zip", b"7z\xbc\xaf": "a 7z", b"Rar!": "a rar"}
_FAILURES = (OSError, EOFError, pa.ArrowException)


@dataclass(frozen=True, slots=True)
class RowFile:
    """A file that can be read, and what its first bytes say it is."""

    path: Path
    content: Literal["json", "csv", "parquet"]
    compression: str | None
    size: int
    """Bytes on the disk."""


@dataclass(frozen=True, slots=True)
class Fault:
    """A row that cannot be read."""

    reason: str
    """Its kind, a colon, the details."""
    text: str
    """How it begins."""


Numbered = tuple[int, Row | Fault]
"""The line on which a row begins (of Parquet: its number), from 1 on."""


def examine(path: Path) -> RowFile:
    """Look at a file.

    Raises:
        DataError: it is not there, empty, or holds no rows in a form that is known.
    """
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise DataError(f"{path}: not a file; name the files themselves")
        with path.open("rb") as raw:
            magic = raw.read(8)
            compression = next((c for m, c in _COMPRESSIONS.items() if magic.startswith(m)), None)
        if not magic:
            raise DataError(f"{path}: the file is empty")
        if magic.startswith(b"PAR1"):
            return RowFile(path, "parquet", None, found.st_size)
        for start, what in _ARCHIVES.items():
            if magic.startswith(start):
                raise DataError(f"{path}: {what} archive; unpack it first")
        with _opened(path, compression) as (reader, _):
            head = reader.read(_HEAD)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except _FAILURES as error:
        raise _damaged(path, 0, error) from None
    return RowFile(path, _content(path, head), compression, found.st_size)


def _content(path: Path, head: bytes) -> Literal["json", "csv"]:
    if head[257:262] == b"ustar":
        raise DataError(f"{path}: a tar archive; unpack it first")
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(f"{path}: its text is UTF-16; save the file as UTF-8")
    if b"\x00" in head:
        raise DataError(f"{path}: neither text nor Parquet; expected JSON lines, CSV or Parquet")
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if not start:
        raise DataError(f"{path}: the file is empty")
    if start.startswith(b"["):
        raise DataError(f"{path}: one JSON array; expected one JSON object a line")
    return "json" if start.startswith(b"{") else "csv"


@contextmanager
def open_rows(
    file: RowFile, *, columns: Collection[str] | None = None
) -> Iterator[tuple[Iterator[Numbered], Callable[[], int]]]:
    """A file's rows one after the other, and a function that tells how many of its bytes are read.

    Args:
        file: see `examine`.
        columns: of a Parquet file, read these alone, as far as they are there.

    Raises:
        DataError: the file is damaged; it names the line up to which it could be read.
    """
    line = 0

    def counted(rows: Iterator[Numbered]) -> Iterator[Numbered]:
        nonlocal line
        try:
            for line, row in rows:
                yield line, row
        except DataError:
            raise
        except (*_FAILURES, ValueError, OverflowError) as error:  # such as a time beyond year 9999
            raise _damaged(file.path, line, error) from None

    if file.content == "parquet":
        try:
            table = pq.ParquetFile(file.path)
        except _FAILURES as error:
            raise _damaged(file.path, 0, error) from None
        with table:
            rows = counted(_parquet_rows(table, columns))
            yield rows, lambda: file.size * line // max(1, table.metadata.num_rows)
        return
    with _opened(file.path, file.compression) as (reader, position):
        if file.content == "csv":
            yield counted(_csv_rows(file.path, reader)), position
        else:
            yield counted(_json_rows(file.path, reader)), position


def first_rows(file: RowFile, count: int = 100) -> list[Row]:
    """The first rows that can be read, out of `count`.

    Raises:
        DataError: there are none, or the file is damaged.
    """
    with open_rows(file) as (rows, _):
        head = list(islice(rows, count))
    found = [row for _, row in head if not isinstance(row, Fault)]
    if not found:
        form = {"json": "JSON lines", "csv": "CSV", "parquet": "Parquet"}[file.content]
        faults = [f"line {line}: {row.reason}" for line, row in head if isinstance(row, Fault)]
        reason = f" that can be read ({faults[0]})" if faults else ""
        raise DataError(f"{file.path}: looks like {form}, but holds no rows{reason}")
    return found


# --- bytes and lines ---------------------------------------------------------------------------


@contextmanager
def _opened(
    path: Path, compression: str | None
) -> Iterator[tuple[io.BufferedReader, Callable[[], int]]]:
    with path.open("rb") as raw:
        if compression is None:
            yield raw, raw.tell
            return
        with io.BufferedReader(pa.CompressedInputStream(raw, compression), _HEAD) as reader:
            yield reader, lambda: _told(raw)


def _told(raw: io.BufferedReader) -> int:
    return 0 if raw.closed else raw.tell()


def _lines(path: Path, reader: io.BufferedReader) -> Iterator[bytes]:
    read = lambda: reader.readline(LONGEST_LINE)  # noqa: E731
    for number, line in enumerate(iter(read, b""), 1):
        if len(line) == LONGEST_LINE and not line.endswith(b"\n"):
            raise DataError(f"{path}:{number}: a line longer than {LONGEST_LINE >> 20} MiB")
        yield line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line


def _damaged(path: Path, line: int, error: Exception) -> DataError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return DataError(
        f"{path}: cannot be read beyond line {line} ({shorten(reason, 160)}); is the file whole? "
        "Get it anew"
    )


# --- JSON lines --------------------------------------------------------------------------------


def _json_rows(path: Path, reader: io.BufferedReader) -> Iterator[Numbered]:
    for number, line in enumerate(_lines(path, reader), 1):
        if line := line.strip():
            yield number, _json_row(line)


def _json_row(line: bytes) -> Row | Fault:
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        text = line.decode(errors="replace")
        return Fault(f"not UTF-8: byte 0x{line[error.start]:02x}", text)
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        row = _literal(text)
        if row is None:
            return Fault(f"not JSON: {shorten(str(error), 160)}", text)
    if not isinstance(row, dict):
        return Fault("not a JSON object: expected one a line", text)
    return row


def _literal(text: str) -> object:
    """A Python literal, as in the older Amazon files (read, never run); None where it is none."""
    if not text.startswith("{") or len(text) > _LONGEST_LITERAL:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the parser, about escapes in the literal
            return ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return None


# --- CSV ---------------------------------------------------------------------------------------


def _csv_rows(path: Path, reader: io.BufferedReader) -> Iterator[Numbered]:
    """A row may go over several lines. Where one cannot be read, such as after a quotation mark
    that is never closed, only its first line is lost: the reader begins anew on the next one."""
    lines = (line.decode(errors="surrogateescape") for line in _lines(path, reader))
    again: deque[str] = deque()
    taken: list[str] = []

    def texts() -> Iterator[str]:
        while (line := again.popleft() if again else next(lines, None)) is not None:
            taken.append(line)
            yield line

    header, delimiter, number = [""], ",", 0  # lines that are done
    while not any(header):
        first, number = next(lines, None), number + 1
        if first is None:
            return
        delimiter = _delimiter(first)
        header = [name.strip() for name in next(csv.reader([first], delimiter=delimiter), [""])]
    for name in header:
        if name and header.count(name) > 1:
            raise DataError(f"{path}: column {name!r} is there twice; keep one of them")
    cells = csv.reader(texts(), delimiter=delimiter, strict=True)
    while True:
        taken.clear()
        try:
            row = next(cells)
        except StopIteration:
            return
        except csv.Error as error:
            yield number + 1, Fault(f"not CSV: {error}", taken[0])
            again.extendleft(reversed(taken[1:]))
            number += 1
            cells = csv.reader(texts(), delimiter=delimiter, strict=True)
            continue
        start, number = number + 1, number + len(taken)
        if not row:
            continue
        if any(not line.isascii() and _ESCAPED.search(line) for line in taken):
            yield start, Fault("not UTF-8: a byte that is none", delimiter.join(row))
        elif len(row) != len(header):
            reason = f"wrong number of fields: {len(row)}, where the header has {len(header)}"
            yield start, Fault(reason, delimiter.join(row))
        else:
            yield start, dict(zip(header, row, strict=True))


def _delimiter(header: str) -> str:
    """The one that parts the header into most columns."""
    return max(",\t;|", key=lambda mark: len(next(csv.reader([header], delimiter=mark))))


# --- Parquet -----------------------------------------------------------------------------------


def _parquet_rows(table: pq.ParquetFile, columns: Collection[str] | None) -> Iterator[Numbered]:
    names = table.schema_arrow.names
    used = names if columns is None else [name for name in names if name in columns]
    number = 0
    for batch in batches(table, _BATCH, used):
        for row in batch.to_pylist():
            number += 1
            yield number, row


def batches(
    table: pq.ParquetFile, rows: int, columns: list[str] | None = None
) -> Iterator[pa.RecordBatch]:
    """A Parquet file in batches, a group of rows at a time: asked for all groups at once, Arrow
    would hold on to those that are done."""
    for group in range(table.metadata.num_row_groups):
        yield from table.iter_batches(rows, row_groups=[group], columns=columns)
