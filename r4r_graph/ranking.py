"""Several items rated for one user, best first: what `Recommender.rank` answers.

The order is that of the mean rating. Where two means are equal to six decimals, the one with more
probability on the highest rating goes first, then on the one below it, and so on; where all of them
are equal, too, the order in which the candidates were given decides.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any, Self, overload

from r4r_graph import errors
from r4r_graph.errors import EngineError, InputError, SettingError
from r4r_graph.reviews import ReviewSource
from r4r_graph.schema import Recommendation, plain_number, unix_seconds

_DECIMALS = 6
"""To which means and probabilities are compared: what is less is rounding in the sums."""

_LONGEST_SENTENCE = 300


@dataclass(frozen=True, slots=True)
class Failure:
    """A candidate that could not be rated."""

    item_id: str
    error: str
    """The error's type, by its name in `r4r_graph.errors`."""
    reason: str
    """Its message."""

    def to_dict(self) -> dict[str, str]:
        """Plain JSON values."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Ranking(Sequence[Recommendation]):
    """The best candidates of one user, best first; a sequence of `Recommendation`s."""

    user_id: str
    as_of: float
    """Only reviews strictly before this time (unix seconds) were read, for every candidate."""
    recommendations: tuple[Recommendation, ...]
    """At most as many as were asked for."""
    failures: tuple[Failure, ...] = ()
    """In the order given."""
    rated: int = 0
    """Candidates with a rating, those beyond the number asked for among them."""

    @overload
    def __getitem__(self, at: int) -> Recommendation: ...
    @overload
    def __getitem__(self, at: slice) -> tuple[Recommendation, ...]: ...
    def __getitem__(self, at: int | slice) -> Recommendation | tuple[Recommendation, ...]:
        """The recommendation at this place, from 0."""
        return self.recommendations[at]

    def __len__(self) -> int:
        return len(self.recommendations)

    @property
    def summary(self) -> str:
        """The best one in words: its name, its mean rating, the first sentence of its rationale,
        and how many candidates were rated and how many not. No model is asked for it; titles and
        rationales are words out of reviews, or made of them."""
        parts = [f"Best of {self.rated} rated for {self.user_id}:"]
        if self.recommendations:
            best = self.recommendations[0]
            d = best.distribution
            named = f"{best.title or best.item_id}, mean {d.mean:.2f} on the scale"
            parts += [f"{named} {d.scale.low:g} to {d.scale.high:g}."]
            parts += [first_sentence(best.rationale)]
        if self.failures:
            parts += [f"{len(self.failures)} could not be rated."]
        return " ".join(filter(None, parts))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "user_id": self.user_id,
            "as_of": plain_number(self.as_of),
            "summary": self.summary,
            "rated": self.rated,
            "recommendations": [each.to_dict() for each in self.recommendations],
            "failures": [each.to_dict() for each in self.failures],
        }

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> Self:
        """Back from `to_dict`."""
        return cls(
            user_id=row["user_id"],
            as_of=float(row["as_of"]),
            recommendations=tuple(map(Recommendation.from_dict, row["recommendations"])),
            failures=tuple(Failure(**each) for each in row["failures"]),
            rated=row["rated"],
        )


def ranked(
    user_id: str,
    as_of: float,
    outcomes: Sequence[Recommendation | Failure],
    top_k: int | None = None,
) -> Ranking:
    """The ranking of these outcomes, which come in the order of their candidates.

    Raises:
        InputError: none was rated, and all for a fault in what was passed.
        EngineError: none was rated, and at least one for another reason.
    """
    rated = [each for each in outcomes if isinstance(each, Recommendation)]
    failures = tuple(each for each in outcomes if isinstance(each, Failure))
    if not rated:
        raise _none_rated(failures)
    best = sorted(rated, key=_goodness, reverse=True)  # a stable sort, in reverse as well
    return Ranking(user_id, as_of, tuple(best[:top_k]), failures, len(rated))


def _goodness(one: Recommendation) -> list[float]:
    d = one.distribution
    return [round(value, _DECIMALS) for value in (d.mean, *reversed(d.probabilities))]


def _none_rated(failures: Sequence[Failure]) -> InputError | EngineError:
    kinds = [getattr(errors, each.error, EngineError) for each in failures]
    first = "; ".join(f"{each.item_id}: {each.reason}" for each in failures[:3])
    more = f"; and {len(failures) - 3} more" if len(failures) > 3 else ""
    message = f"none of the {len(failures)} candidates could be rated: {first}{more}"
    if all(issubclass(kind, InputError) for kind in kinds):
        return InputError(message)
    return EngineError(message)


def first_sentence(text: str) -> str:
    """The first sentence on one line, at most 300 characters of it."""
    line = " ".join(text.split())
    found = re.match(r".+?[.!?](?=\s|$)", line)
    sentence = found[0] if found else line
    if len(sentence) <= _LONGEST_SENTENCE:
        return sentence
    return sentence[: _LONGEST_SENTENCE - 1].rstrip() + "…"


# What a ranking tells on its way -----------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class CandidateProgress:
    """One candidate is done."""

    item_id: str
    outcome: Recommendation | Failure
    done: int
    of: int


class RankingEvents:
    """Translates the parts of a ranking graph's stream of updates (version v2)."""

    def __init__(self) -> None:
        self._done = 0
        self._of = 0
        self._ranking: Mapping[str, Any] = {}

    def of(self, part: Any) -> Iterator[CandidateProgress]:
        """What a part of the stream tells."""
        for update in part["data"].values():
            if "plan" in update:
                self._of = len(update["plan"]["candidates"])
            elif "ranking" in update:
                self._ranking = update["ranking"]
            else:
                [(item_id, outcome)] = update["outcomes"].items()
                self._done += 1
                yield CandidateProgress(item_id, outcome_of(outcome), self._done, self._of)

    def last(self) -> Ranking:
        """The ranking that the run ended with."""
        return Ranking.from_dict(self._ranking)


def outcome_of(row: Mapping[str, Any]) -> Recommendation | Failure:
    """A candidate's outcome, from its plain JSON values."""
    return Failure(**row) if "error" in row else Recommendation.from_dict(row)


# Candidates --------------------------------------------------------------------------------------


def popular_items(
    reviews: ReviewSource | None,
    user_id: str,
    count: int,
    *,
    as_of: float | str | datetime | None = None,
) -> list[str]:
    """The most reviewed items that the user has not reviewed, the most reviewed first.

    This is popularity and no retrieval: it knows nothing of the user's taste. Where you have a
    retriever of your own, rank what it finds.

    Args:
        reviews: a review source with a method `item_ids() -> Iterable[str]`, such as
            `TableReviewSource`.
        user_id: for whom.
        count: how many at most; there may be fewer.
        as_of: count only reviews strictly before this time (unix seconds, ISO 8601, datetime);
            default now. An item without any review by then is not among them.

    Raises:
        InputError: there is no review source, or it cannot list its items.
        SettingError: `count` is no whole number from 1 on.
        DataError: `as_of` is no time.
    """
    if reviews is None:
        raise InputError("no reviews to choose candidates from: pass the candidates")
    list_items = getattr(reviews, "item_ids", None)
    if not callable(list_items):
        raise InputError(
            f"{type(reviews).__name__} cannot list its items: give it a method item_ids(), or pass "
            "the candidates"
        )
    check_count("number of candidates", count)
    before = time.time() if as_of is None else unix_seconds(as_of, what="as_of")
    written = reviews.user_stats(user_id, before).count
    own = {review.item_id for review in reviews.user_history(user_id, before, written)}
    counts = {
        item_id: reviews.item_stats(item_id, before).count
        for item_id in list_items()
        if item_id not in own
    }
    reviewed = [item_id for item_id, reviews_then in counts.items() if reviews_then]
    return sorted(reviewed, key=lambda item_id: -counts[item_id])[:count]


def check_count(what: str, count: Any) -> None:
    """Refuse what is no whole number from 1 on.

    Raises:
        SettingError: it is none.
    """
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise SettingError(f"bad {what} {count!r}: must be a whole number, 1 or more")
