"""Reinforcement of the reasoner, on a tiny random model."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from peft import PeftModel, PeftModelForCausalLM
from safetensors.torch import load_file

from finetune import splits
from finetune.callbacks import read_metrics
from finetune.grpo import trainer as grpo_trainer
from finetune.grpo.rewards import nearest_value, rating_weights
from finetune.grpo.train import (
    GrpoReport,
    choose_targets,
    prompt_rows,
    rationale_reward,
    train_grpo,
    trainable_reasoner,
)
from finetune.grpo.trainer import LearningGuard, build_trainer, row_order
from finetune.runs import third_party_warnings
from finetune.settings import GrpoSettings, LoraSettings, Recipe, TrainingSettings
from finetune.sft.fitting import Trainee, adapted, load_trainee
from r4r_graph.engine.base import GenerateRequest, Message, RateRequest
from r4r_graph.engine.batching import BatchingEngine
from r4r_graph.engine.local import load_local_engine
from r4r_graph.engine.tokens import HubTokenMeter
from r4r_graph.errors import (
    DataError,
    DivergedError,
    MemoryExhaustedError,
    NotReadyError,
    PromptMismatchError,
    SettingError,
    TrainingError,
)
from r4r_graph.evidence import Evidence
from r4r_graph.experts import reasoner_prompt
from r4r_graph.prompts import prompt_info
from r4r_graph.schema import AspectSummary, Review
from tests.scripted import at, prompt, review
from tests.tiny import make_adapter

Make = Callable[..., BatchingEngine]

SETTINGS = GrpoSettings(
    max_steps=4, prompts=2, group=4, micro_batch=4, learning_rate=1e-2, save_steps=2
)
USERS, ITEMS = 4, 5
SECRET = 3.37
"""A target's rating that occurs nowhere else."""


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


@pytest.fixture
def recipe(tiny_base: Path, tiny_adapters: Path, tmp_path: Path) -> Recipe:
    """Reviews, a reasoner and a predictor; short rationales."""
    made = Recipe(
        reviews=tmp_path / "reviews.parquet",
        work=tmp_path / "work",
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


# --- what training changes, and what comes out ------------------------------------------------


def trained(
    recipe: Recipe, reward: Any = vowels, callbacks: Sequence[Any] = ()
) -> tuple[Trainee, Any, Any]:
    """A trainer that has run, its base model, and the adapter's weights before."""
    trainee = load_trainee(recipe)
    rows = prompt_rows(choose_targets(late(all_reviews()), recipe), {}, trainee, recipe)
    model = trainable_reasoner(trainee, recipe.adapters / "reasoner", recipe)
    before = {name: value.detach().clone() for name, value in model.state_dict().items()}
    with third_party_warnings():
        trainer = build_trainer(
            recipe, trainee, model, rows, reward, recipe.work / "run", callbacks
        )
        trainer.train()
    return trainee, trainer, before


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_the_adapter_changes_and_nothing_else(recipe: Recipe, beta: float) -> None:
    recipe = with_settings(recipe, beta=beta, max_steps=2)
    _, trainer, before = trained(recipe)
    after = trainer.model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    trainable = {name for name in before if "lora_" in name}
    assert changed == trainable
    assert trainable
    reference = {name for name in after if ".ref." in name}
    assert bool(reference) == (beta > 0)
    for name in reference:  # the divergence is from where training began
        assert torch.equal(after[name], before[name.replace(".ref.", ".default.")])
    trains = {n for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert trains == trainable


def test_the_saved_adapter_is_a_reasoner_with_the_same_logits(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []
    build = grpo_trainer.build_trainer
    monkeypatch.setattr(
        grpo_trainer, "build_trainer", lambda *args: (made.append(build(*args)), made[-1])[1]
    )
    before = weights(recipe.adapters / "reasoner")
    report = run(with_settings(recipe, beta=0.1))
    assert report.adapter == recipe.work / "grpo" / "reasoner"
    assert same(before, weights(recipe.adapters / "reasoner"))  # where it began stays as it was
    assert not same(before, weights(report.adapter))
    note = json.loads((report.adapter / "r4r.json").read_text())
    assert note["expert"] == "reasoner"
    assert note["prompt"]["digest"] == prompt_info("reasoner").digest
    assert "vowels" not in (report.adapter / "README.md").read_text()
    assert not list(report.adapter.parent.glob(".*"))
    assert not (report.adapter / "ref").exists()

    digests = {"reasoner": prompt_info("reasoner").digest}
    engine, notes = load_local_engine(
        recipe.base, {"reasoner": report.adapter}, device="cpu", prompts=digests
    )
    with engine:
        assert notes == []
        assert engine.info.digest == note["base_digest"]
        ids = torch.tensor([engine._backend.prepare(GenerateRequest(ask())).ids])
        with torch.inference_mode(), engine._backend._adapter("reasoner"):
            loaded = engine._backend._model(input_ids=ids).logits
        trainer_model = made[0].model.eval()
        with torch.inference_mode():
            own = trainer_model(input_ids=ids).logits
            with trainer_model.disable_adapter():
                base = trainer_model(input_ids=ids).logits
        torch.testing.assert_close(loaded, own)
        assert not torch.allclose(loaded, base)


def ask() -> tuple[Message, ...]:
    return Message("system", "s"), Message("user", "context"), Message("user", "task")


def test_a_planted_reward_rises(recipe: Recipe, fake: Make) -> None:
    """The judge rates best what has most vowels, the truth is always the best rating."""

    def rate(request: RateRequest) -> list[float]:
        said = request.messages[-1].content.split("judgement>")[1]
        share = sum(c in "aeiou" for c in said) / max(1, len(said))
        return [1 - share, 0, 0, 0, share]

    settings = {"max_steps": 14, "rows": 2, "group": 16, "micro_batch": 32, "save_steps": 100}
    recipe = replace(
        with_settings(recipe, learning_rate=5e-2, **settings), budgets={"rationale": 8}
    )
    judge = fake(adapters=["predictor"], rate=rate)
    targets = [replace(one, rating=5.0) for one in late(all_reviews())]
    report = run(recipe, targets=targets, reward=None, judge=judge)
    rows = [row for row in read_metrics(recipe.work / "runs/grpo/metrics.jsonl") if "reward" in row]
    errors = [row["rationale/error"] for row in rows]
    assert sum(errors[-3:]) / 3 < sum(errors[:3]) / 3 - 0.3
    assert report.reward_after > report.reward_before
    assert report.steps == len(rows) == 14
    assert {"rationale/leaking", "rationale/faulty_form", "rationale/failed"} <= rows[0].keys()


def test_the_judge_is_the_predictor_or_the_reward_model(
    recipe: Recipe, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_adapter(tiny_base, recipe.work / "reward", expert="predictor", seed=9)
    used: list[Path] = []
    load = load_local_engine

    def spy(base: Any, adapters: Any, **settings: Any) -> Any:
        used.append(adapters["predictor"])
        return load(base, adapters, **settings)

    monkeypatch.setattr("finetune.grpo.train.load_local_engine", spy)
    recipe = with_settings(recipe, max_steps=1)
    run(recipe, reward=None)
    run(with_settings(recipe, judge="reward"), reward=None, resume=False)
    assert used == [recipe.adapters / "predictor", recipe.work / "reward"]


def test_targets_and_summaries_are_those_of_the_earlier_steps(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = {one.key: AspectSummary(positive=(f"liked {one.text}",)) for one in all_reviews()}
    monkeypatch.setattr("finetune.grpo.train.read_summaries", lambda _: said)
    recipe = replace(
        with_settings(recipe, max_steps=2),
        splits=replace(recipe.splits, reward_rows=4, instruction_rows=6),
    )
    splits.make_splits(recipe)
    wanted = {t.key for t in splits.read_targets(recipe, "train", "instruction")}
    seen: list[dict[str, Any]] = []

    def reward(**columns: Any) -> list[float]:
        seen.append(columns)
        return vowels(columns["completions"])

    train_grpo(recipe, reward=reward, quiet=True)
    users = [u for columns in seen for u in columns["user_id"]]
    items = [i for columns in seen for i in columns["item_id"]]
    known = {(t.user_id, t.item_id): t.key for t in all_reviews()}
    assert {known[pair] for pair in zip(users, items, strict=True)} <= wanted
    assert any("liked word" in turn["content"] for turn in seen[0]["prompts"][0])


# --- prompts ------------------------------------------------------------------------------------

SYSTEMLESS = (  # refuses a system turn and two user turns in a row, as some models' templates do
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('turns must alternate') }}{% endif %}"
    "{{ '[' + message['role'] + ']' + message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)
THINKING = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}"
    "{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{% endif %}"
)


@pytest.mark.parametrize("template", [None, SYSTEMLESS, THINKING])
def test_prompts_are_token_for_token_those_of_inference(
    recipe: Recipe, template: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the model really generates from, less its padding, is what the engine would give it."""
    if template is not None:
        base = recipe.work / "other" / Path(recipe.base).name
        shutil.copytree(recipe.base, base)
        (base / "chat_template.jinja").write_text(template)
        recipe = replace(recipe, base=str(base))
    given: list[tuple[int, ...]] = []
    generate = PeftModelForCausalLM.generate

    def spy(self: Any, *args: Any, **inputs: Any) -> Any:
        for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
            given.append(tuple(ids[mask.bool()].tolist()))
        return generate(self, *args, **inputs)

    monkeypatch.setattr(PeftModelForCausalLM, "generate", spy)
    seen: list[str] = []

    def reward(**columns: Any) -> list[float]:
        seen.extend(columns["evidence"])
        return [float(n) for n in range(len(columns["evidence"]))]

    run(with_settings(recipe, max_steps=1), reward=reward)

    with load_local_engine(recipe.base, device="cpu")[0] as engine:
        evidences = [Evidence.from_dict(json.loads(one)) for one in seen]
        wanted = [
            engine._backend.prepare(GenerateRequest(reasoner_prompt(one, engine.meter))).ids
            for one in evidences
        ]
    assert given == wanted
    assert len(set(given)) == 2  # two prompts of four rationales each
    if template == THINKING:
        assert "</think>" in HubTokenMeter(load_trainee(recipe).tokenizer)._tokenizer.decode(
            given[0]
        )


@pytest.mark.parametrize("activated", [False, True])
def test_training_weighs_the_probabilities_of_inference(recipe: Recipe, activated: bool) -> None:
    """In a left-padded batch, as TRL computes them, against one row at a time in the engine."""
    if activated:
        shutil.rmtree(recipe.adapters / "reasoner")
        lora = TrainingSettings(lora=LoraSettings(rank=4, activated=True))
        with third_party_warnings():
            fresh = adapted(load_trainee(recipe), recipe, lora, None)
            for name, parameter in fresh.named_parameters():
                if "lora_B" in name:
                    torch.nn.init.normal_(parameter.data, std=0.3)
            fresh.save_pretrained(recipe.adapters / "reasoner", save_embedding_layers=False)
    trainee = load_trainee(recipe)
    rows = prompt_rows(choose_targets(late(all_reviews()), recipe)[:3], {}, trainee, recipe)
    model = trainable_reasoner(trainee, recipe.adapters / "reasoner", recipe).eval()
    with third_party_warnings():
        trainer = build_trainer(recipe, trainee, model, rows, vowels, recipe.work / "run")
    turns = [tuple(Message(t["role"], t["content"]) for t in row["prompt"]) for row in rows]
    prompts, answer = [trainee.meter.prompt(one) for one in turns], [50, 60, 70, 80]
    width, pad = max(map(len, prompts)), trainee.tokenizer.pad_token_id
    assert len({len(one) for one in prompts}) > 1
    padded = [[pad] * (width - len(one)) + [*one, *answer] for one in prompts]
    mask = [[0] * (width - len(one)) + [1] * (len(one) + 4) for one in prompts]
    with torch.no_grad():
        batch = trainer._get_per_token_logps_and_entropies(
            model, torch.tensor(padded), torch.tensor(mask), 4
        )[0]
    folder = {"reasoner": recipe.adapters / "reasoner"}
    with load_local_engine(recipe.base, folder, device="cpu")[0] as engine:
        backend = engine._backend
        for got, ids in zip(batch, prompts, strict=True):
            whole = torch.tensor([[*ids, *answer]])
            with torch.inference_mode(), backend._adapter("reasoner"):
                logits = backend._model(
                    input_ids=whole, attention_mask=torch.ones_like(whole)
                ).logits[0, -5:-1]
            wanted = torch.log_softmax(logits, -1)[torch.arange(4), torch.tensor(answer)]
            torch.testing.assert_close(got, wanted, rtol=0, atol=1e-4)


def test_no_prompt_holds_the_target_or_anything_later(recipe: Recipe, fake: Make) -> None:
    """Canaries in every review: only those strictly before the target come through, and its own
    rating and words in no prompt, neither the reasoner's nor the judge's."""
    reviews = all_reviews()
    place = next(n for n, r in enumerate(reviews) if (r.user_id, r.item_id) == ("u2", "i3"))
    target = reviews[place] = replace(reviews[place], rating=SECRET, title="Shown")
    # The same user's other review at the very moment, and an earlier one of the same item by them.
    reviews.append(review("u2", "i9", 14, 2.11, "sameword"))
    reviews.append(review("u2", "i3", 3, 2.22, "ownword"))
    save(recipe, reviews)
    said = {one.key: AspectSummary(positive=(f"liked {one.text}",)) for one in reviews}
    recipe = with_settings(recipe, max_steps=1, prompts=1)
    judged: list[RateRequest] = []

    def rate(request: RateRequest) -> list[float]:
        judged.append(request)
        return [1.0, 1.0, 1.0, 1.0, 1.0]

    judge = fake(adapters=["predictor"], rate=rate)
    reward = rationale_reward(recipe, judge)
    trainee = load_trainee(recipe)
    (row,) = prompt_rows([target], said, trainee, recipe)
    texts = ["This person likes short warm songs, and this album has many, so it will suit well."]
    assert reward(completions=texts, evidence=[row["evidence"]], rating=[row["rating"]]) == [
        pytest.approx(-abs(3.0 - SECRET))
    ]
    shown = [
        "\n".join(turn["content"] for turn in row["prompt"]),
        prompt(judged[0]),
        row["evidence"],
    ]
    earlier = {
        one.text
        for one in reviews
        if one.timestamp < target.timestamp and (one.user_id == "u2") != (one.item_id == "i3")
    }
    assert len(earlier) == 5  # three of the user's, two of the item's
    for text in shown:
        assert {w for w in (one.text for one in reviews) if f"liked {w}" in text} == earlier
        assert str(SECRET) not in text
        assert "2.11" not in text
        assert "2.22" not in text
    assert "rated" not in shown[0]
    stats = Evidence.from_dict(json.loads(row["evidence"]))
    assert (stats.user_stats.count, stats.item_stats.count) == (3, 2)


def test_a_prompt_that_leaves_no_room_is_refused(recipe: Recipe) -> None:
    trainee = load_trainee(recipe)
    trainee.model.config.max_position_embeddings = 60
    with pytest.raises(SettingError, match="budgets"):
        prompt_rows(late(all_reviews())[:1], {}, trainee, recipe)


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


# --- settings -----------------------------------------------------------------------------------


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
