"""Reviews in a database: adding to it, addresses, and what goes wrong. What it answers is in
`test_reviews_conformance.py`."""

from __future__ import annotations

import builtins
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy

from r4r_graph.errors import DataError, MissingExtraError, SettingError, SourceError, is_retryable
from r4r_graph.ratings import RatingScale, RatingStats
from r4r_graph.reviews import load_reviews, open_reviews
from r4r_graph.reviews.addresses import is_address, without_password
from r4r_graph.reviews.sql import ID_BYTES, SqlReviewSource
from r4r_graph.schema import Item, Review
from tests.commands import Done
from tests.review_sources import own_schema
from tests.test_postgres import server as server
from tests.test_reviews_conformance import random_reviews

REVIEWS = random_reviews(1, 150)
GOOD = Review("u", "i", 4.0, 5.0, "t", "words")
SAMPLE = Path(__file__).parents[1] / "r4r_graph" / "_demo"


@pytest.fixture(params=["sqlite", "postgresql"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/reviews.db"
    return own_schema(request.getfixturevalue("server"))


@pytest.fixture
def source(address: str) -> Iterator[SqlReviewSource]:
    with SqlReviewSource(address) as made:
        yield made


# Adding ------------------------------------------------------------------------------------------


def test_what_is_there_is_not_added_again(source: SqlReviewSource) -> None:
    assert source.add_reviews(REVIEWS) == len(REVIEWS)
    before = source.overall_stats(1e9)
    assert source.add_reviews([*REVIEWS, GOOD, GOOD, replace(GOOD, rating=4)]) == 1
    assert source.add_reviews([]) == 0
    assert list(source) == [*REVIEWS, GOOD]
    assert source.overall_stats(1e9).count == before.count + 1
    assert source.add_reviews([replace(GOOD, text="other words")]) == 1  # the same pair and time


def test_an_added_review_is_in_the_next_answer(source: SqlReviewSource) -> None:
    assert not source.knows_user("u")
    for count in (1, 2, 3):
        source.add_reviews([replace(GOOD, timestamp=float(count))])
        assert source.user_stats("u", 9.0) == RatingStats(count, 4.0, 0.0)
        assert source.overall_stats(9.0).count == len(source) == count
    assert len(source.user_history("u", 3.0, 9)) == 2


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"user_id": ""}, "no user_id"),
        ({"item_id": "  "}, "no item_id"),
        ({"rating": 5.5}, "rating 5.5 is off the scale 1 to 5"),
        ({"rating": float("nan")}, "not a finite number"),
        ({"rating": None}, "no rating"),
        ({"timestamp": 1.7e12}, "looks like milliseconds"),
        ({"timestamp": float("inf")}, "not a finite number"),
        ({"text": "half \ud83d"}, "half a surrogate pair"),
        ({"title": "nul\0"}, "title holds the character NUL"),
        ({"user_id": "é" * (ID_BYTES // 2 + 1)}, "user_id is longer than 1000 bytes"),
    ],
)
def test_one_bad_review_and_none_is_added(
    source: SqlReviewSource, change: dict[str, Any], complaint: str
) -> None:
    many = [replace(GOOD, timestamp=float(n)) for n in range(2001)]
    with pytest.raises(DataError, match=f"^review 2002 of those to add: .*{complaint}"):
        source.add_reviews([*many, replace(GOOD, **change)])
    assert list(source) == []
    assert source.overall_stats(1e9) == RatingStats()


def test_the_longest_id_is_found_again(source: SqlReviewSource) -> None:
    longest = Review("é" * (ID_BYTES // 2), "\U0001f600" * (ID_BYTES // 4), 3.0, 1.0)
    source.add_reviews([longest])
    assert source.user_history(longest.user_id, 2.0, 1) == [longest]


def test_an_iterable_that_fails_adds_nothing(source: SqlReviewSource) -> None:
    def broken() -> Iterator[Review]:
        yield from REVIEWS
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        source.add_reviews(broken())
    assert len(source) == 0
    assert source.add_reviews(REVIEWS) == len(REVIEWS)


def test_items_are_replaced(source: SqlReviewSource) -> None:
    source.add_items([Item("i", "Old", "film"), Item("j")])
    source.add_items([Item("i", "New", "album", "described")])
    assert source.item("i", None) == Item("i", "New", "album", "described")
    assert source.item_ids() == ["i", "j"]
    with pytest.raises(DataError, match=r"^item 2 of those to add: no item_id"):
        source.add_items([Item("k"), Item("")])
    assert not source.knows_item("k")


def test_many_add_at_once(source: SqlReviewSource) -> None:
    """The same reviews, each thread in an order of its own, while others ask."""

    def add(number: int) -> int:
        order = REVIEWS if number % 2 else REVIEWS[::-1]
        return source.add_reviews(order[number * 7 :]) + source.add_reviews(order)

    def ask(_: int) -> bool:
        found = source.overall_stats(1e9)
        return found.count <= len(REVIEWS)

    with ThreadPoolExecutor(8) as pool:
        asked = pool.map(ask, range(20))
        assert sum(pool.map(add, range(6))) == len(REVIEWS)
        assert all(asked)
    assert sorted(r.key for r in source) == sorted(r.key for r in REVIEWS)
    assert source.overall_stats(1e9).count == len(REVIEWS)


def test_another_process_sees_it(address: str) -> None:
    with SqlReviewSource(address) as one, SqlReviewSource(address) as other:
        one.add_reviews(REVIEWS)
        assert list(other) == REVIEWS
        assert other.add_reviews(REVIEWS) == 0


def test_whole_scales_of_others(address: str) -> None:
    with SqlReviewSource(address, scale=RatingScale.parse("1-10")) as source:
        assert source.add_reviews([replace(GOOD, rating=9.0)]) == 1


def test_questions_use_the_indexes(tmp_path: Path) -> None:
    with SqlReviewSource(f"sqlite:///{tmp_path}/r.db") as source:
        source.add_reviews(REVIEWS)
    asks = {
        "reviews_of_user": "SELECT sum(rating) FROM reviews WHERE user_id = 'u' AND timestamp < 5",
        "reviews_of_item": "SELECT sum(rating) FROM reviews WHERE item_id = 'u' AND timestamp < 5",
        "reviews_at_time": "SELECT sum(rating) FROM reviews WHERE timestamp >= 1 AND timestamp < 5",
    }
    with closing(sqlite3.connect(tmp_path / "r.db")) as connection:
        for name, ask in asks.items():
            [(*_, plan)] = connection.execute(f"EXPLAIN QUERY PLAN {ask}")
            assert f"COVERING INDEX {name}" in plan


# Addresses ---------------------------------------------------------------------------------------


def test_addresses_are_told_from_paths() -> None:
    assert is_address("sqlite:///a.db")
    assert is_address("postgresql+psycopg://h/db")
    for path in ("reviews.parquet", "/a/b.csv", "C:\\a.csv", "a:b.csv", Path("a")):
        assert not is_address(path)


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("postgresql://ann:s3cret@h:1/db", "postgresql://ann@h:1/db"),
        ("postgresql://ann:s3c/r@et@h/db", "postgresql://ann@h/db"),
        ("postgresql://ann@tenant:s3cret@h/db", "postgresql://ann@tenant@h/db"),
        ("postgresql://h/db?user=ann&password=s3cret&x=1", "postgresql://h/db?user=ann&x=1"),
        ("postgresql://ann@h:5432/db", "postgresql://ann@h:5432/db"),
        ("sqlite:////a/b@c:d.db", "sqlite:////a/b@c:d.db"),
        ("a:b@c.csv", "a:b@c.csv"),
    ],
)
def test_a_password_is_not_shown(address: str, shown: str) -> None:
    assert without_password(address) == shown


def test_a_database_is_opened_where_a_file_is(address: str) -> None:
    with pytest.raises(SettingError, match=r"no such file|holds no reviews yet"):
        open_reviews(address)
    with SqlReviewSource(address) as source:
        source.add_reviews(REVIEWS)
    found = open_reviews(address)
    assert isinstance(found, SqlReviewSource)
    assert list(found) == REVIEWS
    found.close()
    with pytest.raises(SettingError, match="holds its own items"):
        open_reviews(address, items={"i": Item("i")})


def test_an_engine_of_ones_own_stays_open(address: str) -> None:
    engine = sqlalchemy.create_engine(
        address.replace("postgresql://", "postgresql+psycopg://"),
        connect_args={} if "sqlite" in address else {"client_encoding": "utf8"},
    )
    with SqlReviewSource(engine) as source:
        source.add_reviews(REVIEWS)
    with engine.connect() as connection:
        count = connection.execute(sqlalchemy.text("SELECT count(*) FROM reviews")).scalar()
    assert count == len(REVIEWS)
    engine.dispose()


def test_the_file_is_its_owners(tmp_path: Path) -> None:
    SqlReviewSource(f"sqlite:///{tmp_path}/r.db").close()
    assert (tmp_path / "r.db").stat().st_mode & 0o77 == 0


@pytest.mark.parametrize(
    ("address", "complaint"),
    [
        ("sqlite://", "a database in memory is each thread's own"),
        ("sqlite:///:memory:", "a database in memory is each thread's own"),
        ("mysql+nothing://h/db", "bad address 'mysql\\+nothing://h/db'"),
        ("oracle://ann:s3cret@h/db", "not supported|bad address"),
        ("not an address", "bad address"),
        ("postgresql+asyncpg://h/db", "for coroutines alone"),
        ("sqlite:////no/such/folder/r.db", "cannot be made"),
    ],
)
def test_a_bad_address_is_refused(address: str, complaint: str) -> None:
    with pytest.raises(SettingError, match=complaint) as caught:
        SqlReviewSource(address)
    assert "s3cret" not in str(caught.value)


# What goes wrong ---------------------------------------------------------------------------------


def test_tables_that_are_not_ours_are_left_alone(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "shop.db")) as connection:
        connection.execute("CREATE TABLE reviews (id INTEGER, stars INTEGER)")
    with pytest.raises(SettingError, match="its table reviews has no column place"):
        SqlReviewSource(f"sqlite:///{tmp_path}/shop.db")


def test_a_file_that_is_no_database(tmp_path: Path) -> None:
    (tmp_path / "r.db").write_text("user_id,item_id\n" * 100)
    with pytest.raises(SourceError, match="not a database"):
        SqlReviewSource(f"sqlite:///{tmp_path}/r.db")


def test_a_server_that_is_not_there_is_named_without_its_password() -> None:
    pytest.importorskip("psycopg")
    with pytest.raises(SourceError) as caught:
        SqlReviewSource("postgresql://ann:s3cret@127.0.0.1:1/db")
    assert "ann@127.0.0.1:1/db" in str(caught.value)
    assert "s3cret" not in repr(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__
    assert is_retryable(caught.value)


def test_errors_hold_no_word_of_a_review(source: SqlReviewSource) -> None:
    source.add_reviews(REVIEWS)
    with source._changing() as connection:
        connection.exec_driver_sql("DROP TABLE review_days")
    with pytest.raises(SourceError, match="review_days") as caught:
        source.add_reviews([replace(GOOD, text="a secret of mine")])
    assert "secret" not in str(caught.value)
    assert len(source.user_history("u", 9.0, 1)) == 0  # taken back as a whole


def test_a_connection_that_was_cut_is_made_anew(server: str) -> None:
    with SqlReviewSource(own_schema(server)) as source, SqlReviewSource(server) as other:
        source.add_reviews(REVIEWS)
        with other._engine.connect() as connection:
            connection.exec_driver_sql(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE pid <> pg_backend_pid() AND backend_type = 'client backend'"
            )
        assert list(source) == REVIEWS


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    imported: Callable[..., Any] = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name == missing:
            raise ModuleNotFoundError(name)
        return imported(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    missing = "psycopg"
    with pytest.raises(MissingExtraError, match=r"r4r-graph\[postgres\]"):
        SqlReviewSource("postgresql://h/db")
    missing = "sqlalchemy"
    with pytest.raises(MissingExtraError, match=r"r4r-graph\[sql\]"):
        SqlReviewSource(f"sqlite:///{tmp_path}/r.db")


def test_files_are_read_without_sqlalchemy() -> None:
    code = "import sys, r4r_graph.reviews.sql; assert 'sqlalchemy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# The command line --------------------------------------------------------------------------------


def test_the_command_line_reads_it(
    address: str,
    r4r: Callable[..., Done],
    script: object,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("R4R_CACHE_DIR", str(tmp_path / "cache"))
    with SqlReviewSource(address) as source:
        source.add_reviews(load_reviews(SAMPLE / "reviews.jsonl"))
    pair = ("--user", "mara", "--item", "glass-harbour")
    asked = r4r("rate", "--reviews", address, *pair, "--json", "--thread", "one")
    assert asked.code == 0, asked.err
    same = r4r("rate", "--reviews", SAMPLE / "reviews.jsonl", *pair, "--json", "--no-keep")
    assert '"rating"' in asked.out
    assert asked.out.split('"user_aspects"')[1][:200] == same.out.split('"user_aspects"')[1][:200]
    wrong = r4r("rate", "--reviews", "postgresql://ann:s3cret@127.0.0.1:1/db", *pair, "--no-keep")
    assert wrong.code == 2
    assert "s3cret" not in wrong.err + wrong.out


def test_a_kept_run_remembers_no_password() -> None:
    from r4r_graph.cli.options import Sources

    label = Sources(reviews="postgresql://ann:s3cret@h/db").label()
    assert "s3cret" not in str(label)
    assert Sources.of(label).reviews == "postgresql://ann@h/db"


def test_a_configuration_file_may_name_it_without_a_password(tmp_path: Path) -> None:
    from r4r_graph.configuration import resolve

    file = tmp_path / "r4r.toml"
    file.write_text('reviews = "sqlite:///reviews.db"\n')
    assert resolve(environ={}, folder=tmp_path).reviews == "sqlite:///reviews.db"
    file.write_text('reviews = "postgresql://ann:s3cret@h/db"\n')
    with pytest.raises(SettingError, match="PGPASSWORD") as caught:
        resolve(environ={}, folder=tmp_path)
    assert "s3cret" not in str(caught.value)
