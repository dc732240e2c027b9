"""Runs that a checkpointer kept: found again, listed, gone on with, forgotten.

    with open_runs() as kept:  # SQLite; any LangGraph saver will do
        recommender = Recommender.load(..., checkpointer=kept)
        recommender.rate("mara", "glass-harbour", config=thread("monday"))
        fork = recommender.fork("monday", {"without": [("mara", "blue-rooms")]})
        recommender.resume(fork)

A run is a LangGraph thread. Everything it goes on with is in its state, its knobs too, so that it
can be resumed and forked in another process. What its checkpoints are labelled with (their
metadata) lets runs be listed without reading every state.

With an asynchronous saver, call these functions from a thread (`asyncio.to_thread(list_runs,
graph)`), as LangGraph asks for.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.graph import START
from langgraph.types import Command, StateSnapshot

from r4r_graph.errors import InputError, SettingError, UnknownRunError
from r4r_graph.graph import human
from r4r_graph.graph.state import Knobs
from r4r_graph.ratings import RatingScale

if TYPE_CHECKING:
    from langgraph.checkpoint.sqlite import SqliteSaver

    from r4r_graph.graph import RatingGraph

Status = Literal["finished", "waiting", "failed", "stopped"]

_PREFIX = "r4r_"
_USER, _ITEM, _KNOBS, _STARTED, _MODEL = (
    _PREFIX + name for name in ("user", "item", "knobs", "started", "model")
)
FORKED_FROM, FORKED_AFTER = _PREFIX + "forked_from", _PREFIX + "forked_after"
"""Labels of a fork: which run it is a fork of, and the step that it begins after."""


@dataclass(frozen=True, slots=True)
class RunInfo:
    """A kept run, in a line."""

    thread_id: str
    user_id: str
    item_id: str
    status: Status
    """`waiting` for a person; `stopped` where its process ended in its midst, or is at work."""
    started: float
    """Unix seconds."""
    rating: float | None
    """None before it has rated."""
    forked_from: str | None
    """The thread that it is a fork of."""


# Where they are kept -----------------------------------------------------------------------------


@contextmanager
def open_runs(path: Path | None = None) -> Iterator[SqliteSaver]:
    """A SQLite file of runs, by default in the cache folder; it is made on demand (mode 0600).

    Several processes may use one file: a writer waits for another one, up to 30 seconds. What is
    written survives the process at once, and a power cut from a moment later.

    Raises:
        SettingError: the file cannot be opened, read or written, or is no such database.
    """
    from langgraph.checkpoint.sqlite import SqliteSaver

    from r4r_graph.caches import open_database, runs_path, unusable

    def set_up(connection: sqlite3.Connection) -> SqliteSaver:
        saver = SqliteSaver(connection)
        saver.setup()
        return saver

    file, name = runs_path() if path is None else path.expanduser().absolute(), "file of runs"
    saver = open_database(file, name, set_up)
    with closing(saver.conn):
        try:
            yield saver
        except sqlite3.DatabaseError as error:
            if type(error) not in (sqlite3.DatabaseError, sqlite3.OperationalError):
                raise  # a fault of the program, not of the file
            raise unusable(file, name, error) from error


def thread(thread_id: str) -> RunnableConfig:
    """LangGraph's name of a run."""
    return {"configurable": {"thread_id": thread_id}}


def keeps_runs(graph: RatingGraph) -> bool:
    """Whether the graph has a checkpointer of its own."""
    return isinstance(graph.checkpointer, BaseCheckpointSaver)


# Labels ------------------------------------------------------------------------------------------


def labels(user_id: str, item_id: str, knobs: Mapping[str, Any]) -> dict[str, Any]:
    """What the checkpoints of a run that begins now are labelled with.

    Args:
        user_id: whose rating.
        item_id: of which item.
        knobs: those that it begins with.
    """
    return {_USER: user_id, _ITEM: item_id, _KNOBS: json.dumps(knobs), _STARTED: time.time()}


def model_label(card: Mapping[str, Any]) -> dict[str, Any]:
    """A label that tells models apart.

    Args:
        card: `Experts.model_card()`.
    """
    parts = {name: card[name] for name in ("base_digest", "adapters", "prompts")}
    packed = json.dumps(parts, sort_keys=True).encode()
    return {_MODEL: hashlib.blake2b(packed, digest_size=8).hexdigest()}


def labels_of(snapshot: StateSnapshot) -> dict[str, Any]:
    """What a kept state is labelled with."""
    metadata: Mapping[str, Any] = snapshot.metadata or {}
    return {name: value for name, value in metadata.items() if name.startswith(_PREFIX)}


def same_model(snapshot: StateSnapshot, card: Mapping[str, Any]) -> bool:
    """Whether the run began with this model; True where that is unknown."""
    return labels_of(snapshot).get(_MODEL) in (None, model_label(card)[_MODEL])


def knobs_of_run(snapshot: StateSnapshot) -> Knobs:
    """The knobs that a run began with."""
    case = snapshot.values.get("case")
    if case and not unread(snapshot):
        return Knobs(**case["knobs"])
    kept = labels_of(snapshot).get(_KNOBS)
    return Knobs(**json.loads(kept)) if isinstance(kept, str) else Knobs()


def unread(snapshot: StateSnapshot) -> bool:
    """Whether it stands before its reviews are read: what else is in its state then is of an
    earlier run on its thread."""
    return bool(snapshot.next) and set(snapshot.next) <= {START, "recall"}


# Finding -----------------------------------------------------------------------------------------


def find(graph: RatingGraph, thread_id: str) -> StateSnapshot:
    """How a run stands now.

    Raises:
        UnknownRunError: there is none under this id.
        SettingError: the graph keeps no runs.
    """
    _saver(graph)
    return _known(graph.get_state(thread(thread_id)), thread_id)


async def afind(graph: RatingGraph, thread_id: str) -> StateSnapshot:
    """As `find`."""
    _saver(graph)
    return _known(await graph.aget_state(thread(thread_id)), thread_id)


def history(graph: RatingGraph, thread_id: str) -> list[StateSnapshot]:
    """All states of a run, the earliest first; where a thread served several runs, of the latest.

    Raises:
        UnknownRunError, SettingError: as `find`.
    """
    states = [graph.get_state(find(graph, thread_id).config)]
    while (parent := states[-1].parent_config) is not None and not _begins(states[-1]):
        states.append(graph.get_state(parent))
    return states[::-1]


def list_runs(graph: RatingGraph, limit: int | None = None) -> list[RunInfo]:
    """The runs that the graph's checkpointer keeps, those whose thread began last first.

    Args:
        graph: the graph that kept them; other graphs' threads are left out.
        limit: how many at most; None: all.

    Raises:
        SettingError: the graph keeps no runs.
    """
    saver = _saver(graph)
    # Of each thread its first state alone: an input, or what a fork began with.
    filters: list[dict[str, Any]] = [{"step": -1}, {"source": "update"}]
    began: dict[str, float] = {}
    for kept in itertools.chain.from_iterable(saver.list(None, filter=each) for each in filters):
        about, when = kept.config["configurable"], _unix_seconds(kept.checkpoint["ts"])
        if not about.get("checkpoint_ns"):
            thread_id = str(about["thread_id"])
            began[thread_id] = min(when, began.get(thread_id, when))
    infos: list[RunInfo] = []
    for thread_id in sorted(began, key=lambda name: -began[name]):
        if limit is not None and len(infos) >= limit:
            break
        state = graph.get_state(thread(thread_id))
        if _is_ours(state):
            infos.append(info([state], thread_id, began=began[thread_id]))
    return infos


def info(states: Sequence[StateSnapshot], thread_id: str, *, began: float | None = None) -> RunInfo:
    """A run in a line.

    Args:
        states: its states, the earliest first; the last one alone is enough.
        thread_id: the run.
        began: when its thread did (unix seconds), for a run that no label says it of.
    """
    last = states[-1]
    values = {} if unread(last) else last.values
    case: Mapping[str, Any] = values.get("case") or {}
    labels = {**labels_of(states[0]), **labels_of(last)}
    return RunInfo(
        thread_id=thread_id,
        user_id=case.get("user_id") or labels.get(_USER) or last.values.get("user_id", ""),
        item_id=case.get("item_id") or labels.get(_ITEM) or last.values.get("item_id", ""),
        status=status(last),
        started=labels.get(_STARTED) or began or seconds(states[0]),
        rating=(values.get("recommendation") or {}).get("rating"),
        forked_from=labels.get(FORKED_FROM),
    )


def status(snapshot: StateSnapshot) -> Status:
    """How a run stands."""
    if snapshot.interrupts:
        return "waiting"
    if any(task.error for task in snapshot.tasks):
        return "failed"
    # Not `next`: that is empty, too, where all tasks of a step are done and the next is not begun.
    return "stopped" if snapshot.tasks else "finished"


def question(snapshot: StateSnapshot) -> Mapping[str, Any] | None:
    """What a waiting run asks; None where it does not wait."""
    asked: Mapping[str, Any] | None = snapshot.interrupts[0].value if snapshot.interrupts else None
    return asked


def seconds(snapshot: StateSnapshot) -> float:
    """When a state was kept (unix seconds)."""
    return _unix_seconds(snapshot.created_at or "1970-01-01T00:00:00+00:00")


def delete_run(graph: RatingGraph, thread_id: str) -> None:
    """Forget a run; in a file of `open_runs` every word of a review in it is overwritten.

    Raises:
        UnknownRunError, SettingError: as `find`.
    """
    from langgraph.checkpoint.sqlite import SqliteSaver

    find(graph, thread_id)
    saver = _saver(graph)
    saver.delete_thread(thread_id)
    if isinstance(saver, SqliteSaver):
        with saver.lock:
            # Else the words stay in SQLite's log until somebody writes enough more.
            saver.conn.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def _unix_seconds(moment: str) -> float:
    return datetime.fromisoformat(moment).timestamp()


def _saver(graph: RatingGraph) -> BaseCheckpointSaver[Any]:
    if not isinstance(graph.checkpointer, BaseCheckpointSaver):
        raise SettingError("this graph keeps no runs: build it with a checkpointer")
    return graph.checkpointer


def _known(snapshot: StateSnapshot, thread_id: str) -> StateSnapshot:
    if snapshot.created_at is None:
        raise UnknownRunError(f"no run is kept under thread {thread_id!r}; `r4r runs` lists them")
    if not _is_ours(snapshot):
        raise UnknownRunError(f"thread {thread_id!r} is kept, but is no run of the rating graph")
    return snapshot


def _is_ours(snapshot: StateSnapshot) -> bool:
    """Whether it is a run of the rating graph: one database may hold those of others."""
    case = snapshot.values.get("case")
    begun = isinstance(case, Mapping) and "knobs" in case
    return begun or "recall" in snapshot.next or _USER in (snapshot.metadata or {})


def _begins(snapshot: StateSnapshot) -> bool:
    return (snapshot.metadata or {}).get("source") == "input"


# Going on ----------------------------------------------------------------------------------------


def continuation(
    snapshot: StateSnapshot, thread_id: str, answer: Any, scale: RatingScale
) -> Command[Any] | None:
    """What the graph is called with to go on; None where a run goes on by itself.

    Raises:
        InputError: it is finished; an answer is missing, not asked for, or not allowed.
    """
    asked = question(snapshot)
    if asked is None:
        if status(snapshot) == "finished":
            raise InputError(f"run {thread_id} is finished; fork it to change something")
        if answer is not None:
            raise InputError(f"run {thread_id} asks nothing; resume it without an answer")
        return None
    plain = human.plain_answer(answer)
    wrong = "no answer was given" if answer is None else human.fault(plain, asked, scale)
    if wrong is not None:
        allowed = ", ".join(asked["answers"])
        raise InputError(
            f"run {thread_id} waits for an answer about the {asked['about']}: {wrong}; it takes "
            f"{allowed}"
        )
    return Command(resume=plain)
