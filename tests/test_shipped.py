"""The adapters that come with the package for a base model are found by default."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from langgraph.store.memory import InMemoryStore

from r4r_graph import Recommender, prompts
from r4r_graph.engine import adapters
from r4r_graph.engine.adapters import EXPERTS, find_adapters
from r4r_graph.engine.local import load_local_engine
from r4r_graph.engine.weights import find_base
from r4r_graph.errors import ModelNotFoundError, SettingError
from tests.tiny import make_adapter, make_tiny_base

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
