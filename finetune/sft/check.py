"""What training did to the summarizer: its summaries of unseen reviews, held against the teacher's.

The rows are those that `train_summarizer` kept back. The base model and the trained adapter each
write every summary twice: freely, where the share of answers in the format is measured and an
answer outside it counts as nothing in common; and within the format, as at inference. The figure is
`phrase_overlap`. The floor is the teacher's summary of another review.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from finetune.engines import ExpertEngine
from finetune.settings import Recipe
from finetune.sft.train import labelled_reviews
from r4r_graph.caches import write_atomically
from r4r_graph.engine.aspects import parse_aspects
from r4r_graph.engine.base import Engine, GenerateRequest
from r4r_graph.errors import NotReadyError, R4RError
from r4r_graph.evaluation import Estimate, bootstrap, mean
from r4r_graph.evaluation.words.overlap import phrase_overlap
from r4r_graph.experts import summarizer_prompt
from r4r_graph.jobs import Columns, OnProgress, digest_rows, read_job, run_job
from r4r_graph.schema import AspectSummary, Review

SCHEMA = pa.schema([("key", pa.string()), ("text", pa.string()), ("error", pa.string())])


@dataclass(frozen=True, slots=True)
class WriterScores:
    """One writer's summaries of the unseen reviews."""

    writer: str
    """`base` or `adapter`; `another review's` is the floor."""
    form: str
    """`free` or `in format`."""
    rows: int
    in_format: int
    """Answers that parse."""
    overlap: Estimate
    """Mean phrase overlap with the teacher, 95 % bootstrap interval."""


@dataclass(frozen=True, slots=True)
class CheckReport:
    """All writers, on the same rows."""

    scores: tuple[WriterScores, ...]


def check_summarizer(
    recipe: Recipe, *, engine: Engine | None = None, on_progress: OnProgress | None = None
) -> CheckReport:
    """Score base model and adapter on the held-out labelled reviews.

    The report also goes to `work/runs/check/report.json`. Resumable.

    Raises:
        NotReadyError: no summarizer is trained yet, or nothing was held out.
    """
    folder = recipe.adapters / "summarizer"
    if engine is None and not folder.is_dir():
        raise NotReadyError(f"{folder} is not there yet; run: python -m finetune summarizer")
    labelled = labelled_reviews(recipe)
    rows = labelled[: min(recipe.summarizer.validation_rows, len(labelled) // 5)]
    if len(rows) < 2:
        raise NotReadyError("no labelled reviews were held out; raise summarizer.validation_rows")
    teacher = [summary for _, _, summary in rows]
    found = [_floor(teacher, recipe.seed)]
    with ExpertEngine(recipe, "summarizer", folder, engine) as own:
        for adapter in (None, "summarizer"):
            for form in ("free", "in format"):
                texts = _write(recipe, rows, own.engine, adapter, form, on_progress)
                found.append(_scores(adapter, form, texts, teacher, recipe.seed))
    report = CheckReport(tuple(found))
    out = recipe.folder("runs") / "check" / "report.json"
    write_atomically(out, json.dumps(asdict(report), indent=2))
    return report


def _write(
    recipe: Recipe,
    rows: Sequence[tuple[Review, str, AspectSummary]],
    engine: Engine,
    adapter: str | None,
    form: str,
    on_progress: OnProgress | None,
) -> list[str]:
    budgets = recipe.token_budgets

    def request(review: Review, kind: str) -> GenerateRequest:
        turns, _ = summarizer_prompt(review, kind, recipe.rating_scale, engine.meter, budgets)
        asked = GenerateRequest(
            turns, adapter=adapter, max_tokens=budgets.summary, siblings=len(rows)
        )
        return asked if form == "free" else replace(asked, format="aspects")

    async def write(row: tuple[Review, str, AspectSummary]) -> Columns:
        review, kind, _ = row
        try:
            [made] = await engine.agenerate([request(review, kind)])
        except R4RError as error:
            return {"key": review.key, "text": None, "error": f"{type(error).__name__}: {error}"}
        return {"key": review.key, "text": made.text, "error": None}

    name = f"{adapter or 'base'}-{form.replace(' ', '-')}"
    info = engine.info
    manifest: dict[str, Any] = {
        "rows": digest_rows([review.key, kind] for review, kind, _ in rows),
        "base": info.digest,
        "adapter": info.adapters[adapter] if adapter else None,
        "budgets": asdict(budgets),
    }
    # A summarizer that was trained again is checked in a folder of its own.
    where = recipe.folder("runs") / "check" / f"{name}-{digest_rows([manifest])[:8]}"
    run_job(
        rows,
        write,
        where,
        schema=SCHEMA,
        manifest=manifest,
        concurrency=len(rows),
        on_progress=on_progress,
    )
    return [row["text"] or "" for row in read_job(where)]


def _scores(
    adapter: str | None,
    form: str,
    texts: Sequence[str],
    teacher: Sequence[AspectSummary],
    seed: int,
) -> WriterScores:
    parsed = [_parsed(text) for text in texts]
    overlaps = [
        phrase_overlap(one, two) if one is not None else 0.0
        for one, two in zip(parsed, teacher, strict=True)
    ]
    return WriterScores(
        writer="adapter" if adapter else "base",
        form=form,
        rows=len(texts),
        in_format=sum(one is not None for one in parsed),
        overlap=bootstrap(mean, np.array(overlaps), seed=seed),
    )


def _floor(teacher: Sequence[AspectSummary], seed: int) -> WriterScores:
    order = list(range(len(teacher)))
    random.Random(seed).shuffle(order)
    # The next one in a random round: everyone gets another's.
    overlaps = [
        phrase_overlap(teacher[a], teacher[b])
        for a, b in zip(order, [*order[1:], order[0]], strict=True)
    ]
    estimate = bootstrap(mean, np.array(overlaps), seed=seed)
    return WriterScores("another review's", "in format", len(teacher), len(teacher), estimate)


def _parsed(text: str) -> AspectSummary | None:
    try:
        return parse_aspects(text.strip())
    except ValueError:
        return None
