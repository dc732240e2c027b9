"""A run's time limit, put around the steps of the graph.

When a run must be done by is in LangGraph's config of that run, which hands it down to every step
and to graphs inside. It is in no checkpoint: a run that is resumed has its whole time again.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar, cast

from langchain_core.runnables import RunnableConfig
from langgraph.config import get_config

from r4r_graph.graph.state import knobs
from r4r_graph.time_limits import TimeLimit, limited_to

GivenT = TypeVar("GivenT")
MadeT = TypeVar("MadeT")

_UNTIL = "__r4r_until"  # LangGraph copies no name that begins like this into checkpoints


def starting_now(config: RunnableConfig | None, seconds: float | None) -> RunnableConfig | None:
    """The config of a run that begins now and may take so long."""
    if seconds is None:
        return config
    settings = dict((config or {}).get("configurable", {}))
    until = time.monotonic() + seconds
    return cast(RunnableConfig, {**(config or {}), "configurable": {**settings, _UNTIL: until}})


def limited(step: str, work: Callable[[GivenT], MadeT]) -> Callable[[GivenT], MadeT]:
    """The step, which waits no longer than its run may take."""

    @functools.wraps(work)
    def run(given: GivenT) -> MadeT:
        with limited_to(_limit(step)):
            return work(given)

    return run


def alimited(
    step: str, work: Callable[[GivenT], Awaitable[MadeT]]
) -> Callable[[GivenT], Awaitable[MadeT]]:
    """As `limited`; what the step awaits is cancelled."""

    @functools.wraps(work)
    async def run(given: GivenT) -> MadeT:
        limit = _limit(step)
        if limit is None:
            return await work(given)
        if not limit.left:
            raise limit.error()
        scope = asyncio.timeout(limit.left)
        try:
            async with scope:
                return await work(given)
        except TimeoutError:
            if scope.expired():
                raise limit.error() from None
            raise

    return run


def _limit(step: str) -> TimeLimit | None:
    """That of the run. One that was begun without `starting_now` (the graph itself was called) has
    none that all its steps share: each of them then has the whole time."""
    seconds = knobs().timeout
    if seconds is None:
        return None
    settings: dict[str, Any] = dict(get_config().get("configurable", {}))
    return TimeLimit(seconds, settings.get(_UNTIL, time.monotonic() + seconds), step)
