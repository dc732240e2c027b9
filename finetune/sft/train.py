"""The four training steps: summarizer, reward model, reasoner, predictor.

Each reads what earlier steps made, turns it into examples, fits one adapter, and leaves a folder
that `Recommender.load(adapters=work/adapters)` takes as it is. A step that is finished is skipped;
one that was stopped goes on.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from finetune.card import CardFacts, write_card
from finetune.domains import domain_of, read_labels, review_source
from finetune.estimates import statistical_estimates
from finetune.rationales import read_rationales
from finetune.rejection.kept import read_kept
from finetune.runs import is_main_process, main_process_first, prepare_run
from finetune.settings import RatingTrainingSettings, Recipe, TrainingSettings
from finetune.sft.examples import (
    Example,
    rating_examples,
    reasoner_examples,
    reward_examples,
    summarizer_examples,
    within_length,
)
from finetune.sft.fitting import Fitted, Trainee, fit, load_trainee, run_facts, save_adapter
from finetune.sft.validation import rating_tables
from finetune.splits import read_targets, training_ends
from finetune.summaries import read_summaries
from r4r_graph.engine.tokens import HubTokenMeter
from r4r_graph.engine.weights import find_base, load_tokenizer
from r4r_graph.errors import DataError, SettingError
from r4r_graph.evaluation.targets import by_lot
from r4r_graph.schema import AspectSummary, Review


@dataclass(frozen=True, slots=True)
class TrainReport:
    """What a training step did."""

    step: str
    folder: Path
    """The finished adapter."""
    reused: bool
    """It was there already, from the same data and settings."""
    train_rows: int
    validation_rows: int
    left_out: int
    """Rows longer than `max_length`."""
    seconds: float
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class _Plan:
    """What one step trains on."""

    step: str
    expert: str
    settings: TrainingSettings
    out: Path
    train: Sequence[Example]
    validation: Sequence[Example]
    left_out: int
    data: Mapping[str, Any]
    row_keys: Sequence[tuple[str, str, float]] = ()
    """Targets of the training rows, recorded beside the adapter."""
    targets: Sequence[Review] = ()
    """Targets of the validation rows, for floors."""


def train_summarizer(recipe: Recipe, *, resume: bool = True, quiet: bool = False) -> TrainReport:
    """SFT on (review -> the teacher's aspect summary) (paper: preference distillation).

    Labels are `teacher.aspects`, or what the step `teacher` made. Only reviews from the training
    part by time are learned from; of those, `validation_rows` are held out.

    Raises:
        NotReadyError: no labels or splits yet.
        TrainingError, DataError: see `finetune.sft.fitting.fit`.
    """
    return _run(recipe, _plan_summarizer, resume=resume, quiet=quiet)


def train_reward(recipe: Recipe, *, resume: bool = True, quiet: bool = False) -> TrainReport:
    """The reward model: the predictor's rows with the target's true review as the rationale, on
    the reward rows (paper: reward model). It loads as a predictor, and is kept apart from the
    experts."""
    return _run(recipe, _plan_reward, resume=resume, quiet=quiet)


def train_reasoner(recipe: Recipe, *, resume: bool = True, quiet: bool = False) -> TrainReport:
    """SFT on the rationales that survived rejection (paper: preference matching). The targets it
    learned from are recorded in `rows.parquet`, so that the predictor never trains on rationales
    written for them."""
    return _run(recipe, _plan_reasoner, resume=resume, quiet=quiet)


def train_predictor(recipe: Recipe, *, resume: bool = True, quiet: bool = False) -> TrainReport:
    """Histories with ratings and the reasoner's rationale -> distribution (paper: feedback
    prediction), on training rows that the reasoner did not train on."""
    return _run(recipe, _plan_predictor, resume=resume, quiet=quiet)


def labelled_reviews(recipe: Recipe) -> list[tuple[Review, str, AspectSummary]]:
    """(review, kind, teacher's summary) of the training part, each text once, shuffled by seed.

    Raises:
        NotReadyError: there are no labels, or no splits.
        DataError: no label belongs to a review of the training part.
    """
    labels = read_labels(recipe, confident_only=recipe.summarizer.confident_only)
    ends = training_ends(recipe)
    source = review_source(recipe)
    found: dict[str, tuple[Review, str, AspectSummary]] = {}
    for review in source:
        summary = labels.get((review.user_id, review.item_id, float(review.timestamp)))
        early = review.timestamp < ends[domain_of(recipe, review)]
        if summary is not None and early and review.text.strip():
            kind = source.item(review.item_id, None).category
            # One text may stand under several editions of an item.
            found.setdefault(" ".join(review.text.split()), (review, kind, summary))
    if not found:
        raise DataError(
            f"none of the {len(labels)} labels belongs to a review of the training part"
        )
    rows = list(found.values())
    random.Random(recipe.seed).shuffle(rows)
    return rows


def _plan_summarizer(recipe: Recipe, meter: HubTokenMeter) -> _Plan:
    settings = recipe.summarizer
    rows = labelled_reviews(recipe)
    held_out = min(settings.validation_rows, len(rows) // 5)
    train, left_out = _fitting(summarizer_examples(rows[held_out:], meter, recipe), settings)
    validation, _ = within_length(
        summarizer_examples(rows[:held_out], meter, recipe), settings.max_length, 1.0
    )
    data = {"labelled reviews": len(rows)}
    out = recipe.adapters / "summarizer"
    return _Plan("summarizer", "summarizer", settings, out, train, validation, left_out, data)


def _plan_reward(recipe: Recipe, meter: HubTokenMeter) -> _Plan:
    settings = recipe.reward
    source, summaries = review_source(recipe), read_summaries(recipe)
    targets = _drawn(read_targets(recipe, "train", "reward"), settings.rows, recipe)
    checks = _drawn(read_targets(recipe, "validation"), settings.validation_rows, recipe)
    examples = reward_examples(targets, source, summaries, meter, recipe, settings)
    train, left_out = _fitting(examples, settings)
    validation = list(reward_examples(checks, source, summaries, meter, recipe, settings))
    return _Plan(
        "reward",
        "predictor",
        settings,
        recipe.folder("reward"),
        train,
        validation,
        left_out,
        _data(targets, summaries),
        row_keys=[_key(t) for t in targets],
        targets=checks,
    )


def _plan_reasoner(recipe: Recipe, meter: HubTokenMeter) -> _Plan:
    settings = recipe.reasoner
    kept = read_kept(recipe)
    random.Random(recipe.seed).shuffle(kept)
    held_out = min(settings.validation_rows, len(kept) // 5)
    learned = kept[held_out:][: settings.rows]
    train, left_out = _fitting(reasoner_examples(learned, meter), settings)
    validation = list(reasoner_examples(kept[:held_out], meter))
    keys = {
        (row["user_id"], row["item_id"], float(row["as_of"]))
        for row in kept  # those held out too: the validation loss has seen them
        if row["as_of"] is not None
    }
    return _Plan(
        "reasoner",
        "reasoner",
        settings,
        recipe.adapters / "reasoner",
        train,
        validation,
        left_out,
        {"rationales kept": len(kept)},
        row_keys=sorted(keys),
    )


def _plan_predictor(recipe: Recipe, meter: HubTokenMeter) -> _Plan:
    settings = recipe.predictor
    source, summaries = review_source(recipe), read_summaries(recipe)
    targets = read_targets(recipe, "train")
    checks = read_targets(recipe, "validation")
    rationales: dict[tuple[str, str, float], str] = {}
    check_rationales: dict[tuple[str, str, float], str] = {}
    if settings.rationale_dropout < 1:
        rationales = read_rationales(recipe, "train")
        check_rationales = read_rationales(recipe, "validation")
        targets = [t for t in targets if _key(t) in rationales]
        checks = [t for t in checks if _key(t) in check_rationales]
    targets = _drawn(targets, settings.rows, recipe)
    checks = _drawn(checks, settings.validation_rows, recipe)
    numbers = read_targets(recipe, "train", "averages")
    bare = replace(
        _without_dropout(settings, rationale=False, texts=False),
        estimate_share=settings.averages_estimate_share,
    )
    said = None
    if settings.estimate_share or settings.averages_estimate_share:
        said = statistical_estimates(recipe, [*targets, *numbers])
    examples = rating_examples(
        targets, rationales, source, summaries, meter, recipe, settings, said
    )
    train, left_out = _fitting(examples, settings)
    train += rating_examples(numbers, {}, source, {}, meter, recipe, bare, said)
    # Checked as it will be asked: with everything it may be shown.
    whole = settings.rationale_dropout < 1
    shown = _without_dropout(settings, rationale=whole, texts=settings.text_dropout < 1)
    validation = list(
        rating_examples(checks, check_rationales, source, summaries, meter, recipe, shown)
    )
    return _Plan(
        "predictor",
        "predictor",
        settings,
        recipe.adapters / "predictor",
        train,
        validation,
        left_out,
        _data(targets, summaries) | {"targets with averages alone": len(numbers)},
        row_keys=[_key(t) for t in (*targets, *numbers)],
        targets=checks,
    )


def _run(
    recipe: Recipe,
    plan_of: Callable[[Recipe, HubTokenMeter], _Plan],
    *,
    resume: bool,
    quiet: bool,
) -> TrainReport:
    started = time.monotonic()
    base = find_base(recipe.base)
    plan = plan_of(recipe, HubTokenMeter(load_tokenizer(base)))
    facts = run_facts(recipe, plan.expert, plan.settings, base, plan.train, plan.validation)
    if resume and (done := _finished(plan, facts)) is not None:
        return done
    trainee = load_trainee(recipe)
    folder = recipe.folder("runs") / plan.step
    with main_process_first(trainee.device):
        fresh = not resume and is_main_process(trainee.device)
        checkpoint = prepare_run(folder, facts, resume=not fresh)
    fitted = fit(
        recipe,
        plan.step,
        plan.settings,
        trainee,
        plan.train,
        plan.validation,
        folder=folder,
        checkpoint=checkpoint,
        quiet=quiet,
    )
    tables = _tables(recipe, plan, fitted)

    def describe(out: Path) -> None:
        _describe(out, recipe, plan, trainee, fitted, facts, tables)

    if is_main_process(trainee.device):
        save_adapter(fitted, plan.out, describe)
    fitted.trainer.accelerator.wait_for_everyone()
    return _report(plan, fitted.metrics, reused=False, seconds=time.monotonic() - started)


def _report(
    plan: _Plan, metrics: Mapping[str, float], *, reused: bool, seconds: float
) -> TrainReport:
    return TrainReport(
        plan.step,
        plan.out,
        reused=reused,
        train_rows=len(plan.train),
        validation_rows=len(plan.validation),
        left_out=plan.left_out,
        seconds=seconds,
        metrics=metrics,
    )


def _finished(plan: _Plan, facts: Mapping[str, Any]) -> TrainReport | None:
    """The report of a finished run of the same facts; None without one.

    Raises:
        SettingError: the folder holds an adapter of another run.
    """
    note = plan.out / "run.json"
    if not plan.out.is_dir():
        return None
    earlier = json.loads(note.read_text(encoding="utf-8")) if note.is_file() else {}
    changed = sorted(key for key in facts if facts[key] != earlier.get(key))
    if changed:
        raise SettingError(
            f"{plan.out} holds an adapter of another run (different: {', '.join(changed)}); "
            "start over with --no-resume, or choose another work folder"
        )
    metrics = json.loads((plan.out / "metrics.json").read_text(encoding="utf-8"))
    numbers = {name: value for name, value in metrics.items() if isinstance(value, float | int)}
    return _report(plan, numbers, reused=True, seconds=0.0)


def _tables(recipe: Recipe, plan: _Plan, fitted: Fitted) -> list[tuple[str, list[dict[str, Any]]]]:
    """Error of a rating expert on its validation rows, beside the floors on the same rows."""
    if not plan.targets or not isinstance(plan.settings, RatingTrainingSettings):
        return []
    read = fitted.trainer.distributions(fitted.validation, plan.settings.micro_batch)
    return rating_tables(recipe, plan.targets[: len(read)], read.tolist())


def _describe(
    out: Path,
    recipe: Recipe,
    plan: _Plan,
    trainee: Trainee,
    fitted: Fitted,
    facts: Mapping[str, Any],
    tables: Sequence[tuple[str, Sequence[Mapping[str, Any]]]],
) -> None:
    (out / "run.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    if plan.row_keys:
        columns = list(zip(*plan.row_keys, strict=True))
        names = ("user_id", "item_id", "as_of")
        pq.write_table(pa.table(dict(zip(names, columns, strict=True))), out / "rows.parquet")
    data = {
        **plan.data,
        "training rows": len(plan.train),
        "training rows' digest": facts["train_digest"],
        "validation rows": len(plan.validation),
        "left out as too long": plan.left_out,
    }
    write_card(
        out,
        CardFacts(
            expert=plan.expert,
            role=plan.step,
            base=trainee.base,
            settings={**asdict(plan.settings), "seed": recipe.seed, "dtype": trainee.dtype},
            trained_with=recipe.asked,
            data=data,
            metrics=fitted.metrics,
            tables=tables,
            data_terms=recipe.data_terms,
            teacher_terms=recipe.teacher_terms,
        ),
    )


def _fitting(examples: Any, settings: TrainingSettings) -> tuple[list[Example], int]:
    kept, left_out = within_length(examples, settings.max_length, settings.max_left_out)
    return kept[: settings.rows], left_out


def _drawn(targets: list[Review], count: int | None, recipe: Recipe) -> list[Review]:
    """So many of the targets, by lot: the first ones would be the oldest."""
    return by_lot(targets, recipe.seed, "sft")[:count]


def _without_dropout(
    settings: RatingTrainingSettings, *, rationale: bool, texts: bool
) -> RatingTrainingSettings:
    return replace(settings, rationale_dropout=float(not rationale), text_dropout=float(not texts))


def _data(targets: Sequence[Review], summaries: Mapping[str, AspectSummary]) -> dict[str, Any]:
    return {"targets": len(targets), "summaries at hand": len(summaries)}


def _key(target: Review) -> tuple[str, str, float]:
    return target.user_id, target.item_id, float(target.timestamp)
