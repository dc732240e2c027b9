"""Resumable jobs: a function over many rows, into a folder of Parquet parts.

    report = run_job(rows, compute, "out/", schema=SCHEMA, manifest={"rows": digest_rows(...)})
    pandas.read_parquet("out/")

Results are written in the order of the rows, as parts named by the rows they hold; each part
appears whole or not at all. What is there is never computed again, so a job that was killed and is
started again loses only what was in flight. Everything else in the folder begins with `_`. Bulk
rating, labelling, sampling and summarizing are all such jobs.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout

from r4r_graph.caches import write_atomically
from r4r_graph.errors import DataError, InputError

RowT = TypeVar("RowT")
Columns = dict[str, Any]

_PART = re.compile(r"part-(\d{9})-(\d{9})\.parquet")


@dataclass(frozen=True, slots=True)
class JobProgress:
    """How far a job is."""

    done: int
    """Rows with a result, those of earlier runs included."""
    of: int
    failed: int
    """Rows of this run that ended in an error."""
    seconds: float
    """Since this run began."""


@dataclass(frozen=True, slots=True)
class JobReport:
    """What a run of a job did."""

    rows: int
    """All rows in the folder."""
    reused: int
    """Rows that were there already."""
    failed: int
    """Rows of this run that ended in an error."""
    seconds: float


OnProgress = Callable[[JobProgress], None]


def run_job(
    rows: Sequence[RowT],
    compute: Callable[[RowT], Awaitable[Columns]],
    out: str | os.PathLike[str],
    *,
    schema: pa.Schema,
    manifest: Mapping[str, Any],
    concurrency: int = 64,
    part_rows: int = 4096,
    part_seconds: float = 30.0,
    on_progress: OnProgress | None = None,
) -> JobReport:
    """Compute all rows into the folder `out`; continues where an earlier run stopped.

    Args:
        rows: what to compute, in a fixed order.
        compute: gives a row's columns. A failure that is the row's own goes into its column
            `error`; anything raised ends the run (finished rows are written first).
        out: a folder, made on demand; it holds this job and no other.
        schema: columns of every part; among them `error` (null where the row succeeded).
        manifest: JSON values that make two runs the same job; see `digest_rows`.
        concurrency: rows in flight.
        part_rows: rows in a part at most.
        part_seconds: a part is written at least this often while rows end.
        on_progress: called after each row, on this thread.

    Raises:
        InputError: the folder holds another job, or another process is at work in it.
    """
    folder = Path(out)
    with open_folder(folder):
        _check_manifest(folder, manifest)
        job = _Job(rows, compute, folder, schema, part_rows, part_seconds, on_progress)
        return asyncio.run(job.run(concurrency))


@contextmanager
def open_folder(folder: Path) -> Iterator[None]:
    """Make `folder` and hold its lock: one of the operating system, which goes with its process,
    however that ends.

    Raises:
        InputError: another process is at work in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / "_lock", timeout=0):
            yield
    except Timeout:
        raise InputError(f"another process is at work in {folder}") from None


def digest_rows(rows: Iterable[Any]) -> str:
    """32 hex digits over rows of JSON values, in their order; for a job's manifest."""
    digest = hashlib.blake2b(digest_size=16)
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True).encode())
    return digest.hexdigest()


def write_table(table: pa.Table, file: Path) -> None:
    """Write a Parquet file: readers see the old one or the new one, never a part.

    What a killed process leaves behind begins with `_`, so that readers of the folder pass it over.
    """
    scratch = file.with_name(f"_{file.name}")
    pq.write_table(table, scratch)
    with scratch.open("rb") as written:
        os.fsync(written.fileno())
    scratch.replace(file)


def read_job(folder: str | os.PathLike[str]) -> list[Columns]:
    """All rows of a job's folder, in order.

    Raises:
        DataError: there are none.
    """
    parts = sorted(p for p in Path(folder).glob("part-*.parquet") if _PART.fullmatch(p.name))
    if not parts:
        raise DataError(f"{folder} holds no results of a job")
    return [row for part in parts for row in pq.read_table(part).to_pylist()]


class _Job(Generic[RowT]):
    """One run over the rows that are still to do."""

    def __init__(
        self,
        rows: Sequence[RowT],
        compute: Callable[[RowT], Awaitable[Columns]],
        folder: Path,
        schema: pa.Schema,
        part_rows: int,
        part_seconds: float,
        on_progress: OnProgress | None,
    ) -> None:
        self._rows = rows
        self._compute = compute
        self._folder = folder
        self._schema = schema
        self._part_rows = part_rows
        self._part_seconds = part_seconds
        self._on_progress = on_progress
        self._written = _written(folder, len(rows))
        self._reused = sum(end - start for start, end in self._written)
        self._results: dict[int, Columns] = {}
        self._in_flight: set[int] = set()
        self._failed = 0
        self._computed = 0
        self._started = self._flushed = time.monotonic()

    async def run(self, concurrency: int) -> JobReport:
        """Compute what is missing. Whatever ends this, finished rows are written first."""
        missing = iter(_missing(self._written, len(self._rows)))
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(concurrency):
                    group.create_task(self._work(missing))
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None
        finally:
            self._flush(len(self._rows))
        return JobReport(
            rows=self._reused + self._computed,
            reused=self._reused,
            failed=self._failed,
            seconds=time.monotonic() - self._started,
        )

    async def _work(self, missing: Iterable[int]) -> None:
        for at in missing:  # shared by all workers
            self._in_flight.add(at)
            columns = await self._compute(self._rows[at])
            self._results[at] = columns
            self._in_flight.remove(at)
            self._computed += 1
            self._failed += columns.get("error") is not None
            self._tell()
            full = len(self._results) >= self._part_rows
            if full or time.monotonic() - self._flushed >= self._part_seconds:
                self._flush(min(self._in_flight, default=len(self._rows)))

    def _tell(self) -> None:
        if self._on_progress is not None:
            done = self._reused + self._computed
            seconds = time.monotonic() - self._started
            self._on_progress(JobProgress(done, len(self._rows), self._failed, seconds))

    def _flush(self, before: int) -> None:
        """Write the finished rows under number `before`, a part for each unbroken stretch of
        them. Up to the first row in flight, that is one stretch; at the end it is what there is."""
        finished = sorted(at for at in self._results if at < before)
        for start, end in _stretches(finished, self._part_rows):
            table = pa.Table.from_pylist(
                [self._results[at] for at in range(start, end)], self._schema
            )
            write_table(table, self._folder / f"part-{start:09d}-{end:09d}.parquet")
            for at in range(start, end):
                del self._results[at]
        self._flushed = time.monotonic()


def _check_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    file = folder / "_job.json"
    if not file.exists():
        if any(path for path in folder.iterdir() if not path.name.startswith("_")):
            raise InputError(f"{folder} holds other files; choose an empty folder")
        write_atomically(file, json.dumps(dict(manifest), indent=2))
        return
    try:
        earlier = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        raise InputError(f"{file} is damaged; choose another folder") from None
    changed = sorted(key for key in manifest if manifest[key] != earlier.get(key))
    if changed:
        raise InputError(
            f"{folder} holds another job (different: {', '.join(changed)}); choose another "
            "folder, or call it with the same input, model and settings to continue"
        )


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
    return found


def _missing(written: Sequence[tuple[int, int]], rows: int) -> Iterable[int]:
    at = 0
    for start, end in [*written, (rows, rows)]:
        if start < at:
            raise DataError(f"parts overlap at row {start}; remove one of them")
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
