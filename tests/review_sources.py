"""Review sources of every kind over the same reviews, and a slow and obvious reference."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from r4r_graph.ratings import RatingStats
from r4r_graph.reviews import ReviewSource, TableReviewSource, load_reviews
from r4r_graph.reviews.sql import SqlReviewSource
from r4r_graph.reviews.table import REVIEW_SCHEMA
from r4r_graph.schema import Item, Review

Make = Callable[[Sequence[Review], Sequence[Item]], ReviewSource]

KINDS = ("table", "indexed", "sqlite", "postgresql")
"""Every source that ships."""

_numbers = itertools.count()


def maker(kind: str, folder: Path, server: Callable[[], str]) -> Iterator[Make]:
    """Makes sources of a kind, and closes them afterwards; `server` starts PostgreSQL."""
    opened: list[SqlReviewSource] = []

    def database(address: str) -> Make:
        def make(reviews: Sequence[Review], items: Sequence[Item]) -> ReviewSource:
            source = SqlReviewSource(address.format(next(_numbers)))
            opened.append(source)
            source.add_items(items)
            assert source.add_reviews(reviews) == len(reviews)
            return source

        return make

    def indexed(reviews: Sequence[Review], items: Sequence[Item]) -> ReviewSource:
        if not reviews:
            pytest.skip("a file of reviews holds at least one")
        path = write_reviews(folder / f"{next(_numbers)}.parquet", reviews)
        catalogue = {item.item_id: item for item in items}
        load_reviews(path, items=catalogue, index=path.with_suffix(".index"))
        return load_reviews(path, items=catalogue, index=path.with_suffix(".index"))

    def on_server(reviews: Sequence[Review], items: Sequence[Item]) -> ReviewSource:
        return database(own_schema(server()))(reviews, items)

    makers: dict[str, Make] = {
        "table": TableReviewSource.from_reviews,
        "indexed": indexed,
        "sqlite": database(f"sqlite:///{folder}/{{}}.db"),
        "postgresql": on_server,
    }
    yield makers[kind]
    for source in opened:
        source.close()


def own_schema(server: str) -> str:
    """An address with an empty schema of its own on a PostgreSQL server."""
    import psycopg

    name = f"reviews_{next(_numbers)}"
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(f"CREATE SCHEMA {name}")
    joint = "&" if "?" in server else "?"
    return f"{server}{joint}options=-csearch_path%3D{name}"


def write_reviews(path: Path, reviews: Sequence[Review]) -> Path:
    """A Parquet file of the reviews, in several row groups."""
    rows = [review.to_dict() for review in reviews]
    columns = {name: [row[name] for row in rows] for name in REVIEW_SCHEMA.names}
    pq.write_table(pa.table(columns, schema=REVIEW_SCHEMA), path, row_group_size=64)
    return path


class Reference:
    """Looks at every review for every question."""

    def __init__(self, reviews: Sequence[Review]) -> None:
        self.reviews = sorted(reviews, key=lambda r: r.timestamp)  # stable: ties keep their order

    def earlier(
        self,
        before: float,
        *,
        user: str | None = None,
        item: str | None = None,
        without_user: str | None = None,
        without_item: str | None = None,
    ) -> list[Review]:
        return [
            r
            for r in self.reviews
            if r.timestamp < before
            and (user is None or r.user_id == user)
            and (item is None or r.item_id == item)
            and r.user_id != without_user
            and r.item_id != without_item
        ]


def latest(reviews: Sequence[Review], limit: int) -> list[Review]:
    return list(reviews[max(0, len(reviews) - limit) :])


def same_stats(found: RatingStats, reviews: Sequence[Review]) -> bool:
    """Whether they are numpy's."""
    ratings = np.array([r.rating for r in reviews])
    if not len(ratings):
        return found == RatingStats()
    assert found.mean is not None
    assert found.spread is not None
    # the square root turns a rounding error of 1e-14 into 1e-7
    close = abs(found.mean - ratings.mean()) < 1e-9 and abs(found.spread - ratings.std()) < 1e-6
    return found.count == len(ratings) and bool(close)
