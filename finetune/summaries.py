"""Our summarizer's summaries of every review that any target's history may show.

    make_summaries(recipe)
    summaries = read_summaries(recipe)      # review key -> aspect summary

Training and judging read these, not the teacher's labels: what an expert is trained on should be
of the kind that it meets at inference.
"""

from __future__ import annotations

import json
import logging
import sqlite3
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from finetune.rows import review_source, reviews_to_summarize
from finetune.settings import Recipe
from finetune.splits import Split, by_lot, read_targets
from r4r_graph.caches import open_summary_store
from r4r_graph.engine.adapters import find_adapters
from r4r_graph.engine.base import Engine
from r4r_graph.engine.weights import find_base
from r4r_graph.errors import EngineError, NotReadyError, TrainingError
from r4r_graph.experts import Experts
from r4r_graph.jobs import Columns, OnProgress, digest_rows, read_job, run_job
from r4r_graph.prompts import prompt_digests, prompt_info
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


class ExpertEngine:
    """The engine that an expert of this pipeline answers with, loaded when it is first asked for:
    a job that is done already needs none.

    Args:
        recipe: base model, device, precision.
        expert: summarizer, reasoner or predictor.
        folder: its adapter. Without one the base model answers alone, which is said in the log.
        engine: to be used instead of loading one; it stays open.

    Raises:
        ModelError: the base model or the adapter is not there, or they do not fit each other.
    """

    def __init__(self, recipe: Recipe, expert: str, folder: Path, engine: Engine | None) -> None:
        self._recipe = recipe
        self._expert = expert
        self._folder = folder if folder.is_dir() else None
        self._given = engine
        self._loaded: Engine | None = None

    def __enter__(self) -> ExpertEngine:
        return self

    def __exit__(self, *_: object) -> None:
        if self._loaded is not None:
            self._loaded.close()

    @property
    def facts(self) -> dict[str, Any]:
        """What decides its answers: base, adapter and prompt, by their digests."""
        if self._given is not None:
            info = self._given.info
            base, adapter = info.digest, info.adapters.get(self._expert)
        else:
            base = find_base(self._recipe.base).digest
            found = find_adapters({self._expert: self._folder}, calibrated=False)
            adapter = found[self._expert].digest if found else None
        prompt = prompt_info(self._expert).digest
        return {
            "base": base,
            "adapter": adapter,
            "prompt": prompt,
            "quantize_4bit": self._recipe.quantize_4bit,
        }

    @property
    def engine(self) -> Engine:
        """The engine."""
        if self._given is not None:
            return self._given
        if self._loaded is None:
            self._loaded = self._load()
        return self._loaded

    def _load(self) -> Engine:
        from r4r_graph.engine.local import load_local_engine

        recipe = self._recipe
        if self._folder is None:
            _log.warning("no adapter for the %s yet: the base model answers alone", self._expert)
        if recipe.threads is not None:
            import torch

            torch.set_num_threads(recipe.threads)
        engine, notes = load_local_engine(
            recipe.base,
            {self._expert: self._folder},
            device=recipe.device,
            dtype=recipe.dtype,
            quantize_4bit=recipe.quantize_4bit,
            prompts=prompt_digests(),
            calibrated=False,
        )
        for note in notes:
            _log.warning(note)
        return engine


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


def finished_rows(folder: Path, step: str) -> list[Columns]:
    """The rows of a job that has ended.

    Raises:
        NotReadyError: it has not begun, or it was stopped.
    """
    note = folder / "_job.json"
    if not note.is_file():
        raise NotReadyError(f"{folder} holds no results; run the step `{step}` first")
    wanted = json.loads(note.read_text(encoding="utf-8"))["rows"]
    rows = read_job(folder) if any(folder.glob("part-*.parquet")) else []
    if len(rows) < wanted:
        raise NotReadyError(
            f"{folder} holds {len(rows)} of {wanted} rows; run the step `{step}` again to go on"
        )
    return rows


def refuse_all_failed(rows: Sequence[Mapping[str, Any]], folder: Path) -> int:
    """How many rows of a job failed.

    Raises:
        TrainingError: all of them.
    """
    errors = [row["error"] for row in rows if row["error"] is not None]
    if errors and len(errors) == len(rows):
        raise TrainingError(
            f"every row of {folder} failed, the first with: {errors[0]}; mend that, delete the "
            "folder and start again"
        )
    return len(errors)


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
