"""The graph as a machine: its edges, rounds of rationales, threads, parents and knobs."""

from __future__ import annotations

import asyncio
import itertools
import json
import operator
import os
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import pytest
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.checkpoint.sqlite import SqliteSaver
from langgraph.graph import END, START, StateGraph
from langgraph.types import Command
from typing_extensions import TypedDict

from r4r_graph.engine.base import GenerateRequest, RateRequest
from r4r_graph.engine.batching import BatchingEngine
from r4r_graph.errors import DataError, EngineFailure, SettingError
from r4r_graph.graph import Knobs
from r4r_graph.schema import Review
from tests.scripted import Bench, Request, Script, at, make_bench, mark, prompt, review

Fake = Callable[..., BatchingEngine]

TABLE = [
    review("ann", "folk", 1, 5),
    review("ann", "rock", 2, 1),
    review("ben", "target", 1, 2),
    review("ben", "other", 2, 3),
    review("cas", "other", 3, 4),
]


def of_seed(request: Request) -> int:
    """The seed of the rationale that a rating request shows (`Script` writes it down)."""
    return int(request.messages[2].content.split("Reason ")[1].split(".")[0])


def weights(*given: Iterable[float]) -> Callable[[RateRequest], Iterable[float]]:
    """The first rationale's distribution, the second's, ..., for the seed 0."""
    return lambda request: list(given[of_seed(request)])  # type: ignore[call-overload]


SURE = [0.0, 0.0, 0.0, 0.05, 0.95]
UNSURE = [0.2, 0.2, 0.2, 0.2, 0.2]


# Edges -----------------------------------------------------------------------------------------


def steps(parts: Iterable[Any]) -> list[set[str]]:
    """The nodes of each superstep, from the parts of a `debug` stream."""
    found: dict[int, set[str]] = {}
    for part in parts:
        event = part["data"]
        if event["type"] == "task":
            found.setdefault(event["step"], set()).add(event["payload"]["name"])
    return [found[step] for step in sorted(found)]


def executed(path: list[set[str]]) -> set[tuple[str, str]]:
    """The edges along a path of supersteps, each of which ran one kind of node."""
    assert all(len(step) == 1 for step in path)
    nodes = [START, *(name for [name] in path), END]
    return set(itertools.pairwise(nodes))


def runs(fake: Fake) -> list[tuple[Bench, Any, Any, Sequence[str]]]:
    """Graph, input, knobs, and a person's answers, of runs that together take every branch."""
    pair: Any = {"user_id": "ann", "item_id": "target", "as_of": at(9)}
    wordless = [review("ann", "folk", 1, text="  "), review("ben", "target", 1, text="")]

    def over(rows: list[Review], weights: list[float] = SURE) -> Bench:
        script = Script(weights=lambda _: weights)
        return make_bench(fake, rows, script=script, checkpointer=InMemorySaver())

    several = {"rationales": 5, "round_size": 2}
    return [
        (over(wordless), pair, {}, ()),
        (over(TABLE), {**pair, "as_of": at(0)}, {}, ()),
        (over(TABLE), pair, {}, ()),
        (over(TABLE, UNSURE), pair, several, ()),
        (over(TABLE), pair, several, ()),
        (over(TABLE), pair, {"ask": True}, ("refuse", "accept")),
        (over(TABLE, UNSURE), pair, {"ask_below": 0.9}, ("accept",)),
        (over(TABLE), pair, {"influence": "same", "ask_below": 0.9}, ()),
        (over(TABLE, UNSURE), pair, {"influence": "new", "ask_below": 0.9}, ("accept",)),
    ]


async def collected(events: AsyncIterator[Any]) -> list[Any]:
    return [event async for event in events]


@pytest.mark.parametrize("world", ["sync", "async"])
def test_what_is_drawn_is_what_runs(fake: Fake, world: str) -> None:
    paths = []
    for bench, given, context, answers in runs(fake):
        options: Any = {"context": context, "stream_mode": "debug", "version": "v2"}
        parts: list[Any] = []
        for value in (given, *(Command(resume=answer) for answer in answers)):
            if world == "sync":
                parts += bench.graph.stream(value, thread(), **options)
            else:
                stream = bench.graph.astream(value, thread(), **options)
                parts += asyncio.run(collected(stream))
        assert not bench.graph.get_state(thread()).next
        paths.append(steps(parts))

    recall, summarizer, reasoner, predictor, human, influence = (
        {name} for name in ("recall", "summarizer", "reasoner", "predictor", "human", "influence")
    )
    assert paths[0] == paths[1] == [recall, reasoner, predictor]
    plain = [recall, summarizer, reasoner, predictor]
    assert paths[2] == paths[4] == plain
    assert paths[3] == [*plain[:2], *[reasoner, predictor] * 3]
    assert paths[5] == [*plain[:2], *[reasoner, human] * 2, predictor]
    assert paths[6] == [*plain, human]
    assert paths[7] == [*plain, influence]
    assert paths[8] == [*plain, human, influence]
    drawn = {(e.source, e.target) for e in bench.graph.get_graph().edges}
    assert set().union(*map(executed, paths)) == drawn


def test_one_send_a_review_with_words(fake: Fake) -> None:
    table = [*TABLE, review("ann", "mute", 3, text=" \n")]
    bench = make_bench(fake, table)
    sent = [
        part["data"]["input"]
        for part in bench.graph.stream(
            {"user_id": "ann", "item_id": "target", "as_of": at(9)},
            stream_mode="tasks",
            version="v2",
        )
        if part["data"]["name"] == "summarizer" and "input" in part["data"]
    ]
    assert {task["entry"]["review"]["item_id"] for task in sent} == {"folk", "rock", "target"}
    assert [task["siblings"] for task in sent] == [3, 3, 3]


def test_invoke_and_ainvoke_agree(fake: Fake) -> None:
    context: Any = {"rationales": 3, "sure": 1.0}
    given: Any = {"user_id": "ann", "item_id": "target", "as_of": at(9)}
    found = []
    for world in ("sync", "async"):
        bench = make_bench(fake, TABLE)
        if world == "sync":
            state = bench.graph.invoke(given, context=context)
        else:
            state = asyncio.run(bench.graph.ainvoke(given, context=context))
        for usage in state["recommendation"]["usage"].values():
            del usage["seconds"]
        found.append(state["recommendation"])
    assert found[0] == found[1]


def test_the_drawing_says_which_adapter_and_prompt(fake: Fake) -> None:
    bench = make_bench(fake, TABLE, adapters=["reasoner"])
    nodes = bench.graph.get_graph().nodes
    prompts = bench.experts.model_card()["prompts"]
    assert nodes["reasoner"].metadata == {"adapter": "fake-reasoner", "prompt": prompts["reasoner"]}
    assert (nodes["predictor"].metadata or {})["adapter"] == "none (base model)"


# Deliberation ----------------------------------------------------------------------------------


def test_one_rationale_is_greedy_whatever_the_seed(fake: Fake) -> None:
    bench = make_bench(fake, TABLE, script=Script(rationale=lambda _: "So."))
    found = [bench.rate("ann", "target", at(9), seed=seed) for seed in (0, 7)]
    assert [request.temperature for request in bench.script.rationales] == [0.0, 0.0]
    assert found[0]["rationale"] == found[1]["rationale"] == "So."
    assert found[0]["distribution"] == found[1]["distribution"]
    assert "rationales" not in found[0]


def test_rationales_are_drawn_in_rounds_and_mixed(fake: Fake) -> None:
    parts = [
        [1, 0, 0, 0, 0],
        [0, 1, 0, 0, 0],
        [0, 0, 0, 0, 1],
        [0, 0, 0, 0.5, 0.5],
        [0, 0, 1, 0, 0],
    ]
    script = Script(weights=weights(*parts))
    bench = make_bench(fake, TABLE, script=script)
    found = bench.rate("ann", "target", at(9), rationales=5, round_size=2, temperature=0.6)
    assert found["rationales"] == [f"Reason {seed}." for seed in range(5)]
    assert found["rationale"] == "Reason 0."
    mixed = {"1": 0.2, "2": 0.2, "3": 0.2, "4": 0.1, "5": 0.3}
    assert found["distribution"] == pytest.approx(mixed)
    assert found["rating"] == found["mean"] == pytest.approx(3.1)
    assert sorted(request.seed for request in script.rationales) == [0, 1, 2, 3, 4]
    assert {(r.temperature, r.top_p) for r in script.rationales} == {(0.6, 0.95)}
    assert [len(script.rationales), len(script.ratings)] == [5, 5]
    kinds = [type(request) for request in script.asked[len(script.summaries) :]]
    rounds = [(kind, len(list(group))) for kind, group in itertools.groupby(kinds)]
    assert rounds == [(kind, n) for n in (2, 2, 1) for kind in (GenerateRequest, RateRequest)]
    usage = found["usage"]
    assert (usage["reasoner"]["calls"], usage["predictor"]["calls"]) == (5, 5)


def test_it_stops_between_rounds_when_sure(fake: Fake) -> None:
    # After the first round the mode has (0.7 + 1) / 2 = 0.85, after the second 3.7 / 4 = 0.925.
    best = [0, 0, 0, 0, 1]
    script = Script(weights=weights([0, 0, 0, 0.3, 0.7], best, best, best))
    bench = make_bench(fake, TABLE, script=script)
    found = bench.rate("ann", "target", at(9), rationales=8, round_size=2)
    assert len(found["rationales"]) == 4
    assert found["distribution"]["5"] == pytest.approx(0.925)
    eager = bench.rate("ann", "target", at(9), rationales=8, round_size=2, sure=0.85)
    assert len(eager["rationales"]) == 2


def test_a_seed_repeats_itself_and_no_other(fake: Fake) -> None:
    found = []
    for seed in (3, 3, 4):
        # its own words and numbers, not a script's: they hang on the seed
        engine = fake()
        bench = make_bench(lambda engine=engine, **_: engine, TABLE)
        found.append(bench.rate("ann", "target", at(9), rationales=4, seed=seed))
    once, again, other = ((row["rationales"], row["distribution"]) for row in found)
    assert once == again
    assert len(set(once[0])) == 4
    assert not set(once[0]) & set(other[0])
    assert once[1] != other[1]


def test_the_most_rounds_there_can_be_stay_below_the_recursion_limit(fake: Fake) -> None:
    bench = make_bench(fake, TABLE[:1] + TABLE[2:3], script=Script(weights=lambda _: UNSURE))
    found = bench.rate("ann", "target", at(9), rationales=256, round_size=1)
    assert len(found["rationales"]) == 256


@pytest.mark.parametrize(("readout", "value"), [("mean", 4.5), ("median", 5), ("mode", 5)])
def test_the_readout_is_the_callers_choice(fake: Fake, readout: str, value: float) -> None:
    script = Script(weights=lambda _: [0.05, 0.05, 0.05, 0.05, 0.8])
    found = make_bench(fake, TABLE, script=script).rate("ann", "target", at(9), readout=readout)
    assert (found["readout"], found["rating"]) == (readout, found[readout])
    by_hand = {"mean": 4.5, "median": 5, "mode": 5}
    assert found[readout] == pytest.approx(by_hand[readout])


# Knobs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("context", [{"history": 1}, Knobs(history=1)], ids=["dict", "knobs"])
def test_knobs_come_as_context(fake: Fake, context: Any) -> None:
    given: Any = {"user_id": "ann", "item_id": "target", "as_of": at(9)}
    graph = make_bench(fake, TABLE).graph
    assert len(graph.invoke(given, context=context)["user_reviews"]) == 1
    assert len(graph.invoke(given)["user_reviews"]) == 2
    state = asyncio.run(graph.ainvoke(given, context=context))
    assert len(state["user_reviews"]) == 1


@pytest.mark.parametrize(
    "bad",
    [
        {"history": -1},
        {"history": "ten"},
        {"history": 2.5},
        {"history": True},
        {"rationales": 0},
        {"rationales": 257},
        {"rationales": None},
        {"round_size": 0},
        {"sure": 0},
        {"sure": 1.1},
        {"sure": "very"},
        {"readout": "best"},
        {"readout": ["mean"]},
        {"seed": "lucky"},
        {"seed": 1.5},
        {"temperature": 0},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_p": 0},
        {"top_p": None},
        {"ask": 1},
        {"ask_below": -0.1},
        {"ask_below": 1.5},
        {"ask_below": "half"},
        {"influence": "some"},
        {"influence": True},
        {"record": "yes"},
    ],
    ids=str,
)
def test_a_bad_knob_is_named(fake: Fake, bad: Any) -> None:
    [name] = bad
    graph = make_bench(fake, TABLE).graph
    with pytest.raises(SettingError, match=f"bad setting {name}="):
        graph.invoke({"user_id": "ann", "item_id": "target"}, context=bad)


# Threads and checkpoints -----------------------------------------------------------------------


def thread(name: str = "1") -> Any:
    return {"configurable": {"thread_id": name}}


def test_a_thread_used_again_inherits_nothing(fake: Fake) -> None:
    bench = make_bench(fake, TABLE, checkpointer=InMemorySaver())
    rows = [review("zoe", "poles", 1, 2).to_dict()]
    first: Any = {
        "user_id": "zoe",
        "item_id": "target",
        "as_of": at(2),
        "item": {"title": "Passed"},
        "user_history": rows,
        "item_history": [{**rows[0], "user_id": "yan", "item_id": "target"}] * 2,
    }
    second: Any = {"user_id": "ann", "item_id": "other"}
    context: Any = {"rationales": 2}
    used = bench.graph.invoke(first, thread(), context=context)
    assert [len(used[name]) for name in ("rationales", "distributions", "spans")] == [2, 2, 4]
    again = bench.graph.invoke(second, thread(), context=context)
    fresh = bench.graph.invoke(second, thread("2"), context=context)
    for state in (again, fresh):
        assert state["case"].pop("as_of") == state["recommendation"]["as_of"] > at(9)
    assert len(again["rationales"]) == 2
    assert {row["user_id"] for row in again["recommendation"]["user_aspects"]} == {"ann"}
    for name in ("case", "summaries", "rationales", "distributions", "truncated"):
        assert again[name] == fresh[name]
    assert len(again["spans"]) == len(fresh["spans"])


def test_a_failed_run_leaves_nothing_to_the_next(fake: Fake) -> None:
    bench = make_bench(fake, TABLE, checkpointer=InMemorySaver())
    bad: Any = {"rating": 99, "timestamp": 5, "item_id": "poles"}
    pair: Any = {"user_id": "ann", "item_id": "target", "as_of": at(9)}
    with pytest.raises(DataError, match="99 is off the scale"):
        bench.graph.invoke({**pair, "user_history": [bad], "item": {"title": "Bad"}}, thread())
    state = bench.graph.invoke({"user_id": "ann", "item_id": "target"}, thread())
    assert [row["item_id"] for row in state["recommendation"]["user_aspects"]] == ["folk", "rock"]
    assert state["recommendation"]["title"] == "Target"
    assert state["recommendation"]["as_of"] > at(9)


def test_a_stopped_run_goes_on_where_it_stopped(fake: Fake) -> None:
    broken = [True]

    def before(request: Request) -> None:
        if isinstance(request, RateRequest) and broken.pop():
            raise RuntimeError("out of memory")

    script = Script(before=before)
    bench = make_bench(fake, TABLE, script=script, checkpointer=InMemorySaver())
    pair: Any = {"user_id": "ann", "item_id": "target", "as_of": at(9)}
    with pytest.raises(EngineFailure, match="out of memory"):
        bench.graph.invoke(pair, thread())
    broken.append(False)
    state = bench.graph.invoke(None, thread())
    assert state["recommendation"]["rationale"] == "Reason 0."
    assert len(script.rationales) == 1


def test_the_state_is_plain_json(fake: Fake) -> None:
    bench = make_bench(fake, TABLE, checkpointer=InMemorySaver())
    pair: Any = {"user_id": "ann", "item_id": "target", "as_of": "2020-10-01"}
    bench.graph.invoke({**pair, "item": {"title": "A"}}, thread(), context=Knobs(rationales=2))
    for snapshot in bench.graph.get_state_history(thread()):
        assert json.loads(json.dumps(snapshot.values)) == snapshot.values
    json.dumps(bench.graph.get_input_jsonschema())


def test_a_sqlite_checkpoint_is_read_back(fake: Fake, tmp_path: Path) -> None:
    pair: Any = {"user_id": "ann", "item_id": "target", "as_of": at(9)}
    with SqliteSaver.from_conn_string(str(tmp_path / "runs.sqlite")) as saver:
        state = make_bench(fake, TABLE, checkpointer=saver).graph.invoke(pair, thread())
    with SqliteSaver.from_conn_string(str(tmp_path / "runs.sqlite")) as saver:
        graph = make_bench(fake, TABLE, checkpointer=saver).graph
        assert graph.get_state(thread()).values == state
        assert len(list(graph.get_state_history(thread()))) == 6


STRICT = """
    import sys
    from langgraph.checkpoint.memory import InMemorySaver
    from langgraph.checkpoint.sqlite import SqliteSaver
    from langgraph.checkpoint.serde import _msgpack
    from langgraph.store.memory import InMemoryStore
    from r4r_graph import Experts, Knobs, Review, TableReviewSource, build_graph, fake_engine

    assert _msgpack.STRICT_MSGPACK_ENABLED
    table = [Review("ann", "folk", 5, 1e9, "Folk", "warm"), Review("ben", "x", 2, 1e9, "X", "cold")]
    source = TableReviewSource.from_reviews(table)
    thread = {"configurable": {"thread_id": "1"}}
    with SqliteSaver.from_conn_string(sys.argv[1]) as saver, fake_engine() as engine:
        for checkpointer in (saver, InMemorySaver()):
            graph = build_graph(Experts(engine, InMemoryStore()), source, checkpointer=checkpointer)
            pair = {"user_id": "ann", "item_id": "x"}
            for _ in range(2):
                state = graph.invoke(pair, thread, context=Knobs(rationales=3))
            assert graph.get_state(thread).values == state
            past = list(graph.get_state_history(thread))
            [fork] = [s for s in past if s.next == ("predictor",)][-1:]
            again = graph.invoke(None, fork.config, context=Knobs(rationales=3))
            assert again["recommendation"]["rating"] == state["recommendation"]["rating"]
            print(len(past))
"""


def test_strict_checkpoints_hold_no_foreign_types(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(STRICT), tmp_path / "runs.sqlite"],
        env={**os.environ, "LANGGRAPH_STRICT_MSGPACK": "true"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == ["12", "12"]


# Inside another graph --------------------------------------------------------------------------


class Trip(TypedDict, total=False):
    """A parent's own state; it shares `user_id`, `item_id`, `as_of` and `recommendation`."""

    user_id: str
    item_id: str
    as_of: Any
    recommendation: dict[str, Any]
    log: Annotated[list[str], operator.add]


def parent(bench: Bench, **settings: Any) -> Any:
    def ask(state: Trip) -> Any:
        return {"log": [f"asked of {state['item_id']}"]}

    def tell(state: Trip) -> Any:
        return {"log": [f"rated {state['recommendation']['rating']:.1f}"]}

    builder = StateGraph(Trip)
    builder.add_node("ask", ask)
    builder.add_node("rating", bench.graph)
    builder.add_node("tell", tell)
    builder.add_edge(START, "ask")
    builder.add_edge("ask", "rating")
    builder.add_edge("rating", "tell")
    return builder.compile(**settings)


def test_it_is_a_node_of_a_parent_graph(fake: Fake) -> None:
    bench = make_bench(fake, TABLE, script=Script(weights=lambda _: [0, 0, 0, 1, 1]))
    graph = parent(bench, checkpointer=InMemorySaver())
    for item, day in (("target", 9), ("other", 2.5)):
        pair: Any = {"user_id": "ann", "item_id": item, "as_of": at(day), "log": []}
        state = graph.invoke(pair, thread())
        assert state["recommendation"]["item_id"] == item
        assert state["recommendation"]["as_of"] == state["as_of"] == at(day)
        assert len(state["recommendation"]["item_aspects"]) == 1
    assert state["log"] == ["asked of target", "rated 4.5", "asked of other", "rated 4.5"]
    assert set(state) == {"user_id", "item_id", "as_of", "recommendation", "log"}
    pair = {"user_id": "ann", "item_id": "target", "as_of": at(9)}
    assert asyncio.run(parent(bench).ainvoke(pair))["log"] == ["asked of target", "rated 4.5"]


def test_a_parents_context_reaches_it(fake: Fake) -> None:
    bench = make_bench(fake, TABLE, script=Script(weights=lambda _: UNSURE))
    builder = StateGraph(Trip, Knobs)
    builder.add_node("rating", bench.graph)
    builder.add_edge(START, "rating")
    pair: Any = {"user_id": "ann", "item_id": "target"}
    graph: Any = builder.compile()
    state = graph.invoke(pair, context=Knobs(rationales=30, round_size=1, readout="mode"))
    assert state["recommendation"]["readout"] == "mode"
    assert len(state["recommendation"]["rationales"]) == 30
    assert parent(bench).invoke(pair)["recommendation"]["readout"] == "mean"


@pytest.mark.parametrize("world", ["sync", "async"])
def test_a_parent_sees_tokens_and_progress(fake: Fake, world: str) -> None:
    bench = make_bench(fake, TABLE)
    pair: Any = {"user_id": "ann", "item_id": "target", "as_of": at(9)}
    options: Any = {"stream_mode": ["messages", "custom"], "subgraphs": True, "version": "v2"}
    if world == "sync":
        parts = list(parent(bench).stream(pair, **options))
    else:
        parts = asyncio.run(collected(parent(bench).astream(pair, **options)))
    assert all(part["ns"][0].startswith("rating:") for part in parts)
    told = [part["data"] for part in parts if part["type"] == "custom"]
    assert sorted(event["item_id"] for event in told) == ["folk", "rock", "target"]
    assert {(event["event"], event["of"]) for event in told} == {("summary", 3)}
    chunks = [part["data"] for part in parts if part["type"] == "messages"]
    assert "".join(str(chunk.text) for chunk, _ in chunks) == "Reason 0."
    assert len(chunks) > 2
    assert {about["langgraph_node"] for _, about in chunks} == {"reasoner"}


def test_runs_of_one_graph_do_not_mix(fake: Fake) -> None:
    people = [f"p{n}" for n in range(8)]
    table = [review(who, "folk", 1) for who in people] + [review("ben", "target", 1)]
    bench = make_bench(fake, table)

    async def all_of_them() -> list[Any]:
        given: list[Any] = [{"user_id": who, "item_id": "target", "as_of": at(9)} for who in people]
        return await asyncio.gather(*map(bench.graph.ainvoke, given))

    for who, state in zip(people, asyncio.run(all_of_them()), strict=True):
        [known] = state["recommendation"]["user_aspects"]
        assert (known["user_id"], known["positive"]) == (who, [mark(who, "folk")])
    asked = [prompt(request) for request in bench.script.ratings]
    assert all(sum(mark(who, "folk") in words for who in people) == 1 for words in asked)
