"""Training of the experts: reviews in, LoRA adapters out, as in the paper (arXiv 2502.02061).

    from finetune import load_recipe, run_all
    run_all(load_recipe("finetune/recipes/smollm2-cpu.yaml", ["reviews=my.parquet"]))

Every step is also a function of its own, and a command: `python -m finetune --help`. Prompts are
rendered by the functions that render them at inference. Importing this package loads no model
library.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from finetune.calibrate import calibrate_predictor
    from finetune.grpo.train import train_grpo
    from finetune.pipeline import run_all
    from finetune.rationales import write_rationales
    from finetune.rejection.sampling import reject
    from finetune.settings import Recipe, load_recipe, parse_recipe
    from finetune.sft.train import (
        train_predictor,
        train_reasoner,
        train_reward,
        train_summarizer,
    )
    from finetune.splits import make_splits
    from finetune.summaries import make_summaries
    from finetune.teacher import label_aspects

_HOMES = {
    "Recipe": "settings",
    "calibrate_predictor": "calibrate",
    "label_aspects": "teacher",
    "load_recipe": "settings",
    "make_splits": "splits",
    "make_summaries": "summaries",
    "parse_recipe": "settings",
    "reject": "rejection.sampling",
    "run_all": "pipeline",
    "train_grpo": "grpo.train",
    "train_predictor": "sft.train",
    "train_reasoner": "sft.train",
    "train_reward": "sft.train",
    "train_summarizer": "sft.train",
    "write_rationales": "rationales",
}

__all__ = [
    "Recipe",
    "calibrate_predictor",
    "label_aspects",
    "load_recipe",
    "make_splits",
    "make_summaries",
    "parse_recipe",
    "reject",
    "run_all",
    "train_grpo",
    "train_predictor",
    "train_reasoner",
    "train_reward",
    "train_summarizer",
    "write_rationales",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"finetune.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return list(__all__)
