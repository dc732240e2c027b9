"""Runs that may take so long and no longer: what they end with, what they free, what is kept."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
from langgraph.checkpoint.memory import InMemorySaver

from r4r_graph import runs
from r4r_graph.bulk import rate_pairs
from r4r_graph.engine.base import EngineInfo, GenerateRequest, GenerateResult, RateRequest
from r4r_graph.engine.batching import BatchingEngine
from r4r_graph.engine.fake import FakeBackend, FakeMeter, fake_engine
from r4r_graph.engine.remote import RemoteEngine
from r4r_graph.errors import R4RError, RunTimeoutError, SettingError, is_retryable
from r4r_graph.experts import Experts
from r4r_graph.graph import build_graph
from r4r_graph.jobs import read_job
from r4r_graph.recommender import Recommender
from r4r_graph.reviews import TableReviewSource
from r4r_graph.schema import Pair
from r4r_graph.summaries import SummaryCache
from r4r_graph.time_limits import TimeLimit, in_time, limited_to
from tests.scripted import at
from tests.test_async import LONG, PATIENCE, TABLE, Gated, Paced, idle, long_text, plain
from tests.test_async import recommender_over as recommender_over_backend

Rate = Callable[[Recommender, float], Any]

SHORT, LONGER = 0.2, 0.8


def rate(rater: Recommender, timeout: float, **more: Any) -> Any:
    return rater.rate("ann", "target", as_of=at(9), timeout=timeout, **more)


def arate(rater: Recommender, timeout: float, **more: Any) -> Any:
    return asyncio.run(rater.arate("ann", "target", as_of=at(9), timeout=timeout, **more))


def stream(rater: Recommender, timeout: float) -> Any:
    *_, last = rater.stream("ann", "target", as_of=at(9), timeout=timeout)
    return last


def astream(rater: Recommender, timeout: float) -> Any:
    async def read() -> Any:
        events = rater.astream("ann", "target", as_of=at(9), timeout=timeout)
        return [event async for event in events][-1]

    return asyncio.run(read())


ALL_WAYS = pytest.mark.parametrize("call", [rate, arate, stream, astream])


def soon_idle(rater: Recommender) -> bool:
    end = time.monotonic() + PATIENCE
    while not idle(rater) and time.monotonic() < end:
        time.sleep(0.005)
    return idle(rater)


@pytest.fixture
def gated() -> Iterator[Gated]:
    backend = Gated()
    yield backend
    backend.gate.set()


@ALL_WAYS
def test_what_waits_in_the_queue_is_taken_back(call: Rate, gated: Gated) -> None:
    with recommender_over_backend(gated) as rater:
        started = time.monotonic()
        with pytest.raises(RunTimeoutError, match=r"0\.2 s .*step summarizer") as caught:
            call(rater, SHORT)
        assert SHORT <= time.monotonic() - started < PATIENCE / 4
        assert (caught.value.seconds, caught.value.step) == (SHORT, "summarizer")
        gated.gate.set()
        assert soon_idle(rater)
        assert sum(gated.batches) <= 3  # what was in the pass, none of the queue
        assert plain(call(rater, PATIENCE)) == plain(rater.rate("ann", "target", as_of=at(9)))


@ALL_WAYS
def test_a_text_ends_at_its_next_token(call: Rate) -> None:
    backend = Paced(write=long_text, pause=0.05)  # six seconds for all of it
    with recommender_over_backend(backend) as rater:
        with pytest.raises(RunTimeoutError, match="reasoner"):
            call(rater, LONGER)
        assert soon_idle(rater)
        assert 0 < backend.tokens < 60
        backend._pause = 0
        assert rater.rate("zoe", "target", as_of=at(9)).rationale == LONG


@pytest.mark.parametrize("call", [rate, arate])
def test_several_rationales_and_the_rating_itself(call: Rate) -> None:
    def slow(_: RateRequest) -> list[float]:
        time.sleep(1.5 * LONGER)
        return [0, 0, 0, 0, 1]

    source = TableReviewSource.from_reviews(TABLE, ())
    rater = Recommender(Experts(fake_engine(rate=slow)), source)
    with rater, pytest.raises(RunTimeoutError, match="predictor"):
        call(rater, LONGER)
    backend = Paced(write=long_text, pause=0.05)
    with recommender_over_backend(backend) as rater:
        with pytest.raises(RunTimeoutError, match="reasoner"):
            call(rater, LONGER, rationales=3)  # type: ignore[call-arg]
        assert soon_idle(rater)


@pytest.mark.parametrize("again", ["resume", "aresume"])
def test_a_kept_run_goes_on_with_all_its_time(again: str, gated: Gated) -> None:
    experts = Experts(BatchingEngine(gated))
    source = TableReviewSource.from_reviews(TABLE, ())
    with Recommender(experts, source, checkpointer=InMemorySaver()) as rater:
        config = runs.thread("monday")
        with pytest.raises(RunTimeoutError):
            rater.rate("ann", "target", as_of=at(9), timeout=LONGER, config=config)
        kept = runs.find(rater.graph, "monday")
        assert runs.status(kept) == "failed"
        assert runs.knobs_of_run(kept).timeout == LONGER
        assert not [name for name in kept.metadata or {} if "until" in name]
        with pytest.raises(RunTimeoutError):  # the engine is still away: not for nothing
            rater.resume("monday")
        gated.gate.set()
        assert soon_idle(rater)
        if again == "resume":
            found = rater.resume("monday")
        else:
            found = asyncio.run(rater.aresume("monday"))
        assert plain(found) == plain(rater.rate("ann", "target", as_of=at(9)))


def test_in_bulk_it_is_the_failure_of_that_row(tmp_path: Any) -> None:
    def write(request: GenerateRequest) -> str:
        unknown = "<person>\nnone yet" in request.messages[1].content
        return long_text(request) if unknown or request.format == "aspects" else "Soon done."

    backend = Paced(write=write, pause=0.02)
    pairs = [Pair(user, "target", at(9)) for user in ("ann", "nobody", "zoe")]
    with recommender_over_backend(backend) as rater:
        for timeout in (LONGER, PATIENCE):  # another limit is no other job
            report = rate_pairs(rater, pairs, tmp_path / "out", concurrency=1, timeout=timeout)
            assert report.failed == (1 if timeout < 1 else 0)
    found = read_job(tmp_path / "out")
    assert [row["error"] is None for row in found] == [True, False, True]
    assert found[1]["error"].startswith("RunTimeoutError: the run was not done after 0.8 s")


@pytest.mark.parametrize("way", ["rank", "arank"])
def test_a_ranking_is_one_run(way: str, gated: Gated) -> None:
    def ranked(rater: Recommender, timeout: float) -> Any:
        options: Any = {"as_of": at(9), "timeout": timeout, "config": {"max_concurrency": 1}}
        if way == "rank":
            return rater.rank("ann", ["target", "folk", "rock"], **options)
        return asyncio.run(rater.arank("ann", ["target", "folk", "rock"], **options))

    with recommender_over_backend(gated) as rater:
        with pytest.raises(RunTimeoutError, match="rating"):
            ranked(rater, SHORT)
        gated.gate.set()
    backend = Paced(write=long_text, pause=0.02)  # a rationale takes more than two seconds
    with recommender_over_backend(backend) as rater:
        found = ranked(rater, 4.0)
    assert 1 <= found.rated <= 2
    assert {failure.error for failure in found.failures} == {"RunTimeoutError"}
    assert found.rated + len(found.failures) == 3


def test_the_graph_alone_limits_its_steps(gated: Gated) -> None:
    graph = build_graph(Experts(BatchingEngine(gated)), TableReviewSource.from_reviews(TABLE, ()))
    given: Any = {"user_id": "ann", "item_id": "target", "as_of": at(9)}
    context: Any = {"timeout": SHORT}
    with pytest.raises(RunTimeoutError, match="summarizer"):
        graph.invoke(given, context=context)
    with pytest.raises(RunTimeoutError, match="summarizer"):
        asyncio.run(graph.ainvoke(given, context=context))
    gated.gate.set()
    assert graph.invoke(given, context=context)["recommendation"]["rating"]


class FarAway:
    """Answers nothing, and counts who no longer waits for it."""

    info = EngineInfo(base="far", digest="far", device="none", dtype="none")
    meter = FakeMeter()
    asked = left = 0

    def fingerprint(self, request: GenerateRequest) -> str:
        return str(hash(request))

    async def generate(self, request: GenerateRequest, show: Any) -> GenerateResult:
        self.asked += 1
        try:
            await asyncio.sleep(PATIENCE)
        finally:
            self.left += 1
        raise AssertionError

    async def rate(self, request: RateRequest) -> Any:
        raise AssertionError

    async def close(self) -> None:
        pass


@ALL_WAYS
def test_calls_of_a_server_are_dropped(call: Rate) -> None:
    backend = FarAway()
    source = TableReviewSource.from_reviews(TABLE, ())
    with Recommender(Experts(RemoteEngine(backend)), source) as rater:
        with pytest.raises(RunTimeoutError, match="summarizer"):
            call(rater, SHORT)
        end = time.monotonic() + PATIENCE
        while backend.left < 3 and time.monotonic() < end:
            time.sleep(0.005)
        assert backend.asked == backend.left == 3


@pytest.mark.parametrize("timeout", [0, -1, True, "3", float("nan"), float("inf")])
def test_bad_limits_are_refused(timeout: Any) -> None:
    with (
        recommender_over_backend(FakeBackend()) as rater,
        pytest.raises(SettingError, match="timeout"),
    ):
        rater.rate("ann", "target", timeout=timeout)


# Waiting -----------------------------------------------------------------------------------------


def limit(seconds: float) -> TimeLimit:
    return TimeLimit(seconds, time.monotonic() + seconds, "step")


def test_a_limit_is_of_its_own_thread_and_its_own_block() -> None:
    future: Future[int] = Future()
    with limited_to(limit(0.01)), pytest.raises(RunTimeoutError):
        in_time(future)
    threading.Timer(0.05, future.set_result, [3]).start()
    assert in_time(future).result() == 3
    with pytest.raises(RunTimeoutError), limited_to(limit(0)):
        raise AssertionError("it does not begin")


def test_a_futures_own_time_out_stays_its_own() -> None:
    future: Future[int] = Future()
    future.set_exception(TimeoutError("of its own"))
    with limited_to(limit(5)), pytest.raises(TimeoutError, match="of its own"):
        in_time(future).result()
    gone: Future[int] = Future()
    gone.cancel()
    with limited_to(limit(5)):
        assert in_time(gone).cancelled()


def test_who_waits_for_anothers_summary_waits_no_longer() -> None:
    cache, begun, go_on = SummaryCache(None), threading.Event(), threading.Event()

    def compute() -> dict[str, Any]:
        begun.set()
        assert go_on.wait(PATIENCE)
        return {"by": "the first"}

    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(cache.get_or_compute, "key", compute)
        assert begun.wait(PATIENCE)
        with limited_to(limit(0.05)), pytest.raises(RunTimeoutError):
            cache.get_or_compute("key", lambda: {"by": "the second"})
        go_on.set()
        assert first.result(PATIENCE) == ({"by": "the first"}, False)


def test_the_error_is_ours_and_a_time_out() -> None:
    error = RunTimeoutError(1.5, "reasoner")
    assert isinstance(error, R4RError)
    assert isinstance(error, TimeoutError)
    assert not is_retryable(error)
    assert "1.5 s" in str(error)
