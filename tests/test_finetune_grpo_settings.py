"""What the settings of the reinforcement do, and which are refused."""

from __future__ import annotations

import dataclasses
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.grpo import trainer as grpo_trainer
from finetune.grpo.rewards import nearest_value, rating_weights
from finetune.grpo.train import (
    GrpoReport,
    choose_targets,
    prompt_rows,
    rationale_reward,
    trainable_reasoner,
)
from finetune.grpo.trainer import build_trainer, row_order
from finetune.runs import third_party_warnings
from finetune.settings import Recipe
from finetune.sft.fitting import load_trainee
from r4r_graph.errors import DataError, NotReadyError, PromptMismatchError, SettingError
from tests.grpo_desk import (
    SETTINGS,
    Make,
    all_reviews,
    late,
    make_recipe,
    run,
    weights,
    with_settings,
)
from tests.tiny import make_adapter


@pytest.fixture
def recipe(tiny_base: Path, tiny_adapters: Path, tmp_path: Path) -> Recipe:
    """Reviews, a reasoner and a predictor; short rationales."""
    return make_recipe(tmp_path, tiny_base, tiny_adapters)


def test_balance_reaches_the_advantages(recipe: Recipe, fake: Make) -> None:
    """A weight that all draws of a prompt share cancels out where their rewards are divided by the
    group's own spread; with `balance` a rare rating's group has the larger advantages."""
    targets = late(all_reviews())
    targets = [replace(t, rating=1.0 if n == 0 else 5.0) for n, t in enumerate(targets[:8])]
    scale = recipe.rating_scale

    def spread(balance: bool) -> dict[float, float]:
        """Rating to its group's largest advantage."""
        used = with_settings(recipe, balance=balance, prompts=8, max_steps=1, micro_batch=32)
        weights = rating_weights([t.rating for t in targets], scale) if balance else {}
        found: list[tuple[float, float]] = []

        def reward(completions: Any, rating: list[float], **_: Any) -> list[float]:
            steps = [0.1 * (n % 4) for n in range(len(completions))]
            known = [weights.get(nearest_value(r, scale), 1.0) for r in rating]
            found.extend((r, 0.0) for r in rating)
            return [w * s for w, s in zip(known, steps, strict=True)]

        trainee = load_trainee(used)
        rows = prompt_rows(targets, {}, trainee, used)
        model = trainable_reasoner(trainee, used.adapters / "reasoner", used)
        with third_party_warnings():
            trainer = build_trainer(used, trainee, model, rows, reward, used.work / "x")
            trainer.train()
        advantages = list(trainer._logs["advantages"])
        largest: dict[float, float] = {}
        for (rating, _), advantage in zip(found, advantages, strict=True):
            largest[rating] = max(largest.get(rating, 0.0), advantage)
        return largest

    plain, balanced = spread(False), spread(True)
    assert plain[1.0] == pytest.approx(plain[5.0], rel=1e-3)
    assert balanced[1.0] > 3 * balanced[5.0]


def test_balanced_rewards_come_from_the_training_rows(recipe: Recipe, fake: Make) -> None:
    judge = fake(rate=lambda _: [0, 0, 0, 0, 1])
    balanced = rationale_reward(recipe, judge, [5.0, 5.0, 5.0, 1.0])
    plain = rationale_reward(recipe, judge)
    said = "This person likes short warm songs, and this album has many, so it will suit well."
    packed = prompt_rows(late(all_reviews())[:1], {}, load_trainee(recipe), recipe)[0]["evidence"]
    asked = {"completions": [said], "evidence": [packed], "rating": [1.0]}
    assert plain(**asked) == [-4.0]
    assert balanced(**asked) == [-8.0]


def test_the_penalties_are_the_recipes(recipe: Recipe, fake: Make) -> None:
    given = with_settings(recipe, leak_penalty=3.0, form_penalty=2.0)
    assert rationale_reward(given, fake()).worst == -(4 + 3 + 2)


def test_without_a_reasoner_or_a_judge_it_is_not_ready(recipe: Recipe) -> None:
    with pytest.raises(NotReadyError, match="reward"):
        run(with_settings(recipe, judge="reward"), reward=None)
    shutil.rmtree(recipe.adapters / "reasoner")
    with pytest.raises(NotReadyError, match="reasoner"):
        run(recipe)


def test_a_reasoner_of_another_prompt_is_refused(recipe: Recipe, tiny_base: Path) -> None:
    shutil.rmtree(recipe.adapters / "reasoner")
    make_adapter(
        tiny_base, recipe.adapters / "reasoner", expert="reasoner", seed=1, prompt_digest="old"
    )
    with pytest.raises(PromptMismatchError):
        run(recipe)


@pytest.mark.parametrize(
    "bad",
    [
        {"group": 1},
        {"prompts": 0},
        {"max_steps": 0},
        {"micro_batch": 0},
        {"temperature": 0.0},
        {"learning_rate": 0.0},
        {"beta": -0.1},
    ],
)
def test_settings_out_of_range_are_refused(recipe: Recipe, bad: dict[str, Any]) -> None:
    with pytest.raises(SettingError, match=f"grpo.{next(iter(bad))}"):
        run(with_settings(recipe, **bad))


def test_too_few_rows_are_refused(recipe: Recipe) -> None:
    with pytest.raises(DataError, match=r"grpo\.prompts"):
        run(recipe, targets=late(all_reviews())[:1])


def test_rows_are_a_draw_of_the_seed(recipe: Recipe) -> None:
    targets = late(all_reviews())
    few = with_settings(recipe, rows=5)
    one, other = choose_targets(targets, few), choose_targets(targets, replace(few, seed=7))
    assert len(one) == 5
    assert one == choose_targets(targets, few) != other
    # no more than the run will show
    assert len(choose_targets(targets, with_settings(recipe, max_steps=2))) == 4


def test_rows_come_in_turn() -> None:
    order = row_order(3, 8, seed=1)
    assert order[:3] == [0, 1, 2]
    assert sorted(order[3:6]) == [0, 1, 2]
    assert len(order) == 8
    assert order == row_order(3, 8, seed=1)
    assert row_order(5, 3, seed=1) == [0, 1, 2]


@pytest.mark.parametrize(("setting", "used"), [(4, 4), (3, 2), (8, 8), (100, 8), (1, 1)])
def test_the_micro_batch_parts_a_step_evenly(setting: int, used: int) -> None:
    assert grpo_trainer._micro_batch(replace(SETTINGS, micro_batch=setting)) == used


def test_the_micro_batch_does_not_change_the_result(recipe: Recipe) -> None:
    recipe = with_settings(recipe, max_steps=1)
    whole = weights(run(with_settings(recipe, micro_batch=8), resume=False).adapter)
    parts = weights(run(with_settings(recipe, micro_batch=2), resume=False).adapter)
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=0, atol=1e-3)


def test_reports_are_frozen(recipe: Recipe) -> None:
    report = GrpoReport(Path(), False, 1, 1, 0, 1, 0.0, 0.0, 0.0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.rows = 2  # type: ignore[misc]


def test_several_processes_are_refused(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """They would not share the rows of a step, and nothing would say so."""
    monkeypatch.setattr("finetune.grpo.train.process_count", lambda _: 2)
    with pytest.raises(SettingError, match="one process"):
        run(recipe)
