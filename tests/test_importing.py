"""Whole imports: what is written, what is left out, what an end in the middle leaves behind."""

from __future__ import annotations

import itertools
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from filelock import FileLock

from r4r_graph import load_items, load_reviews
from r4r_graph.errors import DataError, InputError, SettingError, StorageError
from r4r_graph.importing import FORMATS, ImportProgress, import_reviews, passes
from r4r_graph.importing.cleaning import parse_scale
from r4r_graph.reviews.table import REVIEW_SCHEMA
from tests.import_files import MAKERS, amazon_2014, amazon_2018, amazon_2023, write_lines


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def rows_of(path: Path) -> list[dict[str, Any]]:
    return list(pq.read_table(path).to_pylist())


def rejects_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# --- the formats -------------------------------------------------------------------------------

RATED = {"goodreads": [1, 2, 3, 4, 1, 2, 3, 4, 1]}
FIRST_TIME = {
    "amazon-2014": 1_300_000_000.0,
    "amazon-2018": 1_300_000_000.0,
    "amazon-2023": 1_300_000_000.87,
    "yelp": 1_530_482_951.0,
    "goodreads": 1_499_006_650.0,  # the first with a rating: July 2, 07:44:10 at -0700
}
SECOND_ITEM = {
    "amazon-2014": ("Album's 1", "CDs & Vinyl", "An old one."),
    "amazon-2018": ("Album 1", "Digital Music", "First part.\nSecond part."),
    "amazon-2023": ("Album 1", "CDs & Vinyl", "Remastered"),
    "yelp": ("Diner 1", "Diners, Breakfast & Brunch", "Tucson, AZ"),
    "goodreads": ("Book 1", "book", "About it."),
}


def test_every_format_is_tried() -> None:
    assert set(MAKERS) == set(FORMATS)


@pytest.mark.parametrize("name", MAKERS)
def test_reviews_joined_with_titles(name: str, tmp_path: Path) -> None:
    reviews, items = MAKERS[name]()
    files = [
        write_lines(tmp_path / "one.zst", items),
        write_lines(tmp_path / "two.gz", reviews[:5]),
        write_lines(tmp_path / "three.json", reviews[5:]),
    ]
    report = import_reviews(name, files, tmp_path / "out" / "reviews.parquet")

    out = tmp_path / "out"
    written = rows_of(out / "reviews.parquet")
    rated = RATED.get(name, [1 + n % 5 for n in range(12)])
    assert [row["rating"] for row in written] == rated
    assert (report.read, report.reviews, report.unrated) == (12, len(rated), 12 - len(rated))
    assert written[0]["timestamp"] == FIRST_TIME[name]
    number = 1 if name == "goodreads" else 0
    assert written[0]["user_id"] == f"A{number}"
    assert written[0]["review"] == f"Number {number}: warm & honest."
    assert report.titled == len(rated)
    catalogue = load_items(out / "items.parquet")
    assert list(catalogue) == [row["book_id"] if name == "goodreads" else f"B{n}"
                               for n, row in enumerate(items)]  # fmt: skip
    second = list(catalogue.values())[1]
    assert (second.title, second.category, second.description) == SECOND_ITEM[name]
    assert all(row["title"] == catalogue[row["item_id"]].title for row in written)
    assert names_in(out) == ["items.parquet", "reviews.parquet"]
    source = load_reviews(out / "reviews.parquet", items=catalogue)
    assert len(source) == len(rated)
    assert pq.read_schema(out / "reviews.parquet").equals(REVIEW_SCHEMA)


def test_python_literals_are_read_and_never_run(tmp_path: Path) -> None:
    reviews, items = amazon_2014()
    mark = tmp_path / "ran"
    evil = f"{{'asin': 'B0', 'title': open({str(mark)!r}, 'w')}}"
    meta = tmp_path / "meta.json"
    meta.write_text("\n".join([evil, *map(repr, items)]) + "\n")
    old = tmp_path / "reviews.json"
    old.write_text("\n".join(map(repr, reviews)))
    report = import_reviews("amazon-2014", [old, meta], tmp_path / "r.parquet")
    assert (report.reviews, report.titled, report.items_rejected) == (12, 12, 1)
    assert not mark.exists()


def test_goodreads_about_spoilers(tmp_path: Path) -> None:
    row = {
        "user_id": "u", "book_id": 7, "rating": 4, "has_spoiler": True, "timestamp": "2017-08-30",
        "review_sentences": [[0, "I liked it."], [1, "He dies."]],
    }  # fmt: skip
    import_reviews("goodreads", [write_lines(tmp_path / "s", [row])], tmp_path / "r.parquet")
    [written] = rows_of(tmp_path / "r.parquet")
    assert (written["item_id"], written["review"]) == ("7", "I liked it. He dies.")
    assert written["timestamp"] == 1_504_051_200


def test_a_script_is_no_title(tmp_path: Path) -> None:
    reviews, items = amazon_2018()
    items[0]["title"] = "var aPageStart = (new Date()).getTime();"
    files = [write_lines(tmp_path / "r", reviews), write_lines(tmp_path / "m", items)]
    report = import_reviews("amazon-2018", files, tmp_path / "reviews.parquet")
    assert report.titled == 8
    assert load_items(tmp_path / "items.parquet")["B0"].title == ""


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("part", [0, 1])
def test_a_file_of_another_format_is_named(name: str, part: int, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "file", MAKERS[name]()[part])
    kind = ("reviews", "items")[part]
    for other in set(MAKERS) - {name}:
        with pytest.raises(DataError, match=f"no file of {other}; its content looks like {kind} "):
            import_reviews(other, [path], tmp_path / "out.parquet")
    strange = write_lines(tmp_path / "file", [{"x": 1, "name": "a"}])
    with pytest.raises(DataError, match="file: no file of goodreads; its fields are 'name', 'x'"):
        import_reviews("goodreads", [strange], tmp_path / "out.parquet")
    assert names_in(tmp_path) == ["file"]


# --- any table ---------------------------------------------------------------------------------

TABLE = [("u1", "i1", "4.5", "2020-01-01", "fine, really"), ("u2", "i1", "2", "1577836800", "no")]
NAMES = {"user_id": "who", "rating": "stars", "timestamp": "when", "review": "words"}


@pytest.mark.parametrize("mark", [",", ";", "\t", "|"])
def test_csv_of_any_delimiter_with_a_mark_and_windows_line_ends(mark: str, tmp_path: Path) -> None:
    lines = [mark.join(["who", "item_id", "stars", "when", "words"])]
    lines += [mark.join(f'"{cell}"' for cell in row) for row in TABLE]
    path = tmp_path / "t.txt"
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    import_reviews("table", [path], tmp_path / "r.parquet", columns=NAMES)
    first, second = rows_of(tmp_path / "r.parquet")
    assert first == {
        "user_id": "u1", "item_id": "i1", "title": "", "rating": 4.5, "timestamp": 1577836800.0,
        "review": "fine, really",
    }  # fmt: skip
    assert second["timestamp"] == first["timestamp"]


def test_parquet_and_items_with_names_of_their_own(tmp_path: Path) -> None:
    table = pa.table(
        {
            "who": pa.array([1.0, None, 3.0]),
            "item_id": pa.array([5, 5, 6]),
            "stars": [4, 4, 3],
            "when": pa.array([0, 1, 2], pa.timestamp("ms")),
            "title": ["", "", "own"],
            "picture": [b"\xff", b"\xff", b"\xff"],
        }
    )
    pq.write_table(table, tmp_path / "reviews.bin")
    (tmp_path / "items.csv").write_text("id,name\n5,Five\n6,Six\n7,Seven\n")
    report = import_reviews(
        "table",
        [tmp_path / "items.csv", tmp_path / "reviews.bin"],
        tmp_path / "out.parquet",
        columns={name: column for name, column in NAMES.items() if name != "review"},
        item_columns={"item_id": "id", "title": "name"},
    )
    found = [(row["user_id"], row["title"], row["timestamp"]) for row in rows_of(report.out)]
    assert found == [("1", "Five", 0.0), ("3", "own", 0.002)]
    assert report.items_out == tmp_path / "out-items.parquet"
    assert list(load_items(report.items_out)) == ["5", "6"]
    [bad] = rejects_of(tmp_path / "out-rejects.jsonl")
    assert (bad["line"], bad["reason"]) == (2, "no user_id")


def test_columns_that_are_not_there(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "t", [{"who": 1, "item_id": 2, "stars": 3, "when": 4}])
    with pytest.raises(DataError, match=r"items, but no reviews of them.*user_id=user_id"):
        import_reviews("table", [path], tmp_path / "r.parquet")
    with pytest.raises(DataError, match=r"its fields are .*'stars'.*review=words"):
        import_reviews("table", [path], tmp_path / "r.parquet", columns=NAMES)


def test_thumbs_and_ten_stars(tmp_path: Path) -> None:
    given = [True, "down", 1, "no", "0", "maybe", 2]
    rows = [
        {"user_id": n, "item_id": "i", "rating": rating, "timestamp": n}
        for n, rating in enumerate(given)
    ]
    path = write_lines(tmp_path / "t", rows)
    out = tmp_path / "r.parquet"
    report = import_reviews("table", [path], out, scale=parse_scale("thumbs"))
    assert [row["rating"] for row in rows_of(out)] == [1, 0, 1, 0, 0]
    assert report.reasons == {"bad rating": 1, "off the scale": 1}
    assert len(load_reviews(out, scale=parse_scale("0-1"))) == 5
    rows = [{**row, "rating": 10} for row in rows]
    write_lines(path, rows)
    assert import_reviews("table", [path], out, scale=parse_scale("1-10")).mean_rating == 10
    assert not (tmp_path / "r-rejects.jsonl").exists()  # that of the import before is gone


# --- what is left out --------------------------------------------------------------------------


def test_bad_rows_are_kept_with_line_and_reason(tmp_path: Path) -> None:
    good, _ = amazon_2023(6)
    lines = [json.dumps(row).encode() for row in good]
    lines[1:1] = [
        b"",
        b'{"user_id": ',
        json.dumps({**good[0], "rating": 6}).encode(),
        json.dumps({**good[0], "rating": None}).encode(),
        b'{"user_id": "caf\xe9"}',
        b"[1]",
        json.dumps({**good[0], "timestamp": "yesterday"}).encode(),
        json.dumps({**good[0], "user_id": "half \ud800"}).encode(),
    ]
    (tmp_path / "f").write_bytes(b"\r\n".join(lines))
    report = import_reviews("amazon-2023", [tmp_path / "f"], tmp_path / "r.parquet")
    assert (report.read, report.rejected, report.reviews) == (13, 7, 6)
    bad = rejects_of(tmp_path / "r-rejects.jsonl")
    assert [(row["line"], row["reason"].partition(":")[0]) for row in bad] == [
        (3, "not JSON"),
        (4, "off the scale"),
        (5, "no rating"),
        (6, "not UTF-8"),
        (7, "not a JSON object"),
        (8, "bad timestamp"),
        (9, "bad user_id"),
    ]
    assert {row["file"] for row in bad} == {str(tmp_path / "f")}
    assert "rating=6" in bad[1]["row"]
    assert report.reasons == {row["reason"].partition(":")[0]: 1 for row in bad}


def test_everything_left_out_is_counted_once(tmp_path: Path) -> None:
    reviews, _ = amazon_2014(12)
    start = reviews[0]["unixReviewTime"]
    reviews[3]["reviewText"] = " <br/> "
    rare = {**reviews[0], "reviewerID": "once"}
    early = {**reviews[0], "unixReviewTime": start - 1}
    other = {**reviews[0], "reviewText": "In other words."}
    bad = {**reviews[0], "overall": 9}
    rows = [*reviews, reviews[5], reviews[5], rare, early, other, bad]
    report = import_reviews(
        "amazon-2014",
        [write_lines(tmp_path / "f", rows)],
        tmp_path / "r.parquet",
        since=start,
        until=start + 86400 * 11,
        k=2,
        with_text=True,
    )
    assert (report.read, report.rejected, report.duplicates, report.no_text) == (18, 1, 2, 1)
    assert (report.outside_window, report.outside_core) == (2, 2)
    assert (report.reviews, report.further, report.empty_texts) == (10, 1, 0)
    texts = [row["review"] for row in rows_of(tmp_path / "r.parquet")]
    left = (0, 1, 2, 4, 5, 6, 8, 9, 10)  # of user A3, 3 and 11 are gone: 7 is alone
    assert texts == [*(f"Number {n}: warm & honest." for n in left), "In other words."]
    assert (report.first, report.last) == (start, start + 86400 * 10)


def test_empty_texts_stay_where_nothing_else_is_asked(tmp_path: Path) -> None:
    reviews, _ = amazon_2014(4)
    reviews[2]["reviewText"] = None
    report = import_reviews(
        "amazon-2014", [write_lines(tmp_path / "f", reviews)], tmp_path / "r.parquet"
    )
    assert (report.reviews, report.empty_texts, report.titled) == (4, 1, 0)
    assert report.items_out is None


def test_nothing_left_says_what_took_it(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "f", amazon_2014(4)[0])
    with pytest.raises(DataError, match=r"no review is left of 4 rows \(4 outside core\)"):
        import_reviews("amazon-2014", [path], tmp_path / "r.parquet", k=9)
    scale = parse_scale("6-7")
    with pytest.raises(DataError, match=r"(?s)\(4 bad\)\n  .*f:1: off the scale: rating 1 is not"):
        import_reviews("amazon-2014", [path], tmp_path / "r.parquet", scale=scale)
    assert names_in(tmp_path) == ["f"]


def test_batches_do_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reviews, items = amazon_2014(60)
    files = [write_lines(tmp_path / "r", reviews * 2), write_lines(tmp_path / "m", items)]
    whole = import_reviews("amazon-2014", files, tmp_path / "a.parquet", k=3)
    monkeypatch.setattr(passes, "_BATCH_ROWS", 7)
    monkeypatch.setattr("r4r_graph.importing.spool._GROUP_ROWS", 11)
    parts = import_reviews("amazon-2014", files, tmp_path / "b.parquet", k=3)
    assert rows_of(tmp_path / "a.parquet") == rows_of(tmp_path / "b.parquet")
    assert pq.ParquetFile(tmp_path / "b.parquet").num_row_groups > 3
    assert whole.duplicates == parts.duplicates == 60


def test_progress_comes_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "_EVERY", 5)
    reviews, items = amazon_2014(40)
    files = [write_lines(tmp_path / "r.gz", reviews), write_lines(tmp_path / "m", items)]
    told: list[ImportProgress] = []
    import_reviews("amazon-2014", files, tmp_path / "a.parquet", on_progress=told.append)
    stages = {"reading": 40, "items": 3, "writing": 40}
    assert list(dict.fromkeys(now.stage for now in told)) == list(stages)
    for stage, rows in stages.items():
        mine = [now for now in told if now.stage == stage]
        assert (mine[-1].done, mine[-1].rows) == (mine[-1].of, rows)
        assert all(a.done <= b.done <= b.of for a, b in itertools.pairwise(mine))
    assert sum(now.stage == "reading" for now in told) > 3


# --- ends in the middle ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["f.gz", "f.zst"])
def test_a_broken_download_leaves_nothing(name: str, tmp_path: Path) -> None:
    path = write_lines(tmp_path / name, amazon_2023(5000)[0])
    path.write_bytes(path.read_bytes()[:-20])
    out = tmp_path / "r.parquet"
    out.write_text("what was there")
    with pytest.raises(DataError, match=rf"{name}: cannot be read beyond line \d+ \(Truncated"):
        import_reviews("amazon-2023", [path], out)
    assert out.read_text() == "what was there"
    assert names_in(tmp_path) == [name, "r.parquet"]


@pytest.mark.parametrize("stage", ["reading", "items", "writing"])
def test_ctrl_c_leaves_nothing(stage: str, tmp_path: Path) -> None:
    reviews, items = amazon_2014()
    files = [write_lines(tmp_path / "r", reviews), write_lines(tmp_path / "m", items)]

    def stop(now: ImportProgress) -> None:
        if now.stage == stage:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        import_reviews("amazon-2014", files, tmp_path / "out.parquet", on_progress=stop)
    assert names_in(tmp_path) == ["m", "r"]


KILLED = """
import os, signal, sys
from r4r_graph.importing import import_reviews
def die(now):
    if now.stage == "writing":
        os.kill(os.getpid(), signal.SIGKILL)
import_reviews("amazon-2014", [sys.argv[1]], sys.argv[2], on_progress=die)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="there is no SIGKILL")
def test_what_a_killed_process_leaves_the_next_one_removes(tmp_path: Path) -> None:
    path, out = write_lines(tmp_path / "r", amazon_2014()[0]), tmp_path / "out.parquet"
    done = subprocess.run([sys.executable, "-c", KILLED, path, out], timeout=120)
    assert done.returncode == -signal.SIGKILL
    assert names_in(tmp_path) == [".out.parquet.importing", "r"]
    assert import_reviews("amazon-2014", [path], out).reviews == 12
    assert names_in(tmp_path) == ["out.parquet", "r"]


def test_two_imports_to_one_file(tmp_path: Path) -> None:
    path, out = write_lines(tmp_path / "r", amazon_2014()[0]), tmp_path / "out.parquet"
    folder = tmp_path / ".out.parquet.importing"
    folder.mkdir()
    (folder / "spill.parquet").write_text("of the other")
    with (
        FileLock(folder / "_lock"),
        pytest.raises(InputError, match=r"another process is importing to .*out.parquet"),
    ):
        import_reviews("amazon-2014", [path], out)
    assert (folder / "spill.parquet").exists()
    assert import_reviews("amazon-2014", [path], out).reviews == 12


def test_a_full_disk(tmp_path: Path) -> None:
    """As near as a test comes: the process may write no file of more than some bytes."""
    resource = pytest.importorskip("resource")
    path, out = write_lines(tmp_path / "r", amazon_2014(4000)[0]), tmp_path / "out.parquet"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(StorageError, match=r"out.parquet cannot be written .*untouched"):
            import_reviews("amazon-2014", [path], out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names_in(tmp_path) == ["r"]


# --- settings and the command ------------------------------------------------------------------


def test_settings_that_cannot_be(tmp_path: Path) -> None:
    path, out = write_lines(tmp_path / "r", amazon_2014()[0]), tmp_path / "out.parquet"
    mine = shutil.copy(path, tmp_path / "mine.parquet")
    (tmp_path / "folder.parquet").mkdir()
    refused: list[tuple[str, list[Any], Any, dict[str, Any], str]] = [
        ("imdb", [path], out, {}, "no format 'imdb': one of amazon-2014, .*, table"),
        ("yelp", [path], out, {"columns": NAMES}, "the columns of yelp are known"),
        ("amazon-2014", [path], out, {"k": -1}, "bad k -1"),
        ("amazon-2014", [], out, {}, "no files to import"),
        ("amazon-2014", [path], tmp_path / "out.csv", {}, "has to end in .parquet"),
        ("amazon-2014", [path], out, {"items_out": out}, "have to be different files"),
        ("amazon-2014", [mine], mine, {}, "is among the files to import"),
        ("amazon-2014", [path], tmp_path / "folder.parquet", {}, "is a folder"),
        ("amazon-2014", [path], out, {"rejects_out": tmp_path / "no" / "r"}, "no such folder"),
    ]
    for name, files, target, settings, reason in refused:
        with pytest.raises(SettingError, match=reason):
            import_reviews(name, files, target, **settings)


def test_the_command(r4r: Any, tmp_path: Path) -> None:
    reviews, items = amazon_2014()
    reviews[0]["overall"] = 7
    files = [write_lines(tmp_path / "r.gz", reviews), write_lines(tmp_path / "m", items)]
    out = tmp_path / "reviews.parquet"
    done = r4r("import", "amazon-2014", *files, "--out", out, "--k-core", 2)
    assert done.code == 0
    flat = " ".join(done.out.split())
    assert "12 rows read 1 rejected 11 reviews written of 4 users and 3 items, 2011-03-" in flat
    assert "11 with the item's title" in flat
    assert f"bad rows: {tmp_path / 'reviews-rejects.jsonl'} (1 off the scale)" in flat
    assert "reading reviews" in done.err
    told = json.loads(r4r("import", "amazon-2014", *files, "--out", out, "--json").out)
    assert (told["reviews"], told["out"], told["reasons"]) == (11, str(out), {"off the scale": 1})


def test_the_command_refuses_in_one_line(r4r: Any, tmp_path: Path) -> None:
    path, out = write_lines(tmp_path / "r", amazon_2023()[0]), tmp_path / "reviews.parquet"
    done = r4r("import", "amazon-2018", path, "--out", out)
    assert done.code == 2
    assert done.complaint.endswith("looks like reviews of amazon-2023. Import it with: r4r import "
                                   "amazon-2023")  # fmt: skip
    refused = {
        ("--since", "2020"): "bad --since: bad timestamp: 2020 may be a date",
        ("--columns", "stars=rating"): "bad --columns 'stars=rating': write OURS=THEIRS",
        ("--item-columns", "review=x"): "bad --item-columns 'review=x'",
        ("--scale", "good"): "bad rating scale 'good'",
    }
    for options, reason in refused.items():
        done = r4r("import", "table", path, "--out", out, *options)
        assert done.code == 2
        assert reason in done.complaint


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGINT for one process")
def test_ctrl_c_on_the_command_line(tmp_path: Path) -> None:
    row = amazon_2014(1)[0][0]
    path = write_lines(tmp_path / "r", [{**row, "unixReviewTime": n} for n in range(150_000)])
    run = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    run += "from r4r_graph.cli import main; main()"
    out = tmp_path / "out.parquet"
    arguments = ["import", "amazon-2014", str(path), "--out", str(out)]
    process = subprocess.Popen(
        [sys.executable, "-c", run, *arguments], stderr=subprocess.PIPE, text=True
    )
    spilled, latest = tmp_path / ".out.parquet.importing" / "spill.parquet", time.monotonic() + 90
    while not spilled.exists() and process.poll() is None and time.monotonic() < latest:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=90)
    assert (process.returncode, "Traceback" in told) == (130, False)
    assert "stopped; nothing was written" in told
    assert names_in(tmp_path) == ["r"]
