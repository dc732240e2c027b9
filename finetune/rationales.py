"""The reasoner's rationales for rows that it did not learn from.

    write_rationales(recipe)
    rationales = read_rationales(recipe, "train")      # (user, item, as_of) -> text

The predictor is trained on the train rows and checked and calibrated on the validation rows. A
reasoner writes better about targets that it was trained on than about others; a predictor that
learned from such rationales would trust all of them too much. So none is ever written for a target
in the reasoner's `rows.parquet`, and none is read.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from finetune.domains import review_source
from finetune.engines import ExpertEngine, finished_rows, refuse_all_failed
from finetune.rows import row_key, target_evidence
from finetune.settings import Recipe
from finetune.splits import read_targets
from finetune.summaries import read_summaries
from r4r_graph.engine.base import Engine
from r4r_graph.errors import DataError, EngineError
from r4r_graph.evaluation.targets import by_lot
from r4r_graph.evaluation.words.leaks import form_faults, leaks
from r4r_graph.experts import Experts
from r4r_graph.jobs import Columns, OnProgress, digest_rows, run_job
from r4r_graph.schema import Review

SCHEMA = pa.schema(
    [
        ("user_id", pa.string()),
        ("item_id", pa.string()),
        ("as_of", pa.float64()),
        ("split", pa.string()),
        ("rationale", pa.string()),
        ("error", pa.string()),
    ]
)
"""Columns of the rationales. A row that failed has its reason in `error` and no rationale."""

ROWS_FILE = "rows.parquet"
"""Beside an adapter: the targets that it was trained on."""

Key = tuple[str, str, float]
"""User, item and time (unix seconds) of a target."""

_Row = tuple[Review, str]
"""A target and its split."""


@dataclass(frozen=True, slots=True)
class RationalesReport:
    """What the reasoner wrote."""

    path: Path
    train: int
    """Training targets that it wrote for."""
    validation: int
    seen: int
    """Training targets left out because the reasoner was trained on them."""
    reused: int
    """Rows that were there already."""
    failed: int
    """Rows without a rationale, of this run and earlier ones."""
    leaking: int
    """Rationales that give a rating away (`r4r_graph.evaluation.words.leaks`)."""
    malformed: int
    """Rationales with faults of form: a sign of how well the reasoner is trained."""
    seconds: float


def write_rationales(
    recipe: Recipe,
    engine: Engine | None = None,
    on_progress: OnProgress | None = None,
) -> RationalesReport:
    """One greedy rationale for every training target that the reasoner did not train on, and for
    every validation target, into the job folder `work/rationales`.

    Prompt and decoding are those of inference (`r4r_graph.experts.Reasoner`). A row that fails is
    recorded with its reason.

    Args:
        recipe: `rationales.rows` caps the training targets (drawn by seed),
            `rationales.concurrency` says how many rows are in flight.
        engine: answers with its adapter `reasoner`; None loads base and adapter.
        on_progress: called after each row.

    Raises:
        NotReadyError: there are no splits or no summaries yet.
        InputError: the folder holds rationales for other rows or by another reasoner.
        TrainingError: every row failed.
    """
    rows, seen = _rows(recipe)
    summaries = read_summaries(recipe)
    folder = recipe.folder("rationales")
    opened: list[Experts] = []

    with ExitStack() as stack:
        expert = stack.enter_context(
            ExpertEngine(recipe, "reasoner", recipe.adapters / "reasoner", engine)
        )

        async def write(row: _Row) -> Columns:
            if not opened:
                budgets, scale = recipe.token_budgets, recipe.rating_scale
                opened.append(Experts(expert.engine, scale=scale, budgets=budgets))
            experts, (target, split) = opened[0], row
            columns: Columns = dict.fromkeys(SCHEMA.names) | row_key(target) | {"split": split}
            try:
                evidence = target_evidence(
                    target, review_source(recipe), summaries, experts.engine.meter, recipe
                )
                (rationale,) = await experts.reasoner.awrite(evidence)
            except EngineError as error:
                return columns | {"error": f"{type(error).__name__}: {error}"}
            return columns | {"rationale": rationale.text}

        report = run_job(
            rows,
            write,
            folder,
            schema=SCHEMA,
            manifest={
                "rows": len(rows),
                "rows_digest": digest_rows([target.key, split] for target, split in rows),
                "summaries": digest_summaries(summaries),
                "history": recipe.history,
                "budgets": asdict(recipe.token_budgets),
                "reasoner": expert.facts,
            },
            concurrency=recipe.rationales.concurrency,
            on_progress=on_progress,
        )
    made = finished_rows(folder, "rationales")
    texts = [row["rationale"] for row in made if row["error"] is None]
    return RationalesReport(
        folder,
        train=sum(split == "train" for _, split in rows),
        validation=sum(split == "validation" for _, split in rows),
        seen=seen,
        reused=report.reused,
        failed=refuse_all_failed(made, folder),
        leaking=sum(bool(leaks(text, recipe.rating_scale)) for text in texts),
        malformed=sum(bool(form_faults(text)) for text in texts),
        seconds=report.seconds,
    )


def read_rationales(recipe: Recipe, split: Literal["train", "validation"]) -> dict[Key, str]:
    """The rationales of a split, by target. Rows that failed are not in it.

    Raises:
        NotReadyError: the step `rationales` has not ended yet.
        DataError: some are for targets that the reasoner has been trained on since.
    """
    folder = recipe.folder("rationales")
    found = {
        _key(row): row["rationale"]
        for row in finished_rows(folder, "rationales")
        if row["split"] == split and row["error"] is None
    }
    refuse_trained(found, recipe)
    return found


def trained_on(recipe: Recipe) -> set[Key]:
    """The targets that the finished reasoner was trained on; none where it learned from ready-made
    rationales, whose targets are not known.

    Raises:
        DataError: the file cannot be read.
    """
    file = recipe.adapters / "reasoner" / ROWS_FILE
    if not file.is_file():
        return set()
    try:
        rows = pq.read_table(file, columns=["user_id", "item_id", "as_of"]).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{file} cannot be read ({str(error).splitlines()[0]:.160}): without it nothing says "
            "which targets the reasoner was trained on; train it again"
        ) from None
    return {_key(row) for row in rows if row["as_of"] is not None}


def refuse_trained(targets: Iterable[Key], recipe: Recipe) -> None:
    """Hold targets against those that the reasoner was trained on.

    Raises:
        DataError: it was trained on one of them.
    """
    if known := trained_on(recipe) & set(targets):
        raise DataError(
            f"the reasoner was trained on {len(known)} of these targets ({_shown(known)}): its "
            f"rationales for them are better than for others. Delete {recipe.folder('rationales')} "
            "and run the step `rationales` again"
        )


def digest_summaries(summaries: Any) -> str:
    """32 hex digits over summaries by review key, in whatever order they come."""
    return digest_rows([key, summaries[key].to_dict()] for key in sorted(summaries))


def _rows(recipe: Recipe) -> tuple[list[_Row], int]:
    """What to write for, and how many training targets the reasoner has seen."""
    known = trained_on(recipe)
    train = read_targets(recipe, "train")
    unseen = [target for target in train if _target_key(target) not in known]
    seen = len(train) - len(unseen)
    if recipe.rationales.rows is not None:
        drawn = by_lot(unseen, recipe.seed, "rationales")[: recipe.rationales.rows]
        chosen = {target.key for target in drawn}
        unseen = [target for target in unseen if target.key in chosen]
    refuse_trained(map(_target_key, unseen), recipe)
    validation = read_targets(recipe, "validation")
    return [*((t, "train") for t in unseen), *((t, "validation") for t in validation)], seen


def _target_key(target: Review) -> Key:
    return target.user_id, target.item_id, float(target.timestamp)


def _key(row: Columns) -> Key:
    return row["user_id"], row["item_id"], float(row["as_of"])


def _shown(keys: Iterable[Key]) -> str:
    user, item, _ = min(keys)
    return f"such as user {user}, item {item}"
