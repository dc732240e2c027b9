"""Reinforcement of the reasoner: rationales that let the predictor rate better become likelier.

    report = train_grpo(recipe)

Group relative policy optimization (arXiv 2402.03300) by TRL: for each prompt a group of rationales
is drawn, each earns its reward (`rewards`), and what lies above its group's mean is made likelier.
Training goes on from the reasoner in `work/adapters/reasoner`, which stays as it is; the
result is `work/grpo/reasoner`, an adapter like any other.

The trainer itself, and where it departs from TRL's, is in `finetune.grpo.trainer`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from finetune.card import CardFacts, write_card
from finetune.domains import review_source
from finetune.grpo.rewards import RationaleReward, rating_weights
from finetune.rows import Summaries, row_key, target_evidence
from finetune.runs import (
    prepare_run,
    process_count,
    third_party_warnings,
    training_errors,
    weights_digest,
)
from finetune.settings import GrpoSettings, Recipe
from finetune.sft.fitting import Fitted, Trainee, load_trainee, save_adapter
from finetune.splits import read_targets
from finetune.summaries import read_summaries
from r4r_graph.engine.adapters import Adapter, check_adapter, find_adapters
from r4r_graph.engine.base import Engine
from r4r_graph.engine.local import load_local_engine
from r4r_graph.engine.model_files import read_json
from r4r_graph.engine.weights import BaseModel
from r4r_graph.errors import (
    DataError,
    MemoryExhaustedError,
    NotReadyError,
    SettingError,
    TrainingError,
)
from r4r_graph.evaluation.targets import by_lot
from r4r_graph.evaluation.words.leaks import screens_digest
from r4r_graph.experts import reasoner_prompt
from r4r_graph.jobs import digest_rows
from r4r_graph.prompts import prompt_digests, prompt_info
from r4r_graph.schema import Review

Reward = Callable[..., Sequence[float]]
"""A reward function as TRL calls it."""

_FREE = ("micro_batch", "save_steps", "log_steps", "report_to")  # may change within one run


@dataclass(frozen=True, slots=True)
class GrpoReport:
    """What a run made."""

    adapter: Path
    """The reinforced reasoner, a PEFT folder."""
    reused: bool
    """It was there already, from the same data and settings."""
    rows: int
    """Different targets that prompts were made of."""
    steps: int
    """Optimizer steps, those of earlier parts of the run included."""
    resumed_from: int
    """The step that this part of the run went on from; 0 is the beginning."""
    trainable_parameters: int
    reward_before: float
    """Mean over the first tenth of the logged steps, at least one."""
    reward_after: float
    """Mean over the last tenth."""
    seconds: float
    """Of this part of the run."""


def train_grpo(
    recipe: Recipe,
    *,
    resume: bool = True,
    targets: Sequence[Review] | None = None,
    summaries: Summaries | None = None,
    judge: Engine | None = None,
    reward: Reward | None = None,
    quiet: bool = False,
) -> GrpoReport:
    """Reinforce the reasoner; writes the adapter `work/grpo/reasoner`.

    Args:
        recipe: see `GrpoSettings`.
        resume: go on from the last checkpoint in `work/runs/grpo`; else begin anew.
        targets: rows to draw prompts from; None takes the instruction rows of training.
        summaries: of the reviews in their histories; None takes the summaries step's.
        judge: an engine whose predictor judges; None loads the one that `grpo.judge` names. The
            caller's engine stays open.
        reward: instead of `RationaleReward`; it gets the columns evidence, rating, user_id,
            item_id and as_of.
        quiet: without a progress bar.

    Raises:
        NotReadyError: there is no reasoner to begin with, or no judge.
        SettingError: a setting is out of range, or the checkpoints are of another run.
        DataError: fewer rows than prompts in a step.
        DivergedError: a loss or a gradient is no finite number.
        MemoryExhaustedError: memory ran out; names the settings to lower.
        TrainingError: nothing trains, nothing was learned, or the judge is broken.
    """
    began = time.monotonic()
    settings = recipe.grpo
    _check(settings)
    start = _reasoner(recipe)
    if targets is None:
        targets = read_targets(recipe, "train", "instruction")
    if summaries is None:
        summaries = read_summaries(recipe)
    trainee = load_trainee(recipe)
    if process_count(trainee.device) > 1:  # the rows of a step would not be shared out
        raise SettingError("grpo runs in one process; start it without accelerate or torchrun")
    check_adapter(start, trainee.base, prompt_info("reasoner").digest)
    rows = prompt_rows(choose_targets(targets, recipe), summaries, trainee, recipe)
    judges = ["custom"] if reward is not None else _judge_digests(recipe, judge, trainee.base)
    facts = _facts(recipe, start, trainee, judges, rows)
    out = recipe.folder("grpo") / "reasoner"
    if resume and (done := _finished(out, facts)) is not None:
        return done
    folder = recipe.folder("runs") / "grpo"
    checkpoint = prepare_run(folder, facts, resume=resume)
    weights = [target.rating for target in targets] if settings.balance else None
    with _rewarding(recipe, judge, reward, weights) as earns:
        model = trainable_reasoner(trainee, start.path, recipe)
        trainable = trainable_parameters(model)
        fitted = _fit(recipe, trainee, model, rows, earns, folder, checkpoint, quiet)
    fitted.metrics["trainable_parameters"] = trainable
    report = _report(
        out,
        fitted.metrics,
        reused=False,
        resumed_from=int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0,
        seconds=time.monotonic() - began,
    )
    card = CardFacts(
        expert="reasoner",
        role="reasoner",
        base=trainee.base,
        settings={**asdict(settings), "seed": recipe.seed, "dtype": trainee.dtype},
        trained_with=recipe.asked,
        data={
            "reinforced from adapter": start.digest,
            "targets": len(rows),
            "targets' digest": facts["rows"],
        },
        metrics=fitted.metrics,
        data_terms=recipe.data_terms,
        teacher_terms=recipe.teacher_terms,
    )

    def describe(scratch: Path) -> None:
        (scratch / "run.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        write_card(scratch, card)

    save_adapter(fitted, out, describe)
    return report


def choose_targets(targets: Sequence[Review], recipe: Recipe) -> list[Review]:
    """The targets that a run draws its prompts from, by the recipe's seed.

    Raises:
        DataError: they are fewer than the prompts of one step.
    """
    settings = recipe.grpo
    most = min(settings.rows or len(targets), settings.max_steps * settings.prompts)
    chosen = by_lot(targets, recipe.seed, "grpo")[:most]
    if len(chosen) < settings.prompts:
        raise DataError(
            f"grpo: {len(chosen)} rows for steps of {settings.prompts} prompts; lower "
            "grpo.prompts, raise grpo.rows, or give more reviews"
        )
    return chosen


def prompt_rows(
    targets: Sequence[Review], summaries: Summaries, trainee: Trainee, recipe: Recipe
) -> list[dict[str, Any]]:
    """One row a target: the prompt in turns, and the columns that the reward reads.

    TRL renders `prompt` with the tokenizer's own template, which gives the tokens of
    `trainee.meter.prompt`, those of inference. The evidence in it ends strictly before the target.

    Raises:
        SettingError: a prompt and its rationale exceed the model's positions.
    """
    source, meter = review_source(recipe), trainee.meter
    room = trainee.model.config.max_position_embeddings - recipe.token_budgets.rationale
    rows = []
    for target in targets:
        evidence = target_evidence(target, source, summaries, meter, recipe)
        messages = reasoner_prompt(evidence, meter)
        if (size := len(meter.prompt(messages))) > room:
            raise SettingError(
                f"grpo: a prompt of {size} tokens leaves no room for a rationale of "
                f"{recipe.token_budgets.rationale} in {trainee.base.name}; lower history or budgets"
            )
        rows.append(
            {
                "prompt": meter.turns(messages),
                "evidence": json.dumps(evidence.to_dict(), ensure_ascii=False),
                "rating": float(target.rating),
                **row_key(target),
            }
        )
    return rows


def rationale_reward(
    recipe: Recipe, judge: Engine, ratings: Sequence[float] | None = None
) -> RationaleReward:
    """The recipe's reward; with `ratings`, those of the training rows, balanced by their skew."""
    settings, scale = recipe.grpo, recipe.rating_scale
    return RationaleReward(
        judge,
        scale,
        recipe.token_budgets,
        leak_penalty=settings.leak_penalty,
        form_penalty=settings.form_penalty,
        weights=None if ratings is None else rating_weights(ratings, scale),
    )


def trainable_reasoner(trainee: Trainee, adapter: Path, recipe: Recipe) -> Any:
    """The reasoner's adapter on its base, ready to train.

    Raises:
        TrainingError: nothing in it would train. An adapter that PEFT loads for inference is
            frozen, and training it changes nothing without a word.
    """
    import peft
    from peft import PeftModel

    model = trainee.model
    if recipe.quantize_4bit:
        prepare: Any = peft.prepare_model_for_kbit_training
        model = prepare(model, use_gradient_checkpointing=True)
    with third_party_warnings():
        adapted = PeftModel.from_pretrained(model, str(adapter), is_trainable=True)
    if not trainable_parameters(adapted):
        raise TrainingError(f"grpo: no parameter of the adapter {adapter} is trainable")
    # Our adapters name their base by its name; where checkpoints are written, PEFT looks for it.
    adapted.peft_config["default"].base_model_name_or_path = str(trainee.base.path)
    return adapted


def trainable_parameters(model: Any) -> int:
    """How many numbers train."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _fit(
    recipe: Recipe,
    trainee: Trainee,
    model: Any,
    rows: Sequence[dict[str, Any]],
    reward: Reward,
    folder: Path,
    checkpoint: Path | None,
    quiet: bool,
) -> Fitted:
    """Train, from the beginning or from a checkpoint."""
    from finetune.callbacks import MetricsFile, ProgressBar, read_metrics
    from finetune.grpo.trainer import build_trainer

    bar = None if quiet else ProgressBar("grpo")
    log = folder / "metrics.jsonl"
    callbacks = [MetricsFile(log), *([bar] if bar else [])]
    before = weights_digest(model)
    with third_party_warnings(), training_errors("grpo", folder, bar), _memory_errors():
        trainer = build_trainer(recipe, trainee, model, rows, reward, folder, callbacks)
        output = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if weights_digest(model) == before:
        raise TrainingError(
            "grpo: no step changed a weight: the rewards within every group were equal; raise "
            "grpo.temperature or grpo.group, and see in metrics.jsonl whether all rationales were "
            "refused, or the judge's rating depends on none"
        )
    if "ref" in model.peft_config:  # TRL's copy of the beginning, for the divergence
        model.delete_adapter("ref")
    rewards = [float(row["reward"]) for row in read_metrics(log) if row.get("reward") is not None]
    part = max(1, len(rewards) // 10)
    metrics = {
        "steps": float(trainer.state.global_step),
        "rows": float(len(rows)),
        "reward_before": sum(rewards[:part]) / max(1, len(rewards[:part])),
        "reward_after": sum(rewards[-part:]) / max(1, len(rewards[-part:])),
        "train_runtime": float(output.metrics["train_runtime"]),
    }
    return Fitted(trainer, trainee.base, metrics, None, recipe.saved_dtype)


def _facts(
    recipe: Recipe,
    start: Adapter,
    trainee: Trainee,
    judge: Sequence[str | None],
    rows: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    """What makes two runs the same one."""
    settings = {k: v for k, v in asdict(recipe.grpo).items() if k not in _FREE}
    digests = prompt_digests()
    return {
        "base": trainee.base.digest,
        "reasoner": start.digest,
        "judge": list(judge),
        "prompts": [digests["reasoner"], digests["predictor"]],
        "screens": screens_digest(),
        "settings": settings,
        "rationale_budget": recipe.token_budgets.rationale,
        "scale": recipe.scale,
        "dtype": trainee.dtype,
        "quantize_4bit": recipe.quantize_4bit,
        "seed": recipe.seed,
        "rows": digest_rows(rows),
    }


def _finished(out: Path, facts: Mapping[str, Any]) -> GrpoReport | None:
    """The report of a finished run of the same facts; None without one.

    Raises:
        SettingError: the folder holds an adapter of another run.
    """
    if not out.is_dir():
        return None
    note = out / "run.json"
    earlier = read_json(note) if note.is_file() else {}
    if changed := sorted(key for key in facts if facts[key] != earlier.get(key)):
        raise SettingError(
            f"{out} holds an adapter of another run (different: {', '.join(changed)}); start over "
            "with --no-resume, or choose another work folder"
        )
    return _report(out, read_json(out / "metrics.json"), reused=True, resumed_from=0, seconds=0.0)


def _report(
    out: Path, metrics: Mapping[str, float], *, reused: bool, resumed_from: int, seconds: float
) -> GrpoReport:
    return GrpoReport(
        adapter=out,
        reused=reused,
        rows=int(metrics["rows"]),
        steps=int(metrics["steps"]),
        resumed_from=resumed_from,
        trainable_parameters=int(metrics["trainable_parameters"]),
        reward_before=float(metrics["reward_before"]),
        reward_after=float(metrics["reward_after"]),
        seconds=seconds,
    )


def _check(settings: GrpoSettings) -> None:
    least: Mapping[str, float] = {
        "max_steps": 1,
        "prompts": 1,
        "group": 2,
        "micro_batch": 1,
        "beta": 0,
        "save_steps": 1,
        "log_steps": 1,
    }
    for name, limit in least.items():
        if getattr(settings, name) < limit:
            raise SettingError(f"bad setting grpo.{name}={getattr(settings, name)}: under {limit}")
    for name in ("learning_rate", "temperature"):
        if getattr(settings, name) <= 0:
            raise SettingError(f"bad setting grpo.{name}={getattr(settings, name)}: not above 0")


def _reasoner(recipe: Recipe) -> Adapter:
    folder = recipe.adapters / "reasoner"
    if not folder.is_dir():
        raise NotReadyError(f"grpo: no reasoner to begin with in {folder}; run the step `reasoner`")
    return find_adapters({"reasoner": folder})["reasoner"]


def _judge_folder(recipe: Recipe) -> Path:
    by_reward = recipe.grpo.judge == "reward"
    folder = recipe.folder("reward") if by_reward else recipe.adapters / "predictor"
    if not folder.is_dir():
        raise NotReadyError(
            f"grpo: no judge in {folder}; run the step `{recipe.grpo.judge}`, or set grpo.judge"
        )
    return folder


def _judge_digests(recipe: Recipe, given: Engine | None, base: BaseModel) -> list[str | None]:
    """Of the judge's base model and of its adapter."""
    if given is not None:
        return [given.info.digest, given.info.adapters.get("predictor")]
    return [base.digest, find_adapters({"predictor": _judge_folder(recipe)})["predictor"].digest]


@contextmanager
def _rewarding(
    recipe: Recipe, judge: Engine | None, reward: Reward | None, ratings: Sequence[float] | None
) -> Iterator[Reward]:
    """The reward function; an engine that it needs is loaded, and closed at the end."""
    if reward is not None:
        yield reward
        return
    if judge is not None:
        yield rationale_reward(recipe, judge, ratings)
        return
    engine, _ = load_local_engine(
        recipe.base,
        {"predictor": _judge_folder(recipe)},
        device=recipe.device,
        dtype=recipe.dtype,
        quantize_4bit=recipe.quantize_4bit,
        prompts=prompt_digests(),
    )
    with engine:
        yield rationale_reward(recipe, engine, ratings)


@contextmanager
def _memory_errors() -> Iterator[None]:
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise MemoryExhaustedError(
            "grpo: memory ran out; lower grpo.micro_batch (the result stays the same), then "
            "grpo.group or grpo.prompts (all their rationales are drawn at once), history or the "
            "budgets, or set quantize_4bit"
        ) from error
