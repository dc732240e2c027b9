"""The training loop: what changes, what does not, and that a stopped run is no other run."""

from __future__ import annotations

import errno
import json
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from finetune import runs
from finetune.callbacks import read_metrics
from finetune.runs import prepare_run
from finetune.settings import (
    LoraSettings,
    RatingLoss,
    RatingTrainingSettings,
    Recipe,
    TrainingSettings,
)
from finetune.sft import fitting as sft
from finetune.sft.examples import Example
from finetune.sft.fitting import Fitted, Trainee, fit, load_trainee, run_facts, save_adapter
from finetune.sft.trainer import IGNORED, Collator
from r4r_graph.engine.base import Message, RateRequest
from r4r_graph.engine.local import load_local_engine
from r4r_graph.errors import (
    DataError,
    DivergedError,
    MemoryExhaustedError,
    SettingError,
    TrainingError,
)
from r4r_graph.ratings import RatingScale

KINDS = ("text", "rating", "activated text", "activated rating")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def settings_for(kind: str, **more: Any) -> TrainingSettings:
    lora = {
        "rank": 4,
        "alpha": 8,
        "activated": kind.startswith("activated"),
        **more.pop("lora", {}),
    }
    values: dict[str, Any] = {
        "lora": LoraSettings(**lora),
        "learning_rate": 1e-2,
        "epochs": 2,
        "batch": 4,
        "micro_batch": 4,
        "warmup": 0,
        "min_rows": 2,
        "eval_steps": 2,
        "save_steps": 2,
        "log_steps": 1,
        **more,
    }
    if kind.endswith("rating"):
        return RatingTrainingSettings(loss=RatingLoss(cross_entropy=1, emd=1), **values)
    return TrainingSettings(**values)


def recipe_for(base: Path, **more: Any) -> Recipe:
    return Recipe(base=str(base), device="cpu", **more)


def rows_for(trainee: Trainee, kind: str, count: int = 12) -> list[Example]:
    rows = []
    for i in range(count):
        turns = [
            Message("system", "s"),
            Message("user", "notes on songs " * (2 + i % 5)),
            Message("user", f"the task is number {i}"),
        ]
        prompt = trainee.meter.prompt(turns)
        if kind.endswith("rating"):
            rating = 1.0 + i % 5
            target = tuple(float(value == rating) for value in range(1, 6))
            rows.append(Example(prompt, (), target, rating))
        else:
            rows.append(
                Example(prompt, trainee.meter.answer(f"loved guitar {i}" + " so" * (i % 3)))
            )
    return rows


def run(
    base: Path, folder: Path, kind: str = "text", seed: int = 42, **more: Any
) -> tuple[Fitted, Trainee, list[Example]]:
    checkpoint = more.pop("checkpoint", None)
    recipe = recipe_for(base, seed=seed, **more.pop("recipe", {}))
    trainee = load_trainee(recipe)
    rows = rows_for(trainee, kind)
    fitted = fit(
        recipe,
        "step",
        settings_for(kind, **more),
        trainee,
        rows,
        rows[:4],
        folder=folder,
        checkpoint=checkpoint,
        quiet=True,
    )
    return fitted, trainee, rows


def saved(fitted: Fitted, out: Path) -> dict[str, torch.Tensor]:
    save_adapter(fitted, out, lambda _: None)
    found: dict[str, torch.Tensor] = load_file(out / "adapter_model.safetensors")
    return found


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], tolerance: float = 0.0) -> bool:
    return a.keys() == b.keys() and all(
        torch.allclose(a[name], b[name], atol=tolerance, rtol=tolerance) for name in a
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_changes_the_adapter_and_nothing_else(
    kind: str, tiny_base: Path, tmp_path: Path
) -> None:
    """Guards against training with a frozen adapter: no parameter trains, and nothing warns."""
    recipe = recipe_for(tiny_base)
    before = {n: p.clone() for n, p in load_trainee(recipe).model.state_dict().items()}
    fitted, _, _ = run(tiny_base, tmp_path / "run", kind, max_steps=2)
    model = fitted.trainer.model
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trainable
    assert all("lora_" in name for name in trainable)
    changed = [n for n, p in model.named_parameters() if "lora_B" in n and p.abs().sum() > 0]
    assert len(changed) == sum("lora_B" in name for name in trainable)
    after = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): p
        for name, p in model.state_dict().items()
        if "lora_" not in name
    }
    assert before.keys() <= after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("kind", ["text", "activated rating"])
def test_on_a_cpu_bfloat16_is_what_passes_are_computed_in(
    kind: str, tiny_base: Path, tmp_path: Path
) -> None:
    """The weights stay in float32, base and adapter: small steps are not rounded away."""
    whole, _, _ = run(tiny_base, tmp_path / "whole", kind, max_steps=3)
    half, trainee, _ = run(
        tiny_base, tmp_path / "half", kind, max_steps=3, recipe={"dtype": "bfloat16"}
    )
    assert trainee.dtype == "bfloat16"
    assert {p.dtype for p in half.trainer.model.parameters()} == {torch.float32}
    a, b = (saved(fitted, tmp_path / name) for fitted, name in ((whole, "a"), (half, "b")))
    assert not same(a, b)
    assert same(a, b, tolerance=0.05)


def test_adapters_are_saved_in_16_bits_where_asked(tiny_base: Path, tmp_path: Path) -> None:
    fitted, _, _ = run(tiny_base, tmp_path / "run", max_steps=2)
    whole = saved(fitted, tmp_path / "whole")
    half = saved(replace(fitted, saved_dtype="float16"), tmp_path / "half")
    assert {tensor.dtype for tensor in half.values()} == {torch.float16}
    assert same(whole, {name: tensor.float() for name, tensor in half.items()}, tolerance=1e-3)
    sizes = [
        (tmp_path / name / "adapter_model.safetensors").stat().st_size for name in ("whole", "half")
    ]
    assert sizes[1] < 0.7 * sizes[0]


@pytest.mark.parametrize("kind", ["rating", "activated rating"])
@pytest.mark.parametrize("head", ["frozen", "rating_tokens", "whole"])
def test_a_saved_rating_adapter_answers_in_the_engine_as_it_did_in_training(
    kind: str, head: str, tiny_base: Path, tmp_path: Path
) -> None:
    """Through the loader that users call; with a tuned head, tied to the embedding or not."""
    if kind == "activated rating" and head != "frozen":
        pytest.skip("an activated adapter leaves the head as it is")
    from tests.tiny import make_tiny_base

    bases = {"tied": tiny_base}
    if head != "rating_tokens":
        bases["untied"] = make_tiny_base(tmp_path / "untied", style="headers")
    for name, base in bases.items():
        fitted, _, _ = run(base, tmp_path / name / "run", kind, lora={"head": head}, max_steps=4)
        read = fitted.trainer.distributions(fitted.validation, 3)
        out = tmp_path / name / "adapter"
        weights = saved(fitted, out)
        assert any("lora_" not in key for key in weights) == (head != "frozen")
        assert (
            json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"]
            == base.name
        )
        other = tmp_path / name / "text"
        text, _, _ = run(base, tmp_path / name / "text-run", "text", max_steps=2)
        saved(text, other)
        engine, _ = load_local_engine(base, {"predictor": out, "reasoner": other}, device="cpu")
        with engine:
            asked = []
            for i in range(4):
                turns = (
                    Message("system", "s"),
                    Message("user", "notes on songs " * (2 + i % 5)),
                    Message("user", f"the task is number {i}"),
                )
                asked.append(RateRequest(turns, adapter="predictor"))
            results = engine.rate(asked)
            bare = engine.rate([RateRequest(r.messages) for r in asked])
        for result, row, base_row in zip(results, read.tolist(), bare, strict=True):
            assert list(result.distribution.probabilities) == pytest.approx(row[:-1], abs=1e-5)
            assert result.distribution.mass == pytest.approx(row[-1], abs=1e-5)
            assert base_row.distribution.probabilities != result.distribution.probabilities
        # What the base model says is not touched by any adapter's head.
        clean, _ = load_local_engine(base, None, device="cpu")
        with clean:
            untouched = clean.rate([RateRequest(r.messages) for r in asked])
        for one, two in zip(bare, untouched, strict=True):
            assert one.distribution.probabilities == pytest.approx(
                two.distribution.probabilities, abs=1e-6
            )


def test_untied_rating_tokens_are_refused_with_the_way_out(tmp_path: Path) -> None:
    from tests.tiny import make_tiny_base

    base = make_tiny_base(tmp_path / "untied", style="headers")
    with pytest.raises(SettingError, match="head=whole"):
        run(base, tmp_path / "run", "rating", lora={"head": "rating_tokens"})


@pytest.mark.parametrize("kind", ["text", "activated text"])
def test_a_saved_text_adapter_gives_the_logits_of_training(
    kind: str, tiny_base: Path, tmp_path: Path
) -> None:
    from peft import PeftModel

    fitted, _, rows = run(tiny_base, tmp_path / "run", kind, max_steps=3)
    saved(fitted, tmp_path / "adapter")
    with runs.third_party_warnings():
        base = load_trainee(recipe_for(tiny_base)).model
        again = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    ids = torch.tensor([[*rows[0].prompt, *rows[0].completion]])
    with torch.no_grad():
        one = fitted.trainer.model.eval()(input_ids=ids).logits
        two = again(input_ids=ids).logits
    assert torch.allclose(one, two, atol=1e-6)


def test_labels_cover_exactly_the_completion(tiny_base: Path) -> None:
    trainee = load_trainee(recipe_for(tiny_base))
    rows = rows_for(trainee, "text", 3)
    dataset = sft._dataset(rows)
    pad = trainee.tokenizer.pad_token_id
    for opening in (None, trainee.meter.task_opening):
        batch = Collator(pad, None, opening)([dataset[i] for i in range(3)])
        for row, labels, ids in zip(rows, batch["labels"], batch["input_ids"], strict=True):
            learned = labels != IGNORED
            assert labels[learned].tolist() == list(row.completion)
            assert ids[learned].tolist() == list(row.completion)
            assert learned.nonzero().min() == len(labels) - len(row.completion)
        if opening is not None:
            whole = [
                [*c[m.bool()].tolist(), *i[n.bool()].tolist()]
                for c, m, i, n in zip(
                    batch["context_ids"],
                    batch["context_mask"],
                    batch["input_ids"],
                    batch["attention_mask"],
                    strict=True,
                )
            ]
            assert whole == [[*r.prompt, *r.completion] for r in rows]


@pytest.mark.parametrize("kind", ["text", "rating"])
def test_the_frozen_context_is_the_plain_way_computed_faster(
    kind: str, tiny_base: Path, tmp_path: Path
) -> None:
    """Loss and gradients of an activated adapter: over a frozen cache of the context, and by
    PEFT's own forward pass over the whole rows."""
    fitted, trainee, rows = run(tiny_base, tmp_path / "run", f"activated {kind}", max_steps=2)
    trainer, model = fitted.trainer, fitted.trainer.model
    model.eval()  # no dropout; gradients all the same
    data = sft._dataset(rows[:5])
    pad, readout = trainee.tokenizer.pad_token_id, trainer._readout

    def measured(collator: Collator) -> tuple[float, dict[str, torch.Tensor]]:
        model.zero_grad()
        loss = trainer.compute_loss(model, collator([data[i] for i in range(5)]))
        loss.backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        return float(loss.detach()), grads

    frozen = measured(Collator(pad, readout, trainee.meter.task_opening))
    plain = measured(Collator(pad, readout, None))
    assert frozen[0] == pytest.approx(plain[0], abs=1e-5)
    assert same(frozen[1], plain[1], 1e-4)
    assert any(g.abs().max() > 1e-4 for g in frozen[1].values())


def test_the_loss_of_texts_is_trls(tiny_base: Path, tmp_path: Path) -> None:
    """TRL computes it otherwise; value and gradients are the same."""
    from trl import SFTTrainer

    fitted, trainee, rows = run(tiny_base, tmp_path / "run", "text", max_steps=2)
    trainer, model = fitted.trainer, fitted.trainer.model
    model.eval()
    data = sft._dataset(rows[:5])
    batch = Collator(trainee.tokenizer.pad_token_id, None, None)([data[i] for i in range(5)])

    def measured(loss_of: Any) -> tuple[float, dict[str, torch.Tensor]]:
        model.zero_grad()
        loss = loss_of(dict(batch))
        loss.backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        return float(loss.detach()), grads

    ours = measured(lambda inputs: trainer.compute_loss(model, inputs))
    trls = measured(
        lambda inputs: SFTTrainer.compute_loss(
            trainer,
            model,
            {**inputs, "position_ids": (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)},
        )
    )
    assert ours[0] == pytest.approx(trls[0], abs=1e-5)
    assert same(ours[1], trls[1], 1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_micro_batches_do_not_change_the_result(kind: str, tiny_base: Path, tmp_path: Path) -> None:
    """Rows of unlike length: a mean of means would give other gradients."""
    one = saved(run(tiny_base, tmp_path / "a", kind, micro_batch=4)[0], tmp_path / "one")
    two = saved(run(tiny_base, tmp_path / "b", kind, micro_batch=1)[0], tmp_path / "two")
    assert same(one, two, 2e-3)


@pytest.mark.parametrize("kind", ["text", "rating"])
def test_one_seed_repeats_and_two_differ(kind: str, tiny_base: Path, tmp_path: Path) -> None:
    lora = {"dropout": 0.1}
    found = [
        saved(run(tiny_base, tmp_path / f"{i}", kind, seed, lora=lora)[0], tmp_path / f"out{i}")
        for i, seed in enumerate((1, 1, 2))
    ]
    assert same(found[0], found[1])
    assert not same(found[0], found[2], 1e-4)


@pytest.mark.parametrize("kind", ["text", "activated rating"])
def test_a_resumed_run_equals_the_straight_one(kind: str, tiny_base: Path, tmp_path: Path) -> None:
    straight, _, _ = run(tiny_base, tmp_path / "straight", kind, lora={"dropout": 0.1})
    steps = straight.trainer.state.global_step
    checkpoint = tmp_path / "straight" / "checkpoint-4"
    assert steps > 4
    resumed, _, _ = run(
        tiny_base, tmp_path / "straight", kind, lora={"dropout": 0.1}, checkpoint=checkpoint
    )
    assert resumed.trainer.state.global_step == steps
    assert same(saved(straight, tmp_path / "a"), saved(resumed, tmp_path / "b"), 1e-7)


def test_metrics_are_a_line_a_log_also_after_a_resume(tiny_base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run(tiny_base, folder)
    first = read_metrics(folder / "metrics.jsonl")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99, "lo')  # a killed run's last line
    run(tiny_base, folder, checkpoint=folder / "checkpoint-4")
    second = read_metrics(folder / "metrics.jsonl")
    steps = [row["step"] for row in second if "loss" in row]
    assert steps == sorted(set(steps)) == [row["step"] for row in first if "loss" in row]
    losses = [row["loss"] for row in first if "loss" in row]
    assert [row["loss"] for row in second if "loss" in row] == pytest.approx(losses)
    assert losses[-1] < losses[0]


def test_a_loss_that_is_no_number_ends_the_run(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from finetune.sft import trainer

    monkeypatch.setattr(trainer, "rating_loss", lambda read, *_: (read.raw.sum(1) * torch.nan, {}))
    with pytest.raises(DivergedError, match="step 1; lower learning_rate"):
        run(tiny_base, tmp_path / "run", "rating")


def test_memory_that_runs_out_names_the_setting(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from finetune.sft import trainer

    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(trainer, "rating_loss", full)
    with pytest.raises(MemoryExhaustedError, match="lower micro_batch"):
        run(tiny_base, tmp_path / "run", "rating")


def test_a_full_disk_is_told_and_leaves_no_half_adapter(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted, _, _ = run(tiny_base, tmp_path / "run", max_steps=2)
    out = tmp_path / "adapters" / "reasoner"
    saved(fitted, out)
    before = (out / "adapter_model.safetensors").read_bytes()

    def full(folder: Path) -> None:
        (folder / "README.md").write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(TrainingError, match=r"No space left.*free some space"):
        save_adapter(fitted, out, full)
    assert (out / "adapter_model.safetensors").read_bytes() == before
    assert [path.name for path in out.parent.iterdir()] == ["reasoner"]

    from transformers import Trainer

    def no_room(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Trainer, "save_model", no_room)
    with pytest.raises(TrainingError, match="goes on from its last checkpoint"):
        run(tiny_base, tmp_path / "other")


def test_too_few_rows_are_refused(tiny_base: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="12 rows to train on, under the least of 20"):
        run(tiny_base, tmp_path / "run", min_rows=20)


def test_a_run_that_learns_nothing_is_an_error(tiny_base: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="changed no weight"):
        run(tiny_base, tmp_path / "run", learning_rate=1e-50)


def test_another_run_does_not_go_on_from_these_checkpoints(tiny_base: Path, tmp_path: Path) -> None:
    recipe = recipe_for(tiny_base)
    trainee = load_trainee(recipe)
    rows = rows_for(trainee, "text")

    def facts(rows: Sequence[Example], **more: Any) -> dict[str, Any]:
        return run_facts(
            recipe, "reasoner", settings_for("text", **more), trainee.base, rows, rows[:2]
        )

    folder = tmp_path / "run"
    assert prepare_run(folder, facts(rows), resume=True) is None
    (folder / "checkpoint-2").mkdir()
    (folder / "checkpoint-4").mkdir()
    (folder / "checkpoint-2" / "trainer_state.json").write_text("{}")
    # The newer one was not written to its end.
    assert prepare_run(folder, facts(rows), resume=True) == folder / "checkpoint-2"
    with pytest.raises(SettingError, match=r"different: settings.*--no-resume"):
        prepare_run(folder, facts(rows, epochs=3), resume=True)
    with pytest.raises(SettingError, match="train_digest"):
        prepare_run(folder, facts(rows[::-1]), resume=True)
    assert prepare_run(folder, facts(rows[::-1]), resume=False) is None


KILLED = """
    import os, sys
    from pathlib import Path
    from transformers import TrainerCallback
    sys.path.insert(0, {root!r})
    from tests import test_finetune_sft as t
    import finetune.callbacks as c

    class Dies(c.MetricsFile):
        def on_step_begin(self, args, state, control, **_):
            if state.global_step == 3:
                Path({folder!r}, "reached").write_text("")
                os.kill(os.getpid(), 9)

    c.MetricsFile = Dies
    t.torch.set_num_threads(1)
    t.run(Path({base!r}), Path({folder!r}))
"""


def test_killed_and_started_again_it_ends_as_if_nothing_had_been(
    tiny_base: Path, tmp_path: Path
) -> None:
    straight = saved(run(tiny_base, tmp_path / "straight")[0], tmp_path / "a")
    folder = tmp_path / "killed"
    folder.mkdir()
    code = textwrap.dedent(KILLED).format(
        root=str(Path(__file__).parents[1]), folder=str(folder), base=str(tiny_base)
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert (folder / "reached").exists()
    checkpoint = runs.last_checkpoint(folder)
    assert checkpoint is not None
    assert checkpoint.name == "checkpoint-2"
    resumed = saved(run(tiny_base, folder, checkpoint=checkpoint)[0], tmp_path / "b")
    assert same(straight, resumed, 1e-7)


def test_a_scale_of_two_token_ratings_trains(tiny_base: Path, tmp_path: Path) -> None:
    """10 begins with 1: the loss reads both places, as inference does."""
    recipe = recipe_for(tiny_base, scale="1-10")
    trainee = load_trainee(recipe)
    values = RatingScale.parse("1-10").values
    rows = [
        Example(row.prompt, (), tuple(float(value == 10.0) for value in values), 10.0)
        for row in rows_for(trainee, "rating")
    ]
    settings = settings_for("rating", epochs=6)
    fitted = fit(recipe, "step", settings, trainee, rows, rows[:4], folder=tmp_path, quiet=True)
    read = fitted.trainer.distributions(fitted.validation, 4)
    assert read.shape == (4, 11)
    assert (read[:, 9] > 0.8).all()
    assert torch.allclose(read[:, :-1].sum(1), torch.ones(4))


def test_it_reports_to_tensorboard_where_asked(tiny_base: Path, tmp_path: Path) -> None:
    run(tiny_base, tmp_path / "run", report_to="tensorboard", max_steps=2)
    assert list((tmp_path / "run").rglob("events.out.tfevents.*"))


def test_loading_the_trainer_takes_no_network(tiny_base: Path, tmp_path: Path) -> None:
    """PEFT asks the hub for a base's configuration at each save unless told otherwise."""
    started = time.monotonic()
    with pytest.MonkeyPatch.context() as patch:

        def refuse(*_: Any, **__: Any) -> Any:
            raise AssertionError("the network was asked")

        patch.setattr("socket.getaddrinfo", refuse)
        fitted, _, _ = run(tiny_base, tmp_path / "run", max_steps=2)
        saved(fitted, tmp_path / "out")
    assert time.monotonic() - started < 60
