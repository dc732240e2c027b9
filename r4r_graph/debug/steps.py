"""The steps of a kept run: when each ran, what it asked and heard, what it cost.

LangGraph keeps a state before every step, with the tasks that it led to and what each returned.
"""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from langgraph.graph import START
from langgraph.types import PregelTask, StateSnapshot

from r4r_graph import runs
from r4r_graph.graph.outcome import evidence_of
from r4r_graph.graph.state import Json
from r4r_graph.schema import ReviewAspects

Standing = Literal["done", "failed", "waiting", "pending", "earlier"]
"""How a step stands. `pending`: it was to run when the process ended; `earlier`: it ran before the
first state that is kept, such as in the run that this one was forked from."""

_COUNTS = ("calls", "cache_hits", "prompt_tokens", "completion_tokens")


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of a prompt."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Output:
    """What the model answered: a text, or a distribution."""

    text: str | None
    probabilities: tuple[float, ...]
    """One a scale value; empty where it is a text."""
    mass: float | None
    """Raw probability of the scale's tokens; None where it is a text."""
    prompt_tokens: int
    completion_tokens: int
    cached: bool = False


@dataclass(frozen=True, slots=True)
class Exchange:
    """A prompt, and every answer that was drawn for it."""

    prompt: tuple[Turn, ...]
    outputs: tuple[Output, ...]


@dataclass(frozen=True, slots=True)
class Step:
    """One node's work on one task."""

    node: str
    standing: Standing
    started: float | None
    """Unix seconds; None where it has not begun."""
    ended: float | None
    calls: int = 0
    cache_hits: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    review: ReviewAspects | None = None
    """The review that it summarized."""
    exchanges: tuple[Exchange, ...] = ()
    """Empty where the run kept no records, or the step asks no model."""
    answer: Mapping[str, Any] | None = None
    """What a person decided in it."""
    error: str = ""

    @property
    def seconds(self) -> float | None:
        """How long it took; None where it is not over."""
        return None if self.started is None or self.ended is None else self.ended - self.started


def busy_seconds(steps: Iterable[Step]) -> float:
    """Wall time during which any of the steps was at work."""
    spans = sorted(
        (step.started, step.ended)
        for step in steps
        if step.started is not None and step.ended is not None
    )
    total, until = 0.0, float("-inf")
    for started, ended in spans:
        total += max(0.0, ended - max(started, until))
        until = max(until, ended)
    return total


def added(update: Any, name: str) -> list[Json]:
    """What a step added to a list of the state (recall replaces them, and adds nothing)."""
    found = update.get(name) if isinstance(update, Mapping) else None
    return found if isinstance(found, list) else []


# Out of the states -------------------------------------------------------------------------------


def steps_of(states: Sequence[StateSnapshot], values: Json) -> tuple[Step, ...]:
    """The steps of a run, in their order.

    Args:
        states: its states, the earliest first.
        values: what it has found out so far; names the reviews.
    """
    reviews = _reviews(values)
    found: list[Step] = []
    first = states[0]
    if START not in first.next:
        spans, records = (first.values.get(name) or [] for name in ("spans", "records"))
        found += [Step("recall", "earlier", None, None), *_earlier(spans, records, reviews)]
    for state, after in itertools.zip_longest(states, states[1:]):
        read = iter(reviews)  # one task each, in their order
        for task in state.tasks:
            if task.name != START:
                review = reviews.get(next(read, "")) if task.name == "summarizer" else None
                found.append(replace(_step(task, state, after), review=review))
    return tuple(found)


def _step(task: PregelTask, state: StateSnapshot, after: StateSnapshot | None) -> Step:
    """A step of a kept state; `after` is the state that it led to."""
    began, update = runs.seconds(state), task.result
    if after is None and update is None:
        if task.error is not None:
            return Step(task.name, "failed", began, None, error=_error_text(task.error))
        if task.interrupts:
            return Step(task.name, "waiting", began, None)
        return Step(task.name, "pending", None, None)
    step = Step(
        task.name,
        "done",
        began,
        None if after is None else runs.seconds(after),
        exchanges=_exchanges(added(update, "records")),
        answer=next(iter(added(update, "answers")), None),
    )
    for span in added(update, "spans"):
        step = _measured(step, span)
    return step


def _error_text(error: Any) -> str:
    """An error as it is kept (`Name('text')`), in the words of a traceback's last line."""
    kept = error if isinstance(error, str) else repr(error)
    parts = re.fullmatch(r"(\w+)\((.*)\)", kept, re.DOTALL)
    try:
        text = ast.literal_eval(parts[2]) if parts else None
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        text = None
    return f"{parts[1]}: {text}" if parts and isinstance(text, str) else kept


def _earlier(
    spans: Sequence[Json], records: Sequence[Json], reviews: Mapping[str, Any]
) -> list[Step]:
    found = []
    for span in spans:
        mine = [r for r in records if (r["node"], r["started"]) == (span["node"], span["started"])]
        step = Step(span["node"], "earlier", None, None, exchanges=_exchanges(mine))
        keys = [record["key"] for record in mine if "key" in record]
        found.append(_measured(replace(step, review=reviews.get(keys[0]) if keys else None), span))
    return found


def _measured(step: Step, span: Json) -> Step:
    counts = {name: span[name] for name in _COUNTS}
    return replace(step, started=span["started"], ended=span["ended"], **counts)


def _reviews(values: Any) -> dict[str, ReviewAspects]:
    """Review key to the review, for naming steps: those that have words, in the order in which
    the graph sends them to the summarizer."""
    if not values:
        return {}
    evidence = evidence_of(values)
    entries = (*values["user_reviews"], *values["item_reviews"])
    both = (*evidence.user_reviews, *evidence.item_reviews)
    pairs = zip(entries, both, strict=True)
    return {e["key"]: review for e, review in pairs if e["review"]["review"].strip()}


def _exchanges(records: Sequence[Json]) -> tuple[Exchange, ...]:
    """Records with one prompt, which stand side by side, make one exchange."""
    found = []
    for prompt, group in itertools.groupby(records, key=lambda record: record["prompt"]):
        turns = tuple(Turn(turn["role"], turn["content"]) for turn in prompt)
        found.append(Exchange(turns, tuple(map(_output, group))))
    return tuple(found)


def _output(record: Json) -> Output:
    said = record["output"]
    rated = isinstance(said, Mapping)
    return Output(
        text=None if rated else said,
        probabilities=tuple(said["probabilities"]) if rated else (),
        mass=said["mass"] if rated else None,
        prompt_tokens=record["prompt_tokens"],
        completion_tokens=record["completion_tokens"],
        cached=record.get("cached", False),
    )
