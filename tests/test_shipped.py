"""The adapters that come with the package: found by default, complete, small, and able."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from langgraph.store.memory import InMemoryStore

from r4r_graph import Recommender, prompts
from r4r_graph.engine import adapters
from r4r_graph.engine.adapters import EXPERTS, find_adapters
from r4r_graph.engine.local import load_local_engine
from r4r_graph.engine.model_files import tensor_shapes
from r4r_graph.engine.weights import find_base
from r4r_graph.errors import ModelNotFoundError, SettingError
from r4r_graph.evaluation.words.leaks import form_faults, leaks
from tests.tiny import make_adapter, make_tiny_base

SHIPPED = Path(adapters.__file__).parents[1] / "_adapters"
FOLDERS = sorted(path for path in SHIPPED.glob("*/*") if path.is_dir())
SAMPLE = Path(adapters.__file__).parents[1] / "_demo"


@pytest.fixture
def shipped(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package that ships adapters for the tiny base."""
    digest = find_base(str(tiny_base)).digest
    for seed, expert in enumerate(EXPERTS):
        make_adapter(
            tiny_base,
            tmp_path / "shipped" / "tiny" / expert,
            expert=expert,
            seed=seed,
            base_digest=digest,
            prompt_digest=prompts.prompt_info(expert).digest,
        )
    monkeypatch.setattr(adapters, "_SHIPPED", tmp_path / "shipped")
    return tmp_path / "shipped" / "tiny"


def loaded(base: Path, chosen: Any = None) -> dict[str, str]:
    engine, _ = load_local_engine(base, chosen, device="cpu", prompts=prompts.prompt_digests())
    with engine:
        return dict(engine.info.adapters)


def test_left_out_they_are_taken_for_the_weights_they_were_made_for(
    shipped: Path, tiny_base: Path, tmp_path: Path
) -> None:
    assert set(loaded(tiny_base)) == set(loaded(tiny_base, "shipped")) == set(EXPERTS)
    assert loaded(tiny_base, "none") == {}
    assert set(loaded(tiny_base, {"reasoner": shipped / "reasoner"})) == {"reasoner"}
    other = make_tiny_base(tmp_path / "tiny", seed=5)  # of the same name
    assert loaded(other) == {}
    with pytest.raises(ModelNotFoundError, match="no adapters come with the package for"):
        loaded(other, "shipped")


def test_a_base_nobody_named_has_none() -> None:
    assert find_adapters(None) == {}
    with pytest.raises(ModelNotFoundError, match="an unknown base model"):
        find_adapters("shipped")


def test_a_run_reads_as_many_reviews_as_they_were_trained_with(
    shipped: Path, tiny_base: Path
) -> None:
    for expert in EXPERTS:
        note = json.loads((shipped / expert / "r4r.json").read_text())
        note["trained_with"] = {"history": 2, "budgets": {"side": 300}}
        (shipped / expert / "r4r.json").write_text(json.dumps(note))
    with Recommender.load(
        SAMPLE / "reviews.jsonl", base=tiny_base, store=InMemoryStore(), device="cpu"
    ) as recommender:
        assert recommender.experts.history == 2
        assert recommender.experts.budgets.side == 300
        usual = recommender.rate("mara", "glass-harbour")
        more = recommender.rate("mara", "glass-harbour", history=3)
    assert (len(usual.user_aspects), len(more.user_aspects)) == (2, 3)
    with pytest.raises(SettingError, match="history"):
        recommender.rate("mara", "glass-harbour", history=-1)


# The real ones ----------------------------------------------------------------------------------


def test_there_is_one_for_each_expert() -> None:
    assert [path.name for path in FOLDERS] == sorted(EXPERTS)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
def test_each_is_complete_and_says_whose_words_it_learned_from(folder: Path) -> None:
    note = json.loads((folder / "r4r.json").read_text())
    assert note["prompt"]["digest"] == prompts.prompt_info(folder.name).digest
    assert note["trained_with"]["history"] >= 1
    card = (folder / "README.md").read_text()
    for needed in ("Amazon", "critics", "research", "gpt-3.5-turbo", "limits"):
        assert needed in card
    assert "/" + "work" not in card
    assert not list(folder.rglob("*.parquet"))
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "smollm2-135m"


def test_together_they_are_small() -> None:
    size = sum(path.stat().st_size for path in SHIPPED.rglob("*") if path.is_file())
    assert size < 16_000_000
    for folder in FOLDERS:
        weights = folder / "adapter_model.safetensors"
        elements = sum(a * b for a, b in tensor_shapes(weights).values())
        assert weights.stat().st_size < 2.2 * elements  # 16 bits each


@pytest.mark.model
def test_they_answer_as_experts_do(tmp_path: Path) -> None:
    """On reviews nobody trained on: the package's own sample."""
    shutil.copy(SAMPLE / "reviews.jsonl", tmp_path)
    with Recommender.load(
        tmp_path / "reviews.jsonl", SAMPLE / "items.jsonl", store=InMemoryStore(), device="cpu"
    ) as recommender:
        results = [
            recommender.rate(user, item)
            for user, item in (("mara", "glass-harbour"), ("mara", "eleven-miles"))
        ]
    for result in results:
        assert all(result.model["adapters"].values())
        assert result.distribution.mass > 0.99
        assert any(aspects.summary.positive for aspects in result.user_aspects)
        assert not leaks(result.rationale, result.distribution.scale)
        assert "repeats a sentence" not in form_faults(result.rationale)
