"""Dataset-scale runs of the graph: many pairs rated, every review summarized.

    report = rate_pairs(recommender, "pairs.parquet", "out/")
    pandas.read_parquet("out/")

The same graph runs for every pair, many at a time, and the micro-batcher joins their requests. The
folder, its parts and how a stopped run goes on are those of every job; see `jobs`.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import pyarrow as pa

from r4r_graph.errors import InputError, R4RError, SettingError
from r4r_graph.jobs import Columns, JobProgress, JobReport, OnProgress, digest_rows, run_job
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
        ("rationales", pa.list_(pa.string())),
        ("cold_start", pa.string()),
        ("error", pa.string()),
    ]
)
"""Columns of every part. A row that failed has its reason in `error` and no rating."""

_OF_ONE_RUN = ("ask", "ask_below", "influence", "record")
"""Knobs that change no column."""


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
) -> JobReport:
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
        SettingError: a knob is out of range, or asks a person.
        InputError: the folder holds another job, or another process is at work in it.
    """
    settings = check_knobs(knobs)
    if settings.ask or settings.ask_below:
        raise SettingError("a bulk run can ask nobody: leave out ask and ask_below")
    rows = load_pairs(pairs) if isinstance(pairs, str | os.PathLike) else list(pairs)

    async def rate(pair: Pair) -> Columns:
        row = dict.fromkeys(SCHEMA.names) | asdict(pair)
        try:
            result = await recommender.arate(pair.user_id, pair.item_id, as_of=pair.as_of, **knobs)
        except R4RError as error:
            return row | {"error": f"{type(error).__name__}: {error}"}
        return row | _columns(result)

    return run_job(
        rows,
        rate,
        out,
        schema=SCHEMA,
        manifest=_manifest(recommender, rows, knobs),
        concurrency=concurrency,
        part_rows=part_rows,
        part_seconds=part_seconds,
        on_progress=on_progress,
    )


def summarize_reviews(
    recommender: Recommender,
    *,
    concurrency: int = 64,
    on_progress: OnProgress | None = None,
) -> JobReport:
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
                on_progress(JobProgress(done, len(source), failed, seconds))

    async def everything() -> None:
        reviews = iter(source)
        await asyncio.gather(*(work(reviews) for _ in range(concurrency)))

    asyncio.run(everything())
    return JobReport(done, hits, failed, time.monotonic() - started)


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


def _manifest(
    recommender: Recommender, rows: Sequence[Pair], knobs: Mapping[str, Any]
) -> dict[str, Any]:
    """What makes two runs the same job."""
    model = recommender.experts.model_card()
    settings = asdict(check_knobs(knobs).settled(recommender.experts.history))
    for name in _OF_ONE_RUN:
        del settings[name]
    return {
        "columns": SCHEMA.names,
        "pairs": len(rows),
        "pairs_digest": digest_rows([pair.user_id, pair.item_id, pair.as_of] for pair in rows),
        "scale": list(recommender.experts.scale.values),
        "budgets": asdict(recommender.experts.budgets),
        "knobs": settings,
        "model": {name: model[name] for name in ("base", "base_digest", "adapters", "prompts")},
    }
