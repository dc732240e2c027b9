"""Review and item files: every format, and every way in which one can be bad."""

from __future__ import annotations

import csv
import datetime as dt
import gzip
import io
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from r4r_graph.errors import DataError
from r4r_graph.ratings import RatingScale
from r4r_graph.reviews import TableReviewSource, load_items, load_reviews
from r4r_graph.schema import Item, Review

Rows = Sequence[Mapping[str, Any]]

REVIEWS = [
    Review("ann", "x1", 4.0, 1_400_000_000.0, "Blue", 'Said "wow",\nthen slept.\r\nÉtonnant.'),
    Review("bob", "x1", 2.5, -86_400.0, "Blue", ""),
    Review("ann", "x2", 5.0, 1_500_000_000.5, "", "x" * 200_000),  # over csv's own field limit
]


def write_csv(path: Path, rows: Rows) -> None:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    data = text.getvalue().encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def write_json_lines(path: Path, rows: Rows) -> None:
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def write_parquet(path: Path, rows: Rows) -> None:
    pq.write_table(pa.Table.from_pylist(list(rows)), path)


WRITERS: dict[str, Callable[[Path, Rows], None]] = {
    "data.parquet": write_parquet,
    "data.csv": write_csv,
    "data.csv.gz": write_csv,
    "data.jsonl": write_json_lines,
    "data.JSONL": write_json_lines,
    "data.jsonl.gz": write_json_lines,
    "data.ndjson": write_json_lines,
    "data.ndjson.gz": write_json_lines,
}
PLAIN = ["data.parquet", "data.csv", "data.jsonl"]


def write(folder: Path, name: str, rows: Rows) -> Path:
    path = folder / name
    WRITERS[name](path, rows)
    return path


def row(**change: Any) -> dict[str, Any]:
    good = {"user_id": "u", "item_id": "i", "title": "t", "rating": 4.0, "timestamp": 5.0}
    return {**good, "review": "r", **change}


def text_file(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def complaint(
    path: Path, load: Callable[[Path], object] = load_reviews, *, lines: int | None = 1
) -> str:
    """The message with which the path is refused, without the folder's name."""
    with pytest.raises(DataError) as caught:
        load(path)
    message = str(caught.value)
    assert str(path) in message
    if lines:
        assert message.count("\n") == lines - 1, message
    return message.replace(str(path.parent) + os.sep, "")


# --- good files --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_reviews(tmp_path: Path, name: str) -> None:
    limit = csv.field_size_limit()
    path = write(tmp_path, name, [r.to_dict() for r in REVIEWS])
    assert list(load_reviews(path)) == REVIEWS
    assert list(load_reviews(str(path))) == REVIEWS
    assert csv.field_size_limit() == limit


def test_a_folder_gives_its_parquet_parts_in_order(tmp_path: Path) -> None:
    for number, review in enumerate(REVIEWS):
        write_parquet(tmp_path / f"part-{number}.parquet", [review.to_dict()])
    pq.write_table(
        pq.read_table(tmp_path / "part-0.parquet").slice(0, 0), tmp_path / "part-9.parquet"
    )
    for ignored in ("_temporary.parquet", ".part.parquet", "_SUCCESS", "README.md"):
        (tmp_path / ignored).write_text("not parquet")
    assert list(load_reviews(tmp_path)) == REVIEWS


@pytest.mark.parametrize("name", PLAIN)
def test_texts_may_be_absent_and_other_columns_are_ignored(tmp_path: Path, name: str) -> None:
    rows = [{"verified": True, "timestamp": 7, "rating": 3, "item_id": "i", "user_id": "u"}]
    assert list(load_reviews(write(tmp_path, name, rows))) == [Review("u", "i", 3.0, 7.0)]


@pytest.mark.parametrize("name", ["data.parquet", "data.jsonl"])
def test_null_texts_are_empty(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, name, [row(title=None, review=None), row(title=None)])
    assert [(r.title, r.text) for r in load_reviews(path)] == [("", ""), ("", "r")]


@pytest.mark.parametrize("name", PLAIN)
def test_integer_ids_become_texts(tmp_path: Path, name: str) -> None:
    rows = [row(user_id=12, item_id=2**60, title=300), row(user_id=7, item_id=8, title=1917)]
    source = load_reviews(write(tmp_path, name, rows))
    assert source.user_ids() == ["12", "7"]
    assert source.item_ids() == [str(2**60), "8"]
    assert [r.title for r in source] == ["300", "1917"]


@pytest.mark.parametrize("name", ["data.parquet", "data.jsonl"])
def test_integer_ids_that_became_floats_are_integers_again(tmp_path: Path, name: str) -> None:
    rows = [row(user_id=12.0, title=float("nan")), row(user_id=7.0, title=3.0)]
    source = load_reviews(write(tmp_path, name, rows))
    assert source.user_ids() == ["12", "7"]
    assert [r.title for r in source] == ["", "3"]


@pytest.mark.parametrize("name", PLAIN)
def test_times_may_be_iso_texts(tmp_path: Path, name: str) -> None:
    times = ["1970-01-02", "1970-01-01T00:00:10", "1970-01-01T01:00:00+01:00", "1969-12-31", "9.5"]
    source = load_reviews(write(tmp_path, name, [row(timestamp=t) for t in times]))
    assert [r.timestamp for r in source] == [86400.0, 10.0, 0.0, -86400.0, 9.5]


MOMENT = dt.datetime(2014, 5, 13, 16, 53, 20, 250_000)
ARROW_TIMES = [
    (pa.array([MOMENT.replace(microsecond=0)], pa.timestamp("s")), 1_400_000_000.0),
    (pa.array([MOMENT], pa.timestamp("ms")), 1_400_000_000.25),
    (pa.array([MOMENT], pa.timestamp("us", tz="UTC")), 1_400_000_000.25),
    (pa.array([MOMENT], pa.timestamp("ns", tz="America/New_York")), 1_400_000_000.25),
    (pa.array([MOMENT.replace(year=1914)], pa.timestamp("us")), -1_755_760_000 + 0.25),
    (pa.array([MOMENT.date()], pa.date32()), 1_399_939_200.0),
    (pa.array([MOMENT.date()], pa.date64()), 1_399_939_200.0),
    (pa.array([1_400_000_000]), 1_400_000_000.0),
    (pa.array([Decimal("1400000000.25")]), 1_400_000_000.25),
    (pa.array([1_400_000_000]).dictionary_encode(), 1_400_000_000.0),
    (pa.array(["2014-05-13T16:53:20.25"]).dictionary_encode(), 1_400_000_000.25),
]


@pytest.mark.parametrize(
    ("times", "seconds"), ARROW_TIMES, ids=[str(t.type) for t, _ in ARROW_TIMES]
)
def test_times_may_be_arrow_times(tmp_path: Path, times: pa.Array, seconds: float) -> None:
    path = tmp_path / "times.parquet"
    table = pa.Table.from_pylist([row()])
    pq.write_table(table.set_column(4, "timestamp", times), path)
    assert [r.timestamp for r in load_reviews(path)] == [seconds]
    nulls = pa.nulls(1, times.type)
    pq.write_table(table.set_column(4, "timestamp", nulls), path)
    assert "row 1: no timestamp" in complaint(path, lines=2)


@pytest.mark.parametrize(
    "kind",
    [pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string()), pa.binary()],
    ids=str,
)
def test_parquet_texts_may_be_of_any_kind(tmp_path: Path, kind: pa.DataType) -> None:
    table = pa.Table.from_pylist([r.to_dict() for r in REVIEWS])
    for place, name in enumerate(table.column_names):
        if name not in ("rating", "timestamp"):
            table = table.set_column(place, name, table.column(name).cast(kind))
    pq.write_table(table, tmp_path / "kinds.parquet")
    assert list(load_reviews(tmp_path / "kinds.parquet")) == REVIEWS


def test_parquet_ratings_may_be_texts(tmp_path: Path) -> None:
    path = write(tmp_path, "data.parquet", [row(rating="4"), row(rating="2.5")])
    assert [r.rating for r in load_reviews(path)] == [4.0, 2.5]


@pytest.mark.parametrize("name", PLAIN)
def test_the_scale_is_the_callers(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, name, [row(rating=9), row(rating=0)])
    assert [r.rating for r in load_reviews(path, scale=RatingScale.parse("0-10"))] == [9.0, 0.0]
    assert "rating 9 is off the scale 1 to 5" in complaint(path, lines=3)


def test_a_byte_order_mark_and_blank_lines_are_passed_over(tmp_path: Path) -> None:
    head = "user_id, item_id ,rating,timestamp\r\n"
    path = text_file(tmp_path, "a.csv", "\ufeff\r\n" + head + "\r\nu,i,3,4\r\n\r\n")
    assert list(load_reviews(path)) == [Review("u", "i", 3.0, 4.0)]
    path = text_file(tmp_path, "a.jsonl", "\ufeff" + json.dumps(row()) + "\n\n  \n")
    assert len(load_reviews(path)) == 1


def test_the_catalogue_reaches_the_source(tmp_path: Path) -> None:
    path = write(tmp_path, "data.csv", [row(title="")])
    source = load_reviews(path, items={"i": Item("i", "Named"), "j": Item("j")})
    assert isinstance(source, TableReviewSource)
    assert source.item("i", None).title == "Named"
    assert source.knows_item("j")


# --- bad rows ----------------------------------------------------------------------------------

BAD_VALUES = [
    ({"user_id": ""}, "no user_id"),
    ({"user_id": "  "}, "no user_id"),
    ({"item_id": ""}, "no item_id"),
    ({"rating": "four"}, "bad rating 'four': not a number"),
    ({"rating": "nan"}, "bad rating 'nan': not a finite number"),
    ({"rating": ""}, "no rating"),
    ({"rating": 5.5}, "rating 5.5 is off the scale 1 to 5"),
    ({"rating": 0}, "rating 0 is off the scale 1 to 5"),
    ({"timestamp": ""}, "no timestamp"),
    ({"timestamp": "yesterday"}, "bad timestamp 'yesterday': expected unix seconds"),
    ({"timestamp": 1_400_000_000_000}, "looks like milliseconds"),
    ({"timestamp": "inf"}, "bad timestamp 'inf': not a finite number"),
]
NULLS = [
    ({"user_id": None}, "no user_id"),
    ({"item_id": None}, "no item_id"),
    ({"rating": None}, "no rating"),
    ({"rating": float("inf")}, "bad rating inf: not a finite number"),
    ({"timestamp": None}, "no timestamp"),
    ({"timestamp": float("nan")}, "bad timestamp nan: not a finite number"),
]
ONLY_JSON = [
    ({"user_id": True}, "user_id True is not text"),
    ({"user_id": 1.5}, "user_id 1.5 is no exact whole number"),
    ({"user_id": 2.0**60}, "is no exact whole number"),
    ({"review": ["a"]}, "review ['a'] is not text"),
    ({"review": "\ud83d"}, "review has half a surrogate pair"),
    ({"rating": True}, "bad rating True: not a number"),
    ({"rating": 10**400}, "not a number"),
    ({"timestamp": True}, "bad timestamp True"),
    ({"timestamp": {}}, "bad timestamp {}: not a time"),
    ({"timestamp": 10**400}, "too large to be a time"),
]
CASES = [
    *((name, change, reason) for name in PLAIN for change, reason in BAD_VALUES),
    *((name, *case) for name in ("data.parquet", "data.jsonl") for case in NULLS),
    *(("data.jsonl", *case) for case in ONLY_JSON),
]


@pytest.mark.parametrize(("name", "change", "reason"), CASES)
def test_a_bad_row_is_named_with_its_reason(
    tmp_path: Path, name: str, change: dict[str, Any], reason: str
) -> None:
    good, bad = row(), row(**change)
    for key, value in change.items():
        if name == "data.parquet" and isinstance(value, str):  # one type a column
            good[key] = str(good[key])
    message = complaint(write(tmp_path, name, [good, good, bad, good]), lines=2)
    place = {"data.parquet": ": row 3", "data.csv": ":4", "data.jsonl": ":3"}[name]
    assert message.startswith(f"{name}: 1 bad row; correct or remove:\n  {name}{place}: ")
    assert reason in message


@pytest.mark.parametrize("name", PLAIN)
def test_the_first_five_of_many_bad_rows_are_named(tmp_path: Path, name: str) -> None:
    rows = [row(rating=9.0 if n % 2 else 4.0) for n in range(20)]
    message = complaint(write(tmp_path, name, rows), lines=7)
    assert message.splitlines()[0] == f"{name}: 10 bad rows; correct or remove:"
    assert message.splitlines()[-1] == "  and 5 more"
    places = [int(n) for n in re.findall(r"^  \S+?:(?: row )?(\d+): rating 9", message, re.M)]
    first = {"data.parquet": 2, "data.csv": 3, "data.jsonl": 2}[name]
    assert places == [first + 2 * n for n in range(5)]


def test_bad_rows_of_all_parts_are_counted_together(tmp_path: Path) -> None:
    for part, bad in (("a", 3), ("b", 0), ("c", 8)):
        rows = [row(), *[row(rating=7.0)] * bad]
        write_parquet(tmp_path / f"{part}.parquet", rows)
    with pytest.raises(DataError) as caught:
        load_reviews(tmp_path)
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{tmp_path}: 11 bad rows; correct or remove:"
    found = [line.split(":")[:-1] for line in lines[1:-1]]
    rows_named = [(Path(p.strip()).name, place.strip()) for p, place in found]
    assert rows_named == [
        *[("a.parquet", f"row {n}") for n in (2, 3, 4)],
        *[("c.parquet", f"row {n}") for n in (2, 3)],
    ]
    assert lines[-1] == "  and 6 more"


def test_csv_lines_are_physical_lines(tmp_path: Path) -> None:
    head = "user_id,item_id,rating,timestamp,review\n"
    body = 'u,i,3,4,"two\nlines"\n\nu,i,9,4,"three\n\nlines"\nu,i,8,4,one\nu,i,3\nu,i,3,4,r,\n'
    message = complaint(text_file(tmp_path, "a.csv", head + body), lines=5)
    assert [line.split(": ")[0] for line in message.splitlines()[1:]] == [
        "  a.csv:5",
        "  a.csv:8",
        "  a.csv:9",
        "  a.csv:10",
    ]
    assert "3 fields, where the header has 5" in message
    assert "6 fields, where the header has 5" in message


@pytest.mark.parametrize("quoted", ['u,i,3,4,"never closed\nu,i,3,4,r\n', 'u,i,3,4,"a"b\n'])
def test_csv_with_broken_quotes_names_the_line_where_the_row_begins(
    tmp_path: Path, quoted: str
) -> None:
    head = 'user_id,item_id,rating,timestamp,review\nu,i,3,4,"x\ny"\n'
    assert "a.csv:4: not CSV from here on" in complaint(text_file(tmp_path, "a.csv", head + quoted))
    assert csv.field_size_limit() == 131072


def test_json_lines_that_are_no_objects_are_named(tmp_path: Path) -> None:
    good = json.dumps(row())
    lines = [good, "", "[1, 2]", good[:-3], "[" * 100_000, '{"rating": ' + "1" * 5000 + "}", "null"]
    message = complaint(text_file(tmp_path, "a.jsonl", "\n".join(lines)), lines=6)
    found = [line.split(": ", 1) for line in message.splitlines()[1:]]
    assert [where for where, _ in found] == [f"  a.jsonl:{n}" for n in (3, 4, 5, 6, 7)]
    assert found[0][1] == "expected one JSON object a line"
    assert found[1][1].startswith("not JSON (Unterminated string")
    assert found[2][1].startswith("not JSON (maximum recursion")
    assert found[3][1].startswith("not JSON (Exceeds the limit")


def test_a_long_bad_value_does_not_flood_the_message(tmp_path: Path) -> None:
    message = complaint(write(tmp_path, "data.csv", [row(timestamp="word " * 1000)]), lines=2)
    assert len(message) < 400


# --- bad files ---------------------------------------------------------------------------------


@pytest.mark.parametrize("load", [load_reviews, load_items])
def test_what_is_no_readable_file_is_refused(
    tmp_path: Path, load: Callable[[Path], object]
) -> None:
    assert "no such file; pass .parquet, .csv" in complaint(tmp_path / "a.csv", load)
    assert "unknown kind of file" in complaint(text_file(tmp_path, "a.tsv", "x"), load)
    assert "unknown kind of file" in complaint(text_file(tmp_path, "a.gz", "x"), load)
    assert "unknown kind of file" in complaint(text_file(tmp_path, "a.parquet.gz", "x"), load)
    (tmp_path / "sub").mkdir()
    text_file(tmp_path / "sub", "a.csv", "x")
    assert "a folder without .parquet files" in complaint(tmp_path / "sub", load)


@pytest.mark.parametrize("name", WRITERS)
def test_an_empty_file_is_refused(tmp_path: Path, name: str) -> None:
    assert "the file is empty" in complaint(text_file(tmp_path, name, ""))


def test_a_file_without_rows_is_refused(tmp_path: Path) -> None:
    head = "user_id,item_id,rating,timestamp\n"
    assert "holds no reviews" in complaint(text_file(tmp_path, "a.csv", head))
    assert "holds no items" in complaint(text_file(tmp_path, "a.csv", head), load_items)
    assert "holds no reviews" in complaint(text_file(tmp_path, "a.jsonl", "\n\n"))
    assert "file is empty" in complaint(text_file(tmp_path, "a.csv.gz", gzip.compress(b"")))
    pq.write_table(pa.Table.from_pylist([row()]).slice(0, 0), tmp_path / "a.parquet")
    assert "holds no reviews" in complaint(tmp_path / "a.parquet")


@pytest.mark.parametrize("name", PLAIN)
def test_a_missing_column_is_named_with_those_found(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, name, [{"user_id": "u", "stars": 4, "rating": 4, "asin": "i"}] * 2)
    message = complaint(path)
    assert "no column item_id, timestamp; found 'user_id', 'stars', 'rating', 'asin'" in message
    assert "no column item_id;" in complaint(path, load_items)


def test_a_column_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    path = text_file(tmp_path, "a.csv", "user_id,item_id,rating,rating,timestamp\nu,i,3,4,5\n")
    assert "column rating is there twice" in complaint(path)
    table = pa.Table.from_pylist([row()]).append_column("rating", pa.array([1.0]))
    pq.write_table(table, tmp_path / "a.parquet")
    assert "column rating is there twice" in complaint(tmp_path / "a.parquet")


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    for name in ("data.parquet", "data.csv.gz", "data.jsonl.gz"):
        path = write(tmp_path, name, [row(review=str(n)) for n in range(2000)])
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2])
        assert "cannot be read" in complaint(path)
        path.write_bytes(b"plain text, neither compressed nor columnar")
        assert "cannot be read" in complaint(path)
    path = write(tmp_path, "data.csv.gz", [row(review=str(n)) for n in range(2000)])
    data = path.read_bytes()
    path.write_bytes(data[:60] + b"\xff" * 30 + data[90:])
    assert "cannot be read" in complaint(path)


def test_text_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    head = b"user_id,item_id,rating,timestamp,review\nu,i,3,4,ok\n"
    path = text_file(tmp_path, "a.csv", head + b"u,i,3,4,caf\xe9\n")
    assert "a.csv:3: byte 0xe9 is not UTF-8" in complaint(path)
    assert csv.field_size_limit() == 131072
    path = text_file(tmp_path, "a.jsonl", json.dumps(row()).encode("utf-16"))
    assert "a.jsonl:1: byte 0xff is not UTF-8" in complaint(path)
    table = pa.Table.from_pylist([row()])
    broken = pa.array([b"caf\xe9"], pa.binary()).view(pa.string())
    pq.write_table(table.set_column(5, "review", broken), tmp_path / "a.parquet")
    assert "column review is of type string and cannot be read" in complaint(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    ("name", "values", "reason"),
    [
        ("user_id", [True], "column user_id is of type bool and cannot be read as text"),
        ("user_id", [1.5], "column user_id is of type double and cannot be read as text"),
        ("item_id", [2.0**60], "too large to be exact"),
        ("title", [dt.date(2020, 1, 1)], "column title is of type date32"),
        ("review", [["a"]], "column review is of type list"),
        ("rating", [True], "column rating is of type bool; expected numbers"),
        ("rating", [dt.date(2020, 1, 1)], "column rating is of type date32"),
        ("timestamp", [dt.timedelta(1)], "column timestamp is of type duration[us]"),
    ],
)
def test_a_parquet_column_of_the_wrong_type_is_refused(
    tmp_path: Path, name: str, values: list[object], reason: str
) -> None:
    table = pa.Table.from_pylist([row()])
    place = table.column_names.index(name)
    pq.write_table(table.set_column(place, name, pa.array(values)), tmp_path / "a.parquet")
    assert reason in complaint(tmp_path / "a.parquet")


# --- items -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WRITERS)
def test_items_from_every_format(tmp_path: Path, name: str) -> None:
    items = [Item("a", "Blue", "film", "sad,\nlong"), Item("b")]
    path = write(tmp_path, name, [item.to_dict() for item in items])
    assert load_items(path) == {"a": items[0], "b": items[1]}
    assert load_items(write(tmp_path, name, [{"item_id": 5, "year": 1999}])) == {"5": Item("5")}


@pytest.mark.parametrize("name", PLAIN)
def test_a_repeated_item_may_not_differ(tmp_path: Path, name: str) -> None:
    rows = [{"item_id": "a", "title": "x"}, {"item_id": "b", "title": "y"}]
    path = write(tmp_path, name, [*rows, *rows])
    assert list(load_items(path)) == ["a", "b"]
    path = write(tmp_path, name, [*rows, {"item_id": "b", "title": "z"}])
    message = complaint(path, load_items, lines=2)
    here, there = {
        "data.parquet": (": row 3", ": row 2"),
        "data.csv": (":4", ":3"),
        "data.jsonl": (":3", ":2"),
    }[name]
    assert f"{name}{here}: item_id 'b' is described differently at {name}{there}" in message


@pytest.mark.parametrize("name", PLAIN)
def test_an_item_without_id_is_named(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, name, [{"item_id": "a", "title": "x"}, {"item_id": "", "title": "y"}])
    assert "no item_id" in complaint(path, load_items, lines=2)


# --- real data ---------------------------------------------------------------------------------


def test_real_reviews_load_and_never_leak(request: pytest.FixtureRequest) -> None:
    default = Path(__file__).parents[2] / "shared" / "data"
    folder = Path(os.environ.get("R4R_SHARED_DATA", default)) / "film_critics"
    if not (folder / "reviews.parquet").exists():
        pytest.skip(f"no real reviews at {folder}; R4R_SHARED_DATA names another folder")
    source = load_reviews(folder / "reviews.parquet", items=load_items(folder / "items.parquet"))
    reviews = list(source)
    assert len(source) == len(reviews) > 20_000
    for target in reviews[:: len(reviews) // 200]:
        pair, now = (target.user_id, target.item_id), target.timestamp
        by_user = source.user_history(pair[0], now, 10, without_item=pair[1])
        of_item = source.item_history(pair[1], now, 10, without_user=pair[0])
        assert all(r.user_id == pair[0] and r.item_id != pair[1] for r in by_user)
        assert all(r.item_id == pair[1] and r.user_id != pair[0] for r in of_item)
        for history in (by_user, of_item):
            times = [r.timestamp for r in history]
            assert times == sorted(times)
            assert all(time < now for time in times)
        earlier = [r for r in reviews if r.item_id == pair[1] and r.timestamp < now]
        assert source.item_stats(pair[1], now).count == len(earlier)
        assert source.item(pair[1], now).title
