"""Ready-made candidate rationales, ranked by the error that each of them carries.

Someone else has drawn them and predicted with each. The true ratings are not known here, so they
can be compared within a row only: the best are kept whose error is lower than the row's median by
`rejection.min_margin`.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from finetune.rejection.composing import base_meter, composed_facts, composed_rows
from finetune.rejection.judging import Candidate, screened
from finetune.rejection.kept import (
    KEPT_SCHEMA,
    RejectionReport,
    Survivors,
    count_reasons,
    earlier_report,
    kept_file,
    mean,
    packed,
    survivors,
    write_kept,
)
from finetune.settings import Recipe
from r4r_graph.engine.base import TokenMeter
from r4r_graph.engine.model_files import file_digest
from r4r_graph.engine.weights import find_base
from r4r_graph.errors import DataError, SettingError
from r4r_graph.evaluation.words.leaks import screens_digest
from r4r_graph.evidence import Evidence, fit_evidence
from r4r_graph.jobs import Columns, JobProgress, OnProgress
from r4r_graph.ratings import RatingStats
from r4r_graph.reviews.files import Layout, read_parquet
from r4r_graph.schema import AspectSummary, Item, ReviewAspects

_SIDES = ("user_history", "item_history")
_COLUMNS = Layout(("item_title", *_SIDES, "candidates"), ())


def rank_candidates(
    recipe: Recipe, meter: TokenMeter | None = None, on_progress: OnProgress | None = None
) -> RejectionReport:
    """Keep the best of the ready-made candidates in `teacher.rationales` (Parquet).

    Columns: item_title; user_history and item_history, lists of {title, positive, negative, values
    (or preferences)}, oldest first; candidates, a list of {text, error}. Within a row the lower
    error wins, on a tie the shorter text (in words), then the earlier one. A row's best
    `rejection.keep` are kept, as far as each is better than the median of the row's sound
    candidates by `rejection.min_margin`.

    Nothing says which targets the rows are about: a reasoner trained on them may have met targets
    of this recipe's validation or test part.

    Args:
        recipe: `rejection.rows` caps the rows, drawn by seed.
        meter: of the base model's tokenizer; None loads that.
        on_progress: called after each row.

    Raises:
        SettingError, DataError: the file is not named, cannot be read, or has other columns.
    """
    started = time.monotonic()
    path = recipe.teacher.rationales
    if path is None:
        raise SettingError("no ready-made rationales: name their file in teacher.rationales")
    made_of = _ingredients(recipe, path) | composed_facts(recipe)
    if (earlier := earlier_report(recipe, made_of)) is not None:
        return earlier
    rows = _drawn_rows(_read(path), recipe)
    meter = meter or base_meter(recipe)
    kept: list[Columns] = []
    everything: list[Candidate] = []
    medians: list[float] = []
    without = 0
    for at, row in enumerate(rows, start=1):
        evidence = _evidence(row, meter, recipe)
        ranked = _ranked(row, evidence, meter, recipe)
        best = [candidate for candidate in ranked if candidate.outcome == "kept"]
        kept += [_kept_row(evidence, candidate, rank) for rank, candidate in enumerate(best)]
        everything += ranked
        medians += [statistics.median(errors)] if (errors := _errors(ranked)) else []
        without += not best
        if on_progress is not None:
            on_progress(JobProgress(at, len(rows), 0, time.monotonic() - started))
    composed = composed_rows(recipe, meter)
    report = RejectionReport(
        path=kept_file(recipe),
        ready_made=True,
        rows=len(rows),
        failed=0,
        without=without,
        kept=len(kept) + len(composed),
        composed=len(composed),
        plain=survivors(everything),
        hinted=Survivors(),
        reasons=count_reasons(everything),
        baseline_error=mean(medians),
        kept_error=mean(row["error"] for row in kept),
        seconds=time.monotonic() - started,
    )
    write_kept(recipe, kept + composed, report, made_of)
    return report


def _drawn_rows(rows: list[Columns], recipe: Recipe) -> list[Columns]:
    most = recipe.rejection.rows
    if most is None or most >= len(rows):
        return rows
    return [rows[at] for at in sorted(random.Random(recipe.seed).sample(range(len(rows)), most))]


def _ranked(row: Columns, evidence: Evidence, meter: TokenMeter, recipe: Recipe) -> list[Candidate]:
    """The row's candidates with their outcomes: the sound ones first, the best of them first."""
    out: list[Candidate] = []
    sound: list[Candidate] = []
    for given in filter(None, row["candidates"] or []):
        texts = [candidate.text for candidate in sound]
        refused = screened(given["text"], evidence, texts, recipe, meter)
        if refused is not None:
            out.append(refused)
        elif given["error"] is None or not math.isfinite(given["error"]):
            out.append(Candidate(given["text"].strip(), "malformed", reasons=("no error",)))
        else:
            error = abs(float(given["error"]))
            sound.append(Candidate(given["text"].strip(), "rejected", error=error))
    sound.sort(key=lambda candidate: (candidate.error, len(candidate.text.split())))  # stable
    if errors := _errors(sound):
        limit = statistics.median(errors) - recipe.rejection.min_margin
        for at, candidate in enumerate(sound[: recipe.rejection.keep]):
            if candidate.error is not None and candidate.error <= limit:
                sound[at] = replace(candidate, outcome="kept")
    return sound + out


def _errors(candidates: Iterable[Candidate]) -> list[float]:
    return [candidate.error for candidate in candidates if candidate.error is not None]


def _kept_row(evidence: Evidence, candidate: Candidate, rank: int) -> Columns:
    return dict.fromkeys(KEPT_SCHEMA.names) | {
        "evidence": packed(evidence),
        "rationale": candidate.text,
        "hinted": False,
        "error": candidate.error,
        "rank": rank,
    }


def _evidence(row: Columns, meter: TokenMeter, recipe: Recipe) -> Evidence:
    """What the reasoner is shown. The ratings are not known, and it is never shown any."""
    try:
        user, others = (_side(row[name], recipe.history) for name in _SIDES)
    except (TypeError, KeyError, ValueError) as error:
        raise DataError(
            f"{recipe.teacher.rationales}: bad history in the row of {row['item_title']!r}: "
            f"{type(error).__name__}: {error}"
        ) from None
    item, unknown = Item("", title=row["item_title"] or ""), RatingStats()
    evidence = Evidence(item, user, others, unknown, unknown)
    return fit_evidence(evidence, meter, recipe.token_budgets)[0]


def _side(entries: Sequence[Mapping[str, Any]] | None, limit: int) -> tuple[ReviewAspects, ...]:
    latest = (entries or [])[-limit:] if limit else []
    return tuple(map(_aspects, latest))


def _aspects(entry: Mapping[str, Any]) -> ReviewAspects:
    values = entry["values"] if "values" in entry else entry["preferences"]
    lists = (entry["positive"] or (), entry["negative"] or (), values or ())
    summary = AspectSummary(*(tuple(map(str, phrases)) for phrases in lists))
    return ReviewAspects("", "", entry["title"] or "", 0.0, 0.0, summary)


def _read(path: Path) -> list[Columns]:
    table = read_parquet(path, _COLUMNS)
    kind = table.schema.field("candidates").type
    members = kind.value_type if pa.types.is_list(kind) or pa.types.is_large_list(kind) else kind
    if not pa.types.is_struct(members) or not {"text", "error"} <= {m.name for m in members}:
        raise DataError(f"{path}: column candidates is {kind}; expected a list of {{text, error}}")
    rows: list[Columns] = table.to_pylist()
    if not rows:
        raise DataError(f"{path}: holds no candidates")
    return rows


def _ingredients(recipe: Recipe, path: Path) -> dict[str, Any]:
    """All that decides what is kept."""
    return {
        "rationales": file_digest(path) if path.is_file() else None,
        "settings": asdict(recipe.rejection),
        "seed": recipe.seed,
        "scale": recipe.scale,
        "history": recipe.history,
        "budgets": asdict(recipe.token_budgets),
        "base": find_base(recipe.base).digest,
        "screens": screens_digest(),
    }
