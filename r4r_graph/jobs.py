"""Resumable jobs: a function over many rows, into a folder of Parquet parts.

    report = run_job(rows, compute, "out/", schema=SCHEMA, manifest={"rows": digest_rows(...)})
    pandas.read_parquet("out/")

Results are written in the order of the rows, as parts named by the rows they hold (see `parts`).
What is there is never computed again, so a job that was killed and is started again loses only what
was in flight; rows that failed are computed again where that is asked for. Bulk rating, labelling,
sampling and summarizing are all such jobs.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout

from r4r_graph.caches import write_atomically
from r4r_graph.errors import DataError, InputError
from r4r_graph.parts import Columns as Columns
from r4r_graph.parts import Parts, part_files, storing
from r4r_graph.parts import write_table as write_table

RowT = TypeVar("RowT")
RowT_co = TypeVar("RowT_co", covariant=True)

_STUCK = 10
"""A row in flight for so many times a part's seconds holds up no part any longer."""


class Rows(Protocol[RowT_co]):
    """Rows in a fixed order: a list, or a table that gives them one after the other."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[RowT_co]: ...


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
    rows: Rows[RowT],
    compute: Callable[[RowT], Awaitable[Columns]],
    out: str | os.PathLike[str],
    *,
    schema: pa.Schema,
    manifest: Mapping[str, Any],
    retry_failed: bool = False,
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
        retry_failed: compute the rows that ended in an error again, too.
        concurrency: rows in flight.
        part_rows: rows in a part at most.
        part_seconds: a part is written at least this often while rows end.
        on_progress: called after each row, on this thread.

    Raises:
        InputError: the folder holds another job, or another process is at work in it.
        StorageError: the disk is full, or the folder cannot be written to; what was written
            before is kept.
        KeyboardInterrupt: Ctrl-C; finished rows are written first.
    """
    with open_job(Path(out), manifest, schema, len(rows)) as parts:
        job = _Job(rows, compute, parts, part_rows, part_seconds, on_progress)
        return asyncio.run(job.run(concurrency, retry_failed))


@contextmanager
def open_job(
    folder: Path, manifest: Mapping[str, Any], schema: pa.Schema, rows: int
) -> Iterator[Parts]:
    """A job's folder, held by its lock: its parts, to be gone on with.

    Raises: as `run_job`.
    """
    with open_folder(folder):
        with storing(folder):
            _check_manifest(folder, manifest)
        yield Parts(folder, schema, rows)


@contextmanager
def open_folder(folder: Path) -> Iterator[None]:
    """Make `folder` and hold its lock: one of the operating system, which goes with its process,
    however that ends.

    Raises:
        InputError: another process is at work in it.
        StorageError: it cannot be made or written to.
    """
    lock = FileLock(folder / "_lock", timeout=0)
    with storing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except Timeout:
            raise InputError(f"another process is at work in {folder}") from None
    try:
        yield
    finally:
        lock.release()


def digest_rows(rows: Iterable[Any]) -> str:
    """32 hex digits over rows of JSON values, in their order; for a job's manifest."""
    digest = hashlib.blake2b(digest_size=16)
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True).encode())
    return digest.hexdigest()


def read_job(folder: str | os.PathLike[str]) -> list[Columns]:
    """All rows of a job's folder, in order.

    Raises:
        DataError: there are none.
    """
    parts = part_files(folder)
    if not parts:
        raise DataError(f"{folder} holds no results of a job")
    return [row for part in parts for row in pq.read_table(part).to_pylist()]


class _Job(Generic[RowT]):
    """One run over the rows that are still to do."""

    def __init__(
        self,
        rows: Rows[RowT],
        compute: Callable[[RowT], Awaitable[Columns]],
        parts: Parts,
        part_rows: int,
        part_seconds: float,
        on_progress: OnProgress | None,
    ) -> None:
        self._rows = rows
        self._compute = compute
        self._parts = parts
        self._part_rows = part_rows
        self._part_seconds = part_seconds
        self._on_progress = on_progress
        self._reused = len(parts)
        self._results: dict[int, Columns] = {}
        self._in_flight: dict[int, float] = {}
        """Each row's number, and since when."""
        self._failed = 0
        self._computed = 0
        self._started = self._flushed = time.monotonic()

    async def run(self, concurrency: int, retry_failed: bool) -> JobReport:
        """Compute what is to do. Whatever ends this, finished rows are written first."""
        again = self._parts.failed() if retry_failed else []
        self._reused -= len(again)
        todo = numbered(self._rows, self._parts.todo(again))
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(concurrency):
                    group.create_task(self._work(todo))
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

    async def _work(self, todo: Iterable[tuple[int, RowT]]) -> None:
        for at, row in todo:  # shared by all workers
            self._in_flight[at] = time.monotonic()
            columns = await self._compute(row)
            self._results[at] = columns
            del self._in_flight[at]
            self._computed += 1
            self._failed += columns.get("error") is not None
            self._tell()
            full = len(self._results) >= self._part_rows
            if full or time.monotonic() - self._flushed >= self._part_seconds:
                self._flush(self._first_in_flight())
            if len(self._results) >= self._part_rows:  # one row holds up all others
                self._flush(len(self._rows))

    def _tell(self) -> None:
        if self._on_progress is not None:
            done = self._reused + self._computed
            seconds = time.monotonic() - self._started
            self._on_progress(JobProgress(done, len(self._rows), self._failed, seconds))

    def _first_in_flight(self) -> int:
        """Up to which row finished ones make one stretch; those that are stuck aside."""
        latest = time.monotonic() - _STUCK * self._part_seconds
        going = (at for at, since in self._in_flight.items() if since > latest)
        return min(going, default=len(self._rows))

    def _flush(self, before: int) -> None:
        """Write the finished rows under number `before`, a part for each unbroken stretch of
        them. Up to the first row in flight, that is one stretch; at the end it is what there is."""
        finished = {at: self._results[at] for at in self._results if at < before}
        self._parts.write(finished, self._part_rows)
        for at in finished:
            del self._results[at]
        self._flushed = time.monotonic()


def numbered(rows: Rows[RowT], wanted: Iterator[int]) -> Iterator[tuple[int, RowT]]:
    """The rows of these rising numbers, with their numbers."""
    at = next(wanted, None)
    for number, row in enumerate(rows) if at is not None else ():
        if number == at:
            yield number, row
            if (at := next(wanted, None)) is None:
                return


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
