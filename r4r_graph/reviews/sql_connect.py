"""Connecting to a database of reviews: addresses, drivers, and what goes wrong."""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from r4r_graph.errors import MissingExtraError, SettingError, SourceError
from r4r_graph.reviews.addresses import without_password

if TYPE_CHECKING:
    from sqlalchemy import URL, Dialect, Engine, MetaData
    from sqlalchemy.exc import SQLAlchemyError

_BUSY_SECONDS = 30
_CONNECT_SECONDS = 10


def make_engine(database: str | URL, *, create: bool) -> Engine:
    """An engine for an address.

    Args:
        database: of SQLite or PostgreSQL; without a driver it is psycopg.
        create: whether a SQLite file that is not there is made.

    Raises:
        SettingError: it is no such address, or the file cannot be made or is not there.
        MissingExtraError: the driver is not installed.
    """
    from sqlalchemy import create_engine, event, make_url
    from sqlalchemy.exc import ArgumentError, NoSuchModuleError

    try:
        url = make_url(database)
        if url.drivername in ("postgres", "postgresql"):
            url = url.set(drivername="postgresql+psycopg")
        check_kind(url.get_dialect())
        remote = url.get_backend_name() == "postgresql"
        settings: dict[str, Any] = {"timeout": _BUSY_SECONDS}
        if remote:
            settings = {"client_encoding": "utf8", "connect_timeout": _CONNECT_SECONDS}
        engine = create_engine(
            url, hide_parameters=True, pool_pre_ping=remote, connect_args=settings
        )
    except (ArgumentError, NoSuchModuleError):
        raise SettingError(
            f"bad address {without_password(str(database))!r}: write sqlite:///FILE or "
            "postgresql+psycopg://USER@HOST/NAME"
        ) from None
    except ImportError:
        raise MissingExtraError("reviews in PostgreSQL", "postgres") from None
    if not remote:
        _prepare_file(url, create)

        @event.listens_for(engine, "connect")
        def settle(connection: Any, _: object) -> None:
            connection.execute("PRAGMA synchronous = NORMAL")

    return engine


def check_kind(dialect: Dialect | type[Dialect]) -> None:
    """Refuse a database or a driver that is not supported.

    Raises:
        SettingError: it is none of SQLite and PostgreSQL, or for coroutines alone.
    """
    if dialect.name not in ("sqlite", "postgresql"):
        raise SettingError(
            f"a database of kind {dialect.name} is not supported: use SQLite or PostgreSQL"
        )
    if dialect.is_async:
        raise SettingError(
            f"the driver {dialect.driver} is for coroutines alone: write sqlite:// or "
            "postgresql+psycopg://; the graph asks on threads of its own"
        )


def check_tables(engine: Engine, tables: MetaData, *, create: bool) -> bool:
    """Whether all tables are there.

    Raises:
        SettingError: one of these names is not ours, or one is missing and may not be made.
    """
    from sqlalchemy import inspect

    there = inspect(engine)
    missing = [name for name in tables.tables if not there.has_table(name)]
    for name, table in tables.tables.items():
        if name not in missing:
            columns = {column["name"] for column in there.get_columns(name)}
            if lacking := [each.name for each in table.columns if each.name not in columns]:
                raise SettingError(
                    f"{shown(engine.url)}: its table {name} has no column {lacking[0]}, so it is "
                    "not ours; give the reviews a database of their own"
                )
    if missing and not create:
        raise SettingError(
            f"{shown(engine.url)} holds no reviews yet; fill it with SqlReviewSource.add_reviews"
        )
    return not missing


def fault(url: URL, error: SQLAlchemyError) -> SourceError:
    """What went wrong, without a password."""
    reason = " ".join(str(getattr(error, "orig", None) or error).split()) or type(error).__name__
    for secret in (url.password, url.query.get("password")):
        if secret:
            reason = reason.replace(str(secret), "***")
    return SourceError(f"the reviews in {shown(url)} cannot be used: {reason[:300]}")


def shown(url: URL) -> str:
    """An address as it may be shown."""
    return without_password(url.render_as_string(hide_password=False))


def _prepare_file(url: URL, create: bool) -> None:
    """A SQLite file, readable by its owner alone, whose readers wait for no writer."""
    name = url.database or ""
    if not name or name == ":memory:" or url.query.get("mode") == "memory":
        raise SettingError(
            f"{shown(url)}: a database in memory is each thread's own; name a file, as in "
            "sqlite:///reviews.db"
        )
    if name.startswith("file:") or Path(name).exists():
        return
    if not create:
        raise SettingError(f"{shown(url)}: no such file; fill it with SqlReviewSource.add_reviews")
    try:
        os.close(os.open(name, os.O_CREAT | os.O_RDWR, 0o600))
        with closing(sqlite3.connect(name, timeout=_BUSY_SECONDS)) as connection:
            connection.execute("PRAGMA journal_mode = WAL")
    except (OSError, sqlite3.Error) as error:
        raise SettingError(f"{shown(url)}: cannot be made: {error}") from None
