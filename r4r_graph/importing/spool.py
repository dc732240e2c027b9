"""Rows on their way to the disk: Parquet in groups of bounded size, bad rows as JSON lines."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout

from r4r_graph.errors import InputError
from r4r_graph.importing.streaming import Fault
from r4r_graph.reviews.files import shorten

_GROUP_ROWS = 2**16
_GROUP_BYTES = 2**25
_SHOWN = 500  # characters of a bad row


class TableWriter:
    """Tables, one after the other, into a Parquet file; a group of rows is kept in memory."""

    def __init__(self, path: Path, schema: pa.Schema, compression: str = "zstd") -> None:
        dictionary = [name for name in ("user_id", "item_id", "title") if name in schema.names]
        self._file = pq.ParquetWriter(
            path, schema, compression=compression, use_dictionary=dictionary
        )
        self._schema = schema
        self._waiting: list[pa.Table] = []

    def add(self, table: pa.Table) -> None:
        """Write the rows, or keep them until a group is full."""
        self._waiting.append(table)
        rows, size = sum(map(len, self._waiting)), sum(t.nbytes for t in self._waiting)
        if rows >= _GROUP_ROWS or size >= _GROUP_BYTES:
            self._flush()

    def close(self) -> None:
        """Write the rest and end the file."""
        self._flush()
        self._file.close()

    def _flush(self) -> None:
        if self._waiting:
            joined = pa.concat_tables(self._waiting)
            self._waiting = []
            if len(joined):
                self._file.write_table(joined.combine_chunks(), row_group_size=len(joined))


class Rejects:
    """Bad rows: each with file, line, reason and how it begins; counted by the kind of fault."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w", encoding="utf-8")
        self.reasons: Counter[str] = Counter()
        self.first: list[str] = []
        """The first few, in words."""

    @property
    def count(self) -> int:
        """All of them."""
        return self.reasons.total()

    def add(self, path: Path, line: int, fault: Fault) -> None:
        """Write one down."""
        self.reasons[fault.reason.partition(":")[0]] += 1
        if len(self.first) < 5:
            self.first.append(f"{path}:{line}: {shorten(fault.reason, 240)}")
        row = {
            "file": str(path),
            "line": line,
            "reason": fault.reason,
            "row": shorten(fault.text, _SHOWN),
        }
        # ASCII: the row may hold half a pair, which is no UTF-8
        self._file.write(json.dumps(row) + "\n")

    def close(self) -> None:
        """End the file."""
        self._file.close()


@contextmanager
def scratch_folder(out: Path) -> Iterator[Path]:
    """A hidden folder beside `out` for what is not finished. It is gone afterwards, whatever ends
    the work; what a killed process left in it is gone before.

    Raises:
        InputError: another process is at work in it.
        OSError: it cannot be made.
    """
    folder = out.with_name(f".{out.name}.importing")
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / "_lock")  # of the operating system: it goes with its process
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise InputError(f"another process is importing to {out}") from None
    try:
        for left in folder.iterdir():
            if left.name != "_lock":
                left.unlink()
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        lock.release()


def put_in_place(made: Path, path: Path) -> None:
    """Give a finished file its name: readers see the old file or the new one, never a part."""
    with made.open("rb") as written:
        os.fsync(written.fileno())
    made.replace(path)
