"""Each review is summarized once: across runs, graphs, threads and coroutines."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from langgraph.store.memory import InMemoryStore

from r4r_graph.caches import open_summary_store
from r4r_graph.engine.base import GenerateRequest
from r4r_graph.engine.batching import BatchingEngine
from r4r_graph.errors import EngineBusyError, EngineError, EngineFailure
from r4r_graph.summaries import SummaryCache
from tests.scripted import Bench, Request, Script, at, make_bench, mark, prompt, review

Fake = Callable[..., BatchingEngine]

TABLE = [
    review("ann", "folk", 1),
    review("ann", "rock", 2),
    review("ben", "target", 1),
    review("cas", "target", 2),
    review("cas", "other", 3),
]
PAIR: Any = {"user_id": "ann", "item_id": "target", "as_of": at(9)}


def spent(found: dict[str, Any]) -> tuple[int, int]:
    """Calls and cache hits of the summarizer."""
    usage = found["usage"]["summarizer"]
    return usage["calls"], usage["cache_hits"]


def test_the_second_run_summarizes_nothing(fake: Fake) -> None:
    bench = make_bench(fake, TABLE)
    first = bench.rate("ann", "target", at(9))
    assert spent(first) == (4, 0)
    usage = first["usage"]["summarizer"]
    lengths = [bench.engine.meter.count(prompt(request)) for request in bench.script.summaries]
    assert usage["prompt_tokens"] > sum(lengths)
    assert usage["completion_tokens"] > 0
    second = bench.rate("ann", "target", at(9))
    assert spent(second) == (0, 4)
    assert second["usage"]["summarizer"]["prompt_tokens"] == 0
    assert second["usage"]["summarizer"]["completion_tokens"] == 0
    assert len(bench.script.summaries) == 4
    assert first["user_aspects"] == second["user_aspects"]
    assert first["user_aspects"][0]["positive"] == [mark("ann", "folk")]


def test_another_pair_shares_what_it_can(fake: Fake) -> None:
    bench = make_bench(fake, TABLE)
    bench.rate("ann", "target", at(9))
    assert spent(bench.rate("ann", "other", at(9))) == (1, 2)
    assert spent(bench.rate("cas", "target", at(9))) == (0, 2)  # other's was just summarized


@pytest.mark.parametrize("kept", ["memory", "disk"])
def test_graphs_that_share_a_store_share_summaries(fake: Fake, kept: str) -> None:
    store = InMemoryStore() if kept == "memory" else open_summary_store()
    try:
        first = make_bench(fake, TABLE, store=store)
        second = make_bench(fake, TABLE, store=store)
        assert spent(first.rate("ann", "target", at(9))) == (4, 0)
        found = asyncio.run(second.graph.ainvoke(PAIR))["recommendation"]
        assert spent(found) == (0, 4)
        assert second.script.summaries == []
    finally:
        if kept == "disk":
            store.conn.close()  # type: ignore[union-attr]


def test_without_a_store_nothing_is_kept(fake: Fake) -> None:
    bench = make_bench(fake, TABLE)
    bench.experts.summarizer._cache = SummaryCache(None)
    assert spent(bench.rate("ann", "target", at(9))) == (4, 0)
    assert spent(bench.rate("ann", "target", at(9))) == (4, 0)


def test_a_changed_review_is_a_new_one(fake: Fake) -> None:
    store = InMemoryStore()
    make_bench(fake, TABLE, store=store).rate("ann", "target", at(9))
    changed = [review("ann", "folk", 1, text=f"Now {mark('ann', 'folk')} less."), *TABLE[1:]]
    assert spent(make_bench(fake, changed, store=store).rate("ann", "target", at(9))) == (1, 3)
    other = make_bench(fake, TABLE, store=store, adapters=["summarizer"])
    assert spent(other.rate("ann", "target", at(9))) == (4, 0)


def test_a_review_without_words_is_not_summarized(fake: Fake) -> None:
    table = [review("ann", "folk", 1, 5, text=" \n "), review("ben", "target", 1, text="Warm.")]
    bench = make_bench(fake, table)
    found = bench.rate("ann", "target", at(9))
    assert spent(found) == (1, 0)
    [silent] = found["user_aspects"]
    assert (silent["rating"], silent["positive"], silent["values"]) == (5, [], [])
    assert '1. "Folk"; said nothing' in prompt(bench.script.ratings[0])
    assert "Ratings by this person: 1: 5; average" in prompt(bench.script.ratings[0])


def test_doubled_reviews_are_summarized_once(fake: Fake) -> None:
    twice = [TABLE[0], TABLE[0]]  # one and the same
    alike = [review("ben", "target", 1, text="Warm."), review("cas", "target", 2, text="Warm.")]
    bench = make_bench(fake, [*twice, *alike])
    found = bench.rate("ann", "target", at(9))
    assert len(bench.script.summaries) == 2
    assert [len(found[side]) for side in ("user_aspects", "item_aspects")] == [2, 2]
    assert [row["positive"] for row in found["user_aspects"]] == [[mark("ann", "folk")]] * 2
    calls, hits = spent(found)
    assert (calls, hits) == (2, 1)  # one a distinct review, of which two ask the same


# Failures --------------------------------------------------------------------------------------


def failing(error: Exception | str, times: int = 1) -> Script:
    """Fails the summary of ann's review of `rock`."""
    left = [times]

    def before(request: Request) -> None:
        if mark("ann", "rock") in prompt(request) and left[0]:
            left[0] -= 1
            if isinstance(error, Exception):
                raise error

    script = Script(before=before)
    if isinstance(error, str):
        write = script.write

        def spoilt(request: GenerateRequest) -> str:
            bad = request.format == "aspects" and left[0] and mark("ann", "rock") in prompt(request)
            answer = write(request)
            return error if bad else answer

        script.write = spoilt  # type: ignore[method-assign]
    return script


@pytest.mark.parametrize("world", ["sync", "async"])
@pytest.mark.parametrize(
    "error", [RuntimeError("no memory"), "not the format at all"], ids=["raises", "malformed"]
)
def test_a_failed_summary_is_a_typed_error_and_the_next_run_works(
    fake: Fake, error: Exception | str, world: str
) -> None:
    bench = make_bench(fake, TABLE, script=failing(error))

    def run() -> dict[str, Any]:
        if world == "sync":
            return bench.rate("ann", "target", at(9))
        found: dict[str, Any] = asyncio.run(bench.graph.ainvoke(PAIR))["recommendation"]
        return found

    with pytest.raises(EngineFailure, match=r"no memory|not an aspect summary"):
        run()
    assert run()["user_aspects"][1]["positive"] == [mark("ann", "rock")]
    asked = Counter(prompt(request) for request in bench.script.summaries)
    assert len(asked) == 4
    # What was under way when the run failed may have gone with it; the rest is there still.
    assert sum(asked.values()) == 5 if world == "sync" else 5 <= sum(asked.values()) <= 8


def test_a_busy_engine_is_asked_again(fake: Fake) -> None:
    bench = make_bench(fake, TABLE, script=failing(EngineBusyError("full")))
    assert spent(bench.rate("ann", "target", at(9))) == (4, 0)


class Broken(InMemoryStore):
    """A store on a full, unreadable disk."""

    def batch(self, ops: Any) -> Any:
        raise OSError("disk full")


def test_a_broken_store_costs_time_not_the_run(
    fake: Fake, caplog: pytest.LogCaptureFixture
) -> None:
    bench = make_bench(fake, TABLE, store=Broken())
    with caplog.at_level(logging.WARNING):
        assert spent(bench.rate("ann", "target", at(9))) == (4, 0)
    assert "disk full" in caplog.text


# Single flight ---------------------------------------------------------------------------------


def once_each(bench: Bench, runs: list[dict[str, Any]]) -> None:
    """Every review was summarized once, and the runs' bills say so."""
    asked = Counter(prompt(request) for request in bench.script.summaries)
    assert len(asked) == 4
    assert set(asked.values()) == {1}
    assert sum(spent(found)[0] for found in runs) == 4
    assert sum(spent(found)[1] for found in runs) == 4 * len(runs) - 4
    assert all(found["user_aspects"] == runs[0]["user_aspects"] for found in runs)


@pytest.mark.parametrize("delay", [0.0, 0.02])
def test_threads_and_coroutines_share_one_summary(fake: Fake, delay: float) -> None:
    bench = make_bench(fake, TABLE, delay=delay)
    start = threading.Barrier(9)

    def in_thread(_: int) -> dict[str, Any]:
        start.wait(10)
        return bench.rate("ann", "target", at(9))

    async def in_loop() -> list[dict[str, Any]]:
        await asyncio.to_thread(start.wait, 10)
        states = await asyncio.gather(*(bench.graph.ainvoke(PAIR) for _ in range(20)))
        return [state["recommendation"] for state in states]

    with ThreadPoolExecutor(8) as pool:
        threads = [pool.submit(in_thread, n) for n in range(8)]
        runs = asyncio.run(in_loop())
        runs += [thread.result(30) for thread in threads]
    once_each(bench, runs)


class SlowToRead(InMemoryStore):
    """A store whose first reader finds nothing, and learns it late: others may write meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.first = threading.Event()
        self.written = threading.Event()

    def get(self, *args: Any, **kwargs: Any) -> Any:
        found = super().get(*args, **kwargs)
        if not self.first.is_set():
            self.first.set()
            if self.written.wait(0.3):
                time.sleep(0.05)  # until the other has landed
        return found

    def put(self, *args: Any, **kwargs: Any) -> None:
        super().put(*args, **kwargs)
        self.written.set()


def test_a_slow_reader_does_not_compute_again() -> None:
    store, made = SlowToRead(), []
    cache = SummaryCache(store)

    def compute() -> dict[str, Any]:
        made.append(1)
        return {"positive": ["warm"]}

    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(cache.get_or_compute, "key", compute)
        assert store.first.wait(10)
        found = [cache.get_or_compute("key", compute), slow.result(10)]
    assert sorted(cached for _, cached in found) == [False, True]
    assert [value for value, _ in found] == [{"positive": ["warm"]}] * 2
    assert made == [1]


def test_a_slow_coroutine_does_not_compute_again() -> None:
    store, made = SlowToRead(), []
    cache = SummaryCache(store)

    async def compute() -> dict[str, Any]:
        made.append(1)
        return {"positive": ["warm"]}

    async def both() -> None:
        slow = asyncio.create_task(cache.aget_or_compute("key", compute))
        assert await asyncio.to_thread(store.first.wait, 10)
        found = [await cache.aget_or_compute("key", compute), await slow]
        assert sorted(cached for _, cached in found) == [False, True]
        assert [value for value, _ in found] == [{"positive": ["warm"]}] * 2

    asyncio.run(both())
    assert made == [1]


def test_whoever_waited_for_a_failure_tries_again(fake: Fake) -> None:
    first, go = threading.Event(), threading.Event()

    def before(request: Request) -> None:
        if isinstance(request, GenerateRequest) and mark("ann", "rock") in prompt(request):
            failing = not first.is_set()
            first.set()
            assert go.wait(10)
            if failing:
                raise RuntimeError("no memory")

    bench = make_bench(fake, TABLE, script=Script(before=before))
    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(bench.rate, "ann", "target", at(9))
        assert first.wait(10)
        other = pool.submit(bench.rate, "ann", "target", at(9))
        time.sleep(0.2)  # until it waits for the first one's summaries
        go.set()
        errors = [run.exception(30) for run in (one, other)]
    # The one whose request failed hears of it, the other does not.
    assert [type(error) for error in errors if error] == [EngineFailure]
    asked = Counter(prompt(request) for request in bench.script.summaries)
    assert sorted(asked.values()) == [1, 1, 1, 2]


def test_cancelling_one_run_does_not_disturb_another(fake: Fake) -> None:
    go = threading.Event()

    def before(request: Request) -> None:
        if isinstance(request, GenerateRequest) and request.format == "aspects":
            assert go.wait(10)

    bench = make_bench(fake, TABLE, script=Script(before=before))

    async def cancel_the_first() -> dict[str, Any]:
        first = asyncio.create_task(bench.graph.ainvoke(PAIR))
        await asyncio.sleep(0.2)
        others = [asyncio.create_task(bench.graph.ainvoke(PAIR)) for _ in range(3)]
        await asyncio.sleep(0.2)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        go.set()
        states = await asyncio.gather(*others)
        found: dict[str, Any] = states[0]["recommendation"]
        assert sum(spent(state["recommendation"])[0] for state in states) == 4
        return found

    found = asyncio.run(asyncio.wait_for(cancel_the_first(), 30))
    assert found["user_aspects"][0]["positive"] == [mark("ann", "folk")]


def test_no_error_escapes_untyped(fake: Fake) -> None:
    def before(request: Request) -> None:
        raise ZeroDivisionError("a script of the embedder's own")

    with pytest.raises(EngineError, match="ZeroDivisionError"):
        make_bench(fake, TABLE, script=Script(before=before)).rate("ann", "target", at(9))
