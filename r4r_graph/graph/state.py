"""The graph's state, its input, and the run's knobs. All of it is plain JSON values.

What a run is *given* and what it *found out* live under different keys, and what it is given is
gone after the first step, even if that failed: a thread that is used again for another pair then
never mistakes the last run's histories for new input.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Annotated, Any

from langgraph.channels import EphemeralValue
from langgraph.runtime import get_runtime
from typing_extensions import TypedDict

from r4r_graph.errors import SettingError
from r4r_graph.ratings import READOUTS, Readout

Json = dict[str, Any]


@dataclass(frozen=True)
class Knobs:
    """What a caller may set for one run; the graph's context."""

    history: int = 10
    """Latest reviews read on each side."""
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

    def __post_init__(self) -> None:
        """Refuse what is of another type or out of range."""
        _check_whole("history", self.history, 0)
        _check_whole("rationales", self.rationales, 1, 256)
        _check_whole("round_size", self.round_size, 1)
        _check_whole("seed", self.seed)
        _check_share("sure", self.sure)
        _check_share("top_p", self.top_p)
        _check("readout", self.readout, self.readout in READOUTS, ", ".join(READOUTS))
        warm = _is_number(self.temperature) and 0 < self.temperature < math.inf
        _check("temperature", self.temperature, warm, "a number above 0")


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


def merge(old: Json, new: Json) -> Json:
    """Union by key, so that a summary that comes twice is there once."""
    return {**old, **new}


class RatingState(RatingInput, total=False):
    """What a run found out, in the order in which it did."""

    case: Json
    """The pair: user_id, item_id, as_of, item, user_stats, item_stats, cold_start, warnings."""
    user_reviews: list[Json]
    """`{"key", "kind", "review"}` of each review read, oldest first."""
    item_reviews: list[Json]
    summaries: Annotated[dict[str, Json], merge]
    """Review key to aspect summary."""
    rationales: Annotated[list[Json], operator.add]
    """`{"text", "seed"}`, in the order drawn."""
    distributions: Annotated[list[Json], operator.add]
    """`{"probabilities", "mass"}`, one a rationale."""
    truncated: Annotated[list[Json], operator.add]
    spans: Annotated[list[Json], operator.add]
    """What each step cost: node, started, ended (unix seconds), calls, cache hits, tokens."""
    recommendation: Json
    """`Recommendation.to_dict()`."""


class SummarizerTask(TypedDict):
    """What one `Send` to the summarizer carries."""

    entry: Json
    """An element of `user_reviews` or `item_reviews`."""
    siblings: int
    """How many reviews are sent at the same moment."""
