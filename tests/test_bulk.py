"""Bulk runs: one schema, atomic parts, and a job that continues where it was killed."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas
import pyarrow.parquet as pq
import pytest
from langgraph.store.memory import InMemoryStore

from r4r_graph import Recommender, SqlReviewSource, TableReviewSource, fake_engine
from r4r_graph.bulk import SCHEMA, rate_pairs, summarize_reviews
from r4r_graph.engine.base import RateRequest
from r4r_graph.errors import DataError, EngineFailure, InputError, SettingError
from r4r_graph.jobs import JobProgress
from r4r_graph.reviews import ReviewSource, load_pairs
from r4r_graph.schema import Pair
from tests.bulk_jobs import PAIRS, REVIEWS, recommender


@pytest.fixture
def made() -> Iterator[Recommender]:
    with recommender() as found:
        yield found


def test_the_folder_reads_as_one_table_in_the_order_of_the_pairs(
    made: Recommender, tmp_path: Path
) -> None:
    told: list[JobProgress] = []
    report = rate_pairs(made, PAIRS, tmp_path / "out", part_rows=7, on_progress=told.append)
    table = pandas.read_parquet(tmp_path / "out")
    assert list(table.columns) == SCHEMA.names
    assert list(zip(table.user_id, table.item_id, table.as_of, strict=True)) == [
        (p.user_id, p.item_id, p.as_of) for p in PAIRS
    ]
    alone = made.rate("u3", "i3", as_of=PAIRS[3].as_of)
    assert table.rating[3] == alone.rating
    assert list(table.distribution[3]) == list(alone.distribution.probabilities)
    assert tuple(table.rationales[3]) == alone.rationales
    assert (report.rows, report.reused, report.failed) == (40, 0, 0)
    assert [now.done for now in told] == list(range(1, 41))
    assert len(list((tmp_path / "out").glob("part-*"))) >= 6
    others = [p.name for p in (tmp_path / "out").iterdir() if not p.name.startswith("part-")]
    assert all(name.startswith("_") for name in others)


def test_every_part_has_the_schema_also_when_all_rows_failed(tmp_path: Path) -> None:
    def refuse(_: RateRequest) -> list[float]:
        raise ValueError("no")

    with recommender(rate=refuse) as broken:
        report = rate_pairs(broken, PAIRS[:3], tmp_path / "out")
    [part] = (tmp_path / "out").glob("part-*")
    assert pq.read_schema(part).equals(SCHEMA)
    table = pandas.read_parquet(tmp_path / "out")
    assert report.failed == 3
    assert table.rating.isna().all()
    assert table.error.str.contains("EngineFailure").all()


def test_one_bad_row_is_kept_with_its_reason(made: Recommender, tmp_path: Path) -> None:
    pairs = [*PAIRS[:2], Pair("nobody", "nothing", 5.0), *PAIRS[2:4]]
    report = rate_pairs(made, pairs, tmp_path / "out")
    table = pandas.read_parquet(tmp_path / "out")
    assert report.failed == 1
    assert "nobody" in table.error[2]
    assert table.rating.notna().tolist() == [True, True, False, True, True]


class Stop(RuntimeError):
    """Ends a run from its progress callback."""


def test_a_stopped_job_continues_and_equals_a_straight_one(
    made: Recommender, tmp_path: Path
) -> None:
    def stop_at(count: int) -> Any:
        def tell(now: JobProgress) -> None:
            if now.done >= count:
                raise Stop

        return tell

    for count in (5, 11, 12, 30):
        with pytest.raises(Stop):
            rate_pairs(made, PAIRS, tmp_path / "out", concurrency=4, on_progress=stop_at(count))
    report = rate_pairs(made, PAIRS, tmp_path / "out")
    assert report.reused >= 30
    rate_pairs(made, PAIRS, tmp_path / "straight")
    stopped = pandas.read_parquet(tmp_path / "out")
    pandas.testing.assert_frame_equal(stopped, pandas.read_parquet(tmp_path / "straight"))


def test_a_finished_job_computes_nothing(made: Recommender, tmp_path: Path) -> None:
    rate_pairs(made, PAIRS, tmp_path / "out")
    told: list[JobProgress] = []
    report = rate_pairs(made, PAIRS, tmp_path / "out", on_progress=told.append)
    assert (report.reused, report.rows, told) == (40, 40, [])


def test_another_job_is_refused(made: Recommender, tmp_path: Path) -> None:
    rate_pairs(made, PAIRS, tmp_path / "out")
    with pytest.raises(InputError, match=r"another job .*knobs"):
        rate_pairs(made, PAIRS, tmp_path / "out", seed=1, rationales=2)
    with pytest.raises(InputError, match=r"another job .*pairs"):
        rate_pairs(made, PAIRS[:-1], tmp_path / "out")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="other files"):
        rate_pairs(made, PAIRS, tmp_path / "mine")
    with pytest.raises(SettingError, match="unknown setting histroy"):
        rate_pairs(made, PAIRS, tmp_path / "new", histroy=3)
    assert not (tmp_path / "new").exists()


def test_what_changes_no_column_makes_no_other_job(made: Recommender, tmp_path: Path) -> None:
    rate_pairs(made, PAIRS[:3], tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "_job.json").read_text())
    known = "history rationales round_size sure readout seed temperature top_p"
    assert list(manifest["knobs"]) == known.split()  # as in folders of earlier versions
    report = rate_pairs(made, PAIRS[:3], tmp_path / "out", influence="same", record=True)
    assert report.reused == 3
    rate_pairs(made, PAIRS[:3], tmp_path / "more", influence="same", record=True)
    pandas.testing.assert_frame_equal(
        pandas.read_parquet(tmp_path / "out"), pandas.read_parquet(tmp_path / "more")
    )


@pytest.mark.parametrize("knobs", [{"ask": True}, {"ask_below": 0.5}])
def test_nobody_can_be_asked(made: Recommender, tmp_path: Path, knobs: Any) -> None:
    with pytest.raises(SettingError, match="a bulk run can ask nobody"):
        rate_pairs(made, PAIRS[:3], tmp_path / "out", **knobs)
    assert not (tmp_path / "out").exists()


def _run_slowly(out: str) -> None:
    with recommender(delay=0.01) as slow:
        rate_pairs(slow, PAIRS, out, concurrency=3, part_rows=2, part_seconds=0.01)


def test_killed_again_and_again_nothing_is_lost_or_done_twice(tmp_path: Path) -> None:
    """SIGKILL, at moments that differ; a dead process's lock blocks nobody."""
    out = tmp_path / "out"
    processes = multiprocessing.get_context("spawn")
    for wanted in (1, 3, 6, 9):
        process = processes.Process(target=_run_slowly, args=(str(out),))
        process.start()
        deadline = time.monotonic() + 60
        while len(list(out.glob("part-*"))) < wanted and process.is_alive():
            assert time.monotonic() < deadline
            time.sleep(0.005)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    (out / "_part-000000000-000000001.parquet").write_bytes(b"half a part")
    with recommender() as made:
        report = rate_pairs(made, PAIRS, out)
        assert report.reused >= 9
        rate_pairs(made, PAIRS, tmp_path / "straight")
    pandas.testing.assert_frame_equal(
        pandas.read_parquet(out), pandas.read_parquet(tmp_path / "straight")
    )
    assert not list(out.glob("_part-*"))


def test_two_processes_do_not_share_a_folder(made: Recommender, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = multiprocessing.get_context("spawn").Process(target=_run_slowly, args=(str(out),))
    process.start()
    deadline = time.monotonic() + 60
    while not list(out.glob("part-*")):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    try:
        with pytest.raises(InputError, match="another process"):
            rate_pairs(made, PAIRS, out)
    finally:
        process.kill()
        process.join()


def test_what_is_no_row_error_ends_the_run(tmp_path: Path) -> None:
    with recommender() as made:
        made.close()
        report = rate_pairs(made, PAIRS[:2], tmp_path / "out")
    table = pandas.read_parquet(tmp_path / "out")
    assert report.failed == 2
    assert table.error.str.startswith(EngineFailure.__name__).all()


def test_pairs_come_from_files(made: Recommender, tmp_path: Path) -> None:
    rows = [{"user_id": "u1", "item_id": "i2", "timestamp": 1040}]
    rows.append({"user_id": "u2", "item_id": "i3", "as_of": "1970-01-01T00:20:00"})  # type: ignore[dict-item]
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    wanted = [Pair("u1", "i2", 1040.0), Pair("u2", "i3", 1200.0)]
    assert load_pairs(file) == wanted
    pandas.DataFrame(
        [
            p.__dict__
            if hasattr(p, "__dict__")
            else {"user_id": p.user_id, "item_id": p.item_id, "as_of": p.as_of}
            for p in wanted
        ]
    ).to_parquet(tmp_path / "pairs.parquet")
    assert load_pairs(tmp_path / "pairs.parquet") == wanted
    rate_pairs(made, file, tmp_path / "out")
    assert pandas.read_parquet(tmp_path / "out").as_of.tolist() == [1040.0, 1200.0]
    file.write_text(json.dumps({"user_id": "u1", "item_id": "i2"}))
    with pytest.raises(DataError, match=r"pairs.jsonl:1: no timestamp"):
        load_pairs(file)


def test_every_review_is_summarized_once() -> None:
    store, calls = InMemoryStore(), []
    engine = fake_engine(write=lambda r: calls.append(r) or "positive: a\nnegative: b\nvalues: c")
    with Recommender.load(REVIEWS, engine=engine, store=store) as made:
        first = summarize_reviews(made)
        again = summarize_reviews(made)
    assert (first.rows, first.reused, len(calls)) == (36, 0, 36)
    assert (again.rows, again.reused) == (36, 36)


def test_the_reviews_of_a_database_are_summarized_too(tmp_path: Path) -> None:
    pytest.importorskip("sqlalchemy")
    with (
        SqlReviewSource(f"sqlite:///{tmp_path / 'reviews.db'}") as source,
        Recommender.load(source, engine=fake_engine(), store=InMemoryStore()) as made,
    ):
        source.add_reviews(REVIEWS)
        report = summarize_reviews(made)
    assert (report.rows, report.failed) == (36, 0)


def test_reviews_that_cannot_be_listed_are_refused() -> None:
    class Histories:
        """Answers questions, and lists nothing."""

    table, histories = TableReviewSource.from_reviews(REVIEWS), Histories()
    for name in dir(ReviewSource):
        if not name.startswith("_"):
            setattr(histories, name, getattr(table, name))
    for source, complaint in ((None, "no reviews to"), (histories, "Histories cannot list its")):
        made = Recommender.load(source, engine=fake_engine())  # type: ignore[arg-type]
        with made, pytest.raises(InputError, match=complaint):
            summarize_reviews(made)
