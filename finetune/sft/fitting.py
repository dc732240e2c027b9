"""Fits one adapter: examples in, a finished PEFT folder out, or nothing.

    trainee = load_trainee(recipe)
    fitted = fit(recipe, "summarizer", trainee, train, validation, describe)

One function serves all experts; what differs between them are their examples and their settings.
A run keeps checkpoints under `work/runs/STEP` and goes on from the last whole one; the finished
folder appears by one rename.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from finetune.runs import (
    is_write_error,
    process_count,
    third_party_warnings,
    training_errors,
    weights_digest,
)
from finetune.settings import LoraSettings, RatingTrainingSettings, Recipe, TrainingSettings
from finetune.sft.examples import Example
from r4r_graph.caches import write_atomically
from r4r_graph.engine.decoding import Grammars, RatingReadout
from r4r_graph.engine.model_files import first_line, read_json
from r4r_graph.engine.tokens import HubTokenMeter
from r4r_graph.engine.weights import BaseModel, find_base, load_model, pick_device
from r4r_graph.errors import (
    DataError,
    MissingExtraError,
    SettingError,
    TrainingError,
)
from r4r_graph.prompts import prompt_info

IGNORED = -100
_WATCHING = frozenset(
    [
        "save_steps",
        "eval_steps",
        "log_steps",
        "report_to",
        "micro_batch",
        "gradient_checkpointing",
        "min_rows",
        "max_left_out",
    ]
)


@dataclass(frozen=True)
class Trainee:
    """A loaded base model that adapters are trained on."""

    base: BaseModel
    model: Any
    tokenizer: Any
    meter: HubTokenMeter
    device: str
    dtype: str
    """What passes are computed in."""


@dataclass(frozen=True)
class Fitted:
    """A finished training run, before its folder is written."""

    trainer: Any
    """The `ExpertTrainer`; its model holds the adapter."""
    base: BaseModel
    metrics: dict[str, float]
    """Steps, rows, losses, tokens, seconds."""
    validation: Any
    """The validation rows as a dataset; None without any."""
    saved_dtype: str = "float32"


def load_trainee(recipe: Recipe) -> Trainee:
    """The base model of a recipe.

    Raises:
        ModelError: it cannot be found or loaded.
        MissingExtraError: TRL is not installed.
    """
    try:
        import trl  # noqa: F401
    except ImportError:
        raise MissingExtraError("training", "training") from None
    if recipe.threads is not None:
        import torch

        torch.set_num_threads(recipe.threads)
    base = find_base(recipe.base)
    # On a CPU a frozen base in float32 under autocast takes fewer casts than one in bfloat16.
    autocast = recipe.dtype == "bfloat16" and pick_device(recipe.device) == "cpu"
    model, tokenizer, device, dtype = load_model(
        base,
        device=recipe.device,
        dtype="float32" if autocast else recipe.dtype,
        quantize_4bit=recipe.quantize_4bit,
    )
    dtype = "bfloat16" if autocast else dtype
    return Trainee(base, model, tokenizer, HubTokenMeter(tokenizer), device, dtype)


def run_facts(
    recipe: Recipe,
    expert: str,
    settings: TrainingSettings,
    base: BaseModel,
    train: Sequence[Example],
    validation: Sequence[Example],
) -> dict[str, Any]:
    """What makes two training runs the same one: compared before a run is continued or skipped.

    What decides how a run is watched and held in memory, not what comes out of it, is left out.
    """
    matters = {k: v for k, v in asdict(settings).items() if k not in _WATCHING}
    return {
        "base": base.digest,
        "prompt": prompt_info(expert).digest,
        "settings": json.loads(json.dumps(matters)),
        "quantize_4bit": recipe.quantize_4bit,
        "dtype": recipe.dtype,
        "seed": recipe.seed,
        "train_rows": len(train),
        "train_digest": digest_examples(train),
        "validation_digest": digest_examples(validation),
    }


def digest_examples(examples: Sequence[Example]) -> str:
    """16 hex digits over the token ids and targets of rows, in their order."""
    digest = hashlib.blake2b(digest_size=8)
    for example in examples:
        digest.update(json.dumps([example.prompt, example.completion, example.target]).encode())
    return digest.hexdigest()


def fit(
    recipe: Recipe,
    step: str,
    settings: TrainingSettings,
    trainee: Trainee,
    train: Sequence[Example],
    validation: Sequence[Example] = (),
    *,
    folder: Path,
    checkpoint: Path | None = None,
    quiet: bool = False,
) -> Fitted:
    """Train one adapter on examples.

    Args:
        recipe: seed, device, precision.
        step: the run's name, in messages.
        settings: of this run.
        trainee: the base model; it is wrapped in place and serves one run.
        train: rows to learn.
        validation: rows for the validation loss.
        folder: for checkpoints, `metrics.jsonl` and logs.
        checkpoint: go on from there.
        quiet: without a progress bar.

    Raises:
        DataError: too few rows.
        DivergedError: the loss is no finite number.
        MemoryExhaustedError: memory ran out; names the setting to lower.
        TrainingError: nothing to train, or the disk is full.
    """
    if len(train) < settings.min_rows:
        raise DataError(
            f"{step}: {len(train)} rows to train on, under the least of {settings.min_rows} "
            "(min_rows); give more reviews or labels"
        )
    from transformers import PrinterCallback

    from finetune.callbacks import MetricsFile, ProgressBar
    from finetune.sft.trainer import Collator, ExpertTrainer

    rates = isinstance(settings, RatingTrainingSettings)
    readout = None
    if rates:
        grammars = Grammars(trainee.model, trainee.tokenizer)
        readout = RatingReadout(grammars, recipe.rating_scale)
    opening = trainee.meter.task_opening if settings.lora.activated else None
    model = adapted(trainee, recipe, settings, readout)
    rows = _dataset(train)
    checks = _dataset(validation[: settings.validation_rows]) if validation else None
    bar = None if quiet else ProgressBar(step)
    with third_party_warnings():
        trainer = ExpertTrainer(
            model=model,
            args=_arguments(recipe, settings, trainee, folder, has_validation=checks is not None),
            train_dataset=rows,
            eval_dataset=checks,
            processing_class=trainee.tokenizer,
            data_collator=Collator(trainee.tokenizer.pad_token_id, readout, opening),
            callbacks=[MetricsFile(folder / "metrics.jsonl"), *([bar] if bar else [])],
            readout=readout,
            rating_weights=settings.loss if isinstance(settings, RatingTrainingSettings) else None,
        )
        trainer.pop_callback(PrinterCallback)  # it would print the log to stdout
        before = weights_digest(model)
        with training_errors(step, folder, bar):
            output = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            metrics = {k: float(v) for k, v in output.metrics.items()}
            if checks is not None:
                metrics |= _last_evaluation(trainer)
    if checkpoint is None and weights_digest(model) == before:
        raise TrainingError(
            f"{step}: training changed no weight; check learning_rate, warmup and rows"
        )
    metrics["train_rows"] = len(train)
    metrics["steps"] = trainer.state.global_step
    metrics["tokens_seen"] = float(trainer._total_train_tokens)
    return Fitted(trainer, trainee.base, metrics, checks, recipe.saved_dtype)


def adapted(
    trainee: Trainee,
    recipe: Recipe,
    settings: TrainingSettings,
    readout: RatingReadout | None,
) -> Any:
    """The trainee's model with a new LoRA adapter, the only thing in it that trains.

    Raises:
        SettingError: the head cannot be tuned that way on this model.
        TrainingError: nothing in it would train.
    """
    import peft
    import torch
    from peft import LoraConfig, get_peft_model

    lora = settings.lora
    model = trainee.model
    if recipe.quantize_4bit:
        prepare: Any = peft.prepare_model_for_kbit_training
        model = prepare(model, use_gradient_checkpointing=settings.gradient_checkpointing)
    attention = ["q_proj", "k_proj", "v_proj", "o_proj"]
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=attention if lora.targets == "attention" else "all-linear",
        task_type="CAUSAL_LM",
        alora_invocation_tokens=list(trainee.meter.task_opening) if lora.activated else None,
        **_head(lora, model, readout),
    )
    with torch.random.fork_rng(devices=[]), third_party_warnings():
        torch.manual_seed(recipe.seed)
        try:
            adapted_model = get_peft_model(model, config)
        except ValueError as error:  # no such modules in this architecture
            raise SettingError(
                f"cannot adapt {trainee.base.name} with lora.targets={lora.targets}: "
                f"{first_line(error)}"
            ) from error
    if not any(p.requires_grad for p in adapted_model.parameters()):
        raise TrainingError(f"no trainable parameter in {trainee.base.name} with {lora}")
    return adapted_model


def save_adapter(fitted: Fitted, out: Path, describe: Callable[[Path], None]) -> None:
    """Write the finished adapter to the folder `out`, all or nothing.

    `describe` adds what else belongs into the folder (the card) before it gets its name.

    Raises:
        TrainingError: it cannot be written; what was at `out` before is still there.
    """
    scratch = out.with_name(f".{out.name}.partial")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.parent.mkdir(parents=True, exist_ok=True)
    try:
        # The base's embeddings are not ours; tuned tokens and heads are saved by PEFT itself.
        fitted.trainer.model.save_pretrained(str(scratch), save_embedding_layers=False)
        cast_weights(scratch / "adapter_model.safetensors", fitted.saved_dtype)
        # The base by its name: a path of this machine means nothing elsewhere.
        config = read_json(scratch / "adapter_config.json")
        config["base_model_name_or_path"] = fitted.base.name
        write_atomically(scratch / "adapter_config.json", json.dumps(config, indent=2))
        describe(scratch)
        old = out.with_name(f".{out.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if out.exists():
            out.replace(old)
        scratch.replace(out)
        shutil.rmtree(old, ignore_errors=True)
    except Exception as error:
        if not is_write_error(error):
            raise
        raise TrainingError(f"cannot write the adapter {out}: {error}; free some space") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def cast_weights(file: Path, dtype: str) -> None:
    """Write the floats of a safetensors file anew in another precision."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    wanted = getattr(torch, dtype)
    with safe_open(file, framework="pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        metadata = opened.metadata()
    if any(tensor.dtype != wanted for tensor in tensors.values()):
        cast = {name: tensor.to(wanted).contiguous() for name, tensor in tensors.items()}
        save_file(cast, file, metadata)


def _head(lora: LoraSettings, model: Any, readout: RatingReadout | None) -> dict[str, Any]:
    """PEFT's own means for a tuned head."""
    if lora.head == "frozen":
        return {}
    assert readout is not None  # settings allow it for rating experts only
    if lora.head == "whole":
        return {"modules_to_save": ["lm_head"]}
    if not model.config.get_text_config().tie_word_embeddings:
        raise SettingError(
            "lora.head=rating_tokens tunes rows of an embedding that is also the head; this model "
            "has a head of its own: use head=whole"
        )
    tokens = sorted(set(_rating_tokens(readout.root)))
    return {"trainable_token_indices": {"embed_tokens": tokens}}


def _rating_tokens(branch: Any) -> Iterator[int]:
    for token, step in branch.steps.items():
        yield token
        if not isinstance(step, int):
            yield from _rating_tokens(step)


def _dataset(examples: Sequence[Example]) -> Any:
    from datasets import Dataset

    columns: dict[str, list[Any]] = {
        "input_ids": [[*e.prompt, *e.completion] for e in examples],
        "labels": [[IGNORED] * len(e.prompt) + list(e.completion) for e in examples],
        "length": [len(e) for e in examples],
    }
    if examples and examples[0].target is not None:
        columns["target"] = [list(e.target or ()) for e in examples]
        columns["rating"] = [e.rating for e in examples]
    return Dataset.from_dict(columns)


def _arguments(
    recipe: Recipe,
    settings: TrainingSettings,
    trainee: Trainee,
    folder: Path,
    *,
    has_validation: bool,
) -> Any:
    from trl import SFTConfig

    on_cuda = trainee.device.startswith("cuda")
    rows_at_once = settings.micro_batch * process_count(trainee.device)
    if settings.batch % rows_at_once:
        raise SettingError(
            f"batch={settings.batch} cannot be shared by passes of {settings.micro_batch} rows on "
            f"{rows_at_once // settings.micro_batch} processes; change batch or micro_batch"
        )
    return SFTConfig(
        output_dir=str(folder),
        seed=recipe.seed,
        data_seed=recipe.seed,
        learning_rate=settings.learning_rate,
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps,
        per_device_train_batch_size=settings.micro_batch,
        per_device_eval_batch_size=settings.micro_batch,
        gradient_accumulation_steps=settings.batch // rows_at_once,
        ddp_find_unused_parameters=False,
        warmup_steps=settings.warmup,
        lr_scheduler_type=settings.schedule,
        optim=settings.optimizer,
        weight_decay=settings.weight_decay,
        max_grad_norm=1.0,
        logging_steps=settings.log_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if has_validation else "no",
        eval_steps=settings.eval_steps,
        prediction_loss_only=True,
        save_strategy="steps",
        save_steps=settings.save_steps,
        save_total_limit=2,
        report_to=settings.report_to,
        use_cpu=not on_cuda,
        bf16=trainee.dtype == "bfloat16",
        gradient_checkpointing=settings.gradient_checkpointing,
        max_length=None,  # nothing is cut: rows that are too long are left out before
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
        dataloader_pin_memory=on_cuda,
        disable_tqdm=True,
    )


def _last_evaluation(trainer: Any) -> dict[str, float]:
    """The validation figures of the last step, computed if that step was not evaluated."""
    for logged in reversed(trainer.state.log_history):
        if "eval_loss" in logged and logged["step"] == trainer.state.global_step:
            return {k: float(v) for k, v in logged.items() if k.startswith("eval_")}
    return {k: float(v) for k, v in trainer.evaluate().items()}
