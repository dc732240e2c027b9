"""An engine whose work is done elsewhere: many requests in flight, one event loop on one thread.

A `RemoteBackend` answers one request at a time, asynchronously; `RemoteEngine` makes an `Engine`
of it. The loop is the engine's own, so that connections outlive their callers' loops and sync and
async callers share them. Waiting holds no thread, and cancelling a future drops its connection.
"""

from __future__ import annotations

import asyncio
import atexit
import threading
import weakref
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any, Protocol, TypeVar, cast

from r4r_graph.engine.base import (
    EngineInfo,
    GenerateRequest,
    GenerateResult,
    OnText,
    RateRequest,
    RateResult,
    TokenMeter,
)
from r4r_graph.errors import EngineFailure, R4RError
from r4r_graph.time_limits import in_time

T = TypeVar("T")

Show = Callable[[str], Awaitable[None]]
"""Takes each new piece of a text."""

AT_ONCE = 64
"""Requests in flight, where nothing else is said."""


class RemoteBackend(Protocol):
    """What answers single requests. Its coroutines run on the engine's loop."""

    @property
    def info(self) -> EngineInfo: ...  # noqa: D102
    @property
    def meter(self) -> TokenMeter: ...  # noqa: D102

    def fingerprint(self, request: GenerateRequest) -> str:
        """See `Engine.fingerprint`."""
        ...

    async def generate(self, request: GenerateRequest, show: Show | None) -> GenerateResult:
        """A text; cancelling stops it."""
        ...

    async def rate(self, request: RateRequest) -> RateResult:
        """A rating distribution."""
        ...

    async def close(self) -> None:
        """Free what is held."""
        ...


class LoopThread:
    """An event loop that runs on a thread of its own until it is stopped."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self.loop.run_forever, name="r4r-remote", daemon=True
        )
        self._thread.start()

    def submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Start it; cancelling the future cancels it."""
        return asyncio.run_coroutine_threadsafe(work, self.loop)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Its result, waited for."""
        future = self.submit(work)
        try:
            return future.result()
        except BaseException:  # e.g. Ctrl-C
            future.cancel()
            raise

    def stop(self) -> None:
        """End the thread; whatever still runs on it is lost."""
        self.loop.call_soon_threadsafe(self.loop.stop)
        if self._thread is not threading.current_thread():
            self._thread.join(timeout=60)
            self.loop.close()


class RemoteEngine:
    """An `Engine` over a `RemoteBackend`.

    Args:
        backend: answers single requests.
        thread: the loop that the backend was made for; None starts one.
        at_once: requests in flight; the others wait.
        shared: whether others use the loop, too: it then runs on when the engine is closed.
    """

    def __init__(
        self,
        backend: RemoteBackend,
        thread: LoopThread | None = None,
        *,
        at_once: int = AT_ONCE,
        shared: bool = False,
    ) -> None:
        self.backend = backend
        self._thread = thread or LoopThread()
        self._shared = shared
        self._tasks: set[asyncio.Task[Any]] = set()
        self._places = asyncio.Semaphore(at_once)
        self._lock = threading.Lock()
        self._closed = False
        self._at_exit = partial(_call, weakref.WeakMethod(self.close))
        atexit.register(self._at_exit)

    @property
    def info(self) -> EngineInfo:
        """Which weights answer."""
        return self.backend.info

    @property
    def meter(self) -> TokenMeter:
        """Token arithmetic."""
        return self.backend.meter

    def fingerprint(self, request: GenerateRequest) -> str:
        """See `Engine.fingerprint`."""
        return self.backend.fingerprint(request)

    def submit(
        self, request: GenerateRequest, on_text: OnText | None = None
    ) -> Future[GenerateResult]:
        """See `Engine.submit`."""
        return self._submit(self._generate, request, on_text)

    async def asubmit(
        self, request: GenerateRequest, on_text: OnText | None = None
    ) -> GenerateResult:
        """See `Engine.asubmit`."""
        return await asyncio.wrap_future(self.submit(request, on_text))

    def generate(
        self, requests: Sequence[GenerateRequest], *, return_exceptions: bool = False
    ) -> list[GenerateResult]:
        """See `Engine.generate`."""
        return _gathered(list(map(self.submit, requests)), return_exceptions)

    def rate(
        self, requests: Sequence[RateRequest], *, return_exceptions: bool = False
    ) -> list[RateResult]:
        """See `Engine.rate`."""
        futures = [self._submit(self.backend.rate, request) for request in requests]
        return _gathered(futures, return_exceptions)

    async def agenerate(
        self, requests: Sequence[GenerateRequest], *, return_exceptions: bool = False
    ) -> list[GenerateResult]:
        """See `Engine.agenerate`."""
        return await _agathered(list(map(self.submit, requests)), return_exceptions)

    async def arate(
        self, requests: Sequence[RateRequest], *, return_exceptions: bool = False
    ) -> list[RateResult]:
        """See `Engine.arate`."""
        futures = [self._submit(self.backend.rate, request) for request in requests]
        return await _agathered(futures, return_exceptions)

    def close(self) -> None:
        """Stop; what is in flight ends with an error. May be called twice."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        atexit.unregister(self._at_exit)
        self._thread.run(self._end())
        if not self._shared:
            self._thread.stop()

    def __enter__(self) -> RemoteEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _submit(self, work: Callable[..., Coroutine[Any, Any, T]], *arguments: Any) -> Future[T]:
        with self._lock:  # not between the end of the loop and its close
            if not self._closed:
                return self._thread.submit(self._guarded(work, arguments))
        failed: Future[T] = Future()
        failed.set_exception(_was_closed())
        return failed

    async def _guarded(
        self, work: Callable[..., Coroutine[Any, Any, T]], arguments: Sequence[Any]
    ) -> T:
        task = cast("asyncio.Task[Any]", asyncio.current_task())
        self._tasks.add(task)
        try:
            async with self._places:
                return await work(*arguments)
        except asyncio.CancelledError:
            if self._closed:
                raise _was_closed() from None
            raise
        except _ListenerError as error:
            raise error.reason from None
        except R4RError:
            raise
        except Exception as error:
            message = f"the engine failed: {type(error).__name__}: {error}"
            raise EngineFailure(message) from error
        finally:
            self._tasks.discard(task)

    async def _generate(self, request: GenerateRequest, on_text: OnText | None) -> GenerateResult:
        async def show(piece: str) -> None:
            await asyncio.sleep(0)  # a cancelling that is already on its way comes first
            try:
                cast(OnText, on_text)(piece)
            except Exception as error:
                raise _ListenerError(error) from None

        return await self.backend.generate(request, None if on_text is None else show)

    async def _end(self) -> None:
        await asyncio.sleep(0)  # what has not begun yet ends with an error, too
        left = list(self._tasks)
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
        await self.backend.close()


class _ListenerError(Exception):
    """Brings a listener's error past those who would take it for the backend's."""

    def __init__(self, reason: Exception) -> None:
        super().__init__(reason)
        self.reason = reason


def _was_closed() -> EngineFailure:
    return EngineFailure("the engine was closed")


def _gathered(futures: Sequence[Future[T]], return_exceptions: bool) -> list[T]:
    try:
        ended = [in_time(future).exception() or future.result() for future in futures]
    except BaseException:  # Ctrl-C, or the run's time is up: free the engine
        for future in futures:
            future.cancel()
        raise
    return _settled(ended, return_exceptions)


async def _agathered(futures: Sequence[Future[T]], return_exceptions: bool) -> list[T]:
    waiting = map(asyncio.wrap_future, futures)
    return _settled(await asyncio.gather(*waiting, return_exceptions=True), return_exceptions)


def _settled(ended: Sequence[T | BaseException], return_exceptions: bool) -> list[T]:
    failed = next((one for one in ended if isinstance(one, BaseException)), None)
    if failed is not None and not return_exceptions:
        raise failed
    return cast("list[T]", list(ended))


def _call(method: weakref.WeakMethod[Callable[[], None]]) -> None:
    if (call := method()) is not None:
        call()
