"""Indexed reviews on disk: made once from a file, then mapped.

A folder holds `index.json`, which says of what it is the index, and beside it one subfolder with
the reviews (Arrow IPC) and the arrays of their index (`.npy`). Nothing of it is read before a
question needs it, so opening takes no time, and what is in memory is the pages that the operating
system keeps, and takes back.

A changed file never meets an old index. Where size, times of change and inode of the file are those
of the last look, it is unchanged; where any differs, its contents are digested anew and decide. A
file that changed less than two seconds before the last look could change once more without a trace
in its times, so that look is not remembered. (Git's index does both.)
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from r4r_graph.caches import locked, write_atomically
from r4r_graph.errors import DataError
from r4r_graph.ratings import RatingScale
from r4r_graph.reviews.index import ARRAYS, Ids, ReviewIndex, arrays
from r4r_graph.reviews.table import REVIEW_SCHEMA

Read = Callable[[Callable[[pa.Table], None]], None]
"""Feeds the reviews, checked, in tables of `REVIEW_SCHEMA`."""

_FORMAT = 1
_MANIFEST = "index.json"
_DATA = "data-"
_TABLE = "reviews.arrow"
_IDS = ("user_id", "item_id")
_SETTLED = 2e9
"""Nanoseconds after which a file's times tell its next change from its last."""
_WAIT = 6 * 3600.0
"""Seconds to wait for another process that makes the same index."""


def stored_reviews(
    folder: Path, files: Sequence[Path], scale: RatingScale, read: Read
) -> tuple[pa.Table, ReviewIndex]:
    """The reviews of some files and their index, mapped from a folder; made there if need be.

    Of several processes that need it one makes it. A folder with a good index may be read-only.

    Args:
        folder: where; made on demand, readable by its owner alone.
        files: what the reviews are read from, in this order.
        scale: within which every rating was checked to lie.
        read: reads and checks them.

    Raises:
        DataError: what `read` raises, or the files changed meanwhile.
        SettingError: another process never ended, or the folder cannot be written.
        OSError: the disk is full, or the like; nothing half-made stays.
    """
    found = _open(folder, files, scale)
    if found is None:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with locked(folder, timeout=_WAIT):
            found = _open(folder, files, scale)
            if found is None:
                found = _map(_make(folder, files, scale, read))
    return found


# Opening -----------------------------------------------------------------------------------------


def _open(
    folder: Path, files: Sequence[Path], scale: RatingScale
) -> tuple[pa.Table, ReviewIndex] | None:
    """What is in the folder, if it is whole and of these files."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        data = folder / manifest["data"]
        if manifest["format"] != _FORMAT or manifest["sizes"] != _sizes(data):
            return None
        if manifest["scale"] != [scale.low, scale.high] or not _is_of(folder, manifest, files):
            return None
        return _map(data)
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException):
        return None  # there is none, or it is damaged, or was replaced a moment ago


def _map(data: Path) -> tuple[pa.Table, ReviewIndex]:
    ids = []
    for name in _IDS:
        texts = _mapped(data / f"{name}.arrow").column(0).chunk(0)
        ids.append(Ids.kept(texts, _array(data, name)))
    found = {name: _array(data, name) for name in ARRAYS}
    return _mapped(data / _TABLE), ReviewIndex.put_together(ids[0], ids[1], found)


def _array(data: Path, name: str) -> Any:
    array = np.load(data / f"{name}.npy", mmap_mode="r", allow_pickle=False)
    return array.view(np.ndarray)  # a memmap's own indexing is slow


def _mapped(file: Path) -> pa.Table:
    return pa.ipc.open_file(pa.memory_map(str(file))).read_all()


def _is_of(folder: Path, manifest: dict[str, Any], files: Sequence[Path]) -> bool:
    """Whether the index is of these files as they are now."""
    now = time.time_ns()
    stamps = _stamps(files)
    if manifest["stamps"] == stamps:
        return True
    if manifest["digests"] != _digests(files) or stamps != _stamps(files):
        return False
    if _settled(stamps, now):
        with suppress(OSError):  # read-only: the contents are digested next time, too
            text = json.dumps({**manifest, "stamps": stamps}, indent=1)
            write_atomically(folder / _MANIFEST, text)
    return True


# Making ------------------------------------------------------------------------------------------


def _make(folder: Path, files: Sequence[Path], scale: RatingScale, read: Read) -> Path:
    """Write an index into the folder, and say where; the caller holds its lock."""
    now = time.time_ns()
    stamps, digests = _stamps(files), _digests(files)
    data = Path(tempfile.mkdtemp(dir=folder, prefix=_DATA))
    try:
        _write(data, read)
        if _stamps(files) != stamps:
            raise DataError(f"{files[0]}: changed while it was read; read it when it is whole")
        manifest = {
            "format": _FORMAT,
            "data": data.name,
            "scale": [scale.low, scale.high],
            "digests": digests,
            "stamps": stamps if _settled(stamps, now) else None,
            "sizes": _sizes(data),
        }
        write_atomically(folder / _MANIFEST, json.dumps(manifest, indent=1))
    except BaseException:
        shutil.rmtree(data, ignore_errors=True)
        raise
    for old in folder.glob(f"{_DATA}*"):
        # Left by a process that was killed, or replaced: what others have mapped stays theirs.
        if old != data:
            shutil.rmtree(old, ignore_errors=True)
    return data


def _write(data: Path, read: Read) -> None:
    """Reviews first, batch by batch; then their index, array by array, out of the mapped file.
    In memory are at most a few numbers a review, and no text."""
    with pa.OSFile(str(data / _TABLE), "wb") as sink, pa.ipc.new_file(sink, REVIEW_SCHEMA) as out:
        read(lambda table: out.write_table(table))
    table = _mapped(data / _TABLE)
    ids = [Ids.of(table.column(name)) for name in _IDS]
    for name, one in zip(_IDS, ids, strict=True):
        texts = pa.table({"id": one.texts})
        file = str(data / f"{name}.arrow")
        with pa.OSFile(file, "wb") as sink, pa.ipc.new_file(sink, texts.schema) as out:
            out.write_table(texts)
        np.save(data / f"{name}.npy", one.hashes, allow_pickle=False)
    for name, array in arrays(table, *ids):
        np.save(data / f"{name}.npy", array, allow_pickle=False)
    for path in data.iterdir():
        with path.open("rb+") as written:
            os.fsync(written.fileno())  # a power cut must not leave what looks whole


# Files -------------------------------------------------------------------------------------------


def _stamps(files: Sequence[Path]) -> list[list[int]]:
    stats = [file.stat() for file in files]
    return [[s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino] for s in stats]


def _settled(stamps: Sequence[Sequence[int]], now: int) -> bool:
    return all(now - max(changed, made) > _SETTLED for _, changed, made, _ in stamps)


def _digests(files: Sequence[Path]) -> list[list[str]]:
    found = []
    for file in files:
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, partial(hashlib.blake2b, digest_size=16))
        found.append([file.name, digest.hexdigest()])
    return found


def _sizes(data: Path) -> dict[str, int]:
    return {file.name: file.stat().st_size for file in sorted(data.iterdir())}
