"""The first step: which reviews may be read for this pair, and what is known of it.

Every rule against leaks is here. History is strictly earlier than `as_of`; this user's own
reviews of this item are in neither history and in neither average.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from r4r_graph.errors import DataError, InputError, UnknownPairError
from r4r_graph.evidence import HISTORY
from r4r_graph.graph.state import Json, Knobs, RatingState
from r4r_graph.ratings import RatingScale, RatingStats
from r4r_graph.reviews import ReviewSource
from r4r_graph.schema import ColdStart, Item, Review, plain_number, unicode_text, unix_seconds


@dataclass(frozen=True)
class _Side:
    """One side's latest reviews, and statistics over all its earlier ones."""

    reviews: Sequence[Review]
    stats: RatingStats


def recall(
    state: RatingState, knobs: Knobs, reviews: ReviewSource | None, scale: RatingScale
) -> Json:
    """The pair's case and histories, as an update of the state.

    Raises:
        InputError: no ids, or neither a history nor a review source.
        UnknownPairError: both ids are found nowhere, and no history was passed.
        DataError: a passed review, rating or time is bad.
    """
    user_id, item_id = (checked_id(state.get(name), name) for name in ("user_id", "item_id"))
    as_of = state.get("as_of")
    before = time.time() if as_of is None else unix_seconds(as_of, what="as_of")
    limit = HISTORY if knobs.history is None else knobs.history
    given_user, given_item = state.get("user_history"), state.get("item_history")
    warnings: list[str] = []

    if reviews is None and given_user is None and given_item is None:
        raise InputError(
            "nothing to read: build the graph with a review source, or pass user_history and "
            "item_history"
        )
    if reviews is not None:
        asked_user = user_id if given_user is None else None
        asked_item = item_id if given_item is None else None
        warnings += _unknown_ids(asked_user, asked_item, reviews)
    item = _item(state.get("item"), item_id, before, reviews)

    if given_user is not None:
        passed = _passed(given_user, before, limit, {"user_id": user_id}, scale)
        user = _without_pair(passed, user_id, item_id, limit)
    elif reviews is not None:
        user = _Side(
            reviews.user_history(user_id, before, limit, without_item=item_id),
            reviews.user_stats(user_id, before, without_item=item_id),
        )
    else:
        user = _Side((), RatingStats())

    if given_item is not None:
        defaults = {"item_id": item_id, "title": item.title}
        passed = _passed(given_item, before, limit, defaults, scale)
        others = _without_pair(passed, user_id, item_id, limit)
    elif reviews is not None:
        others = _Side(
            reviews.item_history(item_id, before, limit, without_user=user_id),
            reviews.item_stats(item_id, before, without_user=user_id),
        )
    else:
        others = _Side((), RatingStats())

    overall = None
    if reviews is not None:
        overall = reviews.overall_stats(before, without_pair=(user_id, item_id)).mean
    if not item.title:
        titles = [review.title for review in others.reviews if review.title]
        item = replace(item, title=titles[-1] if titles else "")
    return {
        "case": {
            "user_id": user_id,
            "item_id": item_id,
            "as_of": plain_number(before),
            "item": item.to_dict(),
            "user_stats": user.stats.to_dict(),
            "item_stats": others.stats.to_dict(),
            "overall": overall,
            "cold_start": _cold_start(user, others),
            "warnings": warnings,
            "knobs": asdict(knobs),
            **({"siblings": siblings} if (siblings := state.get("siblings")) else {}),
        },
        "user_reviews": [_entry(r, _kind(r, item, reviews)) for r in user.reviews],
        "item_reviews": [_entry(r, item.category) for r in others.reviews],
    }


def checked_id(value: object, name: str) -> str:
    """An id, if it can be one.

    Raises:
        InputError: it is no text, empty, or no Unicode.
    """
    if not isinstance(value, str) or not value:
        raise InputError(f"bad {name} {value!r}: must be a text that is not empty")
    return unicode_text(value, f"bad {name} {value!r}: it")


def _unknown_ids(user_id: str | None, item_id: str | None, reviews: ReviewSource) -> list[str]:
    """Warnings for an id found nowhere; an error where both are. None is not asked for: that
    side's history was passed."""
    missing = []
    if user_id is not None and not reviews.knows_user(user_id):
        missing.append(f"user {user_id!r}")
    if item_id is not None and not reviews.knows_item(item_id):
        missing.append(f"item {item_id!r}")
    if len(missing) == 2:
        raise UnknownPairError(
            f"{' and '.join(missing)} appear nowhere in the reviews or items; check the ids, or "
            "pass their histories"
        )
    return [f"{name} appears nowhere in the reviews or items" for name in missing]


def _item(given: Any, item_id: str, before: float, reviews: ReviewSource | None) -> Item:
    if given is not None:
        return replace(Item.from_dict(given), item_id=item_id)
    if reviews is None:
        return Item(item_id)
    return Item.from_dict(reviews.item(item_id, before).to_dict())  # checked: anyone's source


def _passed(
    rows: Sequence[Json], before: float, limit: int, defaults: Json, scale: RatingScale
) -> list[Review]:
    """Passed reviews, checked, strictly earlier than `before`, oldest first."""
    found = []
    for at, row in enumerate(rows, start=1):
        review = _passed_review(at, row, defaults, scale)
        if review.timestamp < before:
            found.append(review)
    return sorted(found, key=lambda review: review.timestamp)


def _passed_review(at: int, row: Json, defaults: Json, scale: RatingScale | None = None) -> Review:
    try:
        if not isinstance(row, Mapping):
            raise DataError(f"{type(row).__name__} is no mapping of columns to values")
        filled = {**defaults, **{k: v for k, v in row.items() if v not in (None, "")}}
        review = Review.from_dict(filled)
        if scale is not None:
            scale.check(review.rating)
    except DataError as error:
        raise DataError(f"review {at} of the passed history: {error}") from None
    return review


def plain_history(reviews: Iterable[Review] | None) -> list[Json] | None:
    """A history as the graph's input takes it: what no checkpointer could keep is refused here.

    Raises:
        DataError: a number that is none, or a text that is no Unicode; it names the review.
    """
    if reviews is None:
        return None
    rows = (review.to_dict() for review in reviews)
    return [_passed_review(at, row, {}).to_dict() for at, row in enumerate(rows, start=1)]


def plain_item(item: Item) -> Json:
    """As `plain_history`, of an item."""
    return Item.from_dict(item.to_dict()).to_dict()


def _without_pair(reviews: list[Review], user_id: str, item_id: str, limit: int) -> _Side:
    kept = [r for r in reviews if (r.user_id, r.item_id) != (user_id, item_id)]
    latest = kept[len(kept) - limit :] if limit < len(kept) else kept
    return _Side(latest, RatingStats.of([r.rating for r in kept]))


def _cold_start(user: _Side, item: _Side) -> ColdStart | None:
    if not user.stats.count and not item.stats.count:
        return "both"
    if not user.stats.count:
        return "user"
    return None if item.stats.count else "item"


def _kind(review: Review, item: Item, reviews: ReviewSource | None) -> str:
    """What kind of thing an earlier review was of."""
    if review.item_id == item.item_id:
        return item.category
    return reviews.item(review.item_id, None).category if reviews is not None else ""


def _entry(review: Review, kind: str) -> Json:
    return {"key": review.key, "kind": kind, "review": review.to_dict()}
