"""A folder of Parquet parts: which rows are there, which are still to do, and how more are written.

A part is named by the rows it holds and appears whole or not at all. Everything else in the folder
begins with `_`, so that readers of Parquet folders pass it over.
"""

from __future__ import annotations

import heapq
import os
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from r4r_graph.errors import DataError, InputError, StorageError

Columns = dict[str, Any]
"""A row's values, by column."""

_PART = re.compile(r"part-(\d{9})-(\d{9})\.parquet")


class Parts:
    """The parts of one job. The caller holds the folder's lock.

    Args:
        folder: where they are; leftovers of a killed run are removed.
        schema: columns of every part.
        rows: rows of the whole job.

    Raises:
        InputError: a file is no part of this job.
        DataError: two parts hold the same row.
    """

    def __init__(self, folder: Path, schema: pa.Schema, rows: int) -> None:
        self._folder = folder
        self._schema = schema
        self._rows = rows
        self._written = _written(folder, rows)

    def __len__(self) -> int:
        """Rows that are there."""
        return sum(end - start for start, end in self._written)

    def failed(self) -> list[int]:
        """Numbers of the rows that ended in an error, rising."""
        numbers: list[int] = []
        for part in self._written:
            errors = pq.read_table(self._file(part), columns=["error"])["error"]
            if errors.null_count < len(errors):
                told = errors.is_valid().to_pylist()
                numbers += [part[0] + at for at, failed in enumerate(told) if failed]
        return numbers

    def todo(self, again: Sequence[int] = ()) -> Iterator[int]:
        """Numbers of the rows to compute, rising: those that are in no part, and those in
        `again`."""
        return heapq.merge(_missing(self._written, self._rows), again)

    def write(self, results: Mapping[int, Columns], most: int) -> None:
        """Write rows: a part for each unbroken stretch of them, of at most `most` rows. One that is
        there already takes its earlier place, in the part that holds it.

        Raises:
            StorageError: they cannot be written; each part is as it was, or whole.
        """
        again = {at: part for at in results if (part := self._part_of(at)) is not None}
        with storing(self._folder):
            for part in sorted(set(again.values())):
                rows = pq.read_table(self._file(part)).to_pylist()
                for at in again:
                    if again[at] == part:
                        rows[at - part[0]] = results[at]
                self._write_part(part, rows)
            for part in _stretches(sorted(results.keys() - again.keys()), most):
                self._write_part(part, [results[at] for at in range(*part)])
                self._written = sorted([*self._written, part])

    def _file(self, part: tuple[int, int]) -> Path:
        return self._folder / f"part-{part[0]:09d}-{part[1]:09d}.parquet"

    def _write_part(self, part: tuple[int, int], rows: Sequence[Columns]) -> None:
        write_table(pa.Table.from_pylist(rows, self._schema), self._file(part))

    def _part_of(self, at: int) -> tuple[int, int] | None:
        place = bisect_right(self._written, (at, self._rows)) - 1
        if place < 0:
            return None
        start, end = self._written[place]
        return (start, end) if start <= at < end else None


def write_table(table: pa.Table, file: Path) -> None:
    """Write a Parquet file: readers see the old one or the new one, never a part.

    What a killed process leaves behind begins with `_`, so that readers of the folder pass it over.

    Raises:
        OSError: it could not be written; the old file is still there, and nothing beside it.
    """
    scratch = file.with_name(f"_{file.name}")
    try:
        pq.write_table(table, scratch)
        with scratch.open("rb") as written:
            os.fsync(written.fileno())
        scratch.replace(file)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


def part_files(folder: str | os.PathLike[str]) -> list[Path]:
    """The parts in a folder, in the order of their rows."""
    return sorted(p for p in Path(folder).glob("part-*.parquet") if _PART.fullmatch(p.name))


def failures(folder: str | os.PathLike[str]) -> dict[str, tuple[int, str]]:
    """Why rows in the folder failed: the kind of error, how many rows, and one of the reasons."""
    found: dict[str, tuple[int, str]] = {}
    for part in part_files(folder):
        errors = pq.read_table(part, columns=["error"])["error"]
        for error in errors.drop_null().to_pylist():
            kind, _, reason = error.partition(": ")
            count, example = found.get(kind, (0, reason))
            found[kind] = count + 1, example
    return found


@contextmanager
def storing(folder: Path) -> Iterator[None]:
    """Work on the disk, whose failures say what to do.

    Raises:
        StorageError: in the place of an OSError.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise StorageError(
            f"cannot write to {folder}: {reason}; what was written before is whole: mend it, and "
            "the same call continues"
        ) from error


def _written(folder: Path, rows: int) -> list[tuple[int, int]]:
    """Row ranges that are there, in order; leftovers of a killed run are removed."""
    for scratch in folder.glob("_part-*.parquet"):
        scratch.unlink()
    found = []
    for path in sorted(folder.glob("*.parquet")):
        if path.name.startswith("_"):
            continue
        match = _PART.fullmatch(path.name)
        if match is None or int(match[2]) > rows:
            raise InputError(f"{path} is no part of this job; move it away")
        found.append((int(match[1]), int(match[2])))
    for (_, end), (start, _) in pairwise(found):
        if start < end:
            raise DataError(f"parts overlap at row {start}; remove one of them")
    return found


def _missing(written: Sequence[tuple[int, int]], rows: int) -> Iterator[int]:
    at = 0
    for start, end in [*written, (rows, rows)]:
        yield from range(at, start)
        at = end


def _stretches(rows: Sequence[int], most: int) -> Iterable[tuple[int, int]]:
    """Unbroken stretches of row numbers, as (start, end), each of at most `most` rows."""
    start = end = -1
    for at in rows:
        if at != end or end - start >= most:
            if end > start:
                yield start, end
            start = at
        end = at + 1
    if end > start:
        yield start, end
