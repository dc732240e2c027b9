"""Time travel: a new run that begins where an earlier one stood, with something changed.

    fork = recommender.fork("monday", {"rationale": "They dislike long records."})
    recommender.resume(fork)

A fork is a thread of its own with one state, that of the earlier run after the step. What happened
until then is in it, what it cost too; the earlier run stays as it is.
"""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

from langgraph.types import StateSnapshot

from r4r_graph import runs
from r4r_graph.errors import InputError
from r4r_graph.graph.state import Json, check_knobs

if TYPE_CHECKING:
    from r4r_graph.graph import RatingGraph


class Changes(TypedDict, total=False):
    """What a fork changes."""

    rationale: str
    """Stands in the place of all rationales of the run, as if a person had edited them."""
    without: Sequence[tuple[str, str]]
    """Reviews, as (user id, item id), that are left out of both histories; the averages, over all
    earlier ratings, stay as they are."""
    knobs: Mapping[str, Any]
    """Fields of `Knobs`, but for `history`: that is read before anything can be forked."""


_ORDER = ("recall", "summarizer", "reasoner", "predictor")

STEPS = ("recall", "summarizer", "reasoner", "human", "predictor")
"""Steps after which a run can be forked."""

_LATEST = {
    **dict.fromkeys(("seed", "temperature", "top_p"), "summarizer"),
    **dict.fromkeys(("rationale", "without", "ask", "readout", "record"), "reasoner"),
}
"""The last step after which a change still has an effect; the predictor where none is named."""

_DEFAULT = {"rationale": "reasoner", "readout": "reasoner", "influence": "predictor"}
"""After which step a change is made unless that is said; the summarizer where none is named, so
that a rationale is written anew."""


class _Point(NamedTuple):
    number: int
    """The step's number in LangGraph's count."""
    node: str
    state: StateSnapshot
    """The run's state after it."""


def fork(
    graph: RatingGraph,
    thread_id: str,
    changes: Changes,
    *,
    at: str | int | None = None,
    new: str | None = None,
) -> str:
    """A new run out of an earlier one: its state after a step, changed.

    Args:
        graph: the graph that kept the run.
        thread_id: the run.
        changes: what is changed; with nothing changed, the fork repeats the rest of the run.
        at: the step after which it begins: a step's name (its last time), or its number in
            LangGraph's count, which `r4r show` prints. None: after the summarizer, so that a
            rationale is written anew; where the rationale or the read-out alone is changed, after
            the reasoner; where the influence alone is asked for, after the predictor; or before
            that, where the run never came so far.
        new: the new run's thread id; None: a random one.

    Returns:
        The new run's thread id. Nothing has run yet: resume it.

    Raises:
        UnknownRunError: there is no such run.
        InputError: it never came past that step, or the step is too late for the change; the
            review is in neither history; a change is of another type.
        SettingError: an unknown knob, or one out of range; the graph keeps no runs.
    """
    states = runs.history(graph, thread_id)
    names = _checked(changes)
    point = _point(states, at, names, thread_id)
    late = [name for name in names if _position(point) > _ORDER.index(_latest(name))]
    if late:
        raise InputError(
            f"a fork after {point.node} is too late to change {', '.join(late)}: that takes a fork "
            f"after {min(map(_latest, late), key=_ORDER.index)} or earlier"
        )
    values, node = _changed(point, changes)
    new = str(uuid.uuid4()) if new is None else new
    config = runs.thread(new)
    case = values["case"]
    about = runs.labels(case["user_id"], case["item_id"], case["knobs"])
    config["metadata"] = {
        **runs.labels_of(states[0]),
        **about,
        runs.FORKED_FROM: thread_id,
        runs.FORKED_AFTER: node,
    }
    graph.update_state(config, values, as_node=node)
    if not graph.get_state(runs.thread(new)).next:
        runs.delete_run(graph, new)
        raise InputError(
            f"after {node}, run {thread_id} has nothing left to do: fork it after an earlier step"
        )
    return new


def _checked(changes: Changes) -> list[str]:
    """The names of all that is changed, each knob by itself."""
    known = Changes.__annotations__
    unknown = sorted(map(str, set(changes) - set(known)))
    if unknown:
        raise InputError(f"cannot change {', '.join(unknown)}; what can be is {', '.join(known)}")
    rationale, without = changes.get("rationale"), changes.get("without", ())
    if "rationale" in changes and not (isinstance(rationale, str) and rationale.strip()):
        raise InputError("a changed rationale is a text that is not blank")
    pairs = isinstance(without, list | tuple) and all(
        isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(i, str) for i in pair)
        for pair in without
    )
    if not pairs:
        raise InputError("the reviews to leave out are a list of pairs (user id, item id)")
    knobs = changes.get("knobs", {})
    if not isinstance(knobs, Mapping) or not all(isinstance(name, str) for name in knobs):
        raise InputError("changed knobs are a mapping of names to values")
    if "history" in knobs:
        raise InputError("histories are read before a run can be forked; start a new one instead")
    return [name for name in ("rationale", "without") if changes.get(name)] + list(knobs)


def _latest(name: str) -> str:
    return _LATEST.get(name, "predictor")


def _point(
    states: Sequence[StateSnapshot], at: str | int | None, names: Sequence[str], thread_id: str
) -> _Point:
    """Where the run came past a step; unless one is named, past the latest that suits what is
    changed."""
    points = _points(states)
    if isinstance(at, bool) or (isinstance(at, str) and at not in STEPS):
        raise InputError(f"cannot fork at {at!r}; steps are {', '.join(STEPS)}, or a number")
    found = [point for point in points if at in (point.node, point.number)]
    if at is None:
        steps = [_ORDER.index(_DEFAULT.get(name, "summarizer")) for name in names]
        latest = min(steps, default=_ORDER.index("summarizer"))
        found = [point for point in points if _position(point) <= latest]
    elif at == "summarizer" and not found:  # nothing had to be summarized
        found = [point for point in points if point.node == "recall"]
    if not found:
        past = ", ".join(f"{point.number} {point.node}" for point in points) or "none"
        where = "" if at is None else f" at {at!r}"
        raise InputError(
            f"run {thread_id} cannot be forked{where}; steps that it came past: {past}"
        )
    return found[-1]


def _points(states: Sequence[StateSnapshot]) -> list[_Point]:
    """The run's states after steps at which it can be forked."""
    first = (states[0].metadata or {}).get(runs.FORKED_AFTER, "")
    nodes = [first, *(before.next[0] if before.next else "" for before in states[:-1])]
    return [
        _Point((state.metadata or {}).get("step", 0), node, state)
        for node, state in zip(nodes, states, strict=True)
        if node in STEPS
    ]


def _position(point: _Point) -> int:
    """How far the run had come, as a place in `_ORDER`."""
    if point.node == "human":
        answers = point.state.values["answers"]
        return _ORDER.index("reasoner" if answers[-1]["about"] == "rationale" else "predictor")
    return _ORDER.index(point.node)


def _changed(point: _Point, changes: Changes) -> tuple[Json, str]:
    """The state with the changes, and after which step it is put."""
    values = {name: value for name, value in point.state.values.items() if value is not None}
    node, knobs = point.node, dict(changes.get("knobs", {}))
    for user_id, item_id in changes.get("without", ()):
        values = _without(values, user_id, item_id)
    if "rationale" in changes:
        if "summarizer" in point.state.next:
            raise InputError(
                "a fork after recall is too early to change rationale: the reviews are not "
                "summarized yet"
            )
        text = changes["rationale"].strip()
        edit = {"about": "rationale", "action": "edit", "rationales": [text]}
        values["rationales"] = [{"text": text, "seed": 0, "edited": True}]
        values["answers"] = [*values["answers"], edit]
        values["distributions"] = []
        knobs = {"rationales": 1, **knobs}  # it is to stand alone
        node = "human"
    settings = check_knobs({**values["case"]["knobs"], **knobs})
    values["case"] = {**values["case"], "knobs": asdict(settings)}
    return values, node


def _without(values: Json, user_id: str, item_id: str) -> Json:
    """The state without the reviews of a pair. What was rated with them is rated again."""
    kept: Json = {}
    for side in ("user_reviews", "item_reviews"):
        kept[side] = [
            entry
            for entry in values[side]
            if (entry["review"]["user_id"], entry["review"]["item_id"]) != (user_id, item_id)
        ]
    if all(len(kept[side]) == len(values[side]) for side in kept):
        entries = itertools.chain(values["user_reviews"], values["item_reviews"])
        named = [f"{e['review']['user_id']}/{e['review']['item_id']}" for e in entries]
        more = f" and {len(named) - 10} more" if len(named) > 10 else ""
        raise InputError(
            f"no review of {item_id!r} by {user_id!r} is in the histories of this run; it read "
            f"{', '.join(named[:10])}{more}"
        )
    keys = {entry["key"] for side in kept.values() for entry in side}
    summaries = {key: summary for key, summary in values["summaries"].items() if key in keys}
    return {**values, **kept, "summaries": summaries, "distributions": []}
