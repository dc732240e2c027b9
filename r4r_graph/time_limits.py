"""How long a run may take: where it must be done by, and waiting no longer than that.

A run's limit is `Knobs.timeout`. Each of its steps waits for the engine until the run's time is up,
then takes its requests back, which frees the engine at its next token. What is computed in this
process between two requests (prompts, reads of the review table) is not broken off.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TypeVar

from r4r_graph.errors import RunTimeoutError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class TimeLimit:
    """A run's limit, as one of its steps sees it."""

    seconds: float
    """How long the whole run may take."""
    until: float
    """When its time is up, on the clock of `time.monotonic`."""
    step: str
    """The step that waits."""

    @property
    def left(self) -> float:
        """Seconds that are left; 0 where there are none."""
        return max(0.0, self.until - time.monotonic())

    def error(self) -> RunTimeoutError:
        """What a run ends with whose time is up."""
        return RunTimeoutError(self.seconds, self.step)


_current: ContextVar[TimeLimit | None] = ContextVar("r4r_time_limit", default=None)


@contextmanager
def limited_to(limit: TimeLimit | None) -> Iterator[None]:
    """Whatever waits inside, in this thread, waits no longer.

    Raises:
        RunTimeoutError: the time is up before it begins.
    """
    before = _current.set(limit)
    try:
        check()
        yield
    finally:
        _current.reset(before)


def check() -> None:
    """Nothing, while there is time.

    Raises:
        RunTimeoutError: the time is up.
    """
    limit = _current.get()
    if limit is not None and not limit.left:
        raise limit.error()


def time_left() -> float | None:
    """Seconds that are left to whoever waits here; None where there is no limit."""
    limit = _current.get()
    return None if limit is None else limit.left


def in_time(future: Future[T]) -> Future[T]:
    """The future, when it is done.

    Raises:
        RunTimeoutError: the time is up; whoever owns the future cancels it.
    """
    limit = _current.get()
    try:
        future.exception(None if limit is None else limit.left)
    except TimeoutError:
        if limit is not None and not future.done():
            raise limit.error() from None
    except CancelledError:
        pass
    return future
