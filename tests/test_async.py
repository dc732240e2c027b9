"""Coroutines: what cancelling frees, what waiting holds, and in which event loops they run."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, contextmanager
from typing import Any

import pytest
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.store.memory import InMemoryStore

from r4r_graph.engine.base import GenerateRequest, GenerateResult, Message
from r4r_graph.engine.batching import BatchingEngine, Row
from r4r_graph.engine.fake import FakeBackend
from r4r_graph.errors import EngineError
from r4r_graph.events import RationaleToken, read_by_task
from r4r_graph.evidence import TokenBudgets
from r4r_graph.experts import Experts
from r4r_graph.recommender import Recommender
from r4r_graph.reviews import TableReviewSource
from r4r_graph.runs import thread
from r4r_graph.schema import Recommendation
from tests.scripted import at, review

LONG = " ".join(f"word{n}" for n in range(120))
TABLE = [
    review("ann", "folk", 1, 5),
    review("ann", "rock", 2, 1),
    review("zoe", "folk", 1, 2),
    review("ben", "target", 1, 2.5),
]
PATIENCE = 20.0


class Paced(FakeBackend):
    """Writes rationales a token at a time, row after row, and counts the tokens."""

    def __init__(self, pause: float = 0.004, **settings: Any) -> None:
        super().__init__(**settings)
        self.tokens = 0
        self._pause = pause

    def generate(self, rows: Sequence[Row]) -> list[GenerateResult | Exception]:
        for row in rows:
            request = row.prepared.request
            if isinstance(request, GenerateRequest) and request.format == "text":
                row.cancelled = self._paced(row.cancelled)
        return super().generate(rows)

    def _paced(self, cancelled: Callable[[], bool]) -> Callable[[], bool]:
        def asked() -> bool:
            time.sleep(self._pause)
            stopped = cancelled()
            self.tokens += not stopped
            return stopped

        return asked


class Gated(FakeBackend):
    """Starts no batch before `gate` is open."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()

    def _work(self, rows: Sequence[Row]) -> None:
        assert self.gate.wait(PATIENCE)
        super()._work(rows)


def long_text(request: GenerateRequest) -> str:
    from r4r_graph.engine.fake import _invented

    return LONG if request.format == "text" else _invented(request, "any")


def recommender_over(backend: FakeBackend, rows: Any = None) -> Recommender:
    budgets = TokenBudgets(rationale=128)
    source = TableReviewSource.from_reviews(TABLE if rows is None else rows, ())
    return Recommender(Experts(BatchingEngine(backend), budgets=budgets), source)


@pytest.fixture
def backend() -> Paced:
    return Paced(write=long_text)


@pytest.fixture
def rater(backend: Paced) -> Iterator[Recommender]:
    with recommender_over(backend) as made:
        yield made


def plain(found: Recommendation) -> dict[str, Any]:
    """All of a result but what it took."""
    return {name: value for name, value in found.to_dict().items() if name != "usage"}


def idle(rater: Recommender) -> bool:
    engine: Any = rater.experts.engine
    return not engine._queue and not engine._running


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not true():
            await asyncio.sleep(0.001)


# Cancelling ------------------------------------------------------------------------------------


async def cancelled(rater: Recommender, backend: Paced) -> None:
    task = asyncio.create_task(rater.arate("ann", "target", as_of=at(9)))
    await until(lambda: backend.tokens > 5)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def out_of_time(rater: Recommender, backend: Paced) -> None:
    started = time.monotonic()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2):
            await rater.arate("ann", "target", as_of=at(9))
    assert time.monotonic() - started < PATIENCE / 2


async def stream_cancelled(rater: Recommender, backend: Paced) -> None:
    async def read() -> None:
        async for _ in rater.astream("ann", "target", as_of=at(9)):
            pass

    task = asyncio.create_task(read())
    await until(lambda: backend.tokens > 5)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def stream_left(rater: Recommender, backend: Paced) -> None:
    async with aclosing(rater.astream("ann", "target", as_of=at(9))) as events:  # type: ignore[type-var]
        async for event in events:
            if isinstance(event, RationaleToken):
                break


async def one_of_a_group_failed(rater: Recommender, backend: Paced) -> None:
    async def fail() -> None:
        await until(lambda: backend.tokens > 5)
        raise ValueError("the other task")

    async def both() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(rater.arate("ann", "target", as_of=at(9)))
            group.create_task(fail())

    with pytest.raises(ExceptionGroup, match="unhandled errors"):
        await both()


@pytest.mark.parametrize(
    "leave", [cancelled, out_of_time, stream_cancelled, stream_left, one_of_a_group_failed]
)
def test_who_leaves_frees_the_engine(
    leave: Callable[[Recommender, Paced], Awaitable[None]], rater: Recommender, backend: Paced
) -> None:
    async def work() -> None:
        await leave(rater, backend)
        written = backend.tokens
        await until(lambda: idle(rater))
        assert backend.tokens <= written + 1  # at its next token
        assert written < 100
        # ... and another is served at once, as if nothing had been.
        async with asyncio.timeout(PATIENCE):
            found = await rater.arate("zoe", "target", as_of=at(9))
        assert found.rationale == LONG
        assert backend.tokens - written <= 121
        left = asyncio.all_tasks() - {asyncio.current_task()}
        assert not left

    asyncio.run(work())
    assert idle(rater)


def test_a_leaver_in_the_queue_is_never_computed(rater: Recommender, backend: Paced) -> None:
    async def work() -> None:
        first = asyncio.create_task(rater.arate("zoe", "target", as_of=at(9)))
        await until(lambda: backend.tokens > 5)
        second = asyncio.create_task(rater.arate("ann", "target", as_of=at(9)))
        engine: Any = rater.experts.engine
        await until(lambda: bool(engine._queue))
        second.cancel()
        await asyncio.gather(second, return_exceptions=True)
        assert (await first).rationale == LONG
        await until(lambda: idle(rater))

    asyncio.run(work())
    assert backend.tokens <= 121


def test_a_cancelled_run_that_is_kept_goes_on_where_it_stood(backend: Paced) -> None:
    engine = BatchingEngine(backend)
    source = TableReviewSource.from_reviews(TABLE, ())
    experts = Experts(engine, budgets=TokenBudgets(rationale=128))
    with Recommender(experts, source, checkpointer=InMemorySaver()) as rater:

        async def work() -> Recommendation:
            run = rater.arate("ann", "target", as_of=at(9), config=thread("monday"))
            task = asyncio.create_task(run)
            await until(lambda: backend.tokens > 5)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            return await rater.aresume("monday")

        found = asyncio.run(work())
        assert found.rationale == LONG
        assert plain(found) == plain(rater.rate("ann", "target", as_of=at(9)))
        assert found.usage["summarizer"].calls == 3  # each review once, over both


@pytest.fixture
def tiny_rater(tiny_engine: BatchingEngine) -> Recommender:
    """The real engine over the tiny model, which never ends by itself before its budget."""
    budgets = TokenBudgets(rationale=160, summary=40)
    source = TableReviewSource.from_reviews(TABLE, ())
    return Recommender(Experts(tiny_engine, InMemoryStore(), budgets=budgets), source)


def test_a_real_row_ends_alone_and_its_neighbours_go_on(
    tiny_rater: Recommender, monkeypatch: pytest.MonkeyPatch
) -> None:
    from r4r_graph.engine.rows import RowStopper

    steps: list[list[bool]] = []
    plain_call = RowStopper.__call__

    def counted(self: RowStopper, *arguments: Any, **settings: Any) -> Any:
        found = plain_call(self, *arguments, **settings)
        steps.append(list(self.done))
        return found

    expected = plain(tiny_rater.rate("zoe", "target", as_of=at(9)))
    assert len(expected["rationale"]) > 40
    tiny_rater.rate("ann", "target", as_of=at(9))  # from now on all summaries are there
    monkeypatch.setattr(RowStopper, "__call__", counted)
    engine: Any = tiny_rater.experts.engine

    async def work() -> Recommendation:
        # While the engine is busy both runs come to wait for it, and then share a batch.
        busy = engine.submit(GenerateRequest((Message("user", "Write."),), max_tokens=400))
        leaver = asyncio.create_task(tiny_rater.arate("ann", "target", as_of=at(9)))
        stayer = asyncio.create_task(tiny_rater.arate("zoe", "target", as_of=at(9)))
        await until(lambda: len(engine._queue) == 2)
        busy.cancel()
        await until(lambda: bool(steps) and steps[-1] == [False, False])
        leaver.cancel()
        at_leaving = len(steps)
        with pytest.raises(asyncio.CancelledError):
            await leaver
        found = await stayer
        alone = [done.count(True) for done in steps[at_leaving : at_leaving + 30]]
        assert 1 in alone  # one row ended soon, long before its budget, and the other had not
        return found

    assert plain(asyncio.run(work())) == expected
    assert idle(tiny_rater)


def test_a_real_engine_stops_at_the_next_token(
    tiny_rater: Recommender, monkeypatch: pytest.MonkeyPatch
) -> None:
    from r4r_graph.engine.rows import RowStopper

    steps = 0
    plain_call = RowStopper.__call__

    def counted(self: RowStopper, *arguments: Any, **settings: Any) -> Any:
        nonlocal steps
        steps += 1
        return plain_call(self, *arguments, **settings)

    monkeypatch.setattr(RowStopper, "__call__", counted)

    async def work() -> int:
        async with aclosing(tiny_rater.astream("ann", "target", as_of=at(9))) as events:  # type: ignore[type-var]
            async for event in events:
                if isinstance(event, RationaleToken):
                    break
        left = steps
        await until(lambda: idle(tiny_rater))
        return steps - left

    assert asyncio.run(work()) <= 8  # what was computed while the first token travelled


# A hundred at once -----------------------------------------------------------------------------


def test_a_hundred_hold_no_thread_each_and_share_batches() -> None:
    people = [f"p{n}" for n in range(100)]
    rows = [review(who, item, day) for who in people for day, item in enumerate(("folk", "rock"))]
    rows.append(review("ben", "target", 1))
    backend = Gated()

    async def everyone(rater: Recommender) -> tuple[int, list[Recommendation]]:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(2))
        before = threading.active_count()
        runs = [asyncio.create_task(rater.arate(who, "target", as_of=at(9))) for who in people]
        engine: Any = rater.experts.engine
        await until(lambda: len(engine._queue) + len(engine._running) == 201)
        # All wait for the engine, and none for a thread: the loop's two are free.
        assert await asyncio.wait_for(asyncio.to_thread(lambda: "free"), PATIENCE) == "free"
        held = threading.active_count() - before
        backend.gate.set()
        return held, await asyncio.gather(*runs)

    with recommender_over(backend, rows) as rater:
        held, found = asyncio.run(everyone(rater))
        assert held <= 3  # the engine's, and the two of the loop
        assert [row.user_id for row in found] == people
        assert max(backend.batches) == 32
        assert len(backend.batches) < 60  # for 401 requests
        assert idle(rater)
    alone = FakeBackend()
    with recommender_over(alone, rows) as rater:
        one_by_one = [plain(rater.rate(who, "target", as_of=at(9))) for who in people]
    assert [plain(row) for row in found] == one_by_one
    assert len(alone.batches) > 200


def test_streams_interleave(rater: Recommender, backend: Paced) -> None:
    """No stream waits for another one's end to begin."""
    order: list[str] = []

    async def read(who: str) -> None:
        async for event in rater.astream(who, "target", as_of=at(9)):
            if not isinstance(event, RationaleToken):
                order.append(who)

    async def both() -> None:
        await asyncio.gather(read("ann"), read("zoe"))

    asyncio.run(both())
    assert set(order[:-2]) == {"ann", "zoe"}
    assert max(backend.batches) > 1


# Event loops -----------------------------------------------------------------------------------


async def rated(rater: Recommender) -> dict[str, Any]:
    return plain(await rater.arate("ann", "target", as_of=at(9)))


def uv_loop() -> Any:
    uvloop = pytest.importorskip("uvloop")
    return uvloop.new_event_loop()


def test_loops_one_after_the_other_and_in_another_thread() -> None:
    with recommender_over(FakeBackend()) as rater:
        expected = plain(rater.rate("ann", "target", as_of=at(9)))
        assert asyncio.run(rated(rater)) == expected
        assert asyncio.run(rated(rater)) == expected
        with ThreadPoolExecutor(4) as threads:
            calls = [threads.submit(lambda: asyncio.run(rated(rater))) for _ in range(8)]
            calls += [threads.submit(lambda: plain(rater.rate("ann", "target", as_of=at(9))))]
            assert all(call.result(PATIENCE) == expected for call in calls)


def test_a_loop_that_ends_early_leaves_the_engine_free(rater: Recommender, backend: Paced) -> None:
    async def forget() -> None:
        task = asyncio.create_task(rater.arate("ann", "target", as_of=at(9)))
        await until(lambda: backend.tokens > 5)
        assert not task.done()  # `asyncio.run` cancels what is left

    asyncio.run(forget())
    assert backend.tokens < 100
    assert asyncio.run(rated(rater))["rationale"] == LONG


@contextmanager
def uv_runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner(loop_factory=uv_loop) as runner:
        yield runner


def test_uvloop_serves_too(rater: Recommender, backend: Paced) -> None:
    async def all_ways() -> dict[str, Any]:
        await cancelled(rater, backend)
        await stream_left(rater, backend)
        events: AsyncIterator[Any] = rater.astream("ann", "target", as_of=at(9))
        *told, last = [event async for event in events]
        assert any(isinstance(event, RationaleToken) for event in told)
        return plain(last)

    with uv_runner() as runner:
        expected = runner.run(all_ways())
        assert runner.run(rated(rater)) == expected
    assert plain(rater.rate("ann", "target", as_of=at(9))) == expected


# The end of a process --------------------------------------------------------------------------

BEGIN = """
import asyncio, time
from r4r_graph import Recommender, Review, fake_engine

rows = [Review("ann", "folk", 5, 1.0, "", "Warm."), Review("ben", "target", 2, 1.0, "", "Thin.")]
recommender = Recommender.load(rows, engine=fake_engine(delay=0.2))
call = lambda: recommender.arate("ann", "target")
"""
ENDS = {
    "a rating, and no close": "asyncio.run(call()); print('done')",
    "a task that nobody awaits": """
async def work():
    asyncio.create_task(call())
    await asyncio.sleep(0.1)
    print('done')
asyncio.run(work())
""",
    "streams that nobody reads to their end": """
async def work(events):
    async for event in events:
        break
for _ in range(20):
    asyncio.run(work(recommender.astream("ann", "target")))
    asyncio.run(work(recommender.astream_rank("ann", ["target", "folk"])))
print('done')
""",
    "a loop that is closed over a waiting run": """
loop = asyncio.new_event_loop()
task = loop.create_task(call())
loop.run_until_complete(asyncio.sleep(0.1))
task.cancel()
loop.run_until_complete(asyncio.wait([task]))
loop.close()
time.sleep(0.4)
print('done')
""",
}


@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS.keys())
def test_a_process_ends_without_noise(end: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", BEGIN + end], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


def test_a_stream_that_fails_while_it_is_left_makes_no_noise() -> None:
    async def source() -> AsyncIterator[int]:
        yield 1
        try:
            await asyncio.sleep(60)
        finally:
            raise EngineError("away")

    async def work() -> list[Any]:
        noise: list[Any] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, told: noise.append(told))
        async with aclosing(read_by_task(source())) as parts:
            async for _ in parts:
                await asyncio.sleep(0.01)  # the source goes on meanwhile
                break
        await asyncio.sleep(0.01)
        gc.collect()
        return noise

    assert asyncio.run(work()) == []
