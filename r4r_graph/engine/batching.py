"""The micro-batcher: requests from many threads and coroutines, joined into few forward passes.

One worker thread owns the model. Whenever the model is free it takes, from all that is waiting,
the requests that can share a pass with the oldest one (same verb, adapter and output format),
nearest in length first, as many as the token budget allows. While it computes, the queue fills:
under load the batches grow by themselves. A fan-out that announces its size (`siblings`) is waited
for, a few milliseconds at most.

Futures are never marked as running, so `cancel()` works until the result is there; the backend
asks `Row.cancelled()` at each token.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import logging
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, cast

from r4r_graph.engine.base import (
    EngineInfo,
    GenerateRequest,
    GenerateResult,
    OnText,
    RateRequest,
    RateResult,
    TokenMeter,
)
from r4r_graph.errors import EngineBusyError, EngineFailure, R4RError
from r4r_graph.time_limits import check, in_time, time_left

_log = logging.getLogger(__name__)

_MOST_LINGERS = 10
"""The oldest request waits for its siblings so many times as long as they are apart, at most."""

Request = GenerateRequest | RateRequest
Result = GenerateResult | RateResult


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request that passed the backend's checks, tokenized."""

    request: Request
    ids: tuple[int, ...]
    """Prompt token ids."""
    key: Hashable
    """Requests with equal keys may share a forward pass."""
    cost: int
    """Token positions it needs: prompt and longest answer."""
    context: int = 0
    """Tokens before the task, which another prompt may begin with too; 0 if not known."""


@dataclass(slots=True)
class Row:
    """One prepared request inside a running batch, as the backend sees it."""

    prepared: Prepared
    cancelled: Callable[[], bool]
    show: Callable[[str], None] | None = None
    """Takes the answer's text so far; None when nobody listens."""


class Backend(Protocol):
    """What computes a batch. Only the batcher's one thread calls `generate` and `rate`."""

    @property
    def info(self) -> EngineInfo: ...  # noqa: D102
    @property
    def meter(self) -> TokenMeter: ...  # noqa: D102

    def fingerprint(self, request: GenerateRequest) -> str:
        """See `Engine.fingerprint`."""
        ...

    def prepare(self, request: Request) -> Prepared:
        """Check and tokenize, on the caller's thread.

        Raises:
            RequestError: the request cannot be served.
        """
        ...

    def generate(self, rows: Sequence[Row]) -> Sequence[GenerateResult | Exception]:
        """One batch of texts; a row's own failure takes its place."""
        ...

    def rate(self, rows: Sequence[Row]) -> Sequence[RateResult | Exception]:
        """One batch of rating distributions."""
        ...

    def close(self) -> None:
        """Free what is held."""
        ...


@dataclass(slots=True, eq=False)
class _Job:
    prepared: Prepared
    future: Future[Any]
    on_text: OnText | None
    since: float = field(default_factory=time.monotonic)
    shown: int = 0
    listener_error: Exception | None = None
    dropped: bool = False

    def row(self) -> Row:
        return Row(self.prepared, self._stopped, self._show if self.on_text else None)

    def _stopped(self) -> bool:
        return self.future.done() or self.listener_error is not None

    def _show(self, text: str) -> None:
        """Pass on what is new; a batch that is computed again shows nothing twice."""
        new = text[self.shown :]
        if not new or self._stopped() or self.on_text is None:
            return
        self.shown = len(text)
        try:
            self.on_text(new)
        except Exception as error:
            self.listener_error = error

    def finish(self, outcome: Result | BaseException) -> None:
        error = self.listener_error or (outcome if isinstance(outcome, BaseException) else None)
        try:
            if error is None:
                self.future.set_result(outcome)
            elif isinstance(error, R4RError) or error is self.listener_error:
                self.future.set_exception(error)
            else:
                from r4r_graph.chat_models import public

                # Kept with the run, and printed: not with a key that another's error may tell.
                reason = public(f"{type(error).__name__}: {error}")
                failure = EngineFailure(f"the engine failed: {reason}")
                failure.__cause__ = error
                self.future.set_exception(failure)
        except InvalidStateError:  # cancelled or closed meanwhile
            self.drop()

    def drop(self) -> None:
        """Tell `concurrent.futures.wait` and its like of a cancelled future."""
        if self.future.cancelled() and not self.dropped:
            self.dropped = True
            with contextlib.suppress(RuntimeError):  # closed at the same moment
                self.future.set_running_or_notify_cancel()


class BatchingEngine:
    """An `Engine` over a `Backend`.

    Args:
        backend: computes the batches.
        max_batch_tokens: longest row times rows, padding included.
        max_rows: rows in one batch.
        max_pending: requests that may wait; beyond that, callers wait (back-pressure).
        patience: seconds a caller waits for a place in the queue before `EngineBusyError`.
        linger: seconds the engine waits for announced siblings.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        max_batch_tokens: int = 32768,
        max_rows: int = 32,
        max_pending: int = 4096,
        patience: float = 600.0,
        linger: float = 0.03,
    ) -> None:
        self._backend = backend
        self._max_batch_tokens = max_batch_tokens
        self._max_rows = max_rows
        self._max_pending = max_pending
        self._patience = patience
        self._linger = linger
        self._queue: deque[_Job] = deque()
        self._running: Sequence[_Job] = ()
        self._lock = threading.Lock()
        self._arrived = threading.Condition(self._lock)
        self._room = threading.Condition(self._lock)
        self._async_waiters: deque[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = deque()
        self._closed = False
        self._worker: threading.Thread | None = None
        self._at_exit = partial(_call, weakref.WeakMethod(self.close))  # one of its own
        atexit.register(self._at_exit)

    @property
    def info(self) -> EngineInfo:
        """Which weights answer."""
        return self._backend.info

    @property
    def meter(self) -> TokenMeter:
        """Token arithmetic."""
        return self._backend.meter

    def fingerprint(self, request: GenerateRequest) -> str:
        """See `Engine.fingerprint`."""
        return self._backend.fingerprint(request)

    # Callers' side ---------------------------------------------------------------------------

    def submit(
        self, request: GenerateRequest, on_text: OnText | None = None
    ) -> Future[GenerateResult]:
        """Queue one request; see `Engine.submit`."""
        return cast("Future[GenerateResult]", self._submit(request, on_text))

    async def asubmit(
        self, request: GenerateRequest, on_text: OnText | None = None
    ) -> GenerateResult:
        """Queue one request and await it; see `Engine.asubmit`."""
        return cast(GenerateResult, await self._asubmit(request, on_text))

    def generate(
        self, requests: Sequence[GenerateRequest], *, return_exceptions: bool = False
    ) -> list[GenerateResult]:
        """See `Engine.generate`."""
        return cast("list[GenerateResult]", self._gather(requests, return_exceptions))

    def rate(
        self, requests: Sequence[RateRequest], *, return_exceptions: bool = False
    ) -> list[RateResult]:
        """See `Engine.rate`."""
        return cast("list[RateResult]", self._gather(requests, return_exceptions))

    async def agenerate(
        self, requests: Sequence[GenerateRequest], *, return_exceptions: bool = False
    ) -> list[GenerateResult]:
        """See `Engine.agenerate`."""
        return cast("list[GenerateResult]", await self._agather(requests, return_exceptions))

    async def arate(
        self, requests: Sequence[RateRequest], *, return_exceptions: bool = False
    ) -> list[RateResult]:
        """See `Engine.arate`."""
        return cast("list[RateResult]", await self._agather(requests, return_exceptions))

    def close(self) -> None:
        """Stop the worker; what is queued or running ends with an error. May be called twice."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            left, self._queue = [*self._queue, *self._running], deque()
            self._arrived.notify_all()
            self._wake_waiters()
        for job in left:
            job.finish(EngineFailure("the engine was closed"))
        if self._worker is not None and self._worker is not threading.current_thread():
            self._worker.join(timeout=60)
        atexit.unregister(self._at_exit)
        self._backend.close()

    def __enter__(self) -> BatchingEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _gather(self, requests: Sequence[Request], return_exceptions: bool) -> list[Any]:
        futures: list[Future[Any]] = []
        try:
            futures.extend(self._submit(request, None) for request in requests)
            errors = [in_time(future).exception() for future in futures]
        except BaseException:  # Ctrl-C, or the run's time is up: free the engine
            for future in futures:
                future.cancel()
            raise
        return _settle(
            [e or f.result() for e, f in zip(errors, futures, strict=True)], return_exceptions
        )

    async def _agather(self, requests: Sequence[Request], return_exceptions: bool) -> list[Any]:
        tasks = [self._asubmit(request, None) for request in requests]
        return _settle(await asyncio.gather(*tasks, return_exceptions=True), return_exceptions)

    def _submit(self, request: Request, on_text: OnText | None) -> Future[Any]:
        job = self._job(request, on_text)
        deadline = time.monotonic() + self._patience
        with self._lock:
            while not job.future.done() and not self._offer(job):
                patience, left = deadline - time.monotonic(), time_left()
                if not self._room.wait(patience if left is None else min(patience, left)):
                    check()
                    job.finish(self._busy())
        return job.future

    async def _asubmit(self, request: Request, on_text: OnText | None) -> Any:
        job = self._job(request, on_text)
        deadline = time.monotonic() + self._patience
        loop = asyncio.get_running_loop()
        while not job.future.done():
            with self._lock:
                if self._offer(job):
                    break
                room: asyncio.Future[None] = loop.create_future()
                self._async_waiters.append((loop, room))
            try:
                async with asyncio.timeout(deadline - time.monotonic()):
                    await room
            except TimeoutError:
                job.finish(self._busy())
        # Cancelling this task cancels the job's future, which frees the engine.
        return await asyncio.wrap_future(job.future)

    def _job(self, request: Request, on_text: OnText | None) -> _Job:
        """A job, already failed where its request is at fault: the error reaches its caller."""
        try:
            return _Job(self._backend.prepare(request), Future(), on_text)
        except Exception as error:
            job = _Job(Prepared(request, (), None, 0), Future(), on_text)
            job.finish(error)
            return job

    def _busy(self) -> EngineBusyError:
        return EngineBusyError(
            f"{self._max_pending} requests are waiting and none ended in {self._patience:g} s; "
            "send fewer at a time, or try again later"
        )

    def _offer(self, job: _Job) -> bool:
        """Queue the job if there is room (under the lock)."""
        if self._closed:
            job.finish(EngineFailure("the engine was closed"))
            return True
        if len(self._queue) >= self._max_pending:
            return False
        self._queue.append(job)
        if self._worker is None:
            self._worker = threading.Thread(target=self._work, name="r4r-engine", daemon=True)
            self._worker.start()
        self._arrived.notify()
        return True

    def _wake_waiters(self) -> None:
        """Tell everyone who waits for room (under the lock)."""
        self._room.notify_all()
        while self._async_waiters:
            loop, room = self._async_waiters.popleft()
            with contextlib.suppress(RuntimeError):  # that loop is closed
                loop.call_soon_threadsafe(_resolve, room)

    # The worker's side -----------------------------------------------------------------------

    def _work(self) -> None:
        while True:
            with self._lock:
                while not self._queue and not self._closed:
                    self._arrived.wait()
                if self._closed:
                    return
                self._await_siblings()
                jobs = self._running = self._take()
                self._wake_waiters()
            try:
                self._execute(jobs)
            except BaseException as error:  # a dead worker would leave all callers waiting
                for job in jobs:
                    job.finish(error)
            self._running = jobs = []

    def _await_siblings(self) -> None:
        """Linger while the oldest request's announced siblings are still on their way: as long as
        one comes soon after the other, for rendering twenty prompts takes a while."""
        head = self._queue[0]
        key, expected = head.prepared.key, min(head.prepared.request.siblings, self._max_rows)
        while not self._closed and self._queue and self._queue[0] is head:
            arrived = [job.since for job in self._queue if job.prepared.key == key]
            until = min(max(arrived) + self._linger, head.since + _MOST_LINGERS * self._linger)
            left = until - time.monotonic()
            if len(arrived) >= expected or left <= 0:
                return
            self._arrived.wait(left)

    def _take(self) -> list[_Job]:
        """The oldest job and those that fit a batch with it, out of the queue (under the lock)."""
        for job in [job for job in self._queue if job.future.cancelled()]:
            self._queue.remove(job)
            job.drop()
        if not self._queue:
            return []
        head = self._queue[0]
        peers = [job for job in self._queue if job.prepared.key == head.prepared.key]
        ordered = sorted(peers, key=lambda job: len(job.prepared.ids))
        low = high = ordered.index(head)
        # Prompts are padded to the longest one, and answers behind them to the longest budget.
        prompt = len(head.prepared.ids)
        answer = head.prepared.cost - prompt
        # Grow a window of similar lengths around the oldest job: little padding, nobody starves.
        while high - low + 1 < self._max_rows:
            size = len(head.prepared.ids)
            below = size - len(ordered[low - 1].prepared.ids) if low > 0 else None
            above = len(ordered[high + 1].prepared.ids) - size if high + 1 < len(ordered) else None
            if below is None and above is None:
                break
            go_down = above is None or (below is not None and below <= above)
            added = ordered[low - 1 if go_down else high + 1].prepared
            prompt = max(prompt, len(added.ids))
            answer = max(answer, added.cost - len(added.ids))
            if (prompt + answer) * (high - low + 2) > self._max_batch_tokens:
                break
            low, high = (low - 1, high) if go_down else (low, high + 1)
        batch = ordered[low : high + 1]
        chosen = set(map(id, batch))
        self._queue = deque(job for job in self._queue if id(job) not in chosen)
        return batch

    def _execute(self, jobs: list[_Job]) -> None:
        """Compute a batch. If it fails as a whole, halve it: the culprit ends up alone."""
        if self._closed or not jobs:
            return
        rows = [job.row() for job in jobs]
        outcomes: Sequence[Result | Exception]
        try:
            if isinstance(jobs[0].prepared.request, GenerateRequest):
                outcomes = self._backend.generate(rows)
            else:
                outcomes = self._backend.rate(rows)
        except Exception as error:
            if len(jobs) == 1:
                jobs[0].finish(error)
                return
            _log.warning("a batch of %d failed and is halved: %s", len(jobs), error)
            middle = len(jobs) // 2
            self._execute(jobs[:middle])
            self._execute(jobs[middle:])
            return
        for job, outcome in zip(jobs, outcomes, strict=True):
            job.finish(outcome)


def _call(close: weakref.WeakMethod[Callable[[], None]]) -> None:
    method = close()
    if method is not None:
        method()


def _resolve(room: asyncio.Future[None]) -> None:
    if not room.done():
        room.set_result(None)


def _settle(outcomes: Sequence[Any], return_exceptions: bool) -> list[Any]:
    """The outcomes, or the first error among them."""
    if not return_exceptions:
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome
    return list(outcomes)
