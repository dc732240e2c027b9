"""The tables of a database of reviews, and the questions to them.

Three tables: `reviews`, `items`, and `review_days`, which holds for each day the count and the sums
of its ratings: statistics over everything are then sums over days and over the reviews of one. Each
index begins with what is asked for and holds what statistics need, so that these read no text.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

from sqlalchemy import (
    BigInteger,
    Column,
    ColumnElement,
    Double,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Select,
    Table,
    Text,
    bindparam,
    func,
    literal,
    select,
    union_all,
)
from sqlalchemy.dialects import postgresql, sqlite

A_DAY = 86_400.0
"""Seconds."""

tables = MetaData()

_PLACE = BigInteger().with_variant(Integer, "sqlite")  # SQLite counts its own integers only

reviews = Table(
    "reviews",
    tables,
    Column("place", _PLACE, primary_key=True),
    Column("digest", LargeBinary(16), nullable=False, unique=True),
    Column("user_id", Text, nullable=False),
    Column("item_id", Text, nullable=False),
    Column("title", Text, nullable=False),
    Column("rating", Double, nullable=False),
    Column("timestamp", Double, nullable=False),
    Column("review", Text, nullable=False),
)
"""`place` is the order in which they were added; `digest`, of all the rest, is there once."""

_r = reviews.c
Index("reviews_of_user", _r.user_id, _r.timestamp, _r.place, _r.item_id, _r.rating)
Index("reviews_of_item", _r.item_id, _r.timestamp, _r.place, _r.user_id, _r.rating)
Index("reviews_at_time", _r.timestamp, _r.rating)
_titled = _r.title != ""
Index(
    "reviews_with_title",
    _r.item_id,
    _r.timestamp,
    _r.place,
    sqlite_where=_titled,
    postgresql_where=_titled,
)

_before = _r.timestamp < bindparam("before")
_LATEST = (_r.timestamp.desc(), _r.place.desc())

items = Table(
    "items",
    tables,
    Column("place", _PLACE, primary_key=True),
    Column("item_id", Text, nullable=False, unique=True),
    Column("title", Text, nullable=False),
    Column("category", Text, nullable=False),
    Column("description", Text, nullable=False),
)

days = Table(
    "review_days",
    tables,
    Column("day", BigInteger, primary_key=True, autoincrement=False),
    Column("count", BigInteger, nullable=False),
    Column("total", Double, nullable=False),
    Column("squares", Double, nullable=False),
)
"""Days since 1970, and the count, the sum and the sum of squares of their ratings."""

COLUMNS = (_r.user_id, _r.item_id, _r.rating, _r.timestamp, _r.title, _r.review)
"""Of a review, in the order of `Review`'s fields."""

ITEM_COLUMNS = (items.c.item_id, items.c.title, items.c.category, items.c.description)
"""Of an item, in the order of `Item`'s fields."""


def day_of(timestamp: float) -> int:
    """The day of a time; exact, unlike a division that is rounded."""
    return int(timestamp // A_DAY)


# Questions ---------------------------------------------------------------------------------------
#
# Each is made once, and asked with values for `:own`, `:other`, `:before` and so on. An id that no
# database can hold is NULL there, which nothing equals.


@cache
def history(side: str, *, without: bool) -> Select[Any]:
    """The latest `:limit` reviews of `:own` before a time, the latest first.

    Args:
        side: `user_id` or `item_id`: what `:own` is.
        without: whether those of `:other`, on the other side, are left out.
    """
    chosen = select(*COLUMNS).where(*_earlier(side, without))
    return chosen.order_by(*_LATEST).limit(bindparam("limit", type_=Integer))


@cache
def stats(side: str, *, without: bool) -> Select[Any]:
    """Count, sum and sum of squares of the ratings of `:own` before a time; see `history`."""
    return select(*_sums()).where(*_earlier(side, without))


@cache
def overall() -> Select[Any]:
    """Count, sum and sum of squares of all ratings `:before` a time, less those of `:user` and
    `:item`: those of the days before `:day`, and the others from `:start` on."""
    whole = select(days.c.count, days.c.total, days.c.squares).where(days.c.day < bindparam("day"))
    rest = select(*_sums()).where(_r.timestamp >= bindparam("start"), _before)
    own = select(*(-each for each in _sums())).where(
        _r.user_id == bindparam("user"), _r.item_id == bindparam("item"), _before
    )
    parts = union_all(whole, rest, own).subquery()
    return select(*(func.coalesce(func.sum(each), 0) for each in parts.c))


def days_before(before: float) -> dict[str, float]:
    """What `overall` is asked with for a time."""
    if math.isinf(before):
        return {"day": int(math.copysign(2**62, before)), "start": before, "before": before}
    day = day_of(before)
    return {"day": day, "start": day * A_DAY, "before": before}


@cache
def item() -> Select[Any]:
    """The entry of `:own` in the catalogue."""
    return select(*ITEM_COLUMNS).where(items.c.item_id == bindparam("own"))


@cache
def title() -> Select[Any]:
    """The title in the latest review of item `:own` before a time that has one."""
    return select(_r.title).where(*_earlier("item_id", False), _titled).order_by(*_LATEST).limit(1)


@cache
def known(column: Column[Any]) -> Select[Any]:
    """A row where `:own` is there."""
    return select(literal(1)).where(column == bindparam("own")).limit(1)


def by_appearance(column: Column[Any]) -> Select[Any]:
    """All ids, in the order in which they were added first."""
    return select(column).group_by(column).order_by(func.min(column.table.c.place))


def page(after: int, count: int) -> Select[Any]:
    """Some reviews in the order in which they were added, each with its place in front."""
    return select(_r.place, *COLUMNS).where(_r.place > after).order_by(_r.place).limit(count)


# Changes -----------------------------------------------------------------------------------------


def add(dialect: str) -> Any:
    """Adds reviews but those that are there; returns what days need of those added."""
    new = _insert(dialect, reviews).on_conflict_do_nothing(index_elements=[_r.digest])
    return new.returning(_r.timestamp, _r.rating)


def count_days(dialect: str) -> Any:
    """Adds to what each day holds."""
    new = _insert(dialect, days)
    more = {name: days.c[name] + new.excluded[name] for name in ("count", "total", "squares")}
    return new.on_conflict_do_update(index_elements=[days.c.day], set_=more)


def set_items(dialect: str) -> Any:
    """Adds items, or what is known of them now."""
    new = _insert(dialect, items)
    values = {name: new.excluded[name] for name in ("title", "category", "description")}
    return new.on_conflict_do_update(index_elements=[items.c.item_id], set_=values)


def _insert(dialect: str, table: Table) -> Any:
    return (sqlite if dialect == "sqlite" else postgresql).insert(table)


def _earlier(side: str, without: bool) -> list[ColumnElement[bool]]:
    other = _r.item_id if side == "user_id" else _r.user_id
    left_out = [other != bindparam("other")] if without else []
    return [_r[side] == bindparam("own"), _before, *left_out]


def _sums() -> list[ColumnElement[Any]]:
    total = func.coalesce(func.sum(_r.rating), 0.0)
    squares = func.coalesce(func.sum(_r.rating * _r.rating), 0.0)
    return [func.count().label("count"), total.label("total"), squares.label("squares")]
