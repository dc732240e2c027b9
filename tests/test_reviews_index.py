"""The index on disk: made once, found again, and never that of another file."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from r4r_graph.errors import DataError, SettingError
from r4r_graph.ratings import RatingScale
from r4r_graph.reviews import TableReviewSource, index, load_reviews, loading, stored
from r4r_graph.schema import Item, Review
from tests.review_sources import write_reviews
from tests.test_reviews_conformance import STRANGE, random_reviews

REVIEWS = random_reviews(1, 200)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return aged(write_reviews(tmp_path / "reviews.parquet", REVIEWS))


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders into which an index was written."""
    folders: list[Path] = []
    make = stored._make

    def counted(folder: Path, *rest: Any) -> Path:
        folders.append(folder)
        return make(folder, *rest)

    monkeypatch.setattr(stored, "_make", counted)
    return folders


@pytest.fixture
def digested(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often contents were looked at."""
    calls: list[int] = []
    digests = stored._digests
    monkeypatch.setattr(stored, "_digests", lambda files: calls.append(1) or digests(files))
    return calls


def aged(path: Path, seconds: float = 60.0) -> Path:
    """The file, last changed a while ago (but for its inode, whose change no one can set)."""
    then = time.time() - seconds
    os.utime(path, (then, then))
    return path


def test_it_is_made_once(path: Path, made: list[Path]) -> None:
    folder = path.with_name("index")
    assert list(load_reviews(path, index=folder)) == REVIEWS
    for _ in range(2):
        source = load_reviews(path, items={"X": Item("X", "Named")}, index=str(folder))
        assert list(source) == REVIEWS
        assert source.item("X", None).title == "Named"
    assert made == [folder]
    assert folder.stat().st_mode & 0o77 == 0
    assert [p.name for p in sorted(folder.iterdir()) if p.is_file()] == ["index.json"]


def test_a_question_reads_no_more_than_it_needs(path: Path) -> None:
    """What is opened is mapped: nothing of it is a copy."""
    source = load_reviews(path, index=path.with_name("index"))
    assert pa.total_allocated_bytes() < 1 << 20
    users = source._index.users
    assert not any(getattr(users, name).flags.owndata for name in users.__slots__)
    assert not any(getattr(users, name).flags.writeable for name in users.__slots__)


def test_an_unchanged_file_is_not_read_again(
    path: Path, digested: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored, "_SETTLED", -1e18)  # every look is an old one
    load_reviews(path, index=path.with_name("index"))
    assert len(digested) == 1
    load_reviews(path, index=path.with_name("index"))
    assert len(digested) == 1


def test_a_file_that_may_yet_change_unseen_is_looked_at_again(
    path: Path, digested: list[int], made: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A change within a tick of the clock that leaves the size alone leaves no trace: while the
    last one is that near, contents decide."""
    monkeypatch.setattr(stored, "_SETTLED", 1e18)
    for _ in range(2):
        load_reviews(path, index=path.with_name("index"))
    assert len(digested) == 2
    monkeypatch.setattr(stored, "_SETTLED", -1e18)
    for _ in range(2):
        load_reviews(path, index=path.with_name("index"))
    assert len(digested) == 3  # seen to be settled, and remembered
    assert len(made) == 1


def test_a_changed_file_never_meets_an_old_index(tmp_path: Path, made: list[Path]) -> None:
    path = tmp_path / "reviews.csv"
    header = "user_id,item_id,rating,timestamp\n"
    path.write_text(header + "u,i,4,5\n")
    stat = path.stat()
    for rating in (4, 5):  # of the same size, and of the same time of change
        path.write_text(header + f"u,i,{rating},5\n")
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        [review] = load_reviews(path, index=tmp_path / "index")
        assert review.rating == rating
    assert len(made) == 2
    assert len([*(tmp_path / "index").glob("data-*")]) == 1  # the old one is gone


def test_a_file_that_was_only_touched_or_moved_keeps_its_index(
    path: Path, made: list[Path]
) -> None:
    folder = path.with_name("index")
    load_reviews(path, index=folder)
    aged(path, 3600)
    load_reviews(path, index=folder)
    path.parent.joinpath("elsewhere").mkdir()
    moved = path.rename(path.parent / "elsewhere" / path.name)
    assert list(load_reviews(moved, index=folder)) == REVIEWS
    assert len(made) == 1


def test_another_part_or_another_scale_is_another_index(tmp_path: Path, made: list[Path]) -> None:
    folder = tmp_path / "parts"
    folder.mkdir()
    write_reviews(folder / "a.parquet", REVIEWS[:100])
    assert len(load_reviews(folder, index=tmp_path / "index")) == 100
    write_reviews(folder / "b.parquet", REVIEWS[100:])
    assert list(load_reviews(folder, index=tmp_path / "index")) == REVIEWS
    with pytest.raises(DataError, match="off the scale 1 to 3"):
        load_reviews(folder, index=tmp_path / "index", scale=RatingScale.parse("1-3"))
    assert len(made) == 3
    assert list(load_reviews(folder, index=tmp_path / "index")) == REVIEWS  # the good one stayed
    assert len(made) == 3


@pytest.mark.parametrize("name", ["reviews.arrow", "users_sums.npy", "user_id.npy", "index.json"])
def test_a_damaged_index_is_made_anew(path: Path, made: list[Path], name: str) -> None:
    folder = path.with_name("index")
    load_reviews(path, index=folder)
    [file] = folder.rglob(name)
    os.truncate(file, file.stat().st_size // 2)
    assert list(load_reviews(path, index=folder)) == REVIEWS
    file.unlink(missing_ok=True)
    assert list(load_reviews(path, index=folder)) == REVIEWS
    assert len(made) == (3 if name == "index.json" else 2)


def test_an_old_format_is_made_anew(
    path: Path, made: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = path.with_name("index")
    load_reviews(path, index=folder)
    monkeypatch.setattr(stored, "_FORMAT", stored._FORMAT + 1)
    assert list(load_reviews(path, index=folder)) == REVIEWS
    assert len(made) == 2


def test_a_bad_file_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "reviews.csv"
    path.write_text("user_id,item_id,rating,timestamp\nu,i,4,5\nu,i,9,5\n")
    with pytest.raises(DataError, match=r"reviews.csv:3: rating 9 is off the scale"):
        load_reviews(path, index=tmp_path / "index")
    assert [*(tmp_path / "index").iterdir()] == []


def test_rows_are_checked_and_numbered_across_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("r4r_graph.reviews.files.AT_ONCE", 16)
    monkeypatch.setattr(loading, "AT_ONCE", 16)
    bad = [*REVIEWS[:70], Review("u", "i", 9.0, 1.0), *REVIEWS[70:90], Review("u", "i", 8.0, 1.0)]
    path = write_reviews(tmp_path / "bad.parquet", bad)
    with pytest.raises(DataError) as caught:
        load_reviews(path, index=tmp_path / "index")
    lines = str(caught.value).splitlines()
    assert lines[0].endswith("2 bad rows; correct or remove:")
    assert ["row 71" in lines[1], "row 92" in lines[2]] == [True, True]
    good = write_reviews(tmp_path / "good.parquet", REVIEWS)
    assert list(load_reviews(good, index=tmp_path / "index")) == REVIEWS
    csv = tmp_path / "good.csv"
    rows = [f"u{n},i,3,{n}\n" for n in range(50)]
    csv.write_text("user_id,item_id,rating,timestamp\n" + "".join(rows))
    assert [r.user_id for r in load_reviews(csv)] == [f"u{n}" for n in range(50)]


def test_a_file_that_changes_while_it_is_read_is_refused(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = stored._write

    def meanwhile(data: Path, read: stored.Read) -> None:
        write(data, read)
        write_reviews(path, REVIEWS[:50])

    monkeypatch.setattr(stored, "_write", meanwhile)
    with pytest.raises(DataError, match="changed while it was read"):
        load_reviews(path, index=path.with_name("index"))
    assert [*path.with_name("index").iterdir()] == []


def test_a_killed_maker_leaves_no_index_and_no_litter(path: Path, made: list[Path]) -> None:
    folder = path.with_name("index")
    code = (
        "import os, sys; from r4r_graph.reviews import load_reviews, stored;"
        "stored.write_atomically = lambda *_: os.kill(os.getpid(), 9);"
        "load_reviews(sys.argv[1], index=sys.argv[2])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path), str(folder)])
    assert done.returncode == -9
    assert len([*folder.glob("data-*")]) == 1
    assert list(load_reviews(path, index=folder)) == REVIEWS
    assert len([*folder.glob("data-*")]) == len(made) == 1


def test_an_index_in_use_outlives_its_folder(path: Path) -> None:
    folder = path.with_name("index")
    old = load_reviews(path, index=folder)
    write_reviews(path, REVIEWS[:10])
    assert len(load_reviews(path, index=folder)) == 10
    assert list(old) == REVIEWS


def test_large_files_are_kept_in_the_cache_folder(
    path: Path, made: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("R4R_CACHE_DIR", str(path.parent / "cache"))
    load_reviews(path)
    assert made == []
    monkeypatch.setattr(loading, "KEPT_FROM", 100)
    load_reviews(path)
    load_reviews(path)
    load_reviews(path, index=True)
    load_reviews(path, index=False)
    [folder] = made
    assert folder.parent == path.parent / "cache" / "reviews"
    assert folder.name.startswith("reviews.parquet-")


def test_where_nothing_can_be_kept_it_is_made_in_memory(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setenv("R4R_CACHE_DIR", str(path.parent / "cache"))
    monkeypatch.setattr(loading, "KEPT_FROM", 100)
    monkeypatch.setattr(stored, "_write", full)
    with caplog.at_level(logging.WARNING, "r4r_graph"):
        assert list(load_reviews(path)) == REVIEWS
    assert "No space left on device" in caplog.text
    with pytest.raises(SettingError, match=r"cannot keep the index of .*No space left"):
        load_reviews(path, index=path.with_name("index"))
    blocked = path.with_name("file")
    blocked.touch()
    with pytest.raises(SettingError, match="cannot keep the index"):
        load_reviews(path, index=blocked)


def test_ids_of_one_hash_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "_hash", lambda text: len(text) % 2)
    ids = index.Ids.of(pa.chunked_array([pa.array(STRANGE, pa.large_string())]))
    codes = [ids.code(text) for text in STRANGE]
    assert sorted(codes) == list(range(len(STRANGE)))  # type: ignore[type-var]
    assert [ids.each[code] for code in codes] == STRANGE  # type: ignore[index]
    assert ids.code("none of them") is None


def test_the_two_ways_give_the_same_arrays(path: Path) -> None:
    kept = load_reviews(path, index=path.with_name("index"))._index
    fresh = TableReviewSource.from_reviews(REVIEWS)._index
    for side in ("users", "items", "everyone"):
        for name in index.Timeline.__slots__:
            one, other = getattr(getattr(kept, side), name), getattr(getattr(fresh, side), name)
            assert np.array_equal(one, other)
    manifest = json.loads((path.with_name("index") / "index.json").read_text())
    assert len(manifest["sizes"]) == len(index.ARRAYS) + 5
