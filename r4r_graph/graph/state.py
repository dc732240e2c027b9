"""The graph's state, its input, and the run's knobs. All of it is plain JSON values.

What a run is *given* and what it *found out* live under different keys, and what it is given is
gone after the first step, even if that failed: a thread that is used again for another pair then
never mistakes the last run's histories for new input.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, Self, get_args

from langgraph.channels import EphemeralValue
from langgraph.runtime import get_runtime
from typing_extensions import TypedDict

from r4r_graph.errors import SettingError
from r4r_graph.ratings import READOUTS, Readout

Json = dict[str, Any]
Influences = Literal["none", "same", "new"]


@dataclass(frozen=True)
class Knobs:
    """What a caller may set for one run; the graph's context."""

    history: int | None = None
    """Latest reviews read on each side; None takes as many as the adapters were trained with."""
    rationales: int = 1
    """One is greedy; more are sampled, rated each, and their distributions mixed."""
    round_size: int = 4
    """Rationales drawn at a time; between rounds the run stops if it is sure."""
    sure: float = 0.9
    """Probability of the mode from which no further rationales are drawn."""
    readout: Readout = "mean"
    seed: int = 0
    temperature: float = 0.8
    """Of sampled rationales."""
    top_p: float = 0.95
    ask: bool = False
    """Show each rationale to a person before it is rated with, to accept, edit or refuse."""
    ask_below: float = 0.0
    """Show the rating to a person where the mode's probability is below this."""
    influence: Influences = "none"
    """How far each review, the rationale and the averages move the mean rating: `none` leaves it
    unasked, `same` leaves each out with the rationale as it is, `new` has the rationale written
    anew without the review."""
    record: bool = False
    """Keep each step's exact prompt and output in the state, for looking at the run later."""
    timeout: float | None = None
    """Seconds after which the run ends with `RunTimeoutError`; None: it may take as long as it
    takes. A ranking is one run, and a run that is resumed has all its time again. Where the graph
    itself is called, without the `Recommender`, each step has as much."""

    def __post_init__(self) -> None:
        """Refuse what is of another type or out of range."""
        if self.history is not None:
            _check_whole("history", self.history, 0)
        _check_whole("rationales", self.rationales, 1, 256)
        _check_whole("round_size", self.round_size, 1)
        _check_whole("seed", self.seed)
        _check_share("sure", self.sure)
        _check_share("top_p", self.top_p)
        _check("readout", self.readout, self.readout in READOUTS, ", ".join(READOUTS))
        known = get_args(Influences)
        _check("influence", self.influence, self.influence in known, ", ".join(known))
        for name in ("ask", "record"):
            value = getattr(self, name)
            _check(name, value, isinstance(value, bool), "true or false")
        unsure = _is_number(self.ask_below) and 0 <= self.ask_below <= 1
        _check("ask_below", self.ask_below, unsure, "a number from 0 to 1")
        warm = _is_number(self.temperature) and 0 < self.temperature < math.inf
        _check("temperature", self.temperature, warm, "a number above 0")
        soon = _is_number(self.timeout) and 0 < self.timeout < math.inf  # type: ignore[operator]
        _check("timeout", self.timeout, self.timeout is None or soon, "a number of seconds above 0")

    def settled(self, history: int) -> Self:
        """With this length of history where none is asked for."""
        return self if self.history is not None else replace(self, history=history)


def check_knobs(settings: Mapping[str, Any]) -> Knobs:
    """The knobs of a run, checked.

    Raises:
        SettingError: an unknown one, or one out of range.
    """
    unknown = sorted(set(settings) - set(Knobs.__dataclass_fields__))
    if unknown:
        known = ", ".join(Knobs.__dataclass_fields__)
        raise SettingError(f"unknown setting {', '.join(unknown)}; there are: {known}")
    return Knobs(**settings)


def _check(name: str, value: object, sound: bool, allowed: str) -> None:
    if not sound:
        raise SettingError(f"bad setting {name}={value!r}: must be {allowed}")


def _check_whole(name: str, value: Any, least: float = -math.inf, most: float = math.inf) -> None:
    bounds = "" if least == -math.inf else f", {least} or more"
    allowed = f"a whole number{bounds if most == math.inf else f', {least} to {most}'}"
    whole = isinstance(value, int) and not isinstance(value, bool)
    _check(name, value, whole and least <= value <= most, allowed)


def _check_share(name: str, value: Any) -> None:
    _check(name, value, _is_number(value) and 0 < value <= 1, "a number above 0 and at most 1")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def knobs() -> Knobs:
    """The knobs of the run this is called in (without a context, a run has None)."""
    context = get_runtime(Knobs).context
    return context if isinstance(context, Knobs) else Knobs()


def knobs_of(state: RatingState) -> Knobs:
    """The knobs that the run began with. They are in its state, so that it goes on with them after
    a pause, in another process, and in a fork."""
    return Knobs(**state["case"]["knobs"])


class RatingInput(TypedDict, total=False):
    """What a run is given."""

    user_id: str
    item_id: str
    as_of: Annotated[float | str | None, EphemeralValue]
    """Only reviews strictly earlier are read: unix seconds or ISO 8601; default now."""
    item: Annotated[Json | None, EphemeralValue]
    """`Item.to_dict()`, where the review source does not know it."""
    user_history: Annotated[list[Json] | None, EphemeralValue]
    """`Review.to_dict()`s; replaces asking the review source for this side."""
    item_history: Annotated[list[Json] | None, EphemeralValue]
    siblings: Annotated[int | None, EphemeralValue]
    """How many runs like this one begin at the same moment, as in a ranking: the engine waits a few
    milliseconds for the requests of all of them."""


def merge(old: Json, new: Json) -> Json:
    """Union by key, so that a summary that comes twice is there once."""
    return {**old, **new}


class RatingState(RatingInput, total=False):
    """What a run found out, in the order in which it did."""

    case: Json
    """The pair: user_id, item_id, as_of, item, user_stats, item_stats, overall (mean of all earlier
    ratings), cold_start, warnings; and the knobs, with which the run goes on after a pause. Also
    `siblings`, where there are any."""
    user_reviews: list[Json]
    """`{"key", "kind", "review"}` of each review read, oldest first."""
    item_reviews: list[Json]
    summaries: Annotated[dict[str, Json], merge]
    """Review key to aspect summary."""
    rationales: Annotated[list[Json], operator.add]
    """`{"text", "seed"}`, in the order drawn; `edited` is true where a person wrote it."""
    distributions: Annotated[list[Json], operator.add]
    """`{"probabilities", "mass"}`, one a rationale."""
    truncated: Annotated[list[Json], operator.add]
    spans: Annotated[list[Json], operator.add]
    """What each step cost: node, started, ended (unix seconds), calls, cache hits, tokens."""
    answers: Annotated[list[Json], operator.add]
    """What a person decided: `{"about", "action", ...}`; see `graph.human`."""
    influence: list[Json]
    """`Influence.to_dict()`s, where they were asked for."""
    records: Annotated[list[Json], operator.add]
    """Each step's prompts and outputs, where they are kept; see `graph.records`."""
    recommendation: Json
    """`Recommendation.to_dict()`."""


class SummarizerTask(TypedDict):
    """What one `Send` to the summarizer carries."""

    entry: Json
    """An element of `user_reviews` or `item_reviews`."""
    siblings: int
    """How many reviews are sent at the same moment."""
    record: bool
