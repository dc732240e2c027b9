"""Reinforcement of the reasoner, on a tiny random model: what it learns, from which prompts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModelForCausalLM

from finetune import splits
from finetune.callbacks import read_metrics
from finetune.grpo import trainer as grpo_trainer
from finetune.grpo.train import (
    choose_targets,
    prompt_rows,
    rationale_reward,
    train_grpo,
    trainable_reasoner,
)
from finetune.grpo.trainer import build_trainer
from finetune.runs import third_party_warnings
from finetune.settings import LoraSettings, Recipe, TrainingSettings
from finetune.sft.fitting import Trainee, adapted, load_trainee
from r4r_graph.engine.base import GenerateRequest, Message, RateRequest
from r4r_graph.engine.contexts import positions
from r4r_graph.engine.local import load_local_engine
from r4r_graph.engine.tokens import HubTokenMeter
from r4r_graph.errors import SettingError
from r4r_graph.evidence import Evidence
from r4r_graph.experts import reasoner_prompt
from r4r_graph.prompts import prompt_info
from r4r_graph.schema import AspectSummary
from tests.grpo_desk import (
    Make,
    all_reviews,
    late,
    make_recipe,
    run,
    same,
    save,
    vowels,
    weights,
    with_settings,
)
from tests.scripted import prompt, review
from tests.tiny import make_adapter

SECRET = 3.37
"""A target's rating that occurs nowhere else."""


@pytest.fixture
def recipe(tiny_base: Path, tiny_adapters: Path, tmp_path: Path) -> Recipe:
    """Reviews, a reasoner and a predictor; short rationales."""
    return make_recipe(tmp_path, tiny_base, tiny_adapters)


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
        for got, one in zip(batch, turns, strict=True):
            asked = backend.prepare(GenerateRequest(one, "reasoner"))
            with torch.inference_mode():
                inputs = backend._batch("reasoner", [(*asked.ids, *answer)], [asked.context])
                with backend._adapter("reasoner"):
                    logits = backend._model(
                        input_ids=inputs.ids[:, inputs.read :],
                        attention_mask=inputs.mask,
                        position_ids=positions(inputs.mask)[:, inputs.read :],
                        use_cache=bool(inputs.cache),
                        **inputs.cache,
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
