"""The micro-batcher, over fake backends that can be held up, hit and counted."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from typing import Any

import pytest

from r4r_graph.engine.base import GenerateRequest, GenerateResult, Message, RateRequest, RateResult
from r4r_graph.engine.batching import BatchingEngine, Row
from r4r_graph.engine.fake import FakeBackend
from r4r_graph.errors import EngineBusyError, EngineFailure, is_retryable

PATIENCE = 20
"""Seconds after which something that should have ended counts as hung."""


def ask(text: str = "Which?", **settings: Any) -> GenerateRequest:
    return GenerateRequest((Message("user", text),), **settings)


def judge(text: str = "How many?", **settings: Any) -> RateRequest:
    return RateRequest((Message("user", text),), **settings)


def text_of(row: Row) -> str:
    return row.prepared.request.messages[0].content


class GatedBackend(FakeBackend):
    """Starts no batch before `gate` is open; `taken` holds each batch's texts."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.gate = threading.Event()
        self.entered = threading.Event()
        self.taken: list[list[str]] = []

    def _work(self, rows: Sequence[Row]) -> None:
        self.taken.append([text_of(row) for row in rows])
        self.entered.set()
        assert self.gate.wait(PATIENCE)
        super()._work(rows)


class FragileBackend(FakeBackend):
    """A whole batch fails where one of its texts is `poison`."""

    error: BaseException = ValueError("a poisoned batch")

    def _work(self, rows: Sequence[Row]) -> None:
        super()._work(rows)
        if any("poison" in text_of(row) for row in rows):
            raise self.error


def alone(request: Any) -> Any:
    """What a healthy backend answers."""
    backend = FakeBackend()
    rows = [Row(backend.prepare(request), lambda: False)]
    verb = backend.generate if isinstance(request, GenerateRequest) else backend.rate
    return verb(rows)[0]


Start = Callable[..., BatchingEngine]


@pytest.fixture
def start() -> Iterator[Start]:
    """Makes engines over a backend, and closes them; gates are opened first."""
    with ExitStack() as stack:

        def make(backend: FakeBackend, **settings: Any) -> BatchingEngine:
            engine = BatchingEngine(backend, **settings)
            stack.callback(engine.close)
            if isinstance(backend, GatedBackend):
                stack.callback(backend.gate.set)
            return engine

        yield make


@pytest.fixture
def gated() -> GatedBackend:
    return GatedBackend(adapters=("reasoner", "predictor"))


def held_up(engine: BatchingEngine, backend: GatedBackend) -> Future[GenerateResult]:
    """Occupy the engine with a first request, so that later ones queue."""
    future = engine.submit(ask("first"))
    assert backend.entered.wait(PATIENCE)
    return future


# Joining -----------------------------------------------------------------------------------------


def test_what_queues_meanwhile_becomes_one_batch(start: Start, gated: GatedBackend) -> None:
    engine = start(gated)
    held_up(engine, gated)
    with ThreadPoolExecutor(20) as pool:
        futures = list(pool.map(lambda i: engine.submit(ask(f"from thread {i}")), range(20)))
    assert gated.taken == [["first"]]
    gated.gate.set()
    results = [future.result(PATIENCE) for future in futures]
    assert gated.batches == [1, 20]
    assert results == [alone(ask(f"from thread {i}")) for i in range(20)]


def test_a_list_is_one_batch_at_most_max_rows_wide(start: Start, gated: GatedBackend) -> None:
    engine = start(gated, max_rows=8)
    held_up(engine, gated)
    with ThreadPoolExecutor(1) as pool:
        answers = pool.submit(engine.generate, [ask(f"row {i}") for i in range(20)])
        while len(engine._queue) < 20:
            threading.Event().wait(0.001)
        gated.gate.set()
        assert len(answers.result(PATIENCE)) == 20
    assert gated.batches == [1, 8, 8, 4]


def test_only_requests_of_one_kind_share_a_batch(start: Start, gated: GatedBackend) -> None:
    engine = start(gated)
    held_up(engine, gated)
    futures: list[Future[Any]] = [
        engine._submit(request, None)
        for request in (
            ask("a1", adapter="reasoner"),
            ask("b1"),
            judge("c1"),
            ask("a2", adapter="reasoner"),
            ask("d1", adapter="predictor"),
            judge("c2"),
            ask("b2"),
        )
    ]
    gated.gate.set()
    results = [future.result(PATIENCE) for future in futures]
    assert gated.taken[1:] == [["a1", "a2"], ["b1", "b2"], ["c1", "c2"], ["d1"]]
    kinds = [GenerateResult, GenerateResult, RateResult, *[GenerateResult] * 2, RateResult]
    assert [type(result) for result in results] == [*kinds, GenerateResult]


def test_a_batch_keeps_to_the_token_budget(start: Start, gated: GatedBackend) -> None:
    """The longest row times the rows: padding counts."""
    engine = start(gated, max_batch_tokens=100)
    held_up(engine, gated)
    lengths = (88, 3, 3, 3, 3, 38, 38, 38)
    requests = [ask(" ".join(["word"] * n), max_tokens=10) for n in lengths]
    futures = [engine.submit(request) for request in requests]
    gated.gate.set()
    wait(futures, PATIENCE)
    sizes = [[len(text.split()) for text in texts] for texts in gated.taken[1:]]
    assert sizes == [[88], [3, 3, 3, 3], [38, 38], [38]]
    costs = {n: n + 2 + 10 for n in (3, 38)}  # a beginning, a role, the words, the answer
    assert 5 * costs[3] <= 100
    assert 2 * costs[38] <= 100 < 3 * costs[38]


def test_a_long_prompt_and_a_long_answer_cost_both(start: Start, gated: GatedBackend) -> None:
    engine = start(gated, max_batch_tokens=150)
    held_up(engine, gated)
    settings = [(60, 10), (10, 60), (60, 12), (12, 60)]
    futures = [engine.submit(ask(" ".join(["word"] * n), max_tokens=m)) for n, m in settings]
    gated.gate.set()
    wait(futures, PATIENCE)
    sizes = [sorted(len(text.split()) for text in texts) for texts in gated.taken[1:]]
    assert sizes == [[60, 60], [10, 12]]


def test_a_request_over_the_token_budget_runs_alone(start: Start, gated: GatedBackend) -> None:
    engine = start(gated, max_batch_tokens=10)
    gated.gate.set()
    assert len(engine.generate([ask("long " * 50), ask("long " * 60)])) == 2
    assert gated.batches == [1, 1]


def test_rows_of_like_length_go_together(start: Start, gated: GatedBackend) -> None:
    engine = start(gated, max_rows=3)
    held_up(engine, gated)
    futures = [engine.submit(ask("word " * n)) for n in (50, 1, 200, 52, 2, 49, 210, 3)]
    gated.gate.set()
    wait(futures, PATIENCE)
    sizes = [sorted(len(text.split()) for text in texts) for texts in gated.taken[1:]]
    assert sizes == [[49, 50, 52], [1, 2, 3], [200, 210]]


def test_the_oldest_request_is_always_in_the_next_batch(start: Start, gated: GatedBackend) -> None:
    """However odd its length, and however many others keep arriving."""
    engine = start(gated, max_rows=4)
    others: list[Future[GenerateResult]] = []
    odd: list[Future[GenerateResult]] = []
    ended_at: list[int] = []

    def arrive(rows: Sequence[Row]) -> None:
        inner(rows)
        if len(gated.batches) < 30:
            others.extend(engine.submit(ask(f"short {len(others)}")) for _ in range(4))

    inner, gated._work = gated._work, arrive  # type: ignore[method-assign]
    held_up(engine, gated)
    others.extend(engine.submit(ask("short")) for _ in range(8))
    odd.append(engine.submit(ask("odd " * 500)))
    odd[0].add_done_callback(lambda _: ended_at.append(len(gated.batches)))
    gated.gate.set()
    wait(odd, PATIENCE)
    wait(list(others), PATIENCE)
    assert ended_at[0] <= 4, "two batches of those before it, then its own"


# Siblings ----------------------------------------------------------------------------------------


def test_announced_siblings_are_waited_for(start: Start) -> None:
    backend = FakeBackend()
    engine = start(backend, linger=PATIENCE)
    requests = [ask(f"branch {i}", siblings=5) for i in range(5)]
    futures = []
    for request in requests:
        futures.append(engine.submit(request))
        threading.Event().wait(0.002)  # apart enough for an engine that does not wait
    wait(futures, PATIENCE / 2, FIRST_EXCEPTION)
    assert backend.batches == [5]
    assert [future.result(0) for future in futures] == list(map(alone, requests))


def test_siblings_that_come_one_after_the_other_are_waited_for(start: Start) -> None:
    """Each soon after the last, all together later than one linger."""
    backend = FakeBackend()
    engine = start(backend, linger=0.4)
    futures = []
    for i in range(6):
        futures.append(engine.submit(ask(f"branch {i}", siblings=6)))
        threading.Event().wait(0.1)
    assert all(future.result(PATIENCE).text for future in futures)
    assert backend.batches == [6]


def test_siblings_that_never_come_are_not_waited_for_long(start: Start) -> None:
    backend = FakeBackend()
    engine = start(backend, linger=0.02)
    futures = [engine.submit(ask(f"branch {i}", siblings=100)) for i in range(2)]
    assert all(future.result(PATIENCE).text for future in futures)
    assert sum(backend.batches) == 2


def test_more_siblings_than_rows_are_not_waited_for(start: Start) -> None:
    backend = FakeBackend()
    engine = start(backend, linger=PATIENCE, max_rows=3)
    futures = [engine.submit(ask(f"branch {i}", siblings=6)) for i in range(6)]
    done, _ = wait(futures, PATIENCE / 2)
    assert len(done) == 6
    assert backend.batches == [3, 3]


def test_siblings_of_another_kind_do_not_count(start: Start) -> None:
    backend = FakeBackend(adapters=("reasoner",))
    engine = start(backend, linger=PATIENCE)
    first = engine.submit(ask("a1", siblings=2))
    engine.submit(ask("b1", adapter="reasoner"))
    threading.Event().wait(0.02)
    assert not first.done()
    engine.submit(ask("a2", siblings=2))
    assert first.result(PATIENCE / 2).text
    assert backend.batches[0] == 2


def test_closing_does_not_wait_for_siblings(start: Start) -> None:
    engine = start(FakeBackend(), linger=PATIENCE)
    future = engine.submit(ask(siblings=2))
    engine.close()
    assert isinstance(future.exception(0), EngineFailure)


# Back-pressure -----------------------------------------------------------------------------------


def test_callers_wait_where_the_queue_is_full(start: Start, gated: GatedBackend) -> None:
    engine = start(gated, max_pending=2)
    futures = [held_up(engine, gated), engine.submit(ask("second")), engine.submit(ask("third"))]
    returned = threading.Event()

    def submit() -> Future[GenerateResult]:
        future = engine.submit(ask("fourth"))
        returned.set()
        return future

    with ThreadPoolExecutor(1) as pool:
        late = pool.submit(submit)
        assert not returned.wait(0.03)
        gated.gate.set()
        futures.append(late.result(PATIENCE))
    assert all(future.result(PATIENCE).text for future in futures)


def test_more_requests_in_one_call_than_the_queue_holds(start: Start) -> None:
    backend = FakeBackend()
    engine = start(backend, max_pending=3, max_rows=2)
    requests = [ask(f"row {i}") for i in range(25)]
    expected = list(map(alone, requests))
    assert engine.generate(requests) == expected
    assert asyncio.run(engine.agenerate(requests)) == expected
    assert max(backend.batches) <= 2


def test_coroutines_wait_where_the_queue_is_full(start: Start, gated: GatedBackend) -> None:
    engine = start(gated, max_pending=2)
    held_up(engine, gated)

    async def work() -> list[GenerateResult]:
        tasks = [asyncio.ensure_future(engine.asubmit(ask(f"row {i}"))) for i in range(12)]
        for _ in range(20):
            await asyncio.sleep(0)  # the loop is free all the while
        assert len(engine._queue) == 2
        assert not any(task.done() for task in tasks)
        gated.gate.set()
        return await asyncio.wait_for(asyncio.gather(*tasks), PATIENCE)

    assert len(asyncio.run(work())) == 12


def test_a_caller_loses_patience(start: Start, gated: GatedBackend) -> None:
    engine = start(gated, max_pending=1, patience=0.02)
    first, second = held_up(engine, gated), engine.submit(ask("second"))
    with pytest.raises(EngineBusyError, match=r"1 requests are waiting.*0\.02 s") as caught:
        engine.generate([ask("third")])
    assert is_retryable(caught.value)
    assert isinstance(engine.submit(ask("third")).exception(0), EngineBusyError)
    with pytest.raises(EngineBusyError):
        asyncio.run(engine.asubmit(ask("third")))
    gated.gate.set()
    assert first.result(PATIENCE).text
    assert second.result(PATIENCE).text
    assert engine.generate([ask("third")])[0].text, "there is room again"
    assert sum(gated.batches) == 3


def test_giving_up_a_place_in_the_line(start: Start, gated: GatedBackend) -> None:
    """A coroutine that is cancelled while it waits for room leaves nothing behind."""
    engine = start(gated, max_pending=1)
    first, second = held_up(engine, gated), engine.submit(ask("second"))

    async def work() -> GenerateResult:
        leaver = asyncio.ensure_future(engine.asubmit(ask("leaver")))
        stayer = asyncio.ensure_future(engine.asubmit(ask("stayer")))
        await asyncio.sleep(0)
        leaver.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaver
        gated.gate.set()
        return await asyncio.wait_for(stayer, PATIENCE)

    assert asyncio.run(work()).text
    assert first.result(PATIENCE).text
    assert second.result(PATIENCE).text
    assert not any("leaver" in texts for texts in gated.taken)


def test_cancelled_requests_make_room(start: Start, gated: GatedBackend) -> None:
    engine = start(gated, max_pending=3)
    held_up(engine, gated)
    for _ in range(3):
        engine.submit(ask("cancelled")).cancel()
    gated.gate.set()
    futures = [engine.submit(ask(f"later {i}")) for i in range(6)]
    assert all(future.result(PATIENCE).text for future in futures)
    assert not any("cancelled" in texts for texts in gated.taken)


def test_a_loop_that_is_gone_stops_nobody(start: Start, gated: GatedBackend) -> None:
    """Waiters of a closed loop are still on the list when the queue has room again."""
    engine = start(gated, max_pending=1)
    first, second = held_up(engine, gated), engine.submit(ask("second"))
    loop = asyncio.new_event_loop()
    task = loop.create_task(engine.asubmit(ask("gone")))
    loop.run_until_complete(asyncio.sleep(0))
    task.cancel()
    loop.run_until_complete(asyncio.wait([task]))
    loop.close()
    gated.gate.set()
    assert first.result(PATIENCE).text
    assert second.result(PATIENCE).text
    assert engine.generate([ask("after")])[0].text


# Failures ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("poisoned", [[0], [7], [11], [3, 4], [0, 5, 11], list(range(12))])
@pytest.mark.parametrize("make", [ask, judge])
def test_a_poisoned_request_fails_alone(
    start: Start, poisoned: list[int], make: Callable[..., Any]
) -> None:
    backend = FragileBackend()
    engine = start(backend, linger=PATIENCE)
    texts = [f"poison {i}" if i in poisoned else f"good {i}" for i in range(12)]
    requests = [make(text, siblings=12) for text in texts]
    verb = "generate" if make is ask else "rate"
    results = getattr(engine, verb)(requests, return_exceptions=True)
    for i, (request, result) in enumerate(zip(requests, results, strict=True)):
        if i in poisoned:
            assert isinstance(result, EngineFailure)
            assert "ValueError: a poisoned batch" in str(result)
            assert result.__cause__ is FragileBackend.error
        else:
            assert result == alone(request)
    assert backend.batches[0] == 12
    if len(poisoned) == 1:
        assert len(backend.batches) <= 1 + 2 * 4, "halving, not one by one"


def test_halving_shows_no_text_twice(start: Start) -> None:
    class FailsAfterwards(FakeBackend):
        def generate(self, rows: Sequence[Row]) -> Any:
            results = super().generate(rows)
            if len(rows) > 1:
                raise MemoryError
            return results

    engine = start(FailsAfterwards(), linger=PATIENCE)
    heard: list[list[str]] = [[] for _ in range(4)]
    futures = [
        engine.submit(ask(f"row {i}", siblings=4), pieces.append) for i, pieces in enumerate(heard)
    ]
    for future, pieces in zip(futures, heard, strict=True):
        assert future.result(PATIENCE).text == "".join(pieces)


def test_a_rows_own_error_is_its_own(start: Start) -> None:
    def write(request: GenerateRequest) -> str:
        text = request.messages[0].content
        if "bad" in text:
            raise LookupError(text)
        return text

    backend = FakeBackend(write=write)
    engine = start(backend, linger=PATIENCE)
    requests = [ask(text, siblings=3) for text in ("good", "bad luck", "fine")]
    results: list[Any] = engine.generate(requests, return_exceptions=True)
    assert [results[0].text, results[2].text] == ["good", "fine"]
    assert isinstance(results[1], EngineFailure)
    assert isinstance(results[1].__cause__, LookupError)
    assert backend.batches == [3], "nothing is computed again"


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), asyncio.CancelledError()])
def test_the_engine_survives_what_is_no_exception(start: Start, error: BaseException) -> None:
    """A worker that died would leave every caller waiting for ever."""
    backend = FragileBackend()
    backend.error = error
    engine = start(backend)
    with pytest.raises(EngineFailure, match=type(error).__name__):
        engine.submit(ask("poison")).result(PATIENCE / 2)
    assert engine.generate([ask("good")])[0].text


def test_the_engine_survives_a_backend_that_loses_rows(start: Start) -> None:
    class Forgetful(FakeBackend):
        def generate(self, rows: Sequence[Row]) -> Any:
            return super().generate(rows)[: -1 if text_of(rows[0]) == "forget" else None]

    engine = start(Forgetful())
    with pytest.raises(EngineFailure):
        engine.submit(ask("forget")).result(PATIENCE / 2)
    assert engine.generate([ask("good")])[0].text


def test_an_error_of_the_checks_is_the_callers(start: Start) -> None:
    class Broken(FakeBackend):
        def prepare(self, request: Any) -> Any:
            if "broken" in request.messages[0].content:
                raise ZeroDivisionError("in the tokenizer")
            return super().prepare(request)

    engine = start(Broken())
    results: list[Any] = engine.generate([ask("broken"), ask("good")], return_exceptions=True)
    assert isinstance(results[0], EngineFailure)
    assert "in the tokenizer" in str(results[0])
    assert results[1].text


# Cancelling --------------------------------------------------------------------------------------


def test_cancelled_in_the_queue_is_never_computed(start: Start, gated: GatedBackend) -> None:
    engine = start(gated)
    held_up(engine, gated)
    futures = [engine.submit(ask(f"row {i}")) for i in range(6)]
    assert all(future.cancel() for future in futures[::2])
    gated.gate.set()
    assert all(future.result(PATIENCE).text for future in futures[1::2])
    assert gated.taken[1:] == [["row 1", "row 3", "row 5"]]
    assert all(future.cancelled() for future in futures[::2])


def test_a_fake_backend_stops_where_it_is_cancelled() -> None:
    backend, shown = FakeBackend(), list[str]()
    row = Row(backend.prepare(ask()), lambda: len(shown) == 3, shown.append)
    backend.generate([row])
    assert len(shown) == 3


def test_cancelled_futures_count_as_done(start: Start, gated: GatedBackend) -> None:
    """Also for `concurrent.futures.wait`, which wants to be told."""
    engine = start(gated)
    running = held_up(engine, gated)
    queued = engine.submit(ask("queued"))
    running.cancel()
    queued.cancel()
    gated.gate.set()
    done, pending = wait([running, queued], PATIENCE / 4)
    assert not pending
    assert done == {running, queued}


def test_a_cancelled_caller_cancels_its_requests(start: Start, gated: GatedBackend) -> None:
    engine = start(gated)
    held_up(engine, gated)

    async def work() -> None:
        task = asyncio.ensure_future(engine.agenerate([ask(f"row {i}") for i in range(3)]))
        while len(engine._queue) < 3:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(work())
    assert all(job.future.cancelled() for job in engine._queue)
    gated.gate.set()
    assert engine.generate([ask("after")])[0].text
    assert gated.taken[1:] == [["after"]]


def test_a_timeout_frees_the_engine(start: Start, gated: GatedBackend) -> None:
    engine = start(gated)
    held_up(engine, gated)

    async def work() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(engine.asubmit(ask("too slow")), 0.01)

    asyncio.run(work())
    gated.gate.set()
    assert engine.generate([ask("after")])[0].text
    assert gated.taken[1:] == [["after"]]


# Closing -----------------------------------------------------------------------------------------


def test_closing_ends_what_is_queued(start: Start, gated: GatedBackend) -> None:
    engine = start(gated)
    running = held_up(engine, gated)
    queued = [engine.submit(ask("queued")), engine.submit(ask("queued", adapter="reasoner"))]
    with ThreadPoolExecutor(1) as pool:
        closing = pool.submit(engine.close)
        for future in queued:
            with pytest.raises(EngineFailure, match="closed"):
                future.result(PATIENCE)
        gated.gate.set()
        closing.result(PATIENCE)
    assert isinstance(running.exception(0), EngineFailure)
    assert gated.taken == [["first"]]


def test_closing_ends_those_who_wait_for_room(start: Start, gated: GatedBackend) -> None:
    engine = start(gated, max_pending=1)
    held_up(engine, gated)
    engine.submit(ask("queued"))

    async def work() -> None:
        task = asyncio.ensure_future(engine.asubmit(ask("waiting")))
        await asyncio.sleep(0)
        closing = asyncio.ensure_future(asyncio.to_thread(engine.close))
        with pytest.raises(EngineFailure, match="closed"):
            await asyncio.wait_for(task, PATIENCE)
        gated.gate.set()
        await closing

    with ThreadPoolExecutor(1) as pool:
        late = pool.submit(engine.submit, ask("waiting"))
        asyncio.run(work())
        assert isinstance(late.result(PATIENCE).exception(0), EngineFailure)


def test_a_closed_engine_refuses(start: Start) -> None:
    engine = start(FakeBackend())
    assert engine.generate([ask()])
    engine.close()
    engine.close()
    with pytest.raises(EngineFailure, match="closed"):
        engine.generate([ask()])
    with pytest.raises(EngineFailure, match="closed"):
        asyncio.run(engine.arate([judge()]))


def test_closing_an_unused_engine_closes_its_backend() -> None:
    closed: list[int] = []

    class Closing(FakeBackend):
        def close(self) -> None:
            closed.append(1)

    before = threading.active_count()
    with BatchingEngine(Closing()):
        assert threading.active_count() == before, "threads start with the first request"
        assert not closed
    assert closed == [1]


def test_an_engine_may_be_closed_from_a_listener(start: Start) -> None:
    """That is, on its own thread."""
    engine = start(FakeBackend())
    future = engine.submit(ask(), lambda _: engine.close())
    assert isinstance(future.exception(PATIENCE), EngineFailure)
    with pytest.raises(EngineFailure):
        engine.generate([ask()])


def test_engines_are_closed_at_exit() -> None:
    """All that are open, also after another one was closed."""
    code = (
        "from r4r_graph.engine.batching import BatchingEngine\n"
        "from r4r_graph.engine.fake import FakeBackend\n"
        "class Backend(FakeBackend):\n"
        "    def __init__(self, name):\n"
        "        super().__init__()\n"
        "        self.name = name\n"
        "    def close(self):\n"
        "        print(self.name, end=' ')\n"
        "engines = [BatchingEngine(Backend(name)) for name in 'abc']\n"
        "engines[1].close()\n"
        "del engines[2]\n"
        "print('exit', end=' ')"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True
    )
    assert (done.stdout.split(), done.stderr) == (["b", "exit", "a"], "")


def test_nothing_is_logged_when_all_goes_well(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    """`concurrent.futures` logs errors of callbacks, asyncio those that nobody retrieved."""
    with caplog.at_level(logging.DEBUG):
        engine = start(FragileBackend())
        engine.generate([ask("poison"), ask("good")], return_exceptions=True)
        asyncio.run(engine.agenerate([ask("poison"), ask("good")], return_exceptions=True))
        engine.submit(ask()).cancel()
        engine.generate([ask()])
    names = {record.name.partition(".")[0] for record in caplog.records if record.levelno > 10}
    assert not names & {"concurrent", "asyncio"}
