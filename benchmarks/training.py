"""Training speed: our loop against plain TRL on the same rows of the same model.

    python benchmarks/training.py [--rows 32] [--steps 4] [--base smollm2-135m]

Rows are those of the predictor and the reasoner over the package's sample, with texts made up to
fill the histories. Plain TRL is `SFTTrainer` with its default settings (prompt and completion as
token ids, completion-only loss, rows in random order, activation checkpointing on), and once with
the checkpointing off, as our loop has it. Ours is once plain LoRA, once activated LoRA over a
frozen context. What is compared is rows per second; all four see the same rows and batches of the
same size. Each is warmed up by one step that is not counted.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from finetune.rows import review_source, target_evidence
from finetune.settings import LoraSettings, RatingTrainingSettings, Recipe, TrainingSettings
from finetune.sft.examples import Example, rating_examples, reasoner_examples
from finetune.sft.fitting import Trainee, adapted, fit, load_trainee
from r4r_graph.schema import AspectSummary

SAMPLE = Path(__file__).parents[1] / "r4r_graph" / "_demo"
WORDS = (
    "warm",
    "cold",
    "long",
    "short",
    "honest",
    "dull",
    "clever",
    "loud",
    "soft",
    "rough",
    "voice",
    "lyrics",
    "drums",
    "ending",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--base", default="smollm2-135m")
    given = parser.parse_args()
    recipe = Recipe(reviews=SAMPLE / "reviews.jsonl", items=SAMPLE / "items.jsonl", base=given.base)
    results = {}
    for expert in ("predictor", "reasoner"):
        trainee = load_trainee(recipe)
        rows = make_rows(recipe, trainee, expert, given.rows)
        tokens = sum(map(len, rows)) / len(rows)
        found: dict[str, float] = {}
        for name in ("TRL defaults", "TRL, no checkpointing", "ours", "ours, frozen context"):
            trainee = load_trainee(recipe)  # each wraps a model of its own
            found[name] = seconds_a_row(recipe, trainee, expert, rows, name, given)
        results[expert] = {
            "tokens a row": round(tokens),
            "rows a second": {n: round(1 / s, 3) for n, s in found.items()},
            "tokens a second": {n: round(tokens / s, 1) for n, s in found.items()},
            "ratio to TRL defaults": {
                n: round(found["TRL defaults"] / s, 2) for n, s in found.items()
            },
        }
    print(json.dumps(results, indent=2))


def make_rows(recipe: Recipe, trainee: Trainee, expert: str, count: int) -> list[Example]:
    """Rows over the sample's later reviews, over and over with other summaries."""
    source, dice = review_source(recipe), random.Random(0)
    targets = sorted(source, key=lambda review: review.timestamp)[-30:]
    rows: list[Example] = []
    while len(rows) < count:
        summaries = {
            review.key: AspectSummary(*(_phrases(dice) for _ in range(3))) for review in source
        }
        target = targets[len(rows) % len(targets)]
        rationale = " ".join(dice.choices(WORDS, k=70))
        if expert == "reasoner":
            evidence = target_evidence(target, source, summaries, trainee.meter, recipe)
            kept = [{"evidence": evidence, "rationale": rationale}]
            rows += reasoner_examples(kept, trainee.meter)
        else:
            texts = {(target.user_id, target.item_id, float(target.timestamp)): rationale}
            settings = RatingTrainingSettings()
            rows += rating_examples(
                [target], texts, source, summaries, trainee.meter, recipe, settings
            )
    return rows


def _phrases(dice: random.Random) -> tuple[str, ...]:
    return tuple(" ".join(dice.sample(WORDS, 2)) for _ in range(dice.randint(1, 3)))


def seconds_a_row(
    recipe: Recipe, trainee: Trainee, expert: str, rows: Sequence[Example], name: str, given: Any
) -> float:
    """Median seconds of the counted steps, a row."""
    kind = RatingTrainingSettings if expert == "predictor" else TrainingSettings
    settings = kind(
        lora=LoraSettings(rank=16, alpha=32, activated=name.endswith("frozen context")),
        batch=given.batch,
        micro_batch=given.batch,
        max_steps=given.steps + 1,
        warmup=0,
        min_rows=1,
        save_steps=10**6,
        eval_steps=10**6,
    )
    clock = _Clock()
    with tempfile.TemporaryDirectory() as folder:
        if name.startswith("TRL"):
            _plain_trl(recipe, trainee, expert, rows, settings, name, Path(folder), clock)
        else:
            import finetune.callbacks as callbacks

            original = callbacks.MetricsFile
            callbacks.MetricsFile = _also(clock, original)  # type: ignore[misc,assignment]
            try:
                fit(recipe, name, settings, trainee, rows, folder=Path(folder), quiet=True)
            finally:
                callbacks.MetricsFile = original  # type: ignore[misc]
    return statistics.median(clock.steps[1:]) / given.batch


class _Clock:
    """Seconds of each optimizer step."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self._since = 0.0

    def begin(self) -> None:
        self._since = time.perf_counter()

    def end(self) -> None:
        self.steps.append(time.perf_counter() - self._since)


def _also(clock: _Clock, base: Any) -> Any:
    class Timed(base):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            clock.begin()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.end()

    return Timed


def _plain_trl(
    recipe: Recipe,
    trainee: Trainee,
    expert: str,
    rows: Sequence[Example],
    settings: TrainingSettings,
    name: str,
    folder: Path,
    clock: _Clock,
) -> None:
    from datasets import Dataset
    from transformers import PrinterCallback, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    def completion(row: Example) -> list[int]:
        # A rating expert's completion, for a trainer that knows only tokens: the likeliest label.
        if row.target is None:
            return list(row.completion)
        label = recipe.rating_scale.labels[max(range(5), key=row.target.__getitem__)]
        return list(trainee.meter.answer(label))

    ids = [[*row.prompt, *completion(row)] for row in rows]
    labels = [[-100] * len(r.prompt) + i[len(r.prompt) :] for r, i in zip(rows, ids, strict=True)]
    config = SFTConfig(
        output_dir=str(folder),
        per_device_train_batch_size=settings.batch,
        max_steps=settings.max_steps,
        max_length=4096,
        use_cpu=not trainee.device.startswith("cuda"),
        bf16=trainee.dtype == "bfloat16",
        report_to="none",
        save_strategy="no",
        logging_steps=10**6,
        disable_tqdm=True,
        **({"activation_checkpointing": False} if name.endswith("no checkpointing") else {}),
    )
    plain = replace(settings, lora=replace(settings.lora, activated=False))
    trainer = SFTTrainer(
        model=adapted(trainee, recipe, plain, None),
        args=config,
        train_dataset=Dataset.from_dict({"input_ids": ids, "labels": labels}),
        processing_class=trainee.tokenizer,
        callbacks=[_also(clock, TrainerCallback)()],
    )
    trainer.pop_callback(PrinterCallback)
    trainer.train()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
