"""The summary cache: each review is summarized once, across runs, threads and processes.

It sits *below* the graph's node, on a LangGraph `BaseStore`. The key is the engine's fingerprint
of the request (token ids, weights, dtype, grammar, decoding), so that nothing stale is ever
answered, and a review that changes by a letter is a new one. Concurrent misses of one key are
joined: one computes, the others wait for it (single flight).
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import CancelledError, Future
from typing import Any

from langgraph.store.base import BaseStore

from r4r_graph.time_limits import check, in_time

_log = logging.getLogger(__name__)

NAMESPACE = ("r4r", "summaries")

Value = dict[str, Any]


class SummaryCache:
    """Get-or-compute over a store; `store=None` keeps nothing but still joins concurrent misses."""

    def __init__(self, store: BaseStore | None) -> None:
        self.unkept: Exception | None = None
        """Why the latest summary that could not be kept was not."""
        self._store = store
        self._flights: dict[str, Future[Value]] = {}
        self._lock = threading.Lock()

    def get(self, key: str) -> Value | None:
        """What is kept under `key`."""
        if self._store is None:
            return None
        try:
            item = self._store.get(NAMESPACE, key)
        except Exception as error:  # a store that cannot be read costs time, not the run
            _log.warning("the summary cache cannot be read: %s", error)
            return None
        return None if item is None else dict(item.value)

    def get_or_compute(self, key: str, compute: Callable[[], Value]) -> tuple[Value, bool]:
        """The value of `key`, and whether it was there (or on its way) already.

        A failure of `compute` reaches its own caller; whoever waited for it tries again.
        """
        while True:
            flight, leads = self._board(key)
            if not leads:
                try:
                    return dict(in_time(flight).result()), True
                except (Exception, CancelledError):
                    check()  # this one's own time is up
                    continue
            try:
                # Looked up under way, not before: no other flight can have landed in between.
                found = self.get(key)
                value = compute() if found is None else found
                if found is None:
                    self._keep(key, value)
            except BaseException as error:
                self._land(key, flight, error)
                raise
            self._land(key, flight, value)
            return dict(value), found is not None

    async def aget_or_compute(
        self, key: str, compute: Callable[[], Awaitable[Value]]
    ) -> tuple[Value, bool]:
        """As `get_or_compute`. Waiting holds no thread; cancelling a waiter disturbs nobody."""
        while True:
            flight, leads = self._board(key)
            if not leads:
                try:
                    waiting: asyncio.Future[Value] = asyncio.wrap_future(flight)
                    return dict(await asyncio.shield(waiting)), True
                except Exception:
                    continue
                except asyncio.CancelledError:
                    if flight.cancelled() and not _cancelling():
                        continue
                    raise
            try:
                found = await asyncio.to_thread(self.get, key)
                value = await compute() if found is None else found
                if found is None:
                    await asyncio.to_thread(self._keep, key, value)
            except BaseException as error:
                self._land(key, flight, error)
                raise
            self._land(key, flight, value)
            return dict(value), found is not None

    def _board(self, key: str) -> tuple[Future[Value], bool]:
        with self._lock:
            if key in self._flights:
                return self._flights[key], False
            flight: Future[Value] = Future()
            self._flights[key] = flight
            return flight, True

    def _land(self, key: str, flight: Future[Value], outcome: Value | BaseException) -> None:
        with self._lock:
            del self._flights[key]
        if not isinstance(outcome, BaseException):
            flight.set_result(outcome)
        elif isinstance(outcome, Exception):
            flight.set_exception(outcome)
        else:  # cancelled or interrupted: its waiters compute for themselves
            flight.set_exception(RuntimeError("the computation was stopped"))

    def _keep(self, key: str, value: Value) -> None:
        if self._store is None:
            return
        try:
            self._store.put(NAMESPACE, key, value, index=False)
        except Exception as error:  # a full disk must not cost the run its rating
            self.unkept = error
            _log.warning("a summary could not be kept: %s", error)


def _cancelling() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
