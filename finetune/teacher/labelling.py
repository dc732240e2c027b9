"""The teacher's step: have a chat model summarize reviews (paper: preference distillation).

    report = label_aspects(recipe)

Any LangChain chat model can be the teacher, a server's or our own base model; `asking` asks it,
`labels` reads what came of it.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from finetune.domains import domains, has_labels, read_labels, review_source
from finetune.rows import reviews_to_summarize
from finetune.settings import Recipe
from finetune.splits import read_targets
from finetune.teacher.answers import TokensSpent
from finetune.teacher.asking import Teacher, open_teacher, teacher_identity
from finetune.teacher.labels import fit_summary, read_answer
from r4r_graph import prompts
from r4r_graph.engine.aspects import SECTIONS
from r4r_graph.engine.base import Engine, Message, TokenMeter
from r4r_graph.errors import AnswerError, DataError
from r4r_graph.evaluation.targets import by_lot
from r4r_graph.evaluation.words.labels import label_key
from r4r_graph.evidence import DEFAULT_KIND, TokenBudgets, shortened
from r4r_graph.jobs import (
    Columns,
    JobReport,
    OnProgress,
    digest_rows,
    open_folder,
    read_job,
    run_job,
)
from r4r_graph.ratings import RatingScale
from r4r_graph.schema import AspectSummary, Review, plain_number

SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("user_id", pa.string()),
        ("item_id", pa.string()),
        ("timestamp", pa.float64()),
        *((name, pa.list_(pa.string())) for name in SECTIONS),
        ("error", pa.string()),
    ]
)
"""Columns of the teacher's labels; `key` is the review's. A row that failed has its reason in
`error` and no lists."""


@dataclass(frozen=True, slots=True)
class TeacherReport:
    """What labelling has made, and what it cost."""

    path: Path | None
    """Where the labels are; None: in the files of several data sets."""
    rows: int
    failed: int
    """Rows without a label, of this run and earlier ones."""
    reused: int
    """Rows that were there already."""
    spent: TokensSpent
    token_limit: int | None
    reasons: Mapping[str, int]
    """Why rows failed, the most frequent first."""
    seconds: float
    ready_made: bool = False
    """Whether the labels were there already: nobody was asked."""


def label_aspects(
    recipe: Recipe,
    engine: Engine | None = None,
    on_progress: OnProgress | None = None,
    *,
    retry_failed: bool = False,
) -> TeacherReport:
    """Have the teacher summarize reviews, into the job folder `work/labels/aspects`.

    The reviews are those of `reviews_to_label`. An answer that is no summary is asked for again,
    as another draw, up to `teacher.attempts` times. A row that keeps failing is recorded with its
    reason, and later runs leave it alone. Answers are kept in `work/labels/answers.sqlite`, also
    when the run was killed before its part was written.

    Args:
        recipe: names the teacher; where it names ready-made labels, those are checked instead.
        engine: our own base model, where it is loaded already; its tokenizer measures the prompts.
        on_progress: called after each row.
        retry_failed: ask again for the rows that are recorded as failed.

    Raises:
        NotReadyError: there are no splits yet.
        TeacherError: the teacher cannot be used, or its token limit is reached; what it has
            answered is kept, and the same call continues.
        DataError: there is nothing to label, or the ready-made labels are bad.
        InputError: the folder holds labels by another teacher or of other reviews.
    """
    settings = recipe.teacher
    if has_labels(recipe):
        files = [domain.aspects for domain in domains(recipe).values() if domain.aspects]
        path = files[0] if len(files) == 1 else None
        count, nothing = len(read_labels(recipe, confident_only=False)), TokensSpent(0, 0, 0, 0)
        return TeacherReport(path, count, 0, count, nothing, None, {}, 0.0, ready_made=True)
    started = time.monotonic()
    rows = reviews_to_label(recipe)
    folder = recipe.folder("labels") / "aspects"
    budgets, scale = recipe.token_budgets, recipe.rating_scale
    opened: list[tuple[Teacher, TokenMeter]] = []
    retrying = False

    async def label(row: tuple[Review, str]) -> Columns:
        if not opened:  # only now: a job that is done needs neither a key nor a model
            teacher = stack.enter_context(
                open_teacher(recipe, recipe.folder("labels") / "answers.sqlite", engine)
            )
            opened.append((teacher, _meter(recipe, engine or teacher.engine)))
        return await _labelled(row, *opened[0], recipe, ask_anew=retrying)

    def work() -> JobReport:
        return run_job(
            rows,
            label,
            folder,
            schema=SCHEMA,
            manifest={
                "reviews": len(rows),
                "reviews_digest": digest_rows([review.key, kind] for review, kind in rows),
                "teacher": teacher_identity(recipe, engine),
                "temperature": settings.temperature,
                "prompt": prompts.prompt_info("teacher_aspects").digest,
                "scale": list(scale.values),
                "budgets": {n: getattr(budgets, n) for n in ("title", "review", "summary")},
            },
            concurrency=settings.concurrency,
            part_rows=512,
            on_progress=on_progress,
        )

    with ExitStack() as stack:
        done = work()
        if retry_failed and _drop_failed(folder):
            retrying = True
            done = work()
    spent = opened[0][0].spent if opened else TokensSpent(0, 0, 0, 0)
    errors = Counter(row["error"] for row in read_job(folder) if row["error"] is not None)
    return TeacherReport(
        folder,
        rows=done.rows,
        failed=errors.total(),
        reused=done.reused,
        spent=spent,
        token_limit=settings.token_limit,
        reasons=dict(errors.most_common()),
        seconds=time.monotonic() - started,
    )


def reviews_to_label(recipe: Recipe) -> list[tuple[Review, str]]:
    """The reviews to label, each with the kind of thing it is of: all with words in the histories
    of the instruction rows, and those rows' own; `teacher.rows` of them at most, drawn by seed.

    Two reviews by one user of one item at one time would share a label: they are left out.

    Raises:
        NotReadyError: there are no splits yet.
        DataError: there are none.
    """
    source = review_source(recipe)
    targets = read_targets(recipe, "train", "instruction")
    found = {
        review.key: (review, kind) for review, kind in reviews_to_summarize(targets, source, recipe)
    }
    for target in targets:
        if target.text.strip():
            kind = source.item(target.item_id, None).category
            found.setdefault(target.key, (target, kind))
    named = Counter(label_key(review) for review, _ in found.values())
    reviews = [review for review, _ in found.values() if named[label_key(review)] == 1]
    if not reviews:
        raise DataError(
            f"there is nothing to label: no review with words in the histories of the "
            f"{len(targets)} instruction rows"
        )
    return [found[r.key] for r in by_lot(reviews, recipe.seed, "labels")[: recipe.teacher.rows]]


def teacher_prompt(
    review: Review, kind: str, scale: RatingScale, meter: TokenMeter, budgets: TokenBudgets
) -> tuple[Message, ...]:
    """The turns that ask a general chat model for one review's aspect summary. It reads what the
    summarizer will read, cut at the same tokens."""
    inputs = {
        "kind": shortened(kind or DEFAULT_KIND, meter, budgets.title)[0],
        "title": shortened(review.title, meter, budgets.title)[0],
        "rating": plain_number(round(review.rating, 2)),
        "scale_low": plain_number(scale.low),
        "scale_high": plain_number(scale.high),
        "review": shortened(review.text, meter, budgets.review)[0],
    }
    turns = prompts.render("teacher_aspects", inputs, meter.special_tokens)
    return (
        Message("system", turns.system),
        Message("user", turns.context),
        Message("user", turns.task),
    )


async def _labelled(
    row: tuple[Review, str], teacher: Teacher, meter: TokenMeter, recipe: Recipe, *, ask_anew: bool
) -> Columns:
    """A row of the job. With `ask_anew`, answers of earlier runs do not count as attempts."""
    review, kind = row
    user_id, item_id, timestamp = label_key(review)
    columns = dict.fromkeys(SCHEMA.names) | {
        "key": review.key,
        "user_id": user_id,
        "item_id": item_id,
        "timestamp": timestamp,
    }
    budgets = recipe.token_budgets
    messages = teacher_prompt(review, kind, recipe.rating_scale, meter, budgets)
    settings: dict[str, Any] = {"format": "aspects"}
    if teacher.engine is not None:
        settings["max_tokens"] = budgets.summary  # the engine keeps the answer whole
    left = recipe.teacher.attempts if recipe.teacher.temperature else 1  # a repeat is the same
    for draw in count():
        try:
            answer = await teacher.ask(messages, draw=draw, **settings)
        except AnswerError as error:
            return columns | {"error": str(error)}
        try:
            summary = read_answer(answer.text)
            if _parrots(summary, messages[-1].content):
                raise ValueError("it repeats the example in the prompt")
        except ValueError as error:
            left -= not (ask_anew and answer.reused)
            if left <= 0:
                return columns | {"error": f"no summary in the last of {draw + 1} answers: {error}"}
            continue
        return columns | fit_summary(summary, meter, budgets).to_dict()
    raise AssertionError("draws do not end")


def _parrots(summary: AspectSummary, task: str) -> bool:
    """Whether half of the phrases or more are those of the example that ends the task, as weak
    models answer."""
    example = read_answer("\n".join(task.splitlines()[-len(SECTIONS) :]))
    shown = {phrase.lower() for phrases in example.to_dict().values() for phrase in phrases}
    said = [phrase.lower() in shown for phrases in summary.to_dict().values() for phrase in phrases]
    return any(said) and 2 * sum(said) >= len(said)


def _drop_failed(folder: Path) -> bool:
    """Delete the parts that hold failed rows, if any; their other rows cost nothing again."""
    with open_folder(folder):
        failed = [
            part
            for part in folder.glob("part-*.parquet")
            if (errors := pq.read_table(part, columns=["error"])["error"]).null_count < len(errors)
        ]
        for part in failed:
            part.unlink()
    return bool(failed)


def _meter(recipe: Recipe, engine: Engine | None) -> TokenMeter:
    """Of the base model that is to be trained: what it will not read, no label may be about."""
    if engine is not None:
        return engine.meter
    from transformers import AutoTokenizer

    from r4r_graph.engine.tokens import HubTokenMeter
    from r4r_graph.engine.weights import find_base

    tokenizer = AutoTokenizer.from_pretrained(
        find_base(recipe.base).path, local_files_only=True, trust_remote_code=False
    )
    return HubTokenMeter(tokenizer)
