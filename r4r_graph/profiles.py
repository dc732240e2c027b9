"""What a user's own reviews say of them, without rating anything.

    from r4r_graph.profiles import user_profile

    profile = user_profile(recommender, "mara")
    print(profile.ratings.mean, profile.praises, profile.dislikes, profile.looks_for)

The same summarizer reads the same reviews as for a rating, through the same cache: what was read
for one is there for the other.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from langchain_core.runnables.config import get_executor_for_config

from r4r_graph.errors import InputError, SettingError
from r4r_graph.experts import Summarized
from r4r_graph.graph.build import MAX_CONCURRENCY
from r4r_graph.ratings import RatingStats
from r4r_graph.recommender import Recommender
from r4r_graph.schema import (
    AspectSummary,
    Review,
    ReviewAspects,
    Truncation,
    plain_number,
    unix_seconds,
)

Counts = Mapping[str, int]
"""A phrase to how many reviews have it, the most frequent first, then the latest."""


@dataclass(frozen=True, slots=True)
class UserProfile:
    """A user's earlier ratings, and what their latest reviews say."""

    user_id: str
    as_of: float
    """Only reviews strictly before this time (unix seconds) were read."""
    ratings: RatingStats
    """Of *all* earlier ratings by the user."""
    reviews: tuple[ReviewAspects, ...]
    """The latest, oldest first; one without words has an empty summary."""
    truncated: tuple[Truncation, ...] = ()

    @property
    def praises(self) -> Counts:
        """What the reviews praise."""
        return _counts(review.summary.positive for review in self.reviews)

    @property
    def dislikes(self) -> Counts:
        """What they dislike."""
        return _counts(review.summary.negative for review in self.reviews)

    @property
    def looks_for(self) -> Counts:
        """What they show the user to look for."""
        return _counts(review.summary.values for review in self.reviews)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; times are unix seconds."""
        return {
            "user_id": self.user_id,
            "as_of": plain_number(self.as_of),
            "ratings": self.ratings.to_dict(),
            "praises": dict(self.praises),
            "dislikes": dict(self.dislikes),
            "looks_for": dict(self.looks_for),
            "reviews": [review.to_dict() for review in self.reviews],
            "truncated": [asdict(cut) for cut in self.truncated],
        }


def user_profile(
    recommender: Recommender,
    user_id: str,
    *,
    as_of: float | str | datetime | None = None,
    history: int | None = None,
) -> UserProfile:
    """What the user's latest reviews say.

    Args:
        recommender: has the reviews and the summarizer.
        user_id: whose reviews.
        as_of: read only reviews strictly before this time (unix seconds, ISO 8601, datetime);
            default now.
        history: how many of the latest; default as many as for a rating.

    Raises:
        InputError: the recommender has no reviews, or none by this user at any time.
        DataError: `as_of` is no time.
        SettingError: `history` is negative.
        EngineError: the engine could not serve a summary.
    """
    found = _found(recommender, user_id, as_of, history)
    tasks = found.to_summarize(recommender)
    if len(tasks) < 2:
        made = [recommender.experts.summarizer.summarize(*task) for task in tasks]
    else:
        summarize = recommender.experts.summarizer.summarize
        threads = min(len(tasks), MAX_CONCURRENCY)
        with get_executor_for_config({"max_concurrency": threads}) as pool:
            made = list(pool.map(lambda task: summarize(*task), tasks))
    return found.profile(made)


async def auser_profile(
    recommender: Recommender,
    user_id: str,
    *,
    as_of: float | str | datetime | None = None,
    history: int | None = None,
) -> UserProfile:
    """As `user_profile`. Waiting holds no thread."""
    found = await asyncio.to_thread(_found, recommender, user_id, as_of, history)
    tasks = found.to_summarize(recommender)
    made = await asyncio.gather(
        *(recommender.experts.summarizer.asummarize(*task) for task in tasks)
    )
    return found.profile(made)


@dataclass(frozen=True, slots=True)
class _Found:
    """What the review source knows of a user."""

    user_id: str
    before: float
    ratings: RatingStats
    reviews: Sequence[Review]

    def to_summarize(self, recommender: Recommender) -> list[tuple[Review, str, int]]:
        """The summarizer's arguments, once a review with words."""
        source, worded = recommender.reviews, [r for r in self.reviews if r.text.strip()]
        assert source is not None
        return [(r, source.item(r.item_id, None).category, len(worded)) for r in worded]

    def profile(self, made: Iterable[Summarized]) -> UserProfile:
        """With its summaries, in the order of `to_summarize`."""
        summaries, rows = iter(made), []
        cuts: list[Truncation] = []
        for review in self.reviews:
            summary = AspectSummary()
            if review.text.strip():
                summarized = next(summaries)
                summary = summarized.summary
                cuts += summarized.truncated
            rows.append(
                ReviewAspects(
                    review.user_id,
                    review.item_id,
                    review.title,
                    review.timestamp,
                    review.rating,
                    summary,
                )
            )
        return UserProfile(self.user_id, self.before, self.ratings, tuple(rows), tuple(cuts))


def _found(
    recommender: Recommender,
    user_id: str,
    as_of: float | str | datetime | None,
    history: int | None,
) -> _Found:
    source = recommender.reviews
    if source is None:
        raise InputError("nothing to read: load the recommender with reviews")
    if history is not None and history < 0:
        raise SettingError(f"bad setting history={history}: must be 0 or more")
    if not source.knows_user(user_id):
        raise InputError(f"user {user_id!r} appears nowhere in the reviews; check the id")
    before = time.time() if as_of is None else unix_seconds(as_of, what="as_of")
    limit = recommender.experts.history if history is None else history
    return _Found(
        user_id,
        before,
        source.user_stats(user_id, before),
        source.user_history(user_id, before, limit),
    )


def _counts(summaries: Iterable[Iterable[str]]) -> Counts:
    """Phrases are one where they differ only in case; the latest spelling stands for it."""
    counts: dict[str, int] = {}
    spelled: dict[str, str] = {}
    for phrases in summaries:  # oldest first
        for key, phrase in {phrase.casefold(): phrase for phrase in phrases}.items():
            counts[key] = counts.pop(key, 0) + 1  # to the end: the latest comes last
            spelled[key] = phrase
    latest_first = reversed(counts)
    ordered = sorted(latest_first, key=lambda key: -counts[key])
    return {spelled[key]: counts[key] for key in ordered}
