"""Targets: the reviews whose ratings are predicted, and which of them are scored.

    targets = load_targets("test.parquet", scale)
    some = draw(targets, 300, seed=0)

Where a machine is small, a sample is scored. It is drawn by lot, so everyone who draws with the
same seed from the same targets has the same rows, and `record_sample` writes down which.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from r4r_graph.errors import DataError, SettingError
from r4r_graph.jobs import digest_rows, write_table
from r4r_graph.ratings import RatingScale
from r4r_graph.reviews import ListedReviews, ReviewSource, load_reviews
from r4r_graph.schema import Pair, Review

SAMPLE_SCHEMA = pa.schema(
    [("user_id", pa.string()), ("item_id", pa.string()), ("as_of", pa.float64())]
)

RowKey = tuple[str, str, float]
"""User, item and time (unix seconds): what names a target."""


def row_key(review: Review) -> RowKey:
    """What names this target in every file of an evaluation."""
    return review.user_id, review.item_id, float(review.timestamp)


def as_pairs(targets: Iterable[Review]) -> list[Pair]:
    """The targets as pairs to rate, each as of its own time."""
    return [Pair(*row_key(target)) for target in targets]


def load_targets(path: str | os.PathLike[str], scale: RatingScale) -> list[Review]:
    """Targets from a file of reviews, in its order.

    Raises:
        DataError: it cannot be read as reviews; or two rows are of one user, item and time, so
            that no prediction could say which of them it is for.
    """
    targets = list(load_reviews(path, scale=scale))
    check_distinct(targets, path)
    return targets


def check_distinct(targets: Sequence[Review], where: object = "the targets") -> None:
    """Refuse targets that no prediction could tell apart.

    Raises:
        DataError: there are such, or no targets at all.
    """
    if not targets:
        raise DataError(f"{where}: no targets to evaluate on")
    seen: set[RowKey] = set()
    for at, target in enumerate(targets, start=1):
        if row_key(target) in seen:
            raise DataError(
                f"{where}: target {at} (user {target.user_id!r}, item {target.item_id!r}) is there "
                "twice with one time; keep one of the two"
            )
        seen.add(row_key(target))


def draw(targets: Sequence[Review], rows: int | None, seed: int) -> list[Review]:
    """`rows` of the targets by lot, in the order of the targets; all where that is fewer or None.

    Raises:
        SettingError: under one row.
    """
    if rows is None or rows >= len(targets):
        return list(targets)
    if rows < 1:
        raise SettingError(f"bad setting sample={rows}: must be 1 or more")
    chosen = {review.key for review in by_lot(targets, seed, "evaluate")[:rows]}
    return [target for target in targets if target.key in chosen]


def by_lot(reviews: Iterable[Review], seed: int, purpose: str) -> list[Review]:
    """The reviews in an order drawn by the seed, a different one for each purpose.

    Each review's place depends on itself alone: the first n of them are among the first n + 1,
    and a review more or less moves no other.
    """
    return sorted(reviews, key=lambda review: _lot(review, seed, purpose))


def digest_targets(targets: Iterable[Review]) -> str:
    """32 hex digits over users, items and times, whatever their order."""
    return digest_rows(sorted([*row_key(target)] for target in targets))


def record_sample(targets: Sequence[Review], file: Path) -> None:
    """Write down which rows are scored (`SAMPLE_SCHEMA`; no rating, no word of a review).

    Raises:
        DataError: the file records other rows; this folder belongs to another evaluation.
    """
    rows = [dict(zip(SAMPLE_SCHEMA.names, row_key(target), strict=True)) for target in targets]
    if file.exists():
        if pq.read_table(file, schema=SAMPLE_SCHEMA).to_pylist() != rows:
            raise DataError(
                f"{file} records other rows than those to score now; choose another folder, or "
                "call it with the same targets, sample and seed to continue"
            )
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    write_table(pa.Table.from_pylist(rows, SAMPLE_SCHEMA), file)


def earlier_reviews(source: ReviewSource, targets: Sequence[Review]) -> list[Review]:
    """What floors may be fitted on: all reviews strictly earlier than every target.

    Raises:
        DataError: the source cannot list its reviews, or none is earlier; pass training rows.
    """
    if not isinstance(source, ListedReviews):
        raise DataError(f"{type(source).__name__} cannot list its reviews; pass the training rows")
    first = min(target.timestamp for target in targets)
    train = [review for review in source if review.timestamp < first]
    if not train:
        raise DataError(
            "no review is earlier than the first target, so there is nothing to fit the floors "
            "on; pass training rows that are no targets (--train)"
        )
    return train


def _lot(review: Review, seed: int, purpose: str) -> tuple[bytes, str]:
    drawn = hashlib.blake2b(f"{seed} {purpose} {review.key}".encode(), digest_size=8)
    return drawn.digest(), review.key
