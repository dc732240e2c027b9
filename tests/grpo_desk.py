"""Reinforcement of the reasoner on the tiny model: reviews, a recipe, and a planted reward."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file

from finetune.grpo.train import GrpoReport, train_grpo
from finetune.settings import GrpoSettings, Recipe
from r4r_graph.engine.batching import BatchingEngine
from r4r_graph.schema import Review
from tests.scripted import at, review

Make = Callable[..., BatchingEngine]

SETTINGS = GrpoSettings(
    max_steps=4, prompts=2, group=4, micro_batch=4, learning_rate=1e-2, save_steps=2
)
USERS, ITEMS = 4, 5


def word(user: int, item: int) -> str:
    return f"word{user}of{item}"


def all_reviews() -> list[Review]:
    """Twenty reviews, a day apart."""
    return [
        review(f"u{user}", f"i{item}", 4 * item + user, 1 + (user + item) % 5, word(user, item))
        for user in range(USERS)
        for item in range(ITEMS)
    ]


def late(reviews: Sequence[Review]) -> list[Review]:
    return [one for one in reviews if one.timestamp >= at(4)]


def save(recipe: Recipe, reviews: Sequence[Review]) -> None:
    recipe.reviews.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist([one.to_dict() for one in reviews]), recipe.reviews)


def make_recipe(folder: Path, tiny_base: Path, tiny_adapters: Path) -> Recipe:
    """Reviews, a reasoner and a predictor; short rationales."""
    made = Recipe(
        reviews=folder / "reviews.parquet",
        work=folder / "work",
        base=str(tiny_base),
        device="cpu",
        threads=1,
        budgets={"rationale": 10},
        grpo=SETTINGS,
    )
    save(made, all_reviews())
    for expert in ("reasoner", "predictor"):
        shutil.copytree(tiny_adapters / expert, made.adapters / expert)
        config = made.adapters / expert / "adapter_config.json"
        facts = json.loads(config.read_text())
        # As our own steps write it: a name, which is no path.
        config.write_text(json.dumps({**facts, "base_model_name_or_path": tiny_base.name}))
    return made


def vowels(completions: Any, log_metric: Any = None, **_: Any) -> list[float]:
    """A planted reward: the share of vowels."""
    texts = [completion[-1]["content"] for completion in completions]
    return [sum(c in "aeiou" for c in text) / max(1, len(text)) for text in texts]


def run(recipe: Recipe, **more: Any) -> GrpoReport:
    given = {"targets": late(all_reviews()), "summaries": {}, "reward": vowels, "quiet": True}
    return train_grpo(recipe, **{**given, **more})


def with_settings(recipe: Recipe, **changes: Any) -> Recipe:
    return replace(recipe, grpo=replace(recipe.grpo, **changes))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(load_file(folder / "adapter_model.safetensors"))


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
