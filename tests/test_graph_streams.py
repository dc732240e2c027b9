"""Every stream mode of LangGraph on our graph, sync and async, with a person and with influence."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.types import Command

from r4r_graph.engine.batching import BatchingEngine
from r4r_graph.graph import Knobs
from r4r_graph.runs import thread
from tests.scripted import Bench, Script, at, make_bench, review

Fake = Callable[..., BatchingEngine]

TABLE = [
    review("ann", "folk", 1, 5),
    review("ann", "rock", 2, 1),
    review("ben", "target", 1, 2),
]
PAIR: Any = {"user_id": "ann", "item_id": "target", "as_of": at(9)}
PATH = ["recall", "summarizer", "summarizer", "summarizer", "reasoner", "human", "predictor"]
WORLDS = pytest.mark.parametrize("world", ["sync", "async"])


def bench(fake: Fake) -> Bench:
    script = Script(rationale=lambda r: f"Reason {r.seed} in many words.")
    return make_bench(fake, TABLE, script=script, checkpointer=InMemorySaver())


def parts(made: Bench, world: str, modes: Any, answers: Any = ("accept",), **knobs: Any) -> Any:
    """All parts of a run's streams: until its question, and after each answer."""
    options: Any = {"context": Knobs(**knobs), "stream_mode": modes, "version": "v2"}
    found: list[Any] = []

    async def collect(value: Any) -> None:
        async for part in made.graph.astream(value, thread("1"), **options):
            found.append(part)

    for value in (PAIR, *(Command(resume=answer) for answer in answers)):
        if world == "sync":
            found += made.graph.stream(value, thread("1"), **options)
        else:
            asyncio.run(collect(value))
    return found


@WORLDS
def test_values(fake: Fake, world: str) -> None:
    found = parts(bench(fake), world, "values", ask=True, influence="same")
    assert {part["type"] for part in found} == {"values"}
    asked = [part for part in found if part.get("interrupts")]
    [question] = asked[-1]["interrupts"]
    assert question.value["rationales"] == ["Reason 0 in many words."]
    last = found[-1]["data"]["recommendation"]
    assert (last["answers"], len(last["influence"])) == (
        [{"about": "rationale", "action": "accept"}],
        6,
    )


@WORLDS
def test_updates(fake: Fake, world: str) -> None:
    found = parts(bench(fake), world, "updates", ask=True, influence="same")
    nodes = [name for part in found for name in part["data"]]
    assert [name for name in nodes if name != "__interrupt__"] == [*PATH, "influence"]
    assert nodes.count("__interrupt__") == 1
    [human] = [part["data"]["human"] for part in found if "human" in part["data"]]
    assert human["answers"] == [{"about": "rationale", "action": "accept"}]
    [influence] = [part["data"]["influence"] for part in found if "influence" in part["data"]]
    assert len(influence["influence"]) == 6


@WORLDS
def test_messages_are_the_rationales_tokens_alone(fake: Fake, world: str) -> None:
    found = parts(
        bench(fake), world, "messages", ("refuse", "accept"), ask=True, influence="new", record=True
    )
    about = [part["data"][1] for part in found]
    assert {one["langgraph_node"] for one in about} == {"reasoner"}
    text = "".join(str(part["data"][0].text) for part in found)
    assert text == "Reason 0 in many words.Reason 1 in many words."
    assert len([part for part in found if part["data"][0].text]) > 10  # word by word
    assert {one["rationale"] for one in about} == {0}


@WORLDS
def test_messages_tell_rationales_apart(fake: Fake, world: str) -> None:
    found = parts(bench(fake), world, "messages", (), rationales=5, round_size=3, sure=1.0)
    texts: dict[int, str] = {}
    for chunk, about in (part["data"] for part in found):
        texts[about["rationale"]] = texts.get(about["rationale"], "") + str(chunk.text)
    assert texts == {n: f"Reason {n} in many words." for n in range(5)}


@WORLDS
def test_custom_is_progress_by_review(fake: Fake, world: str) -> None:
    made = bench(fake)
    for cached in (False, True):
        found = parts(made, world, "custom", ask=True, influence="new")
        told = [part["data"] for part in found]
        assert sorted(event.pop("item_id") for event in told) == ["folk", "rock", "target"]
        assert all(len(event.pop("key")) == 16 for event in told)
        users = [event.pop("user_id") for event in told]
        assert sorted(users) == ["ann", "ann", "ben"]
        assert told == [{"event": "summary", "cached": cached, "of": 3}] * 3


@WORLDS
@pytest.mark.parametrize("mode", ["debug", "tasks"])
def test_tasks_and_debug(fake: Fake, world: str, mode: str) -> None:
    found = parts(bench(fake), world, mode, ask=True, influence="same")
    events = [part["data"] for part in found]
    if mode == "debug":
        assert {event["type"] for event in events} == {"task", "task_result", "checkpoint"}
        events = [event["payload"] for event in events if event["type"] != "checkpoint"]
    begun = [event["name"] for event in events if "input" in event]
    ended = [event["name"] for event in events if event.get("result")]
    asked = [event for event in events if event.get("interrupts")]
    again = [*PATH[:6], "human", "predictor", "influence"]  # it begins again when it is resumed
    assert (begun, ended) == (again, [*PATH, "influence"])
    assert [event["name"] for event in asked] == ["human"]


@WORLDS
def test_checkpoints(fake: Fake, world: str) -> None:
    found = parts(bench(fake), world, "checkpoints", ask=True)
    states = [part["data"] for part in found]
    nexts = [state["next"][0] if state["next"] else "" for state in states]
    assert list(dict.fromkeys(nexts)) == ["__start__", *dict.fromkeys(PATH), ""]
    assert json.loads(json.dumps(states[-1]["values"])) == states[-1]["values"]


@WORLDS
def test_all_modes_at_once(fake: Fake, world: str) -> None:
    modes = ["values", "updates", "messages", "custom", "debug", "tasks", "checkpoints"]
    found = parts(bench(fake), world, modes, ask=True, influence="new")
    assert {part["type"] for part in found} == set(modes)
    assert all(part["ns"] == () for part in found)
