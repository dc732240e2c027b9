"""Where things are kept: summaries of people's reviews, runs, indexed reviews, and converted base
models.

Everything lies under one folder: the one of `use_dir`, else `R4R_CACHE_DIR`, else the platform's
cache folder for `r4r-graph`.
Deleting it is always safe: summaries, indexes and base models are made again, and runs are
forgotten.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from r4r_graph.errors import SettingError

if TYPE_CHECKING:
    from langgraph.store.sqlite import SqliteStore

SUMMARY_NAMESPACE = ("r4r", "summaries")
"""First parts of the namespace of every summary in the store."""

_T = TypeVar("_T")

_told: str | os.PathLike[str] | None = None
"""The folder that `use_dir` named."""

_TABLES = {"summaries": ("store",), "runs": ("checkpoints", "writes")}
"""What is emptied of a database that cannot be unlinked."""

_REVIEWS = "reviews "
_BUSY_SECONDS = 30.0
_LOCK_SECONDS = 600.0
_SIDE_FILES = ("-wal", "-shm", "-journal")
_ELSEWHERE = "set R4R_CACHE_DIR to a folder that you can write to"


@dataclass(frozen=True, slots=True)
class CacheEntry:
    """Something that is kept on disk."""

    name: str
    """What it is: `summaries`, `runs`, or `reviews` or `base model` and its folder's name."""
    path: Path
    bytes: int
    """Size on disk, side files included."""
    holds_reviews: bool
    """Whether it was made from people's reviews."""


def use_dir(folder: str | os.PathLike[str] | None) -> None:
    """Keep everything in `folder` from now on, in this process; None: as the environment says."""
    global _told
    _told = folder


def cache_dir() -> Path:
    """The folder in which everything is kept; made (mode 0700) when it is not there.

    Raises:
        SettingError: the folder cannot be made or entered.
    """
    from platformdirs import user_cache_path

    chosen = _told or os.environ.get("R4R_CACHE_DIR")
    if chosen:
        folder = Path(os.path.expandvars(chosen)).expanduser().absolute()
    else:
        folder = user_cache_path("r4r-graph", appauthor=False)
    return _made(folder)


def summary_store_path() -> Path:
    """The SQLite file that holds the summaries; it need not exist.

    Raises:
        SettingError: see `cache_dir`.
    """
    return cache_dir() / "summaries.sqlite"


def runs_path() -> Path:
    """The SQLite file that holds the runs of the command line; it need not exist.

    Raises:
        SettingError: see `cache_dir`.
    """
    return cache_dir() / "runs.sqlite"


def review_indexes_dir() -> Path:
    """The folder of indexed reviews, one subfolder a file; made when it is not there.

    Raises:
        SettingError: see `cache_dir`.
    """
    return _made(cache_dir() / "reviews")


def base_models_dir() -> Path:
    """The folder of converted base models, one subfolder a model; made when it is not there.

    Raises:
        SettingError: see `cache_dir`.
    """
    return _made(cache_dir() / "base-models")


def digests_path() -> Path:
    """A JSON file that remembers the digests of large files; it need not exist.

    Raises:
        SettingError: see `cache_dir`.
    """
    return cache_dir() / "digests.json"


def cache_info() -> list[CacheEntry]:
    """What is kept at present: the summaries first, then the runs, indexed reviews, base models.

    Raises:
        SettingError: see `cache_dir`.
    """
    entries = []
    for name, path in (("summaries", summary_store_path()), ("runs", runs_path())):
        if files := _with_side_files(path):
            size = sum(file.stat().st_size for file in files)
            entries.append(CacheEntry(name, path, size, holds_reviews=True))
    for folder in sorted(p for p in review_indexes_dir().iterdir() if p.is_dir()):
        entries.append(CacheEntry(f"{_REVIEWS}{folder.name}", folder, _size(folder), True))
    for folder in sorted(p for p in base_models_dir().iterdir() if p.is_dir()):
        entries.append(CacheEntry(f"base model {folder.name}", folder, _size(folder), False))
    return entries


def clear_cache(
    *,
    summaries: bool = True,
    runs: bool = True,
    reviews: bool = True,
    base_models: bool = False,
) -> list[CacheEntry]:
    """Delete what is kept; returns what was deleted.

    Summaries and runs that another process has open are emptied rather than unlinked, so that they
    are gone from that process, too. A base model in use stays readable there until it is closed
    (on Windows its files cannot be deleted while they are in use).

    Raises:
        SettingError: something could not be deleted; what stands before it in `cache_info` was.
    """
    deleted = []
    for entry in cache_info():
        indexed = entry.name.startswith(_REVIEWS)
        others = reviews if indexed else base_models
        if not {"summaries": summaries, "runs": runs}.get(entry.name, others):
            continue
        try:
            with locked(entry.path if entry.holds_reviews else base_models_dir()):
                if entry.holds_reviews and not indexed:
                    _delete_database(entry.path, _TABLES[entry.name])
                else:
                    _delete_folder(entry.path)
        except (OSError, sqlite3.Error) as error:
            raise SettingError(
                f"cannot delete {entry.path}: {error}; stop what uses it and try again"
            ) from error
        deleted.append(entry)
    if base_models:
        digests_path().unlink(missing_ok=True)
    return deleted


def count_summaries(path: Path | None = None) -> int:
    """Number of summaries in the store (at `path`, or in the cache folder); 0 without a store.

    Reads only. Summaries of all base models, adapters and prompts count.

    Raises:
        SettingError: the file is no summary store, or cannot be read.
    """
    path = path or summary_store_path()
    if not path.exists():
        return 0
    prefix = ".".join(SUMMARY_NAMESPACE)
    try:
        uri = f"{path.absolute().as_uri()}?mode=ro"
        with closing(sqlite3.connect(uri, uri=True, timeout=_BUSY_SECONDS)) as connection:
            if not connection.execute(
                "SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = 'store'"
            ).fetchone():
                return 0
            rows = connection.execute(
                "SELECT count(*) FROM store WHERE prefix = ? OR prefix GLOB ?",
                (prefix, f"{prefix}.*"),
            )
            return int(rows.fetchone()[0])
    except sqlite3.Error as error:
        raise unusable(path, "summary store", error) from error


def open_summary_store(path: Path | None = None) -> SqliteStore:
    """The summary store at `path` (default: `summary_store_path()`), made when it is not there.

    The file is readable by its owner alone (0600). One store serves any number of threads, and
    any number of processes may open the same file; a write waits up to 30 seconds for another
    process. An operation that fails (locked for longer, disk full) leaves the store usable.
    Close it with `store.conn.close()`.

    Raises:
        SettingError: the file is damaged, is no SQLite database, or cannot be opened or made.
    """
    from langgraph.store.sqlite import SqliteStore

    if path is None:
        path = summary_store_path()
    else:
        path = path.expanduser().absolute()
        _made(path.parent)

    def set_up(connection: sqlite3.Connection) -> SqliteStore:
        store = SqliteStore(connection)
        store.setup()
        return store

    return open_database(path, "summary store", set_up, isolation_level=None, factory=_Connection)


def open_database(
    path: Path, name: str, set_up: Callable[[sqlite3.Connection], _T], **settings: Any
) -> _T:
    """A SQLite file that holds people's reviews, made (mode 0600) when it is not there.

    What is committed survives the process at once, and a power cut from a moment later; what is
    deleted is overwritten. A write waits up to 30 seconds for another process.

    Args:
        path: the file.
        name: what it is, for errors.
        set_up: makes the tables and returns what the caller wants; one process at a time.
        settings: of `sqlite3.connect`.

    Raises:
        SettingError: the file is damaged, is no SQLite database, or cannot be opened or made.
    """
    # Two processes that set up one new file would both run the first migration.
    with locked(path):
        connection: sqlite3.Connection | None = None
        try:
            os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
            connection = sqlite3.connect(
                path, check_same_thread=False, timeout=_BUSY_SECONDS, **settings
            )
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = NORMAL")
            connection.execute("PRAGMA secure_delete = ON")
            return set_up(connection)
        except (OSError, sqlite3.Error) as error:
            if connection is not None:
                connection.close()
            raise unusable(path, name, error) from error


@contextmanager
def locked(path: Path, *, timeout: float = _LOCK_SECONDS) -> Iterator[None]:
    """Hold the lock that goes with `path` (the file `<path>.lock`), across processes and threads.

    It goes with its process: a lock of a process that died is free. Not reentrant.

    Raises:
        SettingError: another process held it for all of `timeout` seconds, or there is no
            permission to write beside `path`.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(f"{path}.lock", timeout=timeout)
    try:
        lock.acquire()
    except Timeout:
        raise SettingError(
            f"{path} has been in use by another process for {timeout:g} s; wait for that process "
            "or stop it"
        ) from None
    except OSError as error:
        raise SettingError(f"cannot write to {path.parent}: {error}; {_ELSEWHERE}") from error
    try:
        yield
    finally:
        lock.release()


def write_atomically(path: Path, text: str) -> None:
    """Write `text` (UTF-8) to `path`: readers see the old file or the new one, never a part.

    Raises:
        OSError: it could not be written; the old file is still there.
    """
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(descriptor, "w", encoding="utf-8") as file:  # noqa: PTH123
            file.write(text)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


class _Connection(sqlite3.Connection):
    """Gives a transaction up when its end fails.

    LangGraph's store sends BEGIN and COMMIT by itself and never rolls back: a COMMIT that fails
    would leave the write lock held, and every later BEGIN would fail inside the old transaction.
    """

    def execute(self, sql: str, parameters: Any = (), /) -> sqlite3.Cursor:
        if sql == "BEGIN" and self.in_transaction:
            self.rollback()
        try:
            return super().execute(sql, parameters)
        except sqlite3.Error:
            if sql == "COMMIT" and self.in_transaction:
                self.rollback()
            raise


def _made(folder: Path) -> Path:
    """`folder`, made with mode 0700 when it is not there (its parents with the usual mode)."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        reason = "a file is in the way" if isinstance(error, FileExistsError) else str(error)
        raise SettingError(f"cannot use {folder} as a folder: {reason}; {_ELSEWHERE}") from error
    if not os.access(folder, os.R_OK | os.X_OK):
        raise SettingError(f"cannot use {folder} as a folder: no permission; {_ELSEWHERE}")
    return folder


def unusable(path: Path, name: str, error: Exception) -> SettingError:
    """What to say of a database that cannot be opened, read or written."""
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    if code not in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return SettingError(f"cannot open the {name} {path}: {error}; {_ELSEWHERE}")
    ours = path in (summary_store_path(), runs_path())
    mend = "`r4r cache clear` deletes it" if ours else "delete that file"
    return SettingError(f"the {name} {path} is damaged ({error}); {mend}, and a new one is made")


def _delete_database(path: Path, tables: tuple[str, ...]) -> None:
    """Unlink it, or empty its tables while others have it open. The caller holds its lock."""
    if not _open_elsewhere(path):
        for file in _with_side_files(path):
            file.unlink()
        return
    # Unlinking would leave the others with a nameless file, and their closing would delete the
    # side files of whichever store is made next under this name.
    with closing(sqlite3.connect(path, isolation_level=None, timeout=_BUSY_SECONDS)) as connection:
        connection.execute("PRAGMA secure_delete = ON")
        for table in tables:
            connection.execute(f"DELETE FROM {table}")
        connection.execute("VACUUM")
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def _open_elsewhere(path: Path) -> bool:
    """Whether another connection has the file open: only a lone one may leave WAL mode."""
    with closing(sqlite3.connect(path, isolation_level=None, timeout=0)) as connection:
        try:
            mode = connection.execute("PRAGMA journal_mode = DELETE").fetchone()[0]
        except sqlite3.OperationalError:
            return True
        except sqlite3.DatabaseError:  # damaged
            return False
    return bool(mode == "wal")


def _delete_folder(folder: Path) -> None:
    """Delete `folder` so that nobody ever sees a part of it."""
    aside = folder.with_name(f".deleted-{folder.name.lstrip('.')}")
    shutil.rmtree(aside, ignore_errors=True)
    folder.replace(aside)
    shutil.rmtree(aside)


def _with_side_files(path: Path) -> list[Path]:
    """The database and its side files, as far as they exist, the database first."""
    candidates = [path, *(path.with_name(path.name + suffix) for suffix in _SIDE_FILES)]
    return [file for file in candidates if file.exists()]


def _size(folder: Path) -> int:
    total = 0
    for file in folder.rglob("*"):
        with suppress(FileNotFoundError):  # deleted meanwhile
            total += file.lstat().st_size if not file.is_dir() else 0
    return total
