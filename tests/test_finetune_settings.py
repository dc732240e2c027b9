"""Recipes: what they hold, how they are read, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from finetune.pipeline import STEPS, planned
from finetune.settings import Recipe, load_recipe, parse_recipe, recipe_tree
from r4r_graph.errors import SettingError

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "finetune" / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_shipped_recipe_parses_and_starts_with_a_command_that_exists(path: Path) -> None:
    recipe = load_recipe(path)
    lines = path.read_text(encoding="utf-8").splitlines()
    commands = [line for line in lines if "python -m finetune" in line]
    assert commands, "no command"
    assert f"--config finetune/recipes/{path.name}" in commands[0]
    step = commands[0].split("python -m finetune ")[1].split()[0]
    assert step in {"all", *(s.name for s in STEPS)}
    words = " ".join(lines[:12]).split()
    load_recipe(path, [word.rstrip("\\,") for word in words if "=" in word and "#" not in word])
    assert planned(recipe)


def test_a_shipped_recipe_goes_by_its_name() -> None:
    assert load_recipe("smollm2-cpu") == load_recipe(RECIPES[0].with_name("smollm2-cpu.yaml"))


def test_the_recipes_are_there() -> None:
    names = {path.stem for path in RECIPES}
    assert names >= {
        "smollm2-cpu", "smollm2-gpu", "smollm2-experts", "llama3-8b-qlora", "qwen3-0.6b",
    }  # fmt: skip


def test_the_paper_recipe_has_the_papers_settings() -> None:
    """PAPER settings table, row by row."""
    recipe = load_recipe(ROOT / "finetune" / "recipes" / "llama3-8b-qlora.yaml")
    table = {
        "summarizer": (16, 32, 0.0, 3e-4, 5, 16, 100),
        "reward": (8, 16, 0.0, 3e-6, 3, 16, 0.1),
        "reasoner": (16, 32, 0.1, 3e-4, 3, 32, 100),
        "predictor": (8, 16, 0.0, 3e-5, 3, 16, 0.1),
    }
    for name, wanted in table.items():
        s = getattr(recipe, name)
        found = (s.lora.rank, s.lora.alpha, s.lora.dropout, s.learning_rate)
        assert (*found, s.epochs, s.batch, s.warmup) == wanted, name
        assert s.max_length == 4096
        assert s.lora.targets == "all-linear"
    assert recipe.quantize_4bit
    assert recipe.reward.lora.head == recipe.predictor.lora.head == "whole"
    assert (recipe.splits.reward_rows, recipe.splits.instruction_rows) == (8000, 12000)


def test_a_section_keeps_its_own_defaults_for_what_it_leaves_out() -> None:
    recipe = parse_recipe({"predictor": {"lora": {"rank": 4}}})
    assert recipe.predictor.lora.alpha == 16
    assert recipe.predictor.learning_rate == 3e-5
    assert recipe.reasoner.lora.dropout == 0.1


def test_overrides_reach_the_top_and_the_steps_own_section(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("base: smollm2-135m\nreward: {epochs: 2}\n", encoding="utf-8")
    given = ["epochs=7", "lora.rank=3", "seed=5", "reward.learning_rate=1e-4", "work=/x/y"]
    recipe = load_recipe(file, given, step="predictor")
    assert (recipe.predictor.epochs, recipe.predictor.lora.rank) == (7, 3)
    assert (recipe.seed, recipe.reward.epochs, recipe.reward.learning_rate) == (5, 2, 1e-4)
    assert recipe.work == Path("/x/y")


@pytest.mark.parametrize(
    ("tree", "named"),
    [
        ({"sumarizer": {}}, "sumarizer"),
        ({"predictor": {"lora": {"rnk": 1}}}, "predictor.lora.rnk"),
        ({"predictor": {"learning_rate": "fast"}}, "predictor.learning_rate"),
        ({"predictor": {"batch": 6, "micro_batch": 4}}, "predictor.batch"),
        ({"predictor": {"loss": {"cross_entropy": 0.0}}}, "predictor.loss"),
        ({"predictor": {"rationale_dropout": 1.5}}, "rationale_dropout"),
        ({"predictor": {"lora": {"activated": True, "head": "whole"}}}, "predictor.lora"),
        ({"reasoner": {"lora": {"head": "whole"}}}, "reasoner.lora.head"),
        ({"summarizer": {"lora": {"activated": True}}}, "summarizer.lora.activated"),
        ({"summarizer": {"optimizer": "sgd"}}, "summarizer.optimizer"),
        ({"splits": {"train": 0.95, "validation": 0.1}}, "splits"),
        ({"budgets": {"reviews": 3}}, "reviews"),
        ({"scale": "five"}, "five"),
    ],
)
def test_bad_settings_are_named(tree: dict[str, object], named: str) -> None:
    with pytest.raises(SettingError, match=named.replace(".", r"\.")):
        parse_recipe(tree)


@pytest.mark.parametrize("override", ["epochs", "=3", "predictor.epochs.x=3", "nonsense=[1"])
def test_bad_overrides_are_named(tmp_path: Path, override: str) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("predictor: {epochs: 2}\n", encoding="utf-8")
    with pytest.raises(SettingError, match=r"override|nonsense"):
        load_recipe(file, [override], step="predictor")


@pytest.mark.parametrize("text", ["[1, 2]", "a: [", "\tx"])
def test_a_file_that_is_no_recipe_is_named(tmp_path: Path, text: str) -> None:
    file = tmp_path / "broken.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(SettingError, match=r"broken\.yaml"):
        load_recipe(file)
    with pytest.raises(SettingError, match=r"absent\.yaml"):
        load_recipe(tmp_path / "absent.yaml")


def test_a_recipe_survives_yaml() -> None:
    recipe = parse_recipe({"predictor": {"lora": {"rank": 4}}, "history": 3, "steps": ["splits"]})
    again = parse_recipe(yaml.safe_load(yaml.safe_dump(recipe_tree(recipe))))
    assert again == recipe


def test_steps_keep_the_pipelines_order_and_names() -> None:
    assert [step.name for step in planned(Recipe())][:3] == ["splits", "teacher", "summarizer"]
    assert "grpo" not in {step.name for step in planned(Recipe())}
    ready = parse_recipe({"teacher": {"aspects": "labels.parquet"}})
    assert "teacher" not in {step.name for step in planned(ready)}
    assert [s.name for s in planned(parse_recipe({"steps": ["splits", "predictor"]}))] == [
        "splits",
        "predictor",
    ]
    with pytest.raises(SettingError, match="order"):
        planned(parse_recipe({"steps": ["predictor", "splits"]}))
    with pytest.raises(SettingError, match="cook"):
        planned(parse_recipe({"steps": ["cook"]}))
