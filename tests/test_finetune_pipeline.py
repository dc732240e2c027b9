"""Every step on a tiny random model, through the same doors as a user's."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import yaml

import finetune
from finetune.pipeline import STEPS, run_all
from finetune.rejection import sampling as rejection
from finetune.release import release
from finetune.settings import Recipe, load_recipe, parse_recipe, recipe_tree, with_folder
from finetune.sft import train
from finetune.teacher import Teacher
from r4r_graph.engine import EngineChatModel, fake_engine
from r4r_graph.engine.adapters import find_adapters
from r4r_graph.errors import InputError, ModelNotFoundError, NotReadyError, SettingError
from r4r_graph.prompts import prompt_info
from r4r_graph.recommender import Recommender
from tests.tiny import make_tiny_base
from tests.tiny_reviews import make_reviews, tiny_recipe, write_labels, write_reviews

RECIPES = sorted((Path(__file__).parents[1] / "finetune" / "recipes").glob("*.yaml"))
ALL = tuple(step.name for step in STEPS if step.name not in ("teacher", "relabel"))


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def _writes(request: Any) -> str:
    """A teacher with something to say: the tiny random model writes no prose."""
    liked = "songs with a warm voice" if len(str(request.messages)) % 2 else "clever lyrics most"
    return f"This listener has praised {liked} before, and others found just that in this album."


def _prose_teacher(patch: pytest.MonkeyPatch) -> None:
    def opened(recipe: Recipe, answers: Path, engine: Any = None) -> Teacher:
        model = EngineChatModel(engine=fake_engine(write=_writes))
        return Teacher(model, recipe.teacher, answers)

    patch.setattr(rejection, "open_teacher", opened)


@pytest.fixture(scope="module")
def done(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Any]:
    """The whole pipeline, GRPO included, run once."""
    folder = tmp_path_factory.mktemp("pipeline")
    recipe = tiny_recipe(folder / "data", tiny_base, steps=list(ALL))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("R4R_CACHE_DIR", str(folder / "cache"))
        _prose_teacher(patch)
        return recipe, run_all(recipe)


def test_all_steps_leave_what_the_next_ones_and_the_user_need(done: tuple[Recipe, Any]) -> None:
    recipe, reports = done
    assert tuple(reports) == ALL
    for name in ("summarizer", "reasoner", "predictor"):
        folder = recipe.adapters / name
        assert (folder / "adapter_model.safetensors").is_file()
        card = (folder / "README.md").read_text(encoding="utf-8")
        note = json.loads((folder / "r4r.json").read_text(encoding="utf-8"))
        assert note["expert"] == name
        assert note["prompt"]["digest"] == prompt_info(name).digest
        assert note["trained_with"] == recipe.asked
        for needed in (note["base_digest"], note["prompt"]["digest"], "Terms", "limits", "digest"):
            assert needed in card
    card = (recipe.adapters / "predictor" / "README.md").read_text(encoding="utf-8")
    for needed in ("shrunk bias", "item mean", "this expert, median", "RMSE", "80 % interval"):
        assert needed in card
    assert str(recipe.work) not in card
    assert (recipe.adapters / "predictor" / "calibration.json").is_file()
    assert (recipe.folder("grpo") / "reasoner" / "adapter_model.safetensors").is_file()


def test_the_experts_load_as_they_are(done: tuple[Recipe, Any], tmp_path: Path) -> None:
    from langgraph.store.memory import InMemoryStore

    recipe, _ = done
    with Recommender.load(
        recipe.reviews,
        base=recipe.base,
        adapters=recipe.adapters,
        budgets=recipe.token_budgets,
        store=InMemoryStore(),
        device="cpu",
    ) as recommender:
        result = recommender.rate("u1", "i2", history=3)
    assert all(result.model["adapters"].values())
    assert 1 <= result.rating <= 5


def test_a_release_loads_and_holds_no_ids(done: tuple[Recipe, Any], tmp_path: Path) -> None:
    recipe, _ = done
    report = release(recipe, tmp_path / "experts")
    assert report.experts == ("summarizer", "reasoner", "predictor")
    files = [path for path in report.folder.rglob("*") if path.is_file()]
    assert report.size == sum(path.stat().st_size for path in files)
    assert {path.suffix for path in files} == {".json", ".md", ".safetensors"}
    assert (recipe.adapters / "predictor" / "rows.parquet").is_file()
    assert not list(report.folder.rglob("rows.parquet"))
    mine, theirs = find_adapters(report.folder), find_adapters(recipe.adapters)
    assert {e: a.digest for e, a in mine.items()} == {e: a.digest for e, a in theirs.items()}
    with pytest.raises(InputError, match="not empty"):
        release(recipe, tmp_path / "experts")
    with pytest.raises(ModelNotFoundError):
        release(with_folder(recipe, tmp_path / "nothing"), tmp_path / "other")


def test_a_second_run_skips_everything(
    done: tuple[Recipe, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, _ = done
    _prose_teacher(monkeypatch)
    stamps = {p: p.stat().st_mtime_ns for p in recipe.work.rglob("*.safetensors")}

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a model was loaded for training")

    monkeypatch.setattr(train, "load_trainee", refuse)
    again = parse_recipe({**recipe_tree(recipe), "steps": [s for s in ALL if s != "grpo"]})
    reports = run_all(again)
    for name in ("summarizer", "reward", "reasoner", "predictor"):
        assert reports[name].reused, name
    assert {p: p.stat().st_mtime_ns for p in recipe.work.rglob("*.safetensors")} == stamps


def test_other_settings_are_not_mistaken_for_the_finished_run(done: tuple[Recipe, Any]) -> None:
    recipe, _ = done
    tree = recipe_tree(recipe)
    tree["predictor"]["learning_rate"] = 1e-3
    with pytest.raises(SettingError, match=r"another run \(different: settings\)"):
        finetune.train_predictor(parse_recipe(tree), quiet=True)
    # How a run is watched makes it no other run.
    tree = recipe_tree(recipe)
    tree["predictor"] |= {"eval_steps": 1, "micro_batch": 2}
    assert finetune.train_predictor(parse_recipe(tree), quiet=True).reused


def test_no_row_is_used_twice_where_that_would_cheat(done: tuple[Recipe, Any]) -> None:
    """Reward and instruction rows, and the reasoner's and the predictor's, are disjoint: a
    predictor trained on rationales for the reasoner's own rows sees better ones than it will."""
    recipe, _ = done

    def keys(path: Path) -> set[tuple[Any, ...]]:
        table = pq.read_table(path).to_pydict()
        when = table["as_of"] if "as_of" in table else table["timestamp"]
        return set(zip(table["user_id"], table["item_id"], when, strict=True))

    reasoner = keys(recipe.adapters / "reasoner" / "rows.parquet")
    predictor = keys(recipe.adapters / "predictor" / "rows.parquet")
    reward = keys(recipe.folder("reward") / "rows.parquet")
    assert reasoner
    assert predictor
    assert reward
    assert not reasoner & predictor
    assert not reasoner & reward
    held_out = keys(recipe.folder("splits") / "validation.parquet")
    assert not held_out & (reasoner | predictor | reward)


def test_a_missing_step_is_named(tmp_path: Path, tiny_base: Path) -> None:
    recipe = tiny_recipe(tmp_path / "data", tiny_base)
    with pytest.raises(NotReadyError, match="splits"):
        finetune.train_summarizer(recipe)
    finetune.make_splits(recipe)
    for step in (finetune.train_reward, finetune.train_predictor):
        with pytest.raises(NotReadyError, match="summaries"):
            step(recipe)
    with pytest.raises(NotReadyError, match="rejection"):
        finetune.train_reasoner(recipe)


def test_a_predictor_without_rationales_needs_none(tmp_path: Path, tiny_base: Path) -> None:
    """The comparison at equal budget: trained without what the other is trained with."""
    recipe = tiny_recipe(
        tmp_path / "data", tiny_base, predictor={"rationale_dropout": 1.0, "max_steps": 2}
    )
    finetune.make_splits(recipe)
    finetune.make_summaries(recipe)
    report = finetune.train_predictor(recipe, quiet=True)
    assert report.train_rows == 30
    assert report.metrics["steps"] == 2


SMALL = {
    "device": "cpu",
    "dtype": "float32",
    "quantize_4bit": False,
    "history": 3,
    "budgets": {"review": 64, "side": 96, "summary": 60, "rationale": 64},
    "splits": {"reward_rows": 12, "instruction_rows": 18},
    "summaries": {"concurrency": 8},
    "rejection": {"rows": 6, "hinted_draws": 1, "tau": 100.0},
    "rationales": {"rows": 8},
    "calibrate": {"min_rows": 4},
    "steps": [
        *("splits", "summarizer", "summaries", "reward"),
        *("rejection", "reasoner", "rationales", "predictor"),
    ],
}
TRAINING = {
    "max_steps": 2,
    "rows": 8,
    "min_rows": 2,
    "validation_rows": 3,
    "batch": 4,
    "micro_batch": 2,
    "optimizer": "adamw_torch",
    "save_steps": 1,
}


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_runs_dry_on_a_tiny_model_of_its_kind(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own shapes of adapters, losses and objectives; fewer rows and steps."""
    _prose_teacher(monkeypatch)
    styles = {"llama3-8b-qlora": ("headers", "llama"), "qwen3-0.6b": ("chatml", "qwen3")}
    style, family = styles.get(path.stem, ("chatml", "llama"))
    base = make_tiny_base(tmp_path / "base", style=style, family=family)
    rows = make_reviews()
    recipe = load_recipe(path)
    tree = recipe_tree(recipe)
    for name, value in SMALL.items():
        merge = isinstance(value, dict) and isinstance(tree[name], dict)
        tree[name] = {**tree[name], **value} if merge else value
    for name in ("summarizer", "reward", "reasoner", "predictor"):
        tree[name] |= TRAINING
    tree["teacher"] |= {
        "model": "engine",
        "aspects": str(write_labels(tmp_path / "labels.parquet", rows)),
    }
    tree |= {
        "base": str(base),
        "work": str(tmp_path / "work"),
        "reviews": str(write_reviews(tmp_path / "reviews.parquet", rows)),
    }
    if path.stem == "smollm2-experts":  # two data sets, only one of them with labels
        own = {"reviews": tree.pop("reviews")}
        labels = tree["teacher"].pop("aspects")
        tree |= {"steps": [], "domains": {"music": {**own, "aspects": labels}, "films": own}}
        tree["rejection"] |= {"rows": 0, "composed": 8}
        tree["budgets"]["rationale"] = 400  # the tiny tokenizer takes a token for some letters
    small = parse_recipe(tree)
    reports = run_all(small)
    assert reports["predictor"].metrics["steps"] == 2
    config = json.loads((small.adapters / "predictor" / "adapter_config.json").read_text())
    assert config["r"] == recipe.predictor.lora.rank
    assert bool(config.get("alora_invocation_tokens")) == recipe.predictor.lora.activated
    assert bool(config.get("modules_to_save")) == (recipe.predictor.lora.head == "whole")
    reviews = tmp_path / "reviews.parquet"
    with Recommender.load(reviews, base=base, adapters=small.adapters, device="cpu") as recommender:
        assert 1 <= recommender.rate("u1", "i2", history=2).rating <= 5


def test_the_command_runs_a_step_and_names_what_is_wrong(tmp_path: Path, tiny_base: Path) -> None:
    recipe = tiny_recipe(tmp_path / "data", tiny_base)
    config = tmp_path / "recipe.yaml"
    config.write_text(yaml.safe_dump(recipe_tree(recipe)), encoding="utf-8")

    def call(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "finetune", *words], capture_output=True, text=True, timeout=300
        )

    shown = call("--help").stdout
    for step in STEPS:
        assert step.name in shown
    made = call("splits", "--config", str(config), "validation=0.15")
    assert made.returncode == 0, made.stderr
    report = json.loads(made.stdout)
    assert report["step"] == "splits"
    assert report["validation"] > 0
    bad = call("summarizer", "--config", str(config), "epoch=1")
    assert (bad.returncode, bad.stdout) == (2, "")
    assert "summarizer.epoch" in bad.stderr
    assert "Traceback" not in bad.stderr
    early = call("reasoner", "--config", str(config))
    assert early.returncode == 2
    assert "rejection" in early.stderr
    assert call("cook", "--config", str(config)).returncode == 2


def test_public_names_are_there_and_importing_loads_no_model_library() -> None:
    for name in finetune.__all__:
        assert getattr(finetune, name)
    assert finetune.__all__ == sorted(finetune.__all__)
    code = (
        "import sys, finetune; "
        "assert not {'torch', 'transformers', 'trl', 'peft'} & set(sys.modules), sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
