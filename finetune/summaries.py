"""Our summarizer's summaries of every review that any target's history may show.

    make_summaries(recipe)
    summaries = read_summaries(recipe)      # review key -> aspect summary

Training and judging read these, not the teacher's labels: what an expert is trained on should be
of the kind that it meets at inference.
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa

from finetune.domains import review_source
from finetune.engines import ExpertEngine, finished_rows, refuse_all_failed
from finetune.rows import reviews_to_summarize
from finetune.settings import Recipe
from finetune.splits import Split, read_targets
from r4r_graph.caches import open_summary_store
from r4r_graph.engine.base import Engine
from r4r_graph.errors import EngineError
from r4r_graph.evaluation.targets import by_lot
from r4r_graph.experts import Experts
from r4r_graph.jobs import Columns, OnProgress, digest_rows, run_job
from r4r_graph.schema import AspectSummary, Review

_log = logging.getLogger(__name__)

SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("user_id", pa.string()),
        ("item_id", pa.string()),
        ("timestamp", pa.float64()),
        *((name, pa.list_(pa.string())) for name in ("positive", "negative", "values")),
        ("error", pa.string()),
    ]
)
"""Columns of the summaries; `key` is the review's. A row that failed has its reason in `error` and
no lists."""

SPLITS: tuple[Split, ...] = ("train", "validation", "test")


@dataclass(frozen=True, slots=True)
class SummariesReport:
    """What the summarizer has read."""

    path: Path
    rows: int
    """Reviews with words, each once."""
    reused: int
    """Rows that were there already."""
    failed: int
    """Rows without a summary, of this run and earlier ones."""
    empty: int
    """Summaries without a phrase."""
    seconds: float


def make_summaries(
    recipe: Recipe,
    engine: Engine | None = None,
    splits: Sequence[Split] = SPLITS,
    on_progress: OnProgress | None = None,
) -> SummariesReport:
    """Summarize the reviews in all targets' histories, into the job folder `work/summaries`.

    Each review is read once, greedily, by the summarizer at inference
    (`r4r_graph.experts.Summarizer`), and through the summary cache, so that a recommender with the
    same adapter finds the summaries there. A review that fails is recorded with its reason.

    Args:
        recipe: `summaries.rows` caps the reviews (drawn by seed), `summaries.concurrency` says how
            many are in flight.
        engine: answers with its adapter `summarizer`; None loads base and adapter.
        splits: whose targets' histories.
        on_progress: called after each row.

    Raises:
        NotReadyError: there are no splits yet.
        InputError: the folder holds summaries of other reviews or by another summarizer.
        TrainingError: every row failed.
    """
    rows = _rows(recipe, splits)
    folder = recipe.folder("summaries")
    budgets, scale = recipe.token_budgets, recipe.rating_scale
    opened: list[Experts] = []

    with ExitStack() as stack:
        expert = stack.enter_context(
            ExpertEngine(recipe, "summarizer", recipe.adapters / "summarizer", engine)
        )

        async def summarize(row: tuple[Review, str]) -> Columns:
            if not opened:
                store = open_summary_store()
                connection: sqlite3.Connection = store.conn
                stack.callback(connection.close)
                opened.append(Experts(expert.engine, store, scale, budgets))
            return await _summarized(row, opened[0])

        report = run_job(
            rows,
            summarize,
            folder,
            schema=SCHEMA,
            manifest={
                "rows": len(rows),
                "rows_digest": digest_rows([review.key, kind] for review, kind in rows),
                "scale": list(scale.values),
                "budgets": asdict(budgets),
                "summarizer": expert.facts,
            },
            concurrency=recipe.summaries.concurrency,
            on_progress=on_progress,
        )
    made = finished_rows(folder, "summaries")
    written = [AspectSummary.from_dict(row) for row in made if row["error"] is None]
    return SummariesReport(
        folder,
        rows=report.rows,
        reused=report.reused,
        failed=refuse_all_failed(made, folder),
        empty=written.count(AspectSummary()),
        seconds=report.seconds,
    )


def read_summaries(recipe: Recipe) -> dict[str, AspectSummary]:
    """Review key to its summary. Reviews that could not be summarized are not in it.

    Raises:
        NotReadyError: the step `summaries` has not ended yet.
    """
    rows = finished_rows(recipe.folder("summaries"), "summaries")
    return {row["key"]: AspectSummary.from_dict(row) for row in rows if row["error"] is None}


def _rows(recipe: Recipe, splits: Sequence[Split]) -> list[tuple[Review, str]]:
    targets = [target for split in splits for target in read_targets(recipe, split)]
    rows = reviews_to_summarize(targets, review_source(recipe), recipe)
    if recipe.summaries.rows is None:
        return rows
    drawn = by_lot([review for review, _ in rows], recipe.seed, "summaries")
    chosen = {review.key for review in drawn[: recipe.summaries.rows]}
    return [(review, kind) for review, kind in rows if review.key in chosen]


async def _summarized(row: tuple[Review, str], experts: Experts) -> Columns:
    review, kind = row
    columns: Columns = dict.fromkeys(SCHEMA.names) | {
        "key": review.key,
        "user_id": review.user_id,
        "item_id": review.item_id,
        "timestamp": float(review.timestamp),
    }
    try:
        made = await experts.summarizer.asummarize(review, kind)
    except EngineError as error:
        return columns | {"error": f"{type(error).__name__}: {error}"}
    return columns | made.summary.to_dict()
