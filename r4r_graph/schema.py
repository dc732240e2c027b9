"""The frozen types that travel through the library: reviews in, a rating distribution out.

Everything here converts to and from plain JSON values (`to_dict` / `from_dict`), so that it can
pass through a LangGraph checkpoint without any custom serializer.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal, Self

from r4r_graph.errors import DataError
from r4r_graph.ratings import RatingDistribution, RatingScale, Readout

InfluenceKind = Literal["user_review", "item_review", "rationale", "user_average", "item_average"]
"""What can be left out to see how far it moves the rating."""

ColdStart = Literal["user", "item", "both"]
"""Which side of a pair has no earlier reviews."""

_LATEST = 1e11  # the year 5138 in seconds; anything later is a time in milliseconds


def unix_seconds(value: float | int | str | datetime, *, what: str = "timestamp") -> float:
    """`value` (unix seconds, an ISO 8601 text or a datetime) as unix seconds.

    A time without a zone is read as UTC. Times before 1970 are negative.

    Raises:
        DataError: not a time, not finite, or so large that it must be milliseconds.
    """
    if isinstance(value, bool):
        raise DataError(f"bad {what} {value!r}: expected unix seconds or an ISO 8601 date")
    if isinstance(value, datetime):
        moment = value if value.tzinfo else value.replace(tzinfo=UTC)
        if (seconds := moment.timestamp()) >= _LATEST:
            raise DataError(f"bad {what} {value!r}: after the year 5138")
        return seconds
    if isinstance(value, str):
        text = value.strip()
        try:
            seconds = float(text)
        except ValueError:
            try:
                return unix_seconds(datetime.fromisoformat(text), what=what)
            except DataError:
                raise
            except ValueError:
                raise DataError(
                    f"bad {what} {value!r}: expected unix seconds (1700000000) "
                    "or an ISO 8601 date (2023-11-14)"
                ) from None
    else:
        try:
            seconds = float(value)
        except OverflowError:
            raise DataError(f"bad {what}: a number too large to be a time") from None
        except (TypeError, ValueError):
            raise DataError(
                f"bad {what} {value!r}: expected unix seconds or an ISO 8601 date"
            ) from None
    if not math.isfinite(seconds):
        raise DataError(f"bad {what} {value!r}: not a finite number of seconds")
    if abs(seconds) >= _LATEST:
        raise DataError(f"bad {what} {value!r}: looks like milliseconds; divide by 1000")
    return seconds


def plain_number(value: float) -> float | int:
    """`value` without a trailing `.0`, as it should look in JSON and in prompts."""
    if isinstance(value, int):
        return value  # of any size
    return int(value) if float(value).is_integer() else float(value)


def unicode_text(text: str, what: str) -> str:
    """`text`, if it can be written and kept.

    Raises:
        DataError: it holds half of a surrogate pair, as broken decoders leave behind.
    """
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise DataError(
                f"{what} has half a surrogate pair, which is no character; decode it anew, or "
                "replace what cannot be encoded"
            ) from None
    return text


@dataclass(frozen=True, slots=True)
class Review:
    """One earlier review: who, what, when, how many stars, and in which words."""

    user_id: str
    item_id: str
    rating: float
    """Observed rating; may be a fraction within the scale."""
    timestamp: float
    """Unix seconds."""
    title: str = ""
    """The item's title; may be empty."""
    text: str = ""
    """The review itself; may be empty."""

    @property
    def key(self) -> str:
        """Identifies this very review (16 hex digits over all its fields)."""
        numbers = [float(self.rating), float(self.timestamp)]  # 4 and 4.0 are one rating
        fields = [self.user_id, self.item_id, *numbers, self.title, self.text]
        packed = json.dumps(fields, ensure_ascii=True).encode()
        return hashlib.blake2b(packed, digest_size=8).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, in the column names of a review file."""
        return {
            "user_id": self.user_id,
            "item_id": self.item_id,
            "title": self.title,
            "rating": plain_number(self.rating),
            "timestamp": plain_number(self.timestamp),
            "review": self.text,
        }

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> Self:
        """A review from a mapping with the columns of a review file.

        Raises:
            DataError: a missing field, a rating that is no number, a bad timestamp, a text that is
                no Unicode.
        """
        for name in ("rating", "timestamp"):
            if row.get(name) is None:
                raise DataError(f"a review has no {name!r}: {_shorten(dict(row))}")
        try:
            rating = float(row["rating"])
        except (TypeError, ValueError):
            raise DataError(f"bad rating {row['rating']!r}: not a number") from None
        except OverflowError:
            raise DataError("bad rating: a number too large to be one") from None
        if not math.isfinite(rating):
            raise DataError(f"bad rating {row['rating']!r}: not a finite number")
        return cls(
            user_id=_text(row, "user_id"),
            item_id=_text(row, "item_id"),
            rating=rating,
            timestamp=unix_seconds(row["timestamp"]),
            title=_text(row, "title"),
            text=_text(row, "review" if "review" in row else "text"),
        )


@dataclass(frozen=True, slots=True)
class Pair:
    """A user and an item to rate, as of a time."""

    user_id: str
    item_id: str
    as_of: float
    """Unix seconds; only reviews strictly earlier may be read."""


@dataclass(frozen=True, slots=True)
class Item:
    """What is known of an item besides its reviews."""

    item_id: str
    title: str = ""
    category: str = ""
    """The kind of thing, e.g. `album` or `Drama`; names it in the prompts."""
    description: str = ""
    """Stands in where the item has few or no reviews."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> Self:
        """An item from a mapping; missing fields are empty.

        Raises:
            DataError: a text that is no Unicode.
        """
        names = ("item_id", "title", "category", "description")
        return cls(**{name: _text(row, name) for name in names})


@dataclass(frozen=True, slots=True)
class AspectSummary:
    """What one review praised, disliked, and shows its writer to look for (paper, preference
    distillation)."""

    positive: tuple[str, ...] = ()
    negative: tuple[str, ...] = ()
    values: tuple[str, ...] = ()
    """What the writer looks for in such things."""

    def to_dict(self) -> dict[str, list[str]]:
        """Plain JSON values."""
        return {
            "positive": list(self.positive),
            "negative": list(self.negative),
            "values": list(self.values),
        }

    @classmethod
    def from_dict(cls, row: Mapping[str, Iterable[str]]) -> Self:
        """The summary back from `to_dict`."""
        return cls(tuple(row["positive"]), tuple(row["negative"]), tuple(row["values"]))


@dataclass(frozen=True, slots=True)
class ReviewAspects:
    """An earlier review as the experts saw it: where it came from, and its aspect summary."""

    user_id: str
    item_id: str
    title: str
    timestamp: float
    rating: float
    summary: AspectSummary

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, the summary's lists beside the review's fields."""
        return {
            "user_id": self.user_id,
            "item_id": self.item_id,
            "title": self.title,
            "timestamp": plain_number(self.timestamp),
            "rating": plain_number(self.rating),
            **self.summary.to_dict(),
        }

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> Self:
        """Back from `to_dict`."""
        return cls(
            row["user_id"],
            row["item_id"],
            row["title"],
            float(row["timestamp"]),
            float(row["rating"]),
            AspectSummary.from_dict(row),
        )


@dataclass(frozen=True, slots=True)
class NodeUsage:
    """What one node of the graph cost in one run."""

    calls: int = 0
    """Requests to the engine; cache hits are not calls."""
    cache_hits: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0
    """Wall time during which the node was at work."""


@dataclass(frozen=True, slots=True)
class Truncation:
    """Something that did not fit a token budget and was cut."""

    what: Literal["review", "user_history", "item_history", "description", "rationale"]
    detail: str
    """In words: which one, and how much of it."""


@dataclass(frozen=True, slots=True)
class Influence:
    """How far one thing that the predictor read moves the mean rating."""

    what: InfluenceKind
    without: float
    """The mean rating without it."""
    change: float
    """The mean rating less that: above zero, it raised the rating."""
    user_id: str = ""
    """This and the next two name the review, where it is one."""
    item_id: str = ""
    title: str = ""
    timestamp: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Recommendation:
    """A rating with its distribution and its reason. `to_dict()` is the `--json` object."""

    user_id: str
    item_id: str
    title: str
    as_of: float
    """Only reviews strictly before this time (unix seconds) were read."""
    readout: Readout
    distribution: RatingDistribution
    rationales: tuple[str, ...]
    """One a draw; their distributions were mixed."""
    user_aspects: tuple[ReviewAspects, ...]
    item_aspects: tuple[ReviewAspects, ...]
    cold_start: ColdStart | None
    truncated: tuple[Truncation, ...]
    warnings: tuple[str, ...]
    model: Mapping[str, Any]
    """Base model, adapters and prompt digests."""
    usage: Mapping[str, NodeUsage] = field(default_factory=dict)
    """By node: summarizer, reasoner, predictor; influence where it was asked for."""
    influence: tuple[Influence, ...] = ()
    """Where it was asked for, the strongest first."""
    answers: tuple[Mapping[str, Any], ...] = ()
    """What a person decided on the way, in order; see `graph.human`."""

    @property
    def rating(self) -> float:
        """The rating by the chosen read-out; where a person gave another, theirs."""
        given = [answer["rating"] for answer in self.answers if "rating" in answer]
        return float(given[-1]) if given else self.distribution.read(self.readout)

    @property
    def rationale(self) -> str:
        """The first rationale."""
        return self.rationales[0]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; times are unix seconds."""
        d = self.distribution
        many = {"rationales": list(self.rationales)} if len(self.rationales) > 1 else {}
        return {
            "user_id": self.user_id,
            "item_id": self.item_id,
            "title": self.title,
            "as_of": plain_number(self.as_of),
            "rating": self.rating,
            "readout": self.readout,
            "mean": d.mean,
            "median": d.median,
            "mode": plain_number(d.mode),
            "distribution": d.to_dict(),
            "rating_mass": d.mass,
            "entropy": d.entropy,
            "rationale": self.rationale,
            **many,
            "user_aspects": [a.to_dict() for a in self.user_aspects],
            "item_aspects": [a.to_dict() for a in self.item_aspects],
            "cold_start": self.cold_start,
            "truncated": [asdict(t) for t in self.truncated],
            "warnings": list(self.warnings),
            "model": dict(self.model),
            "usage": {node: asdict(usage) for node, usage in self.usage.items()},
            "influence": [influence.to_dict() for influence in self.influence],
            "answers": [dict(answer) for answer in self.answers],
        }

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> Self:
        """Back from `to_dict`."""
        # Stores may give an object's members back in another order.
        labels = dict(sorted(row["distribution"].items(), key=lambda entry: float(entry[0])))
        scale = RatingScale(tuple(float(v) for v in labels))
        return cls(
            user_id=row["user_id"],
            item_id=row["item_id"],
            title=row["title"],
            as_of=float(row["as_of"]),
            readout=row["readout"],
            distribution=RatingDistribution(scale, tuple(labels.values()), row["rating_mass"]),
            rationales=tuple(row.get("rationales", [row["rationale"]])),
            user_aspects=tuple(map(ReviewAspects.from_dict, row["user_aspects"])),
            item_aspects=tuple(map(ReviewAspects.from_dict, row["item_aspects"])),
            cold_start=row["cold_start"],
            truncated=tuple(Truncation(**t) for t in row["truncated"]),
            warnings=tuple(row["warnings"]),
            model=row["model"],
            usage={node: NodeUsage(**usage) for node, usage in row["usage"].items()},
            influence=tuple(Influence(**each) for each in row.get("influence", ())),
            answers=tuple(row.get("answers", ())),
        )


def _text(row: Mapping[str, Any], name: str) -> str:
    """A field that may be absent; the id 0 is a text like any other."""
    value = row.get(name)
    return "" if value is None else unicode_text(str(value), name)


def _shorten(row: dict[str, Any]) -> str:
    text = json.dumps(row, default=str, ensure_ascii=False)
    return text if len(text) <= 120 else text[:117] + "..."
