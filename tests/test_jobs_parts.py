"""Jobs that fail: rows tried again alone, full disks, rows that never end."""

from __future__ import annotations

import asyncio
import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from r4r_graph.errors import DataError, InputError, StorageError
from r4r_graph.jobs import Columns, JobReport, numbered, run_job
from r4r_graph.parts import Parts, failures

SCHEMA = pa.schema([("row", pa.int64()), ("text", pa.string()), ("error", pa.string())])


def job(
    out: Path, rows: Any = range(20), bad: set[int] | frozenset[int] = frozenset(), **settings: Any
) -> tuple[JobReport, list[int]]:
    """A job over numbers, some of which fail; also the rows that were computed, in their order."""
    computed: list[int] = []

    async def compute(row: int) -> Columns:
        computed.append(row)
        await asyncio.sleep(0)
        if row in bad:
            return {"row": row, "text": None, "error": f"EngineFailure: no {row}"}
        return {"row": row, "text": f"text {row}", "error": None}

    settings = {"part_rows": 6, "concurrency": 3, **settings}
    manifest = {"rows": len(rows)}
    return run_job(rows, compute, out, schema=SCHEMA, manifest=manifest, **settings), computed


def names(out: Path) -> list[str]:
    return sorted(path.name for path in out.glob("*.parquet"))


def test_failed_rows_are_tried_again_alone_in_their_places(tmp_path: Path) -> None:
    out = tmp_path / "out"
    report, _ = job(out, bad={2, 7, 8, 19})
    assert (report.failed, failures(out)) == (4, {"EngineFailure": (4, "no 2")})
    before = names(out)
    report, computed = job(out)
    assert (report.reused, computed) == (20, [])  # without being asked, nothing
    report, computed = job(out, bad={8}, retry_failed=True)
    assert computed == [2, 7, 8, 19]
    assert (report.rows, report.reused, report.failed) == (20, 16, 1)
    assert names(out) == before
    assert failures(out) == {"EngineFailure": (1, "no 8")}
    report, computed = job(out, retry_failed=True)
    assert (computed, failures(out)) == ([8], {})
    job(tmp_path / "straight")
    pandas.testing.assert_frame_equal(
        pandas.read_parquet(out), pandas.read_parquet(tmp_path / "straight")
    )


def test_failed_and_missing_rows_are_done_in_one_go(tmp_path: Path) -> None:
    out = tmp_path / "out"
    job(out, bad={1, 13})
    [first, *_] = sorted(out.glob("part-*"))
    (lost,) = out.glob("part-000000006-*")
    lost.unlink()
    report, computed = job(out, retry_failed=True)
    assert computed == [1, *range(6, 12), 13]
    assert report.reused == 12
    assert first.exists()
    assert pandas.read_parquet(out).text.tolist() == [f"text {n}" for n in range(20)]


def test_a_stopped_retry_keeps_what_it_mended(tmp_path: Path) -> None:
    out = tmp_path / "out"
    job(out, bad=set(range(20)))

    def stop(now: Any) -> None:
        if now.done >= 9:
            raise RuntimeError

    with pytest.raises(RuntimeError):
        job(out, retry_failed=True, concurrency=1, on_progress=stop)
    _, computed = job(out, retry_failed=True)
    assert computed == list(range(9, 20))
    assert failures(out) == {}


def _full_after(parts: int) -> Callable[..., None]:
    write, count = pq.write_table, iter(range(100))

    def write_some(table: pa.Table, where: Path) -> None:
        if next(count) >= parts:
            where.write_bytes(b"half a part")
            raise OSError(errno.ENOSPC, "No space left on device")
        write(table, where)

    return write_some


def test_a_full_disk_ends_the_run_and_what_was_written_is_whole(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    monkeypatch.setattr("pyarrow.parquet.write_table", _full_after(2))
    with pytest.raises(StorageError, match=rf"cannot write to {out}: No space left .* continues"):
        job(out)
    monkeypatch.undo()
    assert len(list(out.glob("part-*"))) == 2
    assert not list(out.glob("_part-*"))
    report, computed = job(out)
    assert (report.reused, report.rows) == (20 - len(computed), 20)
    assert 0 < len(computed) < 20
    assert pandas.read_parquet(out).row.tolist() == list(range(20))


def test_a_full_disk_leaves_a_part_that_was_to_be_mended_as_it_was(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    job(out, bad={3})
    monkeypatch.setattr("pyarrow.parquet.write_table", _full_after(0))
    with pytest.raises(StorageError):
        job(out, retry_failed=True)
    monkeypatch.undo()
    assert failures(out) == {"EngineFailure": (1, "no 3")}
    assert pandas.read_parquet(out).row.tolist() == list(range(20))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounting = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(mounting, capture_output=True, check=False).returncode:
        pytest.skip("mounting a file system needs root")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_real_disk_that_is_full_and_grows(small_disk: Path) -> None:
    out = small_disk / "out"
    rows = [os.urandom(12_000).hex() for _ in range(40)]  # nothing that compresses well

    async def compute(text: str) -> Columns:
        return {"row": 0, "text": text, "error": None}

    def work() -> JobReport:
        return run_job(rows, compute, out, schema=SCHEMA, manifest={}, part_rows=4, concurrency=1)

    with pytest.raises(StorageError, match="No space left on device"):
        work()
    kept = len(list(out.glob("part-*")))
    assert kept
    assert not list(out.glob("_part-*"))
    subprocess.run(["mount", "-o", "remount,size=4m", str(small_disk)], check=True)
    report = work()
    assert report.reused == 4 * kept
    assert pandas.read_parquet(out).text.tolist() == rows


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="cannot write to"):
        job(tmp_path / "file" / "out")


def test_a_row_that_does_not_end_holds_up_no_part(tmp_path: Path) -> None:
    out = tmp_path / "out"
    seen: list[int] = []

    def work(**settings: Any) -> None:
        goes_on = asyncio.Event()

        async def compute(row: int) -> Columns:
            if row == 1:
                await goes_on.wait()
            await asyncio.sleep(0.002)
            if row == 19:
                seen.append(len(list(out.glob("part-*"))))
                goes_on.set()
            return {"row": row, "text": "", "error": None}

        run_job(range(20), compute, out, schema=SCHEMA, manifest={}, concurrency=2, **settings)

    work(part_rows=4)  # as soon as a part is full
    work_again = seen.pop()
    assert work_again >= 3
    assert pandas.read_parquet(out).row.tolist() == list(range(20))
    for part in out.iterdir():
        part.unlink()
    work(part_rows=100, part_seconds=0.0002)  # or it takes very long
    assert seen.pop() >= 3
    assert pandas.read_parquet(out).row.tolist() == list(range(20))


class Lazy:
    """Rows that are made one after the other."""

    def __len__(self) -> int:
        return 20

    def __iter__(self) -> Iterator[int]:
        return iter(range(20))


def test_rows_need_not_be_a_list(tmp_path: Path) -> None:
    def stop(now: Any) -> None:
        if now.done == 8:
            raise RuntimeError

    with pytest.raises(RuntimeError):
        job(tmp_path / "out", rows=Lazy(), concurrency=1, on_progress=stop)
    _, computed = job(tmp_path / "out", rows=Lazy())
    assert computed == list(range(8, 20))
    assert list(numbered(Lazy(), iter([0, 3, 19]))) == [(0, 0), (3, 3), (19, 19)]
    assert list(numbered(Lazy(), iter([]))) == []


def test_parts_that_are_not_of_this_job_are_refused(tmp_path: Path) -> None:
    table = pa.Table.from_pylist([{"row": 0, "text": "", "error": None}], SCHEMA)
    for name in ("part-000000000-000000004.parquet", "part-000000003-000000006.parquet"):
        pq.write_table(table, tmp_path / name)
    with pytest.raises(DataError, match="parts overlap at row 3"):
        Parts(tmp_path, SCHEMA, 10)
    with pytest.raises(InputError, match="no part of this job"):
        Parts(tmp_path, SCHEMA, 5)
