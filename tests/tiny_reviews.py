"""A small invented set of reviews with a pattern in it, for tests of the training pipeline."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

GOOD = ["warm voice", "clever lyrics", "great drums", "honest songs"]
BAD = ["too long", "cold sound", "dull mix", "poor ending"]


def make_reviews(users: int = 8, items: int = 10, seed: int = 0) -> list[dict[str, Any]]:
    """Every user reviews most items, at days of their own; good items get good words."""
    dice = random.Random(seed)
    rows: list[dict[str, Any]] = []
    for user in range(users):
        for item in range(items):
            if dice.random() < 0.3:
                continue
            rating = min(5, max(1, 1 + item % 5 + dice.choice([-1, 0, 0, 1])))
            words = dice.sample(GOOD if rating > 3 else BAD, 2)
            rows.append(
                {
                    "user_id": f"u{user}",
                    "item_id": f"i{item}",
                    "title": f"Album {item}",
                    "rating": float(rating),
                    "timestamp": 86400.0 * (len(rows) + dice.randint(0, 40)),
                    "review": f"The {words[0]} and the {words[1]}, number {len(rows)}.",
                }
            )
    return rows


def write_reviews(path: Path, rows: list[dict[str, Any]]) -> Path:
    """The rows as a Parquet file."""
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def write_labels(path: Path, rows: list[dict[str, Any]]) -> Path:
    """A teacher's aspect summaries of the rows, as Parquet."""
    labels = []
    for row in rows:
        words = [w for w in (*GOOD, *BAD) if w in row["review"]]
        labels.append(
            {
                "user_id": row["user_id"],
                "item_id": row["item_id"],
                "timestamp": row["timestamp"],
                "positive": [w for w in words if w in GOOD],
                "negative": [w for w in words if w in BAD],
                "preferences": ["good songs"],
                "confident": True,
            }
        )
    pq.write_table(pa.Table.from_pylist(labels), path)
    return path


def tiny_recipe(folder: Path, base: Path, **more: Any) -> Any:
    """A recipe over invented reviews in `folder`, for the tiny model at `base`.

    `more` are sections and settings that differ: `predictor={"epochs": 1}`.
    """
    from finetune.settings import parse_recipe

    folder.mkdir(parents=True, exist_ok=True)
    rows = make_reviews()
    training = {
        "lora": {"rank": 4, "alpha": 8},
        "learning_rate": 5e-3,
        "epochs": 1,
        "batch": 4,
        "micro_batch": 4,
        "warmup": 0,
        "min_rows": 2,
        "validation_rows": 4,
        "eval_steps": 2,
        "save_steps": 2,
        "log_steps": 1,
    }
    tree: dict[str, Any] = {
        "reviews": str(write_reviews(folder / "reviews.parquet", rows)),
        "work": str(folder / "work"),
        "base": str(base),
        "device": "cpu",
        "history": 3,
        "budgets": {"review": 64, "side": 96, "summary": 60, "rationale": 64},
        "splits": {"reward_rows": 12, "instruction_rows": 18},
        "teacher": {"aspects": str(write_labels(folder / "labels.parquet", rows))},
        "rejection": {"rows": 6, "hinted_draws": 1, "concurrency": 4, "tau": 100.0},
        "calibrate": {"min_rows": 4},
        "grpo": {"max_steps": 1, "prompts": 1, "group": 2, "micro_batch": 2, "rows": 4},
    }
    for name in ("summarizer", "reward", "reasoner", "predictor"):
        section = more.pop(name, {})
        lora = {**training["lora"], **section.pop("lora", {})}
        tree[name] = {**training, **section, "lora": lora}
    for name, value in more.items():
        merge = isinstance(value, dict) and isinstance(tree.get(name), dict)
        tree[name] = {**tree[name], **value} if merge else value
    return parse_recipe(tree)
