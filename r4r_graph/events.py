"""What a run tells on its way, and a person's part in it: the events of `Recommender.stream`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from langgraph.types import StreamMode

from r4r_graph.errors import RunPausedError
from r4r_graph.schema import Recommendation

Part = TypeVar("Part")


@dataclass(frozen=True, slots=True)
class SummaryProgress:
    """One earlier review has been summarized."""

    user_id: str
    item_id: str
    cached: bool
    """Whether its summary was there already."""
    done: int
    """Of those summarized since the run began or was resumed."""
    of: int


@dataclass(frozen=True, slots=True)
class RationaleToken:
    """A piece of a rationale, as it is written."""

    text: str
    rationale: int
    """Which one of the run's rationales, from 0; several are written at the same time. What
    replaces a refused one has its number."""


@dataclass(frozen=True, slots=True)
class Question:
    """The run waits for a person; see `r4r_graph.graph.human`."""

    thread_id: str
    """Resume this one."""
    asked: Mapping[str, Any]
    """`about` (rationale or rating), the `answers` allowed, the pair, the `rationales`, and the
    `rating`, its `confidence` and `distribution` where it is about that."""


Event = SummaryProgress | RationaleToken | Question | Recommendation
"""What `Recommender.stream` yields; the recommendation, or a question to a person, comes last."""

Answer = str | Mapping[str, Any]
"""What a person says: `"accept"`, `"refuse"`, `{"action": "edit", "rationale": ...}` or
`{"action": "rate", "rating": ...}`."""

MODES: list[StreamMode] = ["messages", "custom", "values"]
"""The modes of a graph's stream that `Events` reads."""


class Events:
    """Translates the parts of a graph's stream (version v2)."""

    def __init__(self, thread_id: str) -> None:
        self._thread_id = thread_id
        self._state: Mapping[str, Any] = {}
        self._interrupts: Sequence[Any] = ()
        self._summaries = 0

    def of(self, part: Any) -> Iterator[Event]:
        """What a part of the stream tells."""
        if part["type"] == "values":
            self._state = part["data"]
            self._interrupts = part.get("interrupts", ())
        elif part["type"] == "custom" and part["data"].get("event") == "summary":
            told = part["data"]
            self._summaries += 1
            yield SummaryProgress(
                told["user_id"], told["item_id"], told["cached"], self._summaries, told["of"]
            )
        elif part["type"] == "messages":
            chunk, about = part["data"]
            if chunk.text:
                yield RationaleToken(str(chunk.text), about["rationale"])

    def last(self) -> Event:
        """The recommendation, or the question that the run waits with."""
        try:
            return ended(self._state, self._interrupts, self._thread_id)
        except RunPausedError as pause:
            return Question(pause.thread_id, pause.question)


async def read_by_task(source: AsyncIterator[Part]) -> AsyncGenerator[Part]:
    """What `source` yields, read by a task of its own that is cancelled where the reader leaves.

    Who leaves a generator half read leaves its closing to a task that asyncio makes at garbage
    collection. Closing a graph's stream has to wait for its nodes, and the loop's end may overtake
    that ("Task was destroyed but it is pending!"). Closing this one waits for nothing; whoever
    reads it in a generator closes it there (`contextlib.aclosing`).
    """
    parts: asyncio.Queue[Part | None] = asyncio.Queue()

    async def read() -> None:
        async for part in source:
            parts.put_nowait(part)

    def finished(done: asyncio.Task[None]) -> None:
        """Behind the last part, and whether or not reading failed."""
        if not done.cancelled():
            done.exception()  # looked at: a reader who has left will not ask for it
        parts.put_nowait(None)

    task = asyncio.create_task(read())
    task.add_done_callback(finished)
    try:
        while (part := await parts.get()) is not None:
            yield part
        await task
    finally:
        task.cancel()


def ended(state: Any, interrupts: Sequence[Any], thread_id: str) -> Recommendation:
    """The recommendation that a run ended with.

    Raises:
        RunPausedError: it waits for a person.
    """
    if interrupts:
        raise RunPausedError(interrupts[0].value, thread_id)
    return Recommendation.from_dict(state["recommendation"])
