"""Reviews in a database that grows while it is asked: SQLite in a file, or PostgreSQL.

    reviews = SqlReviewSource("sqlite:///reviews.db")
    reviews.add_reviews(load_reviews("reviews.parquet"))
    recommender = Recommender.load(reviews)

Over SQLAlchemy's Core; `sql_statements` has the tables and the questions.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self

from r4r_graph.errors import DataError, MissingExtraError
from r4r_graph.ratings import RatingScale, RatingStats
from r4r_graph.reviews.index import check_limit, check_time
from r4r_graph.reviews.rows import checked_review, checked_text
from r4r_graph.reviews.sql_connect import check_kind, check_tables, fault, make_engine, shown
from r4r_graph.reviews.table import REVIEW_SCHEMA
from r4r_graph.schema import Item, Review

if TYPE_CHECKING:
    from sqlalchemy import URL, Connection, Engine

ID_BYTES = 1000
"""An id's greatest length in UTF-8: two of them have to fit into a row of an index."""

_AT_ONCE = 1000
"""Rows in a statement."""
_FAR = 2**31 - 1
_LOCK = 0x723472  # of ours in PostgreSQL: any number that nobody else takes


class SqlReviewSource:
    """A `ReviewSource` in a database, to which reviews can be added at any time.

    Threads may share it: each question takes a connection from a pool. Answers hold what was added
    before the question; of reviews with the same timestamp, the one added earlier comes first.
    `len()` and iterating are as for a table. Close it, or use it as a context manager.
    """

    def __init__(
        self,
        database: str | URL | Engine,
        *,
        scale: RatingScale | None = None,
        create: bool = True,
    ) -> None:
        """Connect, and make the tables where there are none.

        Args:
            database: an address, such as `sqlite:///reviews.db` (a file; three slashes and a
                relative path, or four and an absolute one) or
                `postgresql+psycopg://user@host/name`; or an engine of SQLAlchemy's that is yours
                to close. A password is best left out and given as `PGPASSWORD` or in `.pgpass`.
            scale: every rating that is added must lie within it; default 1 to 5.
            create: False: the tables have to be there.

        Raises:
            SettingError: no such address, another kind of database, tables of these names that
                are not ours, or none where they have to be there.
            SourceError: the database cannot be reached.
            MissingExtraError: SQLAlchemy or the database's driver is not installed.
        """
        try:
            from sqlalchemy import Engine

            from r4r_graph.reviews import sql_statements
        except ImportError:
            raise MissingExtraError("reviews in a database", "sql") from None
        self._sql = sql_statements
        self._scale = scale or RatingScale()
        if isinstance(database, Engine):
            self._engine, close = database, _nothing
        else:
            self._engine = make_engine(database, create=create)
            close = self._engine.dispose
        check_kind(self._engine.dialect)
        self._dialect = self._engine.dialect.name
        self._reading = self._engine
        if self._dialect == "postgresql":
            # One statement a question: a transaction around it would be two more messages.
            self._reading = self._engine.execution_options(isolation_level="AUTOCOMMIT")
        self._close = weakref.finalize(self, close)
        with self._faults():
            complete = check_tables(self._engine, self._sql.tables, create=create)
        if not complete:
            with self._changing() as connection:
                self._sql.tables.create_all(connection)

    def close(self) -> None:
        """Close its connections."""
        self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"SqlReviewSource({shown(self._engine.url)!r})"

    # Questions ------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return self.overall_stats(math.inf).count

    def __iter__(self) -> Iterator[Review]:
        place = -1
        while rows := self._rows(self._sql.page(place, _AT_ONCE)):
            yield from (Review(*row[1:]) for row in rows)
            place = rows[-1][0]

    def user_ids(self) -> list[str]:
        """Everyone who wrote a review, whose first was added first in front."""
        return self._ids(self._sql.reviews.c.user_id)

    def item_ids(self) -> list[str]:
        """All items that are known: the reviewed ones by first appearance, then the others."""
        reviewed = self._ids(self._sql.reviews.c.item_id)
        return list(dict.fromkeys([*reviewed, *self._ids(self._sql.items.c.item_id)]))

    def user_history(
        self, user_id: str, before: float, limit: int, *, without_item: str | None = None
    ) -> list[Review]:
        """The user's latest reviews before a time, oldest first; see `ReviewSource`."""
        return self._history("user_id", user_id, before, limit, without_item)

    def item_history(
        self, item_id: str, before: float, limit: int, *, without_user: str | None = None
    ) -> list[Review]:
        """The latest reviews of an item before a time, oldest first; see `ReviewSource`."""
        return self._history("item_id", item_id, before, limit, without_user)

    def user_stats(
        self, user_id: str, before: float, *, without_item: str | None = None
    ) -> RatingStats:
        """Statistics of all ratings by the user before a time; see `ReviewSource`."""
        return self._stats("user_id", user_id, before, without_item)

    def item_stats(
        self, item_id: str, before: float, *, without_user: str | None = None
    ) -> RatingStats:
        """Statistics of all ratings of an item before a time; see `ReviewSource`."""
        return self._stats("item_id", item_id, before, without_user)

    def overall_stats(
        self, before: float, *, without_pair: tuple[str, str] | None = None
    ) -> RatingStats:
        """Statistics of all ratings before a time; see `ReviewSource`."""
        check_time(before)
        user, item = map(_known, without_pair or (None, None))
        asked = {**self._sql.days_before(before), "user": user, "item": item}
        return _summed(self._rows(self._sql.overall(), asked))

    def knows_user(self, user_id: str) -> bool:
        """Whether the user wrote any review, at whatever time."""
        return self._knows(self._sql.reviews.c.user_id, user_id)

    def knows_item(self, item_id: str) -> bool:
        """Whether the item has any review, at whatever time, or is in the item catalogue."""
        columns = self._sql.reviews.c.item_id, self._sql.items.c.item_id
        return any(self._knows(column, item_id) for column in columns)

    def item(self, item_id: str, before: float | None) -> Item:
        """The catalogue's entry, if need be with a title from a review; see `ReviewSource`."""
        moment = math.inf if before is None else before
        check_time(moment)
        name = _known(item_id)
        found = self._rows(self._sql.item(), {"own": name})
        entry = Item(*found[0]) if found else Item(item_id)
        for when in () if entry.title else (moment, math.inf):
            if titles := self._rows(self._sql.title(), {"own": name, "before": when}):
                return replace(entry, title=titles[0][0])
        return entry

    # Changes --------------------------------------------------------------------------------------

    def add_reviews(self, reviews: Iterable[Review]) -> int:
        """Add reviews: all of them, or none where one is bad. One that is there already, equal in
        every field, is not added again. Whoever adds waits for whoever is adding.

        Args:
            reviews: of which as few are held in memory at once as a statement has.

        Returns:
            How many were new.

        Raises:
            DataError: a review is bad: no id, a rating off the scale, a time in milliseconds, a
                text that no database holds. The message says which one, counted from 1.
            SourceError: the database cannot be reached or written.
        """
        days: dict[int, tuple[int, float, float]] = {}
        rows = (self._row(number, review) for number, review in enumerate(reviews, 1))
        with self._changing() as connection:
            statement = self._sql.add(self._dialect)
            while some := list(itertools.islice(rows, _AT_ONCE)):
                for when, rating in connection.execute(statement, some):
                    day = self._sql.day_of(when)
                    count, total, squares = days.get(day, (0, 0.0, 0.0))
                    days[day] = count + 1, total + rating, squares + rating * rating
            names = "day", "count", "total", "squares"
            new = [dict(zip(names, (day, *sums), strict=True)) for day, sums in days.items()]
            if new:
                connection.execute(self._sql.count_days(self._dialect), new)
        return sum(count for count, _, _ in days.values())

    def add_items(self, items: Iterable[Item]) -> None:
        """Add items to the catalogue: all of them, or none where one is bad. What is known of an
        item already is replaced.

        Raises:
            DataError: an item has no id, or a text that no database holds.
            SourceError: the database cannot be reached or written.
        """
        rows = (self._item_row(number, item) for number, item in enumerate(items, 1))
        with self._changing() as connection:
            while some := list(itertools.islice(rows, _AT_ONCE)):
                connection.execute(self._sql.set_items(self._dialect), some)

    def _row(self, number: int, review: Review) -> dict[str, Any]:
        values = {
            "user_id": review.user_id,
            "item_id": review.item_id,
            "title": review.title,
            "rating": review.rating,
            "timestamp": review.timestamp,
            "review": review.text,
        }
        try:
            checked = checked_review(values, self._scale)
            row = dict(zip(REVIEW_SCHEMA.names, checked, strict=True))
            _check_texts(row, ids=("user_id", "item_id"))
        except DataError as error:
            raise DataError(f"review {number} of those to add: {error}") from None
        packed = json.dumps(checked, ensure_ascii=True).encode()
        return {**row, "digest": hashlib.blake2b(packed, digest_size=16).digest()}

    def _item_row(self, number: int, item: Item) -> dict[str, Any]:
        row = item.to_dict()
        try:
            row = {name: checked_text(row, name, required=name == "item_id") for name in row}
            _check_texts(row, ids=("item_id",))
        except DataError as error:
            raise DataError(f"item {number} of those to add: {error}") from None
        return row

    # The database ---------------------------------------------------------------------------------

    def _history(
        self, side: str, own: str, before: float, limit: int, other: str | None
    ) -> list[Review]:
        check_limit(limit)
        asked = {**_asked(own, before, other), "limit": min(limit, _FAR)}
        rows = self._rows(self._sql.history(side, without="other" in asked), asked)
        return [Review(*row) for row in reversed(rows)]

    def _stats(self, side: str, own: str, before: float, other: str | None) -> RatingStats:
        asked = _asked(own, before, other)
        return _summed(self._rows(self._sql.stats(side, without="other" in asked), asked))

    def _knows(self, column: Any, own: str) -> bool:
        return bool(self._rows(self._sql.known(column), {"own": _known(own)}))

    def _ids(self, column: Any) -> list[str]:
        return [name for (name,) in self._rows(self._sql.by_appearance(column))]

    def _rows(self, statement: Any, asked: dict[str, Any] | None = None) -> list[Any]:
        with self._faults(), self._reading.connect() as connection:
            return list(connection.execute(statement, asked))

    @contextmanager
    def _changing(self) -> Iterator[Connection]:
        """A transaction, one at a time: two that add the same reviews, each in an order of its
        own, would wait for each other."""
        with self._faults(), self._engine.begin() as connection:
            if self._dialect == "sqlite":
                connection.exec_driver_sql("BEGIN IMMEDIATE")
            else:
                connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_LOCK})")
            yield connection

    @contextmanager
    def _faults(self) -> Iterator[None]:
        """What goes wrong in the database, as an error of ours; reviews and passwords are not in
        it, and neither is the original one, which has them."""
        from sqlalchemy.exc import SQLAlchemyError

        try:
            yield
        except SQLAlchemyError as error:
            raise fault(self._engine.url, error) from None


def _nothing() -> None:
    """What is done to close an engine that is somebody else's."""


def _asked(own: str, before: float, other: str | None) -> dict[str, Any]:
    """What a question is asked with; an id that nothing can have leaves nothing out."""
    check_time(before)
    asked = {"own": _known(own), "before": before, "other": _known(other)}
    return {name: value for name, value in asked.items() if name != "other" or value is not None}


def _summed(rows: list[Any]) -> RatingStats:
    [(count, total, squares)] = rows
    return RatingStats.from_sums(int(count), float(total), float(squares))


def _known(text: str | None) -> str | None:
    """An id to ask for; None where no database can hold it, so that nothing has it."""
    if text is None or "\0" in text:
        return None
    try:
        return text if len(text.encode()) <= ID_BYTES else None
    except UnicodeEncodeError:
        return None


def _check_texts(row: dict[str, Any], ids: tuple[str, ...]) -> None:
    """Refuse what a database does not hold."""
    for name, value in row.items():
        if isinstance(value, str) and "\0" in value:
            raise DataError(f"{name} holds the character NUL, which no database text may")
    for name in ids:
        if len(row[name].encode()) > ID_BYTES:
            raise DataError(f"{name} is longer than {ID_BYTES} bytes; shorten it")
