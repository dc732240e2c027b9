"""The summary cache: hits, misses, and single flight over threads and coroutines."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from langgraph.store.base import BaseStore
from langgraph.store.memory import InMemoryStore

from r4r_graph.summaries import NAMESPACE, SummaryCache, Value

PATIENCE = 20
"""Seconds after which something that should have ended counts as hung."""

VALUE: Value = {"positive": ["warm"], "negative": [], "values": ["honesty"]}


class Counted:
    """Something to compute, which counts how often it was. May be held up, and may fail."""

    def __init__(self, *, fails: int = 0, held: bool = False) -> None:
        self.calls = 0
        self.fails = fails
        self.started = threading.Event()
        self.go_on = threading.Event()
        if not held:
            self.go_on.set()

    def __call__(self) -> Value:
        self.calls += 1
        number = self.calls
        self.started.set()
        assert self.go_on.wait(PATIENCE)
        if number <= self.fails:
            raise LookupError(f"failure {number}")
        return VALUE

    def later(self) -> Callable[[], Awaitable[Value]]:
        """The same for `aget_or_compute`."""

        async def compute() -> Value:
            return await asyncio.to_thread(self)

        return compute


class FullStore(InMemoryStore):
    """Reads, and cannot write."""

    def put(self, *_: Any, **__: Any) -> None:
        raise OSError("No space left on device")


@pytest.fixture(params=[InMemoryStore, type(None)], ids=["store", "no store"])
def cache(request: pytest.FixtureRequest) -> SummaryCache:
    return SummaryCache(request.param())


def waiting(cache: SummaryCache, count: int) -> None:
    """Wait until `count` callers have boarded the one flight there is."""
    for _ in range(PATIENCE * 1000):
        flights = list(cache._flights.values())
        if flights and len(flights[0]._done_callbacks) + _threads_in(flights[0]) >= count:
            return
        threading.Event().wait(0.001)
    raise AssertionError("nobody boarded")


def _threads_in(flight: Any) -> int:
    """Threads that wait inside `Future.result`."""
    return len(flight._condition._waiters)


# Hits and misses ---------------------------------------------------------------------------------


def test_a_miss_then_hits() -> None:
    store, compute = InMemoryStore(), Counted()
    cache = SummaryCache(store)
    assert cache.get("a") is None
    assert cache.get_or_compute("a", compute) == (VALUE, False)
    assert cache.get_or_compute("a", compute) == (VALUE, True)
    assert cache.get("a") == VALUE
    assert compute.calls == 1
    assert cache.get_or_compute("b", compute) == (VALUE, False)
    assert compute.calls == 2
    assert {item.key for item in store.search(NAMESPACE)} == {"a", "b"}
    assert SummaryCache(store).get_or_compute("a", compute) == (VALUE, True)


def test_a_miss_then_hits_async() -> None:
    cache, compute = SummaryCache(InMemoryStore()), Counted()

    async def work() -> list[Any]:
        return [await cache.aget_or_compute("a", compute.later()) for _ in range(3)]

    assert asyncio.run(work()) == [(VALUE, False), (VALUE, True), (VALUE, True)]
    assert compute.calls == 1
    assert cache.get_or_compute("a", compute) == (VALUE, True)


def test_without_a_store_nothing_is_kept() -> None:
    cache, compute = SummaryCache(None), Counted()
    assert cache.get("a") is None
    assert cache.get_or_compute("a", compute) == (VALUE, False)
    assert cache.get_or_compute("a", compute) == (VALUE, False)
    assert compute.calls == 2


def test_what_a_caller_does_to_its_value_is_its_own() -> None:
    cache = SummaryCache(InMemoryStore())
    value, _ = cache.get_or_compute("a", Counted())
    value["more"] = 1
    assert cache.get("a") == VALUE
    again, _ = cache.get_or_compute("a", Counted())
    again.clear()
    assert cache.get("a") == VALUE


def test_nothing_is_left_of_a_flight(cache: SummaryCache) -> None:
    cache.get_or_compute("a", Counted())
    with pytest.raises(LookupError):
        cache.get_or_compute("b", Counted(fails=1))
    asyncio.run(cache.aget_or_compute("c", Counted().later()))
    assert cache._flights == {}


# Single flight -----------------------------------------------------------------------------------


def test_threads_share_one_computation(cache: SummaryCache) -> None:
    compute = Counted(held=True)
    with ThreadPoolExecutor(12) as pool:
        futures = [pool.submit(cache.get_or_compute, "a", compute) for _ in range(12)]
        waiting(cache, 11)
        compute.go_on.set()
        results = [future.result(PATIENCE) for future in futures]
    assert compute.calls == 1
    assert [value for value, _ in results] == [VALUE] * 12
    assert sorted(hit for _, hit in results) == [False] + [True] * 11


def test_coroutines_share_one_computation(cache: SummaryCache) -> None:
    compute = Counted(held=True)

    async def work() -> list[tuple[Value, bool]]:
        tasks = [
            asyncio.create_task(cache.aget_or_compute("a", compute.later())) for _ in range(50)
        ]
        await asyncio.to_thread(waiting, cache, 49)
        compute.go_on.set()
        return list(await asyncio.wait_for(asyncio.gather(*tasks), PATIENCE))

    results = asyncio.run(work())
    assert compute.calls == 1
    assert [value for value, _ in results] == [VALUE] * 50
    assert sorted(hit for _, hit in results) == [False] + [True] * 49


def test_threads_and_coroutines_share_one_computation(cache: SummaryCache) -> None:
    compute = Counted(held=True)

    async def work() -> list[tuple[Value, bool]]:
        tasks = [asyncio.create_task(cache.aget_or_compute("a", compute.later())) for _ in range(5)]
        await asyncio.to_thread(waiting, cache, 9)
        compute.go_on.set()
        return list(await asyncio.wait_for(asyncio.gather(*tasks), PATIENCE))

    with ThreadPoolExecutor(5) as pool:
        futures = [pool.submit(cache.get_or_compute, "a", compute) for _ in range(5)]
        results = [*asyncio.run(work()), *(future.result(PATIENCE) for future in futures)]
    assert compute.calls == 1
    assert sorted(hit for _, hit in results) == [False] + [True] * 9


def test_keys_do_not_wait_for_each_other(cache: SummaryCache) -> None:
    slow = Counted(held=True)
    with ThreadPoolExecutor(1) as pool:
        held = pool.submit(cache.get_or_compute, "slow", slow)
        assert slow.started.wait(PATIENCE)
        assert cache.get_or_compute("quick", Counted()) == (VALUE, False)
        assert not held.done()
        slow.go_on.set()
        assert held.result(PATIENCE) == (VALUE, False)


def test_a_flight_that_lands_during_the_lookup_is_not_missed() -> None:
    """Its value must be found, though it was not there when the lookup began."""

    class LateStore(InMemoryStore):
        def get(self, *args: Any, **settings: Any) -> Any:
            found = super().get(*args, **settings)
            if not threads:
                threads.append(threading.Thread(target=summarize, daemon=True))
                threads[0].start()
                threads[0].join(0.03)  # it either waits for us, or is done by now
            return found

    def summarize() -> None:
        results.append(cache.get_or_compute("a", compute))

    threads: list[threading.Thread] = []
    results: list[tuple[Value, bool]] = []
    compute = Counted()
    cache = SummaryCache(LateStore())
    summarize()
    threads[0].join(PATIENCE)
    assert [value for value, _ in results] == [VALUE, VALUE]
    assert compute.calls == 1


# Failures ----------------------------------------------------------------------------------------


def test_a_leaders_failure_is_its_own(cache: SummaryCache) -> None:
    compute = Counted(fails=1, held=True)
    with ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(cache.get_or_compute, "a", compute) for _ in range(8)]
        waiting(cache, 7)
        compute.go_on.set()
        errors = [future.exception(PATIENCE) for future in futures]
    assert [str(error) for error in errors if error] == ["failure 1"]
    results = [f.result(0) for f, error in zip(futures, errors, strict=True) if not error]
    assert [value for value, _ in results] == [VALUE] * 7
    assert compute.calls >= 2


def test_a_leaders_failure_is_its_own_async(cache: SummaryCache) -> None:
    compute = Counted(fails=1, held=True)

    async def work() -> list[Any]:
        tasks = [asyncio.create_task(cache.aget_or_compute("a", compute.later())) for _ in range(8)]
        await asyncio.to_thread(waiting, cache, 7)
        compute.go_on.set()
        gathered = asyncio.gather(*tasks, return_exceptions=True)
        return list(await asyncio.wait_for(gathered, PATIENCE))

    results = asyncio.run(work())
    errors = [result for result in results if isinstance(result, BaseException)]
    assert [str(error) for error in errors] == ["failure 1"]
    assert sum(result[0] == VALUE for result in results if isinstance(result, tuple)) == 7


def test_a_failure_is_not_kept(cache: SummaryCache) -> None:
    compute = Counted(fails=2)
    for number in (1, 2):
        with pytest.raises(LookupError, match=f"failure {number}"):
            cache.get_or_compute("a", compute)
    assert cache.get_or_compute("a", compute) == (VALUE, False)


def test_an_interrupted_leader_frees_its_followers(cache: SummaryCache) -> None:
    def interrupted() -> Value:
        started.set()
        assert go_on.wait(PATIENCE)
        raise SystemExit

    started, go_on = threading.Event(), threading.Event()
    left: list[BaseException] = []

    def lead() -> None:
        try:
            cache.get_or_compute("a", interrupted)
        except BaseException as error:
            left.append(error)

    leader = threading.Thread(target=lead)
    leader.start()
    assert started.wait(PATIENCE)
    with ThreadPoolExecutor(1) as pool:
        follower = pool.submit(cache.get_or_compute, "a", Counted())
        waiting(cache, 1)
        go_on.set()
        assert follower.result(PATIENCE) == (VALUE, False)
    leader.join(PATIENCE)
    assert [type(error) for error in left] == [SystemExit]


def test_a_cancelled_leader_frees_its_followers(cache: SummaryCache) -> None:
    async def endless() -> Value:
        started.set()
        await asyncio.Event().wait()
        raise AssertionError

    async def work() -> tuple[Value, bool]:
        leader = asyncio.create_task(cache.aget_or_compute("a", endless))
        await asyncio.wait_for(started.wait(), PATIENCE)
        follower = asyncio.create_task(cache.aget_or_compute("a", Counted().later()))
        await asyncio.to_thread(waiting, cache, 1)
        leader.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leader
        return await asyncio.wait_for(follower, PATIENCE)

    started = asyncio.Event()
    assert asyncio.run(work()) == (VALUE, False)


def test_a_cancelled_follower_disturbs_nobody(cache: SummaryCache) -> None:
    compute = Counted(held=True)

    async def work() -> list[tuple[Value, bool]]:
        leader, follower, leaver = (
            asyncio.create_task(cache.aget_or_compute("a", compute.later())) for _ in range(3)
        )
        await asyncio.to_thread(waiting, cache, 2)
        leaver.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaver
        assert not leader.done()
        assert not follower.done()
        compute.go_on.set()
        return list(await asyncio.wait_for(asyncio.gather(leader, follower), PATIENCE))

    assert asyncio.run(work()) == [(VALUE, False), (VALUE, True)]
    assert compute.calls == 1


def test_a_leader_in_a_loop_that_ends_frees_followers_elsewhere(cache: SummaryCache) -> None:
    """`asyncio.run` cancels what is left when its loop ends."""

    async def endless() -> Value:
        await asyncio.Event().wait()
        raise AssertionError

    async def abandon(pool: ThreadPoolExecutor) -> Any:
        leader = asyncio.create_task(cache.aget_or_compute("a", endless))
        while not cache._flights:
            await asyncio.sleep(0.001)
        follower = pool.submit(cache.get_or_compute, "a", Counted())
        await asyncio.to_thread(waiting, cache, 1)
        assert not leader.done()
        return follower

    with ThreadPoolExecutor(1) as pool:
        assert asyncio.run(abandon(pool)).result(PATIENCE) == (VALUE, False)


def test_a_store_that_cannot_write_costs_no_summary(caplog: pytest.LogCaptureFixture) -> None:
    cache, compute = SummaryCache(FullStore()), Counted()
    assert cache.get_or_compute("a", compute) == (VALUE, False)
    assert asyncio.run(cache.aget_or_compute("a", compute.later())) == (VALUE, False)
    assert compute.calls == 2
    messages = [r.getMessage() for r in caplog.records if r.name == "r4r_graph.summaries"]
    assert len(messages) == 2
    assert all("No space left on device" in message for message in messages)


def test_followers_of_a_summary_that_could_not_be_kept() -> None:
    cache, compute = SummaryCache(FullStore()), Counted(held=True)
    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(cache.get_or_compute, "a", compute) for _ in range(4)]
        waiting(cache, 3)
        compute.go_on.set()
        assert [future.result(PATIENCE)[0] for future in futures] == [VALUE] * 4
    assert compute.calls == 1


def test_any_store_will_do() -> None:
    """What is put is what `BaseStore` defines: nothing of the memory store's own."""
    put: list[tuple[Any, ...]] = []

    class Spy(InMemoryStore):
        def put(self, namespace: Any, key: Any, value: Any, **settings: Any) -> None:
            put.append((namespace, key, value, settings))
            super().put(namespace, key, value, **settings)

    store: BaseStore = Spy()
    SummaryCache(store).get_or_compute("a", Counted())
    assert put == [(NAMESPACE, "a", VALUE, {"index": False})]
