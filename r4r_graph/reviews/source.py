"""What the graph asks of a collection of reviews.

Every question about the past names a time, `before`, and the answer holds only what happened
strictly earlier. A source that breaks this leaks the future into a prediction, so the promise is
part of the protocol, and one conformance suite checks it for every source.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol, runtime_checkable

from r4r_graph.ratings import RatingStats
from r4r_graph.schema import Item, Review


@runtime_checkable
class ReviewSource(Protocol):
    """Earlier reviews by user and by item, and what is known of an item.

    Times are unix seconds. An id that the source has never seen is no error: its history is
    empty, its statistics count zero. The `without_*` arguments leave out the reviews of the very
    pair that is being rated, which belong in neither of its histories.
    """

    def user_history(
        self, user_id: str, before: float, limit: int, *, without_item: str | None = None
    ) -> list[Review]:
        """The user's latest reviews before a time, oldest first.

        Args:
            user_id: Whose reviews.
            before: Only reviews strictly earlier than this (unix seconds; `inf` for all).
            limit: How many at most; 0 gives none.
            without_item: Leave out the reviews of this item; they do not count to `limit` either.

        Raises:
            SettingError: `limit` is negative, or `before` is nan.
        """
        ...

    def item_history(
        self, item_id: str, before: float, limit: int, *, without_user: str | None = None
    ) -> list[Review]:
        """The latest reviews of an item before a time, oldest first.

        Args:
            item_id: Of which item.
            before: Only reviews strictly earlier than this (unix seconds; `inf` for all).
            limit: How many at most; 0 gives none.
            without_user: Leave out this user's reviews; they do not count to `limit` either.

        Raises:
            SettingError: `limit` is negative, or `before` is nan.
        """
        ...

    def user_stats(
        self, user_id: str, before: float, *, without_item: str | None = None
    ) -> RatingStats:
        """Statistics of *all* ratings by the user before a time, not only of the latest.

        Args:
            user_id: Whose ratings.
            before: Only ratings strictly earlier than this (unix seconds; `inf` for all).
            without_item: Leave out the ratings of this item.

        Raises:
            SettingError: `before` is nan.
        """
        ...

    def item_stats(
        self, item_id: str, before: float, *, without_user: str | None = None
    ) -> RatingStats:
        """Statistics of *all* ratings of an item before a time, not only of the latest.

        Args:
            item_id: Of which item.
            before: Only ratings strictly earlier than this (unix seconds; `inf` for all).
            without_user: Leave out this user's ratings.

        Raises:
            SettingError: `before` is nan.
        """
        ...

    def overall_stats(
        self, before: float, *, without_pair: tuple[str, str] | None = None
    ) -> RatingStats:
        """Statistics of *all* ratings by anyone of anything before a time.

        Args:
            before: Only ratings strictly earlier than this (unix seconds; `inf` for all).
            without_pair: Leave out the ratings of this user (id) of this item (id).

        Raises:
            SettingError: `before` is nan.
        """
        ...

    def knows_user(self, user_id: str) -> bool:
        """Whether the user wrote any review, at whatever time."""
        ...

    def knows_item(self, item_id: str) -> bool:
        """Whether the item has any review, at whatever time, or is in the item catalogue."""
        ...

    def item(self, item_id: str, before: float | None) -> Item:
        """What is known of an item.

        That is its entry in the catalogue. Where the entry has no title, the title comes from the
        item's latest review that has one: earlier than `before` if there is such a review, else
        at any time (a title is the same before and after). An unknown item is `Item(item_id)`.

        Args:
            item_id: Which item.
            before: Prefer a title from before this time (unix seconds); None for any time.

        Raises:
            SettingError: `before` is nan.
        """
        ...


@runtime_checkable
class ListedReviews(ReviewSource, Protocol):
    """A source that also lists all that it holds, whatever the time: for work on whole datasets,
    and never for the graph."""

    def __len__(self) -> int:
        """How many reviews it holds."""
        ...

    def __iter__(self) -> Iterator[Review]:
        """Each of them once, in an order that stays the same."""
        ...
