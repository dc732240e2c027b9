"""Dataset-scale runs: many pairs into a folder of Parquet parts, resumable at any moment.

    report = rate_pairs(recommender, "pairs.parquet", "out/")
    pandas.read_parquet("out/")

The same graph runs for every pair, many at a time, and the micro-batcher joins their requests.
Rows are written in the order of the pairs, as parts named by the rows they hold; each part appears
whole or not at all. What is there is never computed again, so a job that was killed and is started
again loses only what was in flight. Everything else in the folder begins with `_`.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout

from r4r_graph.caches import write_atomically
from r4r_graph.errors import DataError, InputError, R4RError
from r4r_graph.recommender import Recommender, check_knobs
from r4r_graph.reviews import TableReviewSource, load_pairs
from r4r_graph.schema import Pair, Recommendation

SCHEMA = pa.schema(
    [
        ("user_id", pa.string()),
        ("item_id", pa.string()),
        ("as_of", pa.float64()),
        ("rating", pa.float64()),
        ("readout", pa.string()),
        ("mean", pa.float64()),
        ("median", pa.float64()),
        ("mode", pa.float64()),
        ("distribution", pa.list_(pa.float64())),
        ("rating_mass", pa.float64()),
        ("entropy", pa.float64()),
        ("rationale", pa.string()),
        ("cold_start", pa.string()),
        ("error", pa.string()),
    ]
)
"""Columns of every part. A row that failed has its reason in `error` and no rating."""

_PART = re.compile(r"part-(\d{9})-(\d{9})\.parquet")


@dataclass(frozen=True, slots=True)
class BulkProgress:
    """How far a job is."""

    done: int
    """Rows with a result, those of earlier runs included."""
    of: int
    failed: int
    """Rows of this run that ended in an error."""
    seconds: float
    """Since this run began."""


@dataclass(frozen=True, slots=True)
class BulkReport:
    """What a run of a job did."""

    rows: int
    """All rows in the folder."""
    reused: int
    """Rows that were there already."""
    failed: int
    """Rows of this run that ended in an error."""
    seconds: float


OnProgress = Callable[[BulkProgress], None]


def rate_pairs(
    recommender: Recommender,
    pairs: str | os.PathLike[str] | Sequence[Pair],
    out: str | os.PathLike[str],
    *,
    concurrency: int = 64,
    part_rows: int = 4096,
    part_seconds: float = 30.0,
    on_progress: OnProgress | None = None,
    **knobs: Any,
) -> BulkReport:
    """Rate all pairs into the folder `out`; continues where an earlier run stopped.

    Args:
        recommender: rates the pairs, each as of its own time.
        pairs: a file with user_id, item_id and as_of (or timestamp), or such pairs.
        out: a folder, made on demand; it holds this job and no other.
        concurrency: runs of the graph in flight.
        part_rows: rows in a part at most.
        part_seconds: a part is written at least this often while rows end.
        on_progress: called after each row, on this thread.
        **knobs: fields of `Knobs`.

    A row that fails on its own (`R4RError`) is kept with its reason; anything else ends the run.

    Raises:
        DataError: the pairs cannot be read.
        InputError: the folder holds another job, or another process is at work in it.
    """
    check_knobs(knobs)
    rows = load_pairs(pairs) if isinstance(pairs, str | os.PathLike) else list(pairs)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        # A lock of the operating system: it goes with its process, however that ends.
        with FileLock(folder / "_lock", timeout=0):
            _check_manifest(folder, _manifest(recommender, rows, knobs))
            job = _Job(recommender, rows, folder, part_rows, part_seconds, on_progress, knobs)
            return asyncio.run(job.run(concurrency))
    except Timeout:
        raise InputError(f"another process is at work in {folder}") from None


class _Job:
    """One run over the rows that are still to do."""

    def __init__(
        self,
        recommender: Recommender,
        rows: Sequence[Pair],
        folder: Path,
        part_rows: int,
        part_seconds: float,
        on_progress: OnProgress | None,
        knobs: Mapping[str, Any],
    ) -> None:
        self._recommender = recommender
        self._rows = rows
        self._folder = folder
        self._part_rows = part_rows
        self._part_seconds = part_seconds
        self._on_progress = on_progress
        self._knobs = knobs
        self._written = _written(folder, len(rows))
        self._reused = sum(end - start for start, end in self._written)
        self._results: dict[int, dict[str, Any]] = {}
        self._in_flight: set[int] = set()
        self._failed = 0
        self._computed = 0
        self._started = self._flushed = time.monotonic()

    async def run(self, concurrency: int) -> BulkReport:
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
        return BulkReport(
            rows=self._reused + self._computed,
            reused=self._reused,
            failed=self._failed,
            seconds=time.monotonic() - self._started,
        )

    async def _work(self, missing: Iterable[int]) -> None:
        for at in missing:  # shared by all workers
            self._in_flight.add(at)
            self._results[at] = await self._rate(self._rows[at])
            self._in_flight.remove(at)
            self._computed += 1
            self._tell()
            full = len(self._results) >= self._part_rows
            if full or time.monotonic() - self._flushed >= self._part_seconds:
                self._flush(min(self._in_flight, default=len(self._rows)))

    async def _rate(self, pair: Pair) -> dict[str, Any]:
        row = dict.fromkeys(SCHEMA.names) | asdict(pair)
        try:
            result = await self._recommender.arate(
                pair.user_id, pair.item_id, as_of=pair.as_of, **self._knobs
            )
        except R4RError as error:
            self._failed += 1
            return row | {"error": f"{type(error).__name__}: {error}"}
        return row | _columns(result)

    def _tell(self) -> None:
        if self._on_progress is not None:
            done = self._reused + self._computed
            seconds = time.monotonic() - self._started
            self._on_progress(BulkProgress(done, len(self._rows), self._failed, seconds))

    def _flush(self, before: int) -> None:
        """Write the finished rows under number `before`, a part for each unbroken stretch of
        them. Up to the first row in flight, that is one stretch; at the end it is what there is."""
        finished = sorted(at for at in self._results if at < before)
        for start, end in _stretches(finished, self._part_rows):
            table = pa.Table.from_pylist([self._results[at] for at in range(start, end)], SCHEMA)
            name = f"part-{start:09d}-{end:09d}.parquet"
            scratch = self._folder / f"_{name}"
            pq.write_table(table, scratch)
            with scratch.open("rb") as written:
                os.fsync(written.fileno())
            scratch.replace(self._folder / name)
            for at in range(start, end):
                del self._results[at]
        self._flushed = time.monotonic()


def summarize_reviews(
    recommender: Recommender,
    *,
    concurrency: int = 64,
    on_progress: OnProgress | None = None,
) -> BulkReport:
    """Summarize every review of the table into the summary cache; what is there is kept.

    Raises:
        InputError: the recommender's reviews are no table.
    """
    source = recommender.reviews
    if not isinstance(source, TableReviewSource):
        raise InputError("only a table of reviews can be summarized as a whole")
    started = time.monotonic()
    done = hits = failed = 0

    async def work(reviews: Iterable[Any]) -> None:
        nonlocal done, hits, failed
        for review in reviews:
            if review.text.strip():
                kind = source.item(review.item_id, None).category
                try:
                    made = await recommender.experts.summarizer.asummarize(review, kind)
                    hits += made.cached
                except R4RError:
                    failed += 1
            done += 1
            if on_progress is not None:
                seconds = time.monotonic() - started
                on_progress(BulkProgress(done, len(source), failed, seconds))

    async def everything() -> None:
        reviews = iter(source)
        await asyncio.gather(*(work(reviews) for _ in range(concurrency)))

    asyncio.run(everything())
    return BulkReport(done, hits, failed, time.monotonic() - started)


def _columns(result: Recommendation) -> dict[str, Any]:
    d = result.distribution
    return {
        "rating": result.rating,
        "readout": result.readout,
        "mean": d.mean,
        "median": d.median,
        "mode": d.mode,
        "distribution": list(d.probabilities),
        "rating_mass": d.mass,
        "entropy": d.entropy,
        "rationale": "\n\n".join(result.rationales),
        "cold_start": result.cold_start,
    }


def _manifest(
    recommender: Recommender, rows: Sequence[Pair], knobs: Mapping[str, Any]
) -> dict[str, Any]:
    """What makes two runs the same job."""
    pairs = hashlib.blake2b(digest_size=16)
    for pair in rows:
        pairs.update(json.dumps([pair.user_id, pair.item_id, pair.as_of]).encode())
    model = recommender.experts.model_card()
    settings = asdict(check_knobs(knobs))
    return {
        "pairs": len(rows),
        "pairs_digest": pairs.hexdigest(),
        "scale": list(recommender.experts.scale.values),
        "budgets": asdict(recommender.experts.budgets),
        "knobs": settings,
        "model": {name: model[name] for name in ("base", "base_digest", "adapters", "prompts")},
    }


def _check_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    file = folder / "_job.json"
    if not file.exists():
        if any(path for path in folder.iterdir() if not path.name.startswith("_")):
            raise InputError(f"{folder} holds other files; choose an empty folder")
        write_atomically(file, json.dumps(manifest, indent=2))
        return
    try:
        earlier = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        raise InputError(f"{file} is damaged; choose another folder") from None
    changed = sorted(key for key in manifest if manifest[key] != earlier.get(key))
    if changed:
        raise InputError(
            f"{folder} holds another job (different: {', '.join(changed)}); choose another "
            "folder, or call it with the same pairs, model and settings to continue"
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
