"""The ranking graph: its fan-out, what it tells the engine, checkpoints, cancelling, drawing."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.checkpoint.sqlite import SqliteSaver

from r4r_graph.debug import draw
from r4r_graph.engine.base import GenerateRequest
from r4r_graph.engine.batching import BatchingEngine
from r4r_graph.errors import EngineBusyError, EngineFailure, InputError, SettingError
from r4r_graph.graph import Knobs, build_graph, build_ranking_graph
from r4r_graph.graph.rank import call, stream
from r4r_graph.ranking import Ranking
from r4r_graph.reviews import TableReviewSource
from r4r_graph.runs import thread
from tests.scripted import Bench, Request, Script, at, make_bench, prompt, review

Fake = Callable[..., BatchingEngine]

NAMES = [f"item{n}" for n in range(6)]
TABLE = [review("ann", "folk", 1, 5), *(review("ben", name, 1) for name in NAMES)]
SOURCE = TableReviewSource.from_reviews(TABLE)


def given(*items: str, **more: Any) -> Any:
    return {"user_id": "ann", "items": list(items or NAMES), "as_of": at(9), **more}


def bench(fake: Fake, **settings: Any) -> tuple[Bench, Any]:
    keep_going = settings.pop("keep_going", True)
    saver = settings.pop("checkpointer", None)
    source = settings.pop("source", SOURCE)
    made = make_bench(fake, source, **settings)
    graph = build_ranking_graph(made.experts, source, checkpointer=saver, keep_going=keep_going)
    return made, graph


def about(name: str) -> Callable[[Request], bool]:
    """Whether the reasoner's or predictor's request is about this item."""
    return lambda request: (
        getattr(request, "format", "text") == "text" and name.title() in prompt(request)
    )


# Running ---------------------------------------------------------------------------------------


def test_state_is_plain_json(fake: Fake) -> None:
    _, graph = bench(fake)
    state = graph.invoke(given("item0", "item1", "item0", "nowhere", top_k=1))
    assert json.loads(json.dumps(state)) == state
    assert set(state["outcomes"]) == {"item0", "item1", "nowhere"}
    assert len(state["ranking"]["recommendations"]) == 1
    assert state["ranking"]["rated"] == 2
    assert [each["item_id"] for each in state["ranking"]["failures"]] == ["nowhere"]
    later = asyncio.run(graph.ainvoke(given("item0", "item1", "item0", "nowhere", top_k=1)))
    assert later["ranking"]["summary"] == state["ranking"]["summary"]


def test_each_candidate_is_rated_once_and_a_review_of_the_user_is_read_once(fake: Fake) -> None:
    made, graph = bench(fake)
    graph.invoke(given(*NAMES, *NAMES))
    assert len(made.script.rationales) == len(made.script.ratings) == len(NAMES)
    assert len(made.script.summaries) == len(TABLE)


def test_knobs_reach_every_rating(fake: Fake) -> None:
    made, graph = bench(fake)
    state = graph.invoke(given("item0", "item1"), context=Knobs(rationales=2, readout="mode"))
    for each in state["ranking"]["recommendations"]:
        assert (len(each["rationales"]), each["readout"]) == (2, "mode")
    assert len(made.script.rationales) == 4


def test_histories_of_the_caller_need_no_source(fake: Fake) -> None:
    _, graph = bench(fake, source=None)
    mine = [review("ann", "folk", 1).to_dict(), review("ann", "item0", 2).to_dict()]
    state = graph.invoke(given("item0", "item1", user_history=mine))
    read = {
        each["item_id"]: [r["item_id"] for r in each["user_aspects"]]
        for each in state["ranking"]["recommendations"]
    }
    assert read == {"item0": ["folk"], "item1": ["folk", "item0"]}
    with pytest.raises(InputError, match="nothing to read"):
        graph.invoke(given("item0"))


@pytest.mark.parametrize("user", ["", None])
def test_a_user_is_needed(fake: Fake, user: Any) -> None:
    _, graph = bench(fake)
    with pytest.raises(InputError, match="bad user_id"):
        graph.invoke({"user_id": user, "items": ["item0"]})


def test_a_bad_top_k_is_refused_before_anything_runs(fake: Fake) -> None:
    made, graph = bench(fake)
    with pytest.raises(SettingError, match="bad top_k -1"):
        graph.invoke(given(top_k=-1))
    assert made.script.asked == []


# The engine ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "siblings"), [({}, 6), ({"max_concurrency": 4}, 4), ({"max_concurrency": 1}, 1)]
)
def test_the_engine_is_told_how_many_requests_come(fake: Fake, config: Any, siblings: int) -> None:
    made, graph = bench(fake)
    graph.invoke(given(), config=config)
    asked: list[Request] = [*made.script.rationales, *made.script.ratings]
    assert {request.siblings for request in asked} == {siblings}
    made.script.asked.clear()
    graph.invoke(given(), config=config, context=Knobs(rationales=2))
    asked = [*made.script.rationales, *made.script.ratings]
    assert {request.siblings for request in asked} == {2 * siblings}


def test_a_rating_alone_has_no_siblings(fake: Fake) -> None:
    made, _ = bench(fake)
    state = made.run("ann", "item0", at(9))
    assert "siblings" not in state["case"]
    assert {request.siblings for request in made.script.rationales} == {1}


def test_requests_of_all_candidates_share_batches(fake: Fake) -> None:
    """While the first is computed, the others come: without a fan-out each would be a batch."""
    made, graph = bench(fake, delay=0.3)
    graph.invoke(given())  # summaries are kept from here on
    backend: Any = made.engine._backend
    backend.batches.clear()
    asyncio.run(graph.ainvoke(given()))
    assert sum(backend.batches) == 2 * len(NAMES)
    assert len(backend.batches) < len(NAMES)


@pytest.mark.parametrize("limit", [1, 2])
def test_concurrency_is_bounded(fake: Fake, limit: int) -> None:
    running: set[str] = set()
    most = 0
    lock = threading.Lock()

    class Watched:
        """A source that sees which candidates are between their recall and their rating."""

        def __getattr__(self, name: str) -> Any:
            return getattr(SOURCE, name)

        def item_history(self, item_id: str, *args: Any, **more: Any) -> Any:
            nonlocal most
            with lock:
                running.add(item_id)
                most = max(most, len(running))
            return SOURCE.item_history(item_id, *args, **more)

    def weights(request: Any) -> list[float]:
        with lock:
            running.discard(next(name for name in NAMES if about(name)(request)))
        return [1, 1, 1, 1, 1]

    _, graph = bench(fake, source=Watched(), script=Script(weights=weights), delay=0.01)
    graph.invoke(given(), config={"max_concurrency": limit})
    assert most == limit
    most = 0
    asyncio.run(graph.ainvoke(given(), config={"max_concurrency": limit}))
    assert most == limit


def test_cancelling_frees_the_engine(fake: Fake) -> None:
    started = threading.Event()

    def wait(request: Request) -> None:
        if isinstance(request, GenerateRequest) and request.format == "text":
            started.set()
            time.sleep(0.05)

    made, graph = bench(fake, script=Script(before=wait))

    async def run() -> None:
        task = asyncio.create_task(graph.ainvoke(given()))
        await asyncio.to_thread(started.wait, 10)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())
    deadline = time.monotonic() + 5
    while made.engine._queue or made.engine._running:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert made.script.ratings == []


# Failures and checkpoints ----------------------------------------------------------------------


def test_an_engine_that_fails_for_one_leaves_the_others(fake: Fake) -> None:
    def fail(request: Request) -> None:
        if about("item2")(request):
            raise EngineFailure("broken")

    _, graph = bench(fake, script=Script(before=fail))
    for run in (graph.invoke, lambda g: asyncio.run(graph.ainvoke(g))):
        ranking = run(given())["ranking"]
        assert ranking["rated"] == 5
        assert ranking["failures"] == [
            {"item_id": "item2", "error": "EngineFailure", "reason": "broken"}
        ]


@pytest.mark.parametrize("error", [EngineFailure("away"), EngineBusyError("full")])
def test_a_kept_run_goes_on_when_the_engine_is_well_again(
    fake: Fake, tmp_path: Path, error: Exception
) -> None:
    ill = threading.Event()
    ill.set()

    def fail(request: Request) -> None:
        if ill.is_set() and about("item5")(request):
            raise error

    with SqliteSaver.from_conn_string(str(tmp_path / "runs.sqlite")) as saver:
        made, graph = bench(fake, script=Script(before=fail), checkpointer=saver, keep_going=False)
        config: Any = {**thread("mine"), "max_concurrency": 1}
        with pytest.raises(type(error)):
            graph.invoke(given(), config, durability="sync")
        assert len(made.script.ratings) == 5
        made.script.asked.clear()
        ill.clear()
        # In another process it would be another graph.
        again = build_ranking_graph(made.experts, SOURCE, checkpointer=saver)
        ranking = again.invoke(None, config, durability="sync")["ranking"]
        assert ranking["rated"] == 6
        assert len(made.script.ratings) == len(made.script.rationales) == 1
        assert all(map(about("item5"), made.script.ratings))


class Flaky:
    """A source that fails for one item, until it is mended, once the others are done."""

    def __init__(self, others_done: Callable[[], bool]) -> None:
        self.others_done = others_done
        self.mended = False

    def __getattr__(self, name: str) -> Any:
        return getattr(SOURCE, name)

    def item_history(self, item_id: str, *args: Any, **more: Any) -> Any:
        if item_id == "item3" and not self.mended:
            until = time.monotonic() + 30
            while not self.others_done():
                assert time.monotonic() < until
                time.sleep(0.02)
            time.sleep(0.5)  # the last one is rated, and is being kept
            raise OSError("the database is away")
        return SOURCE.item_history(item_id, *args, **more)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_crash_repeats_no_finished_candidate(fake: Fake, asynchronous: bool) -> None:
    """What is no error of a candidate ends the run, whatever `keep_going` says."""
    source = Flaky(lambda: len(made.script.ratings) == len(NAMES) - 1)
    made, graph = bench(fake, source=source, checkpointer=InMemorySaver())
    options: Any = {"config": thread("mine"), "durability": "sync"}

    def run(start: Any) -> None:
        if asynchronous:
            asyncio.run(graph.ainvoke(start, **options))
        else:
            graph.invoke(start, **options)

    with pytest.raises(OSError, match="away"):
        run(given())
    assert len(made.script.ratings) == len(NAMES) - 1
    source.mended = True
    run(None)
    assert graph.get_state(thread("mine")).values["ranking"]["rated"] == len(NAMES)
    assert len(made.script.ratings) == len(made.script.rationales) == len(NAMES)


def test_a_thread_that_is_used_again_begins_anew(fake: Fake) -> None:
    _, graph = bench(fake, checkpointer=InMemorySaver())
    graph.invoke(given(top_k=1), thread("mine"))
    state = graph.invoke(given("item0", "item1"), thread("mine"))
    assert set(state["outcomes"]) == {"item0", "item1"}
    assert len(state["ranking"]["recommendations"]) == 2


# Inside ----------------------------------------------------------------------------------------


def test_the_drawing_shows_the_rating_graph_inside(fake: Fake) -> None:
    made, graph = bench(fake)
    flat = json.loads(draw(graph, "json"))
    assert {node["id"] for node in flat["nodes"]} == {
        "__start__",
        "candidates",
        "rating",
        "ranking",
        "__end__",
    }
    inner = json.loads(draw(build_graph(made.experts), "json"))
    whole = json.loads(draw(graph, "json", subgraphs=True))
    drawn = {(edge["source"], edge["target"]) for edge in whole["edges"]}
    for edge in inner["edges"]:
        if "__start__" not in edge.values():
            assert (f"rating:{edge['source']}", f"rating:{edge['target']}") in drawn


def test_streams_pass_through_from_within(fake: Fake) -> None:
    _, graph = bench(fake)
    parts = graph.stream(
        given("item0", "item1"), stream_mode=["messages", "custom"], subgraphs=True, version="v2"
    )
    seen = list(parts)
    assert any(part["type"] == "messages" and part["ns"] for part in seen)
    told = [part["data"]["item_id"] for part in seen if part["type"] == "custom"]
    assert set(told) == {"folk", "item0", "item1"}  # reviews that were summarized


@pytest.mark.parametrize("limit", [1, 2])
def test_progress_is_told_as_it_happens_with_any_concurrency(fake: Fake, limit: int) -> None:
    made, graph = bench(fake)
    rated = []
    called_with = call("ann", NAMES, None, {"config": {"max_concurrency": limit}})
    for event in stream(graph, called_with):
        rated.append(len(made.script.ratings))
        assert isinstance(event, Ranking) == (len(rated) == 7)
    assert rated[0] <= limit + 1
    assert rated[-1] == 6
