"""The examples run as they are, and show what they say."""

from __future__ import annotations

import asyncio
import importlib.util
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.store.memory import InMemoryStore
from langgraph.types import Command

from r4r_graph.engine.batching import BatchingEngine
from r4r_graph.experts import Experts
from r4r_graph.graph import Knobs, build_graph
from r4r_graph.testing import sample_reviews

EXAMPLES = Path(__file__).parents[1] / "examples"
VISIT = {"visitor": "mara", "shelf": ["glass-harbour", "small-moths"]}
CONFIG: Any = {"configurable": {"thread_id": "visit"}}

Fake = Callable[..., BatchingEngine]


def run(name: str, *arguments: str) -> str:
    command = [sys.executable, "-W", "error", str(EXAMPLES / name), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=EXAMPLES)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def imported(name: str) -> Any:
    """An example as a module; LangGraph looks a state's types up in `sys.modules`."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_agent_calls_every_tool_and_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("R4R_AGENT_MODEL", "R4R_REVIEWS", "R4R_ITEMS"):
        monkeypatch.delenv(name, raising=False)
    told = run("agent.py", "--fake")
    assert re.findall(r"^Name: (\w+)", told, re.MULTILINE) == [
        "explain_user",
        "rate_item",
        "recommend_items",
    ]
    assert "Error" not in told
    answer = told.rpartition("Ai Message")[2]
    assert "rate_item: Predicted rating of item glass-harbour by user mara" in answer


def test_the_agent_takes_a_real_model(monkeypatch: pytest.MonkeyPatch) -> None:
    example = imported("agent")
    monkeypatch.delenv("R4R_AGENT_MODEL", raising=False)
    assert example.chat_model()._llm_type == "scripted"
    monkeypatch.setenv("R4R_AGENT_MODEL", "some-model")
    monkeypatch.setenv("R4R_AGENT_URL", "http://127.0.0.1:9/v1")
    pytest.importorskip("langchain_openai")
    assert example.chat_model().model_name == "some-model"


def test_the_shop_writes_its_letter() -> None:
    told = run("subgraph.py").splitlines()
    assert [line for line in told if line.startswith("[")] == ["[rate]", "[rate]", "[write]"]
    assert len([line for line in told if line.endswith("accept or edit or refuse?")]) == 2
    assert told[-1].startswith("Dear mara, try ")


def shop(fake: Fake, **knobs: Any) -> Any:
    rating = build_graph(Experts(fake(), InMemoryStore()), sample_reviews())
    return imported("subgraph").shop_graph(rating, Knobs(**knobs), InMemorySaver())


def test_the_subgraph_has_no_part_of_the_shops_state(fake: Fake) -> None:
    state = shop(fake, rationales=2).invoke(VISIT, CONFIG)
    assert set(state) == {"visitor", "shelf", "offers", "letter"}
    assert {offer["thing"] for offer in state["offers"]} == {
        "Glass Harbour",
        "Parliament of Small Moths",
    }


def test_tokens_and_steps_pass_through(fake: Fake) -> None:
    graph = shop(fake)

    async def parts() -> list[Any]:
        modes = ["messages", "updates", "custom"]
        stream = graph.astream(VISIT, CONFIG, stream_mode=modes, subgraphs=True, version="v2")
        return [part async for part in stream]

    found = asyncio.run(parts())
    inside = [part for part in found if part["ns"]]
    assert all(part["ns"][0].startswith("rate:") for part in inside)
    written = [part["data"][0].text for part in inside if part["type"] == "messages"]
    assert len(written) > 20
    steps = {name for part in inside if part["type"] == "updates" for name in part["data"]}
    assert steps == {"recall", "summarizer", "reasoner", "predictor"}
    assert any(part["type"] == "custom" for part in inside)


def test_interrupts_pass_through_and_are_answered_one_by_one(fake: Fake) -> None:
    graph = shop(fake, ask=True)
    graph.invoke(VISIT, CONFIG)
    asked = graph.get_state(CONFIG).interrupts
    assert {each.value["item_id"] for each in asked} == set(VISIT["shelf"])
    edit = {"action": "edit", "rationale": "Because I say so."}
    first = {each.value["item_id"]: each.id for each in asked}
    graph.invoke(Command(resume={first["small-moths"]: edit}), CONFIG)
    [left] = graph.get_state(CONFIG).interrupts
    assert left.value["item_id"] == "glass-harbour"
    state = graph.invoke(Command(resume={left.id: "accept"}), CONFIG)
    why = {offer["thing"]: offer["why"] for offer in state["offers"]}
    assert why["Parliament of Small Moths"] == "Because I say so."
    assert why["Glass Harbour"] == left.value["rationales"][0]
