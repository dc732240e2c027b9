"""The trainer of `finetune.grpo.train`: TRL's `GRPOTrainer`, set up for the reasoner.

Two choices are ours. The loss is TRL's default (`dapo`), a mean over all tokens of the step: a mean
over each rationale's own tokens favours long failures. Rewards are divided by their spread within
the group, as in the paper (arXiv 2402.03300), except with `balance`: a weight that a whole group
shares would cancel out there, so the spread of the whole step is taken.

Importing this module imports torch and TRL.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from trl import GRPOConfig, GRPOTrainer

from finetune.settings import GrpoSettings, Recipe
from finetune.sft.fitting import Trainee
from r4r_graph.errors import DivergedError, TrainingError


class ReasonerTrainer(GRPOTrainer):  # type: ignore[misc]
    """`GRPOTrainer` that ends at once when a loss is no number."""

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """One forward and backward pass."""
        loss = super().training_step(*args, **kwargs)
        if not loss.isfinite():
            raise _diverged(f"the loss is {float(loss)}", self.state.global_step + 1)
        return loss

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """None for checkpoints: the finished adapter has a card of ours."""

    def _send_telemetry(self) -> None:
        """Nobody is told what is trained here."""


class LearningGuard(TrainerCallback):
    """Ends a run whose weights do not follow its gradients, or whose gradients are no numbers.

    Reinforcement with a frozen adapter runs to its end, and its rewards wander as those of any
    other run do; so the weights themselves are looked at.
    """

    def __init__(self) -> None:
        self._before: dict[str, torch.Tensor] = {}
        self._had_gradient = False
        self._moved = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Remember the weights, until a step has changed them."""
        self._before = {
            name: parameter.detach().to("cpu", copy=True)
            for name, parameter in given["model"].named_parameters()
            if parameter.requires_grad
        }
        if not self._before:
            raise TrainingError("grpo: no parameter is trainable")

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Look at the gradients while the weights are still sound."""
        gradients = [p.grad for p in given["model"].parameters() if p.grad is not None]
        if not all(bool(gradient.isfinite().all()) for gradient in gradients):
            raise _diverged("a gradient is no finite number", state.global_step + 1)
        self._had_gradient = any(bool(gradient.any()) for gradient in gradients)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Look at the weights after the first step that had a gradient."""
        if self._moved or not self._had_gradient:
            return
        named = dict(given["model"].named_parameters())
        self._moved = any(
            not torch.equal(named[name].detach().cpu(), old) for name, old in self._before.items()
        )
        if not self._moved:
            raise TrainingError(
                f"grpo: step {state.global_step} changed no weight; raise grpo.learning_rate"
            )
        self._before = {}


def build_trainer(
    recipe: Recipe,
    trainee: Trainee,
    model: Any,
    rows: Sequence[dict[str, Any]],
    reward: Callable[..., Sequence[float]],
    folder: Path,
    callbacks: Sequence[TrainerCallback] = (),
) -> ReasonerTrainer:
    """The trainer of one run.

    Args:
        recipe: see `GrpoSettings`; seed and rationale budget besides.
        trainee: the base model, for its tokenizer and device.
        model: its trainable `PeftModel`, whose adapter is called `default`.
        rows: of `finetune.grpo.train.prompt_rows`.
        reward: as TRL calls it.
        folder: for checkpoints and logs.
        callbacks: besides the guard's.
    """
    settings = recipe.grpo
    order = row_order(len(rows), settings.max_steps * settings.prompts, recipe.seed)
    trainer = ReasonerTrainer(
        model=model,
        args=_arguments(recipe, trainee, folder),
        train_dataset=Dataset.from_list(list(rows)).select(order),
        processing_class=trainee.tokenizer,
        reward_funcs=reward,
        callbacks=[LearningGuard(), *callbacks],
    )
    trainer.remove_callback(PrinterCallback)  # standard output is for data
    return trainer


def row_order(rows: int, needed: int, seed: int) -> list[int]:
    """Which row each prompt takes: all rows in turn, then again in another order. One pass over
    this list is the whole run, so that a checkpoint's place in it is plain."""
    dice, order = random.Random(seed), list(range(rows))
    while len(order) < needed:
        again = list(range(rows))
        dice.shuffle(again)
        order += again
    return order[:needed]


def _arguments(recipe: Recipe, trainee: Trainee, folder: Path) -> Any:
    settings = recipe.grpo
    on_cuda = trainee.device.startswith("cuda")
    micro_batch = _micro_batch(settings)
    return GRPOConfig(
        output_dir=str(folder),
        seed=recipe.seed,
        data_seed=recipe.seed,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="constant",
        max_steps=settings.max_steps,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=settings.prompts * settings.group // micro_batch,
        num_generations=settings.group,
        max_completion_length=recipe.token_budgets.rationale,
        temperature=settings.temperature,
        chat_template_kwargs={"enable_thinking": False},  # as `HubTokenMeter.prompt`
        beta=settings.beta,
        scale_rewards="batch" if settings.balance else "group",
        # With dropout, what was drawn would have other probabilities than it was drawn with.
        disable_dropout=True,
        shuffle_dataset=False,  # the rows come in our order
        logging_steps=settings.log_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=settings.save_steps,
        save_total_limit=2,
        report_to=settings.report_to,
        use_cpu=not on_cuda,
        bf16=on_cuda and trainee.dtype == "bfloat16",
        fp16=on_cuda and trainee.dtype == "float16",
        # A base model in 4 bits is there to save memory.
        gradient_checkpointing=recipe.quantize_4bit,
        dataloader_pin_memory=on_cuda,
        disable_tqdm=True,
    )


def _micro_batch(settings: GrpoSettings) -> int:
    """The largest share of a step's rationales that is at most the setting."""
    drawn = settings.prompts * settings.group
    return next(n for n in range(min(settings.micro_batch, drawn), 0, -1) if drawn % n == 0)


def _diverged(what: str, step: int) -> DivergedError:
    return DivergedError(
        f"grpo: {what} at step {step}; lower grpo.learning_rate, or train in float32"
    )
