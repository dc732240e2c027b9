"""Runs of the reinforcement: going on from a checkpoint, and what must not pass in silence."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from finetune.callbacks import read_metrics
from finetune.grpo import trainer as grpo_trainer
from finetune.grpo.trainer import LearningGuard
from finetune.settings import Recipe
from r4r_graph.engine.base import RateRequest
from r4r_graph.errors import DivergedError, MemoryExhaustedError, SettingError, TrainingError
from tests.grpo_desk import (
    Make,
    all_reviews,
    late,
    make_recipe,
    run,
    same,
    vowels,
    weights,
    with_settings,
)


@pytest.fixture
def recipe(tiny_base: Path, tiny_adapters: Path, tmp_path: Path) -> Recipe:
    """Reviews, a reasoner and a predictor; short rationales."""
    return make_recipe(tmp_path, tiny_base, tiny_adapters)


# --- going on from a checkpoint -----------------------------------------------------------------


class Killed(Exception):
    """The process ends here."""


def dying(after: int) -> Any:
    """The planted reward, for so many steps."""
    calls = []

    def reward(**columns: Any) -> list[float]:
        calls.append(1)
        if len(calls) > after:
            raise Killed
        return vowels(columns["completions"])

    return reward


def steps_logged(recipe: Recipe) -> list[int]:
    rows = read_metrics(recipe.work / "runs/grpo/metrics.jsonl")
    return [row["step"] for row in rows if "reward" in row]


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_a_run_that_was_stopped_ends_as_the_straight_one(recipe: Recipe, beta: float) -> None:
    recipe = with_settings(recipe, beta=beta, rows=3)  # the rows are gone through more than once
    straight = run(replace(recipe, work=Path(shutil.copytree(recipe.work, recipe.work / "../b"))))
    with pytest.raises(Killed):
        run(recipe, reward=dying(3))
    assert not (recipe.work / "grpo").exists()
    (recipe.work / "runs/grpo/checkpoint-3").mkdir()  # a half-written one: it is passed over
    resumed = run(recipe)
    assert (straight.resumed_from, resumed.resumed_from) == (0, 2)
    assert straight.steps == resumed.steps == 4
    assert same(weights(straight.adapter), weights(resumed.adapter))
    assert steps_logged(recipe) == [1, 2, 3, 4]
    assert resumed.reward_before == straight.reward_before


def test_memory_settings_may_change_on_the_way(recipe: Recipe) -> None:
    straight = run(replace(recipe, work=Path(shutil.copytree(recipe.work, recipe.work / "../b"))))
    with pytest.raises(Killed):
        run(recipe, reward=dying(2))
    resumed = run(with_settings(recipe, micro_batch=2, log_steps=2))
    assert (resumed.resumed_from, resumed.steps) == (2, 4)
    for name, value in weights(straight.adapter).items():
        # Adam divides by the gradient's size, so rounding shows where a gradient is near zero.
        torch.testing.assert_close(weights(resumed.adapter)[name], value, rtol=0, atol=5e-3)


def test_a_run_that_died_before_its_last_file_only_writes_it(recipe: Recipe) -> None:
    first = run(recipe)
    kept = weights(first.adapter)
    shutil.rmtree(first.adapter)
    again = run(recipe, reward=dying(0))  # no step is left, no rationale is judged
    assert (again.resumed_from, again.steps, again.reused) == (4, 4, False)
    assert same(kept, weights(again.adapter))


def test_a_finished_run_is_not_run_again(recipe: Recipe) -> None:
    first = run(recipe)
    kept = weights(first.adapter)
    again = run(recipe, reward=dying(0))
    assert again.reused
    timeless = {"reused": True, "seconds": 0.0}
    assert replace(first, **timeless) == again
    with pytest.raises(SettingError, match="settings"):
        run(with_settings(recipe, temperature=0.7))
    anew = run(with_settings(recipe, temperature=0.7), resume=False)
    assert not anew.reused
    assert not same(kept, weights(anew.adapter))


def test_checkpoints_of_another_run_are_refused(recipe: Recipe) -> None:
    with pytest.raises(Killed):
        run(recipe, reward=dying(3))
    with pytest.raises(SettingError, match="settings"):
        run(with_settings(recipe, learning_rate=1e-3))
    with pytest.raises(SettingError, match="rows"):
        run(recipe, targets=late(all_reviews())[:5])


def test_a_seed_repeats_and_two_differ(recipe: Recipe) -> None:
    def weights_of(seed: int) -> dict[str, torch.Tensor]:
        return weights(run(replace(recipe, seed=seed), resume=False).adapter)

    recipe = with_settings(recipe, max_steps=1)
    first = weights_of(1)
    assert same(first, weights_of(1))
    assert not same(first, weights_of(2))


# --- what must not pass in silence --------------------------------------------------------------


def test_a_frozen_adapter_is_refused(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    load = PeftModel.from_pretrained
    monkeypatch.setattr(
        PeftModel,
        "from_pretrained",
        lambda model, path, is_trainable: load(model, path, is_trainable=False),
    )
    with pytest.raises(TrainingError, match="trainable"):
        run(recipe)
    assert not (recipe.work / "grpo").exists()


def test_an_adapter_that_a_step_leaves_as_it_is_ends_the_run(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *_, **__: None)
    with pytest.raises(TrainingError, match="changed no weight"):
        run(recipe)


def test_an_adapter_frozen_after_loading_ends_the_run(recipe: Recipe) -> None:
    guard = LearningGuard()
    frozen = torch.nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(TrainingError, match="no parameter"):
        guard.on_train_begin(None, None, None, model=frozen)  # type: ignore[arg-type]


def test_equal_rewards_give_no_nan_and_no_result(recipe: Recipe) -> None:
    flat = with_settings(recipe, max_steps=2)
    with pytest.raises(TrainingError, match="equal"):
        run(flat, reward=lambda completions, **_: [-1.0] * len(completions))
    rows = [r for r in read_metrics(recipe.work / "runs/grpo/metrics.jsonl") if "reward" in r]
    assert [row["frac_reward_zero_std"] for row in rows] == [1.0, 1.0]
    assert [row["reward"] for row in rows] == [-1.0, -1.0]
    assert all(row["loss"] == 0 and row["grad_norm"] == 0 for row in rows)
    assert not (recipe.work / "grpo").exists()


def test_one_group_of_equal_rewards_disturbs_no_other(recipe: Recipe) -> None:
    def reward(completions: Any, **_: Any) -> list[float]:
        half = len(completions) // 2  # two groups; every other step all are equal
        return [-1.0] * half + vowels(completions)[half:]

    report = run(recipe, reward=reward)
    rows = [r for r in read_metrics(recipe.work / "runs/grpo/metrics.jsonl") if "reward" in r]
    assert all(row["frac_reward_zero_std"] == 0.5 for row in rows)
    assert all(torch.isfinite(value).all() for value in weights(report.adapter).values())


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_loss_that_is_no_number_ends_the_run(
    recipe: Recipe, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute = grpo_trainer.GRPOTrainer._compute_loss

    def bad(self: Any, model: Any, inputs: Any) -> Any:
        loss = compute(self, model, inputs)
        if what == "loss":
            return loss * float("nan")
        loss.register_hook(lambda gradient: gradient * float("inf"))
        return loss

    monkeypatch.setattr(grpo_trainer.GRPOTrainer, "_compute_loss", bad)
    with pytest.raises(DivergedError, match="learning_rate"):
        run(recipe)
    assert not (recipe.work / "grpo").exists()
    assert not list((recipe.work / "runs/grpo").glob("checkpoint-*"))


def test_exhausted_memory_names_the_settings(recipe: Recipe) -> None:
    def reward(**_: Any) -> list[float]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(MemoryExhaustedError, match=r"grpo\.micro_batch.*grpo\.group"):
        run(recipe, reward=reward)


def test_a_broken_judge_ends_the_run(recipe: Recipe, fake: Make) -> None:
    def rate(_: RateRequest) -> list[float]:
        raise RuntimeError("no judgement today")

    judge = fake(adapters=["predictor"], rate=rate)
    # Random texts leak now and then, so that rewards differ; that must not hide the judge.
    with pytest.raises(TrainingError, match="no judgement today"):
        run(with_settings(recipe, max_steps=8), reward=None, judge=judge)


def test_a_full_disk_leaves_no_half_adapter(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("finetune.grpo.train.write_card", full)
    with pytest.raises(TrainingError, match="space"):
        run(recipe)
    assert list((recipe.work / "grpo").iterdir()) == []
