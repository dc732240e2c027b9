from __future__ import annotations

import os
import sqlite3
import stat
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from r4r_graph import caches
from r4r_graph.errors import SettingError
from tests.processes import run_together

if TYPE_CHECKING:
    from langgraph.store.sqlite import SqliteStore

SPACE = (*caches.SUMMARY_NAMESPACE, "base")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache folder of the test, not made yet."""
    monkeypatch.setenv("R4R_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@contextmanager
def opened(path: Path | None = None) -> Iterator[SqliteStore]:
    store = caches.open_summary_store(path)
    try:
        yield store
    finally:
        store.conn.close()


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def store_files(folder: Path) -> list[Path]:
    return [file for file in folder.glob("summaries.sqlite*") if file.suffix != ".lock"]


def test_the_folder_is_made_on_demand_for_its_owner_alone(folder: Path) -> None:
    assert not folder.exists()
    assert caches.cache_dir() == folder
    assert mode(folder) == 0o700
    assert caches.base_models_dir() == folder / "base-models"
    assert mode(folder / "base-models") == 0o700


def test_a_folder_that_is_there_keeps_its_mode(folder: Path) -> None:
    folder.mkdir(mode=0o755)
    folder.chmod(0o755)
    assert mode(caches.cache_dir()) == 0o755


@pytest.mark.parametrize("setting", [None, ""])
def test_without_the_variable_it_is_the_platforms_cache_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str | None
) -> None:
    from platformdirs import user_cache_path

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    if setting is None:
        monkeypatch.delenv("R4R_CACHE_DIR")
    else:
        monkeypatch.setenv("R4R_CACHE_DIR", setting)
    assert caches.cache_dir() == user_cache_path("r4r-graph", appauthor=False)
    assert caches.cache_dir().is_relative_to(tmp_path)


def test_a_file_in_the_way(folder: Path) -> None:
    folder.write_text("not a folder")
    with pytest.raises(SettingError, match=r"cache as a folder.*file is in the way.*R4R_CACHE_DIR"):
        caches.cache_dir()


def test_a_file_further_up_in_the_way(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.write_text("not a folder")
    monkeypatch.setenv("R4R_CACHE_DIR", str(folder / "deeper"))
    with pytest.raises(SettingError, match=r"deeper.*R4R_CACHE_DIR"):
        caches.cache_dir()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may do everything")
def test_no_permission(folder: Path) -> None:
    folder.parent.chmod(0o500)
    try:
        with pytest.raises(SettingError, match=r"cache.*ermission.*R4R_CACHE_DIR"):
            caches.cache_dir()
    finally:
        folder.parent.chmod(0o700)


def test_the_store_keeps_values_for_its_owner_alone(folder: Path) -> None:
    with opened() as store:
        store.put(SPACE, "a", {"positive": ["x"]})
        for name in ("summaries.sqlite", "summaries.sqlite-wal", "summaries.sqlite-shm"):
            assert mode(folder / name) == 0o600
    with opened() as store:
        item = store.get(SPACE, "a")
        assert item is not None
        assert item.value == {"positive": ["x"]}


def test_a_store_elsewhere(tmp_path: Path) -> None:
    path = tmp_path / "new" / "mine.sqlite"
    with opened(path) as store:
        store.put(SPACE, "a", {})
    assert caches.count_summaries(path) == 1
    assert caches.count_summaries() == 0


def test_counting_reads_only_and_counts_summaries_only() -> None:
    assert caches.count_summaries() == 0
    assert not caches.summary_store_path().exists()
    with opened() as store:
        assert caches.count_summaries() == 0
        store.put(SPACE, "a", {})
        store.put(SPACE, "b", {})
        store.put(caches.SUMMARY_NAMESPACE, "c", {})
        store.put(("r4r", "summariesque"), "d", {})
        store.put(("other",), "e", {})
        assert caches.count_summaries() == 3
    assert caches.count_summaries() == 3


def test_counting_in_a_database_of_another_kind(tmp_path: Path) -> None:
    path = tmp_path / "other.sqlite"
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE t (x)")
    assert caches.count_summaries(path) == 0


def test_many_threads_share_one_store() -> None:
    with opened() as store, ThreadPoolExecutor(8) as pool:

        def work(i: int) -> bool:
            store.put(SPACE, str(i), {"i": i})
            item = store.get(SPACE, str(i))
            return item is not None and item.value == {"i": i}

        assert all(pool.map(work, range(200)))
    assert caches.count_summaries() == 200


def test_processes_that_start_at_once_share_one_new_store() -> None:
    code = (
        "import sys\n"
        "from r4r_graph.caches import open_summary_store\n"
        "import langgraph.store.sqlite\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "store = open_summary_store()\n"
        "for i in range(50):\n"
        "    store.put(('r4r', 'summaries', 'base'), f'{sys.argv[1]}-{i}', {'i': i})\n"
        "store.conn.close()\n"
    )
    run_together(code, *((n,) for n in range(3)))
    assert caches.count_summaries() == 150


def test_a_store_that_was_locked_is_usable_afterwards() -> None:
    with opened() as store:
        store.conn.execute("PRAGMA busy_timeout = 50")
        with closing(sqlite3.connect(caches.summary_store_path(), isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            with pytest.raises(sqlite3.OperationalError, match="locked"):
                store.put(SPACE, "a", {"n": 1})
            assert store.get(SPACE, "a") is None  # readers do not wait for writers
            other.execute("COMMIT")
        store.put(SPACE, "a", {"n": 2})
        item = store.get(SPACE, "a")
        assert item is not None
        assert item.value == {"n": 2}


def test_a_writer_waits_for_another_process() -> None:
    with (
        opened() as store,
        closing(
            sqlite3.connect(
                caches.summary_store_path(), isolation_level=None, check_same_thread=False
            )
        ) as other,
    ):
        other.execute("BEGIN IMMEDIATE")
        release = threading.Timer(0.3, other.execute, ["COMMIT"])
        release.start()
        store.put(SPACE, "a", {})
        release.join()
        assert store.get(SPACE, "a") is not None


def test_a_commit_that_fails_is_rolled_back() -> None:
    with opened() as store:
        for statement in (
            "PRAGMA foreign_keys = ON",
            "CREATE TABLE parent (id INTEGER PRIMARY KEY)",
            "CREATE TABLE child (id REFERENCES parent (id) DEFERRABLE INITIALLY DEFERRED)",
            "BEGIN",
            "INSERT INTO child VALUES (1)",
        ):
            store.conn.execute(statement)
        with pytest.raises(sqlite3.IntegrityError):
            store.conn.execute("COMMIT")
        assert not store.conn.in_transaction
        store.put(SPACE, "a", {})
        assert caches.count_summaries() == 1


def test_a_transaction_left_open_is_given_up() -> None:
    with opened() as store:
        store.conn.execute("BEGIN")
        store.put(SPACE, "a", {})
        assert not store.conn.in_transaction


@pytest.mark.parametrize("content", [b"no database at all, but long enough" * 100, b"junk"])
def test_a_damaged_store_says_how_to_clear_it(folder: Path, content: bytes) -> None:
    caches.cache_dir()
    (folder / "summaries.sqlite").write_bytes(content)
    with pytest.raises(SettingError, match=r"summaries\.sqlite is damaged.*r4r cache clear"):
        caches.open_summary_store()
    with pytest.raises(SettingError, match="r4r cache clear"):
        caches.count_summaries()
    [entry] = caches.clear_cache()
    assert entry.bytes == len(content)
    with opened() as store:
        store.put(SPACE, "a", {})
    assert caches.count_summaries() == 1


def test_a_damaged_store_elsewhere_is_not_cleared_by_the_command(tmp_path: Path) -> None:
    path = tmp_path / "mine.sqlite"
    path.write_bytes(b"junk" * 100)
    with pytest.raises(SettingError, match=r"mine\.sqlite is damaged.*delete that file"):
        caches.open_summary_store(path)


def test_a_store_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "folder.sqlite").mkdir()
    with pytest.raises(SettingError, match=r"cannot open the summary store .*folder\.sqlite"):
        caches.open_summary_store(tmp_path / "folder.sqlite")


def test_info_and_clear(folder: Path) -> None:
    assert caches.cache_info() == []
    assert caches.clear_cache(base_models=True) == []
    model = caches.base_models_dir() / "tiny-0123"
    (model / "sub").mkdir(parents=True)
    (model / "config.json").write_text("{}")
    (model / "sub" / "weights").write_bytes(b"1234567890")
    caches.digests_path().write_text("{}")
    with opened() as store:
        store.put(SPACE, "a", {"text": "secret words"})
        entries = caches.cache_info()  # with side files
        assert entries[0].bytes == sum(file.stat().st_size for file in store_files(folder))
    summaries, base = caches.cache_info()
    assert (summaries.name, summaries.holds_reviews) == ("summaries", True)
    assert summaries.path == caches.summary_store_path()
    assert base == caches.CacheEntry("base model tiny-0123", model, 12, False)

    assert caches.clear_cache() == [summaries]
    assert not store_files(folder)
    assert caches.cache_info() == [base]
    assert caches.clear_cache(summaries=False, base_models=True) == [base]
    assert caches.cache_info() == []
    assert not caches.digests_path().exists()


def test_runs_are_listed_and_cleared_by_themselves(folder: Path) -> None:
    from r4r_graph.runs import open_runs

    with opened() as store:
        store.put(SPACE, "a", {})
    with open_runs():
        pass
    summaries, runs = caches.cache_info()
    assert (runs.name, runs.path, runs.holds_reviews) == ("runs", caches.runs_path(), True)
    assert caches.clear_cache(summaries=False) == [runs]
    assert caches.cache_info() == [summaries]
    with open_runs():
        pass
    assert caches.clear_cache(runs=False) == [summaries]
    assert [entry.name for entry in caches.clear_cache()] == ["runs"]


def test_clearing_empties_a_store_in_use(folder: Path) -> None:
    with opened() as store:
        store.put(SPACE, "a", {"text": "secret words"})
        assert len(caches.clear_cache()) == 1
        assert store.get(SPACE, "a") is None
        kept = b"".join(file.read_bytes() for file in folder.glob("summaries.sqlite*"))
        assert b"secret words" not in kept
        store.put(SPACE, "b", {})
        assert caches.count_summaries() == 1
    assert caches.count_summaries() == 1


def test_a_lock_held_for_too_long(tmp_path: Path) -> None:
    path = tmp_path / "thing"
    with (
        caches.locked(path),
        pytest.raises(SettingError, match=r"thing has been in use .* 0\.1 s"),
        caches.locked(path, timeout=0.1),
    ):
        pass
    with caches.locked(path, timeout=0.1):
        pass


def test_a_lock_beside_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingError, match="R4R_CACHE_DIR"), caches.locked(tmp_path / "file" / "x"):
        pass


def test_writing_leaves_the_old_file_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.json"
    caches.write_atomically(path, "ä")
    assert path.read_text(encoding="utf-8") == "ä"

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        caches.write_atomically(path, "new")
    assert path.read_text(encoding="utf-8") == "ä"
    assert list(tmp_path.iterdir()) == [path]


def test_indexed_reviews_are_shown_and_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from r4r_graph.reviews import load_reviews

    monkeypatch.setenv("R4R_CACHE_DIR", str(tmp_path / "cache"))
    path = tmp_path / "reviews.csv"
    path.write_text("user_id,item_id,rating,timestamp\nu,i,4,5\n")
    load_reviews(path, index=True)
    [entry] = caches.cache_info()
    assert entry.name.startswith("reviews reviews.csv-")
    assert entry.holds_reviews
    assert entry.bytes > 1000
    assert caches.clear_cache(reviews=False) == []
    assert caches.clear_cache() == [entry]
    assert not entry.path.exists()
    assert len(load_reviews(path, index=True)) == 1
