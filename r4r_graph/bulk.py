"""Dataset-scale runs of the graph: many pairs rated, every review summarized.

    report = rate_pairs(recommender, "pairs.parquet", "out/")
    pandas.read_parquet("out/")

The same graph runs for every pair, many at a time, and the micro-batcher joins their requests. The
folder, its parts and how a stopped run goes on are those of every job; see `jobs`. `ray_bulk` does
the same on many machines.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa

from r4r_graph.caches import write_atomically
from r4r_graph.errors import (
    EngineError,
    EngineFailure,
    InputError,
    R4RError,
    RequestError,
    SettingError,
    StorageError,
)
from r4r_graph.experts import Experts
from r4r_graph.jobs import Columns, JobProgress, JobReport, OnProgress, digest_rows, run_job
from r4r_graph.parts import storing
from r4r_graph.recommender import Recommender, check_knobs
from r4r_graph.reviews import ListedReviews, load_pairs
from r4r_graph.schema import Pair, Recommendation, Review, unicode_text, unix_seconds

_log = logging.getLogger(__name__)

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
        ("rationales", pa.list_(pa.string())),
        ("cold_start", pa.string()),
        ("error", pa.string()),
    ]
)
"""Columns of every part. A row that failed has its reason in `error` and no rating."""

_OF_ONE_RUN = ("ask", "ask_below", "influence", "record", "timeout")
"""Knobs that change no column."""

_GIVE_UP = 100
"""So many requests in a row that the engine could not serve: it is gone, and the rest would only be
recorded as failed."""


def rate_pairs(
    recommender: Recommender,
    pairs: str | os.PathLike[str] | Sequence[Pair],
    out: str | os.PathLike[str],
    *,
    retry_failed: bool = False,
    concurrency: int = 64,
    part_rows: int = 4096,
    part_seconds: float = 30.0,
    on_progress: OnProgress | None = None,
    **knobs: Any,
) -> JobReport:
    """Rate all pairs into the folder `out`; continues where an earlier run stopped.

    Args:
        recommender: rates the pairs, each as of its own time.
        pairs: a file with user_id, item_id and as_of (or timestamp), or such pairs.
        out: a folder, made on demand; it holds this job and no other.
        retry_failed: rate the pairs again that failed earlier, and them alone if all others are
            rated.
        concurrency: runs of the graph in flight.
        part_rows: rows in a part at most.
        part_seconds: a part is written at least this often while rows end.
        on_progress: called after each row, on this thread.
        **knobs: fields of `Knobs`.

    A row that fails on its own (`R4RError`) is kept with its reason; anything else ends the run.

    Raises:
        DataError: the pairs cannot be read.
        SettingError: a knob is out of range, or asks a person.
        InputError: the folder holds another job, or another process is at work in it.
        StorageError: the disk is full, or the folder cannot be written to.
        EngineFailure: the engine served none of a hundred rows in a row.
    """
    check_bulk_knobs(knobs)
    rows = read_pairs(pairs)
    return run_job(
        rows,
        rater(recommender, knobs),
        out,
        schema=SCHEMA,
        manifest=manifest(job_facts(recommender.experts, knobs), rows),
        retry_failed=retry_failed,
        concurrency=concurrency,
        part_rows=part_rows,
        part_seconds=part_seconds,
        on_progress=on_progress,
    )


def check_bulk_knobs(knobs: Mapping[str, Any]) -> None:
    """Refuse knobs that no bulk run can have.

    Raises:
        SettingError: one is out of range, or asks a person.
    """
    settings = check_knobs(dict(knobs))
    if settings.ask or settings.ask_below:
        raise SettingError("a bulk run can ask nobody: leave out ask and ask_below")


def read_pairs(pairs: str | os.PathLike[str] | Sequence[Pair]) -> list[Pair]:
    """The pairs of a file, or those given.

    Raises:
        DataError: one is bad; it names its place.
    """
    if isinstance(pairs, str | os.PathLike):
        return load_pairs(pairs)
    for at, pair in enumerate(pairs := list(pairs), start=1):
        for name in ("user_id", "item_id"):
            unicode_text(getattr(pair, name), f"pair {at}: {name}")
        unix_seconds(pair.as_of, what=f"as_of of pair {at}")
    return pairs


def rater(
    recommender: Recommender, knobs: Mapping[str, Any]
) -> Callable[[Pair], Awaitable[Columns]]:
    """What rates one pair into the columns of `SCHEMA`; a failure of its own goes into `error`.

    Raises (what it returns):
        EngineFailure: the engine served none of a hundred rows in a row.
    """
    engine = _EngineWatch()

    async def rate(pair: Pair) -> Columns:
        row = dict.fromkeys(SCHEMA.names) | asdict(pair)
        try:
            result = await recommender.arate(pair.user_id, pair.item_id, as_of=pair.as_of, **knobs)
        except R4RError as error:
            engine.failed(error)
            return row | {"error": f"{type(error).__name__}: {error}"}
        engine.served()
        return row | _columns(result)

    return rate


class _EngineWatch:
    """Tells rows that fail from an engine that is gone."""

    def __init__(self) -> None:
        self._in_a_row = 0

    def served(self) -> None:
        self._in_a_row = 0

    def failed(self, error: R4RError) -> None:
        """Raises EngineFailure where it has been too many."""
        if not isinstance(error, EngineError) or isinstance(error, RequestError):
            return
        self._in_a_row += 1
        if self._in_a_row >= _GIVE_UP:
            raise EngineFailure(
                f"the engine served none of the last {_GIVE_UP} rows; the last reason: {error}. "
                "Mend it and go on; rows that are recorded as failed are tried again where that "
                "is asked for (retry_failed, --retry-failed)"
            ) from error


def summarize_reviews(
    recommender: Recommender,
    *,
    failures: str | os.PathLike[str] | None = None,
    concurrency: int = 64,
    on_progress: OnProgress | None = None,
) -> JobReport:
    """Summarize every review of the table into the summary cache; what is there is kept.

    Calling it again makes what is missing, which is what failed or was stopped.

    Args:
        recommender: its review source lists its reviews (`ListedReviews`: a table, a database).
        failures: a JSONL file for the reviews that failed: ids, timestamp and `error`; there is
            none where nothing failed. Left out, they go to the log.
        concurrency: reviews in flight.
        on_progress: called after each review, on this thread.

    Raises:
        InputError: the recommender has no reviews, or they cannot be listed.
        StorageError: summaries cannot be kept, such as on a full disk.
        EngineFailure: the engine served none of a hundred reviews in a row.
    """
    source = recommender.reviews
    if not isinstance(source, ListedReviews):
        raise InputError(
            f"{type(source).__name__} cannot list its reviews, so they cannot be summarized as a "
            "whole: give it __len__ and __iter__, or load them as a table or a database"
            if source is not None
            else "no reviews to summarize: load the recommender with some"
        )
    count = len(source)
    summarizer = recommender.experts.summarizer
    earlier = summarizer.unkept
    started = time.monotonic()
    done = hits = 0
    failed: list[tuple[Review, R4RError]] = []
    engine = _EngineWatch()

    async def work(reviews: Iterable[Review]) -> None:
        nonlocal done, hits
        for review in reviews:
            if review.text.strip():
                kind = source.item(review.item_id, None).category
                try:
                    made = await summarizer.asummarize(review, kind)
                except R4RError as error:
                    failed.append((review, error))
                    _tell_failure(review, error, quiet=failures is not None)
                    engine.failed(error)
                else:
                    hits += made.cached
                    engine.served()
                if (lost := summarizer.unkept) is not None and lost is not earlier:
                    raise StorageError(
                        f"a summary cannot be kept: {lost}; those before it are: mend it, and the "
                        "same call continues"
                    ) from lost
            done += 1
            if on_progress is not None:
                seconds = time.monotonic() - started
                on_progress(JobProgress(done, count, len(failed), seconds))

    async def everything() -> None:
        reviews = iter(source)
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(concurrency):
                    group.create_task(work(reviews))
        except BaseExceptionGroup as ended:
            raise ended.exceptions[0] from None

    try:
        asyncio.run(everything())
    finally:
        if failures is not None:
            _write_failures(Path(failures), failed)
    return JobReport(done, hits, len(failed), time.monotonic() - started)


def _tell_failure(review: Review, error: R4RError, *, quiet: bool) -> None:
    level = logging.DEBUG if quiet else logging.WARNING
    _log.log(level, "no summary of %s by %s: %s", review.item_id, review.user_id, error)


def _write_failures(file: Path, failed: Sequence[tuple[Review, R4RError]]) -> None:
    lines = [
        json.dumps(
            {
                "user_id": review.user_id,
                "item_id": review.item_id,
                "timestamp": review.timestamp,
                "error": f"{type(error).__name__}: {error}",
            },
            ensure_ascii=False,
        )
        for review, error in failed
    ]
    with storing(file.parent):
        if lines:
            write_atomically(file, "\n".join(lines) + "\n")
        else:
            file.unlink(missing_ok=True)


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
        "rationales": list(result.rationales),
        "cold_start": result.cold_start,
    }


def job_facts(experts: Experts, knobs: Mapping[str, Any]) -> dict[str, Any]:
    """What makes two runs over the same pairs the same job."""
    model = experts.model_card()
    settings = asdict(check_knobs(dict(knobs)).settled(experts.history))
    for name in _OF_ONE_RUN:
        del settings[name]
    return {
        "scale": list(experts.scale.values),
        "budgets": asdict(experts.budgets),
        "knobs": settings,
        "model": {name: model[name] for name in ("base", "base_digest", "adapters", "prompts")},
    }


def manifest(facts: Mapping[str, Any], rows: Sequence[Pair]) -> dict[str, Any]:
    """What makes two runs the same job, out of `job_facts` and the pairs."""
    return {
        "columns": SCHEMA.names,
        "pairs": len(rows),
        "pairs_digest": digest_rows([pair.user_id, pair.item_id, pair.as_of] for pair in rows),
        **facts,
    }
