"""Bulk runs that end early: killed, stopped by a signal, failing rows, an engine that is gone."""

from __future__ import annotations

import json
import logging
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas
import pytest
from langgraph.store.memory import InMemoryStore

from r4r_graph import Recommender, bulk, fake_engine
from r4r_graph.bulk import rate_pairs, summarize_reviews
from r4r_graph.caches import count_summaries
from r4r_graph.engine.base import GenerateRequest, RateRequest
from r4r_graph.errors import EngineFailure, StorageError
from r4r_graph.parts import failures
from r4r_graph.schema import Pair
from tests.bulk_jobs import PAIRS, REVIEWS, recommender
from tests.commands import R4r

ROOT = Path(__file__).parents[1]


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """The reviews and the pairs, in files."""
    reviews, pairs = tmp_path / "reviews.jsonl", tmp_path / "pairs.jsonl"
    reviews.write_text("\n".join(json.dumps(review.to_dict()) for review in REVIEWS))
    rows = [{"user_id": p.user_id, "item_id": p.item_id, "as_of": p.as_of} for p in PAIRS]
    pairs.write_text("\n".join(map(json.dumps, rows)))
    return reviews, pairs


def test_killed_at_random_moments_the_rows_are_the_same_and_no_summary_is_made_twice() -> None:
    """The short form of `benchmarks/kills.py`."""
    command = [sys.executable, "-W", "error", str(ROOT / "benchmarks" / "kills.py")]
    command += ["--kills", "3", "--pairs", "40", "--seed", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    figures = json.loads(done.stdout)
    assert figures["same_bytes"]
    assert figures["same_summaries"]
    assert figures["kept_summaries_made_again"] == 0


@pytest.fixture
def on_interrupt() -> Iterator[Callable[[Any], None]]:
    """Sets what Ctrl-C does: a process that a shell began in its background ignores it."""
    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield lambda does: signal.signal(signal.SIGINT, does)
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("which", "interrupt"),
    [
        (signal.SIGINT, signal.default_int_handler),
        (signal.SIGTERM, signal.default_int_handler),
        (signal.SIGTERM, signal.SIG_IGN),
    ],
    ids=["ctrl-c", "term", "term in the background"],
)
def test_a_signal_ends_it_with_a_word_and_what_is_finished_is_kept(
    which: signal.Signals,
    interrupt: Any,
    on_interrupt: Callable[[Any], None],
    r4r: R4r,
    script: Any,
    files: tuple[Path, Path],
    tmp_path: Path,
) -> None:
    on_interrupt(interrupt)
    reviews, pairs = files
    rated: list[int] = []

    def weights(_: RateRequest) -> list[float]:
        rated.append(1)
        if len(rated) == 15:
            os.kill(os.getpid(), which)
        return [0, 0, 0.1, 0.2, 0.7]

    script.weights = weights
    command = ("bulk", "--reviews", reviews, "--pairs", pairs, "--out", tmp_path / "out")
    before = signal.getsignal(signal.SIGTERM)
    done = r4r(*command, "--concurrency", 2)
    assert done.code == 130
    assert f"stopped: what is finished is in {tmp_path / 'out'}; the same call" in done.err
    assert done.out == ""
    assert signal.getsignal(signal.SIGTERM) is before
    kept = len(pandas.read_parquet(tmp_path / "out"))
    assert 10 <= kept < 40
    done = r4r(*command)
    assert (done.code, json.loads(done.out)["reused"]) == (0, kept)
    assert len(pandas.read_parquet(tmp_path / "out")) == 40


def test_failed_pairs_are_told_and_tried_again_on_demand(
    r4r: R4r, script: Any, files: tuple[Path, Path], tmp_path: Path
) -> None:
    reviews, pairs = files
    works = False

    def weights(request: RateRequest) -> list[float]:
        if not works and "Title 2" in str(request.messages[1].content):
            raise ValueError("no Title 2 today")
        return [0, 0, 0.1, 0.2, 0.7]

    script.weights = weights
    command = ("bulk", "--reviews", reviews, "--pairs", pairs, "--out", tmp_path / "out")
    done = r4r(*command)
    failed = json.loads(done.out)["failed"]
    assert (done.code, 0 < failed < 40) == (0, True)
    assert f"{failed} failed, EngineFailure: the engine failed: ValueError: no Title 2" in done.err
    assert "--retry-failed tries them again" in done.err
    works = True
    assert json.loads(r4r(*command).out)["reused"] == 40
    done = r4r(*command, "--retry-failed")
    assert json.loads(done.out)["reused"] == 40 - failed
    assert (failures(tmp_path / "out"), "failed," in done.err) == ({}, False)


def test_options_of_a_cluster_need_one(r4r: R4r, files: tuple[Path, Path], tmp_path: Path) -> None:
    reviews, pairs = files
    command = ("bulk", "--reviews", reviews, "--pairs", pairs, "--out", tmp_path / "out")
    done = r4r(*command, "--workers", 3)
    assert (done.code, done.complaint) == (2, "--workers and --worker-gpus are for --ray")


def test_an_engine_that_is_gone_ends_the_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(bulk, "_GIVE_UP", 10)
    gone = False

    def rate(_: RateRequest) -> list[float]:
        if gone:
            raise ConnectionError("refused")
        return [1, 0, 0, 0, 0]

    pairs = [*PAIRS[:5], *[Pair("nobody", "nothing", 5.0 + n) for n in range(15)], *PAIRS]
    with recommender(rate=rate) as made:

        def tell(now: Any) -> None:
            nonlocal gone
            gone = now.done >= 30  # fifteen bad pairs in a row are no reason to end

        with pytest.raises(EngineFailure, match=r"none of the last 10 rows.*refused"):
            rate_pairs(made, pairs, tmp_path / "out", concurrency=2, on_progress=tell)
        kept = pandas.read_parquet(tmp_path / "out")
        assert 35 < len(kept) < 60
        gone = False
        report = rate_pairs(made, pairs, tmp_path / "out", retry_failed=True)
    assert (report.rows, report.failed) == (60, 15)
    assert failures(tmp_path / "out").keys() == {"UnknownPairError"}


def test_reviews_that_failed_are_recorded_and_made_the_next_time(tmp_path: Path) -> None:
    bad, asked = {"Words 2 3.", "Words 4 4."}, []

    def write(request: GenerateRequest) -> str:
        text = str(request.messages[1].content)
        asked.append(text)
        if any(words in text for words in bad):
            raise ValueError("no")
        return "positive: a\nnegative: b\nvalues: c"

    file = tmp_path / "failed.jsonl"
    with recommender(write=write) as made:
        report = summarize_reviews(made, failures=file)
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        assert report.failed == 2
        assert {(row["user_id"], row["item_id"]) for row in rows} == {("u2", "i3"), ("u4", "i4")}
        assert rows[0]["error"] == "EngineFailure: the engine failed: ValueError: no"
        assert sorted(rows[0]) == ["error", "item_id", "timestamp", "user_id"]
        bad.clear()
        asked.clear()
        report = summarize_reviews(made, failures=file)
        assert (report.failed, report.reused, len(asked)) == (0, 34, 2)
        assert not file.exists()


def test_without_a_file_failed_reviews_go_to_the_log(caplog: pytest.LogCaptureFixture) -> None:
    def write(request: GenerateRequest) -> str:
        if "Words 1 1." in str(request.messages[1].content):
            raise ValueError("no")
        return "positive: a\nnegative: b\nvalues: c"

    with caplog.at_level(logging.WARNING), recommender(write=write) as made:
        assert summarize_reviews(made).failed == 1
    assert "no summary of i1 by u1: the engine failed: ValueError: no" in caplog.text


class FullStore(InMemoryStore):
    """Keeps so many summaries."""

    room = 7

    def put(self, *arguments: Any, **settings: Any) -> None:
        if self.room <= 0:
            raise sqlite3.OperationalError("database or disk is full")
        self.room -= 1
        super().put(*arguments, **settings)


def test_summaries_that_cannot_be_kept_are_not_made_for_nothing() -> None:
    store = FullStore()
    with Recommender.load(REVIEWS, engine=fake_engine(), store=store) as made:
        with pytest.raises(StorageError, match="database or disk is full; those before it are"):
            summarize_reviews(made, concurrency=1)
        store.room = 1000
        report = summarize_reviews(made)
    assert (report.rows, report.reused, report.failed) == (36, 7, 0)


@pytest.mark.usefixtures("on_interrupt")
def test_a_stopped_summarize_keeps_what_was_made(
    r4r: R4r, script: Any, files: tuple[Path, Path]
) -> None:
    asked: list[int] = []
    write = script.write

    def stop(request: GenerateRequest) -> str:
        asked.append(1)
        if len(asked) == 12:
            os.kill(os.getpid(), signal.SIGINT)
        text: str = write(request)
        return text

    script.write = stop
    done = r4r("summarize", "--reviews", files[0], "--concurrency", 2)
    assert done.code == 130
    assert "stopped: the summaries that were made are kept; the same call continues" in done.err
    kept = count_summaries()
    assert 9 <= kept < 36
    done = r4r("summarize", "--reviews", files[0])
    assert json.loads(done.out)["reused"] == kept
    assert count_summaries() == 36


def test_bulk_goes_on_where_no_summary_can_be_kept(tmp_path: Path) -> None:
    store = FullStore()
    store.room = 0
    with Recommender.load(REVIEWS, engine=fake_engine(), store=store) as made:
        assert rate_pairs(made, PAIRS[:5], tmp_path / "out").failed == 0
