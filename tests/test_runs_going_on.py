"""Runs that failed or were killed go on, and repeat nothing that was done."""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from langgraph.checkpoint.memory import InMemorySaver

from r4r_graph import runs
from r4r_graph.engine.base import RateRequest
from r4r_graph.engine.batching import BatchingEngine
from r4r_graph.engine.fake import FakeBackend
from r4r_graph.errors import (
    DataError,
    EngineFailure,
    InputError,
)
from r4r_graph.experts import Experts
from r4r_graph.recommender import Recommender
from r4r_graph.reviews import TableReviewSource
from r4r_graph.runs import find, list_runs, open_runs, status, thread
from tests.processes import python
from tests.scripted import Request, Script, at, mark
from tests.small_runs import OFF_SCALE, TABLE, Fake, load


def fails_once() -> Callable[[Request], None]:
    """An engine whose first rating fails."""
    broken = [True]

    def before(request: Request) -> None:
        if isinstance(request, RateRequest) and broken:
            broken.clear()
            raise RuntimeError("out of memory")

    return before


def test_a_failed_step_is_tried_again_and_no_other(fake: Fake) -> None:
    script = Script(before=fails_once())
    rater = load(fake, InMemorySaver(), script)
    with pytest.raises(EngineFailure, match="out of memory"):
        rater.rate("ann", "target", config=thread("mon"), rationales=2, readout="mode", record=True)
    kept = find(rater.graph, "mon")
    assert (status(kept), kept.next) == ("failed", ("predictor",))
    asked = len(script.asked)
    with pytest.raises(InputError, match="run mon asks nothing"):
        rater.resume("mon", "accept")
    found = rater.resume("mon")
    assert (len(found.rationales), found.readout) == (2, "mode")  # its own knobs
    assert len(script.asked) == asked + 2  # the predictor's requests alone
    assert len(find(rater.graph, "mon").values["records"]) == 3 + 2 + 2
    assert list_runs(rater.graph)[0].status == "finished"


def test_the_async_twin_tries_again_too(fake: Fake) -> None:
    script = Script(before=fails_once())
    rater = load(fake, InMemorySaver(), script)

    async def twice() -> Any:
        with pytest.raises(EngineFailure, match="out of memory"):
            await rater.arate("ann", "target", config=thread("mon"))
        return await rater.aresume("mon")

    assert asyncio.run(twice()).rationale == "Reason 0."
    assert len(script.rationales) == 1


def test_finished_siblings_of_a_failed_step_are_not_repeated() -> None:
    broken = [True]

    def before(request: Request) -> None:
        if len(script.summaries) == 3 and broken:
            time.sleep(0.2)  # the others' results are on their way
            raise RuntimeError("out of memory")

    script = Script(before=before)
    backend = FakeBackend(write=script.write, rate=script.rate)
    with BatchingEngine(backend, max_rows=1) as engine:
        # Without a store nothing but the checkpointer remembers what was summarized.
        experts, source = Experts(engine, store=None), TableReviewSource.from_reviews(TABLE)
        rater = Recommender(experts, source, checkpointer=InMemorySaver())
        with pytest.raises(EngineFailure, match="out of memory"):
            rater.rate("ann", "target", as_of=at(9), config=thread("mon"))
        broken.clear()
        [_, _, last] = script.summaries
        found = rater.resume("mon")
        assert script.summaries[3:] == [last]
    positive = {one.item_id: one.summary.positive for one in found.user_aspects}
    assert positive == {"folk": (mark("ann", "folk"),), "rock": (mark("ann", "rock"),)}


def test_a_step_that_is_done_but_not_closed_is_not_the_end(fake: Fake) -> None:
    """The disk is full when the state after the summaries is to be kept."""

    class Full(InMemorySaver):
        full = True

        def put(self, config: Any, checkpoint: Any, metadata: Any, new_versions: Any) -> Any:
            if self.full and metadata["step"] == 2:
                raise OSError("disk full")
            return super().put(config, checkpoint, metadata, new_versions)

    saver, script = Full(), Script()
    rater = load(fake, saver, script)
    with pytest.raises(OSError, match="disk full"):
        rater.rate("ann", "target", as_of=at(9), config=thread("mon"))
    kept = find(rater.graph, "mon")
    assert (kept.next, len(kept.values["summaries"]), status(kept)) == ((), 3, "stopped")
    assert list_runs(rater.graph)[0].status == "stopped"
    saver.full = False
    assert rater.resume("mon").rationale == "Reason 0."
    assert (len(script.summaries), len(script.rationales)) == (3, 1)


def test_a_run_that_failed_on_its_input_says_so_again(fake: Fake) -> None:
    rater = load(fake, InMemorySaver())
    with pytest.raises(DataError, match="99 is off the scale"):
        rater.rate("ann", "target", config=thread("mon"), user_history=[OFF_SCALE], seed=3)
    kept = find(rater.graph, "mon")
    assert (status(kept), runs.unread(kept), runs.knobs_of_run(kept).seed) == ("failed", True, 3)
    with pytest.raises(DataError, match="99 is off the scale"):
        rater.resume("mon")


CRASH = """
    import os, signal, sys
    from pathlib import Path
    from r4r_graph import Experts, Recommender, Review, TableReviewSource
    from r4r_graph.engine.aspects import format_aspects
    from r4r_graph.engine.batching import BatchingEngine
    from r4r_graph.engine.fake import FakeBackend
    from r4r_graph.runs import open_runs, thread
    from r4r_graph.schema import AspectSummary
    import time

    path, log, dies_at = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]

    def note(what):
        with log.open("a") as file:
            file.write(what + "\\n")
        if what == dies_at or log.read_text().count("summarizer") == 4 and dies_at == "last":
            time.sleep(0.3)  # what other threads are writing now is no part of the test
            os.kill(os.getpid(), signal.SIGKILL)

    def write(request):
        if request.format == "text":
            note("reasoner")
            return "Because."
        note("summarizer-" + request.messages[1].content.split("words")[1].split()[0])
        return format_aspects(AspectSummary(positive=("x",)))

    def rate(request):
        note("predictor")
        return [0, 0, 0, 1, 1]

    table = [Review("ann", f"i{n}", 4, 1e9 + n, "", f"words {n}.") for n in range(4)]
    backend = FakeBackend(write=write, rate=rate)
    with open_runs(path) as kept, BatchingEngine(backend, max_rows=1) as engine:
        # without a store nothing but the checkpointer remembers
        source = TableReviewSource.from_reviews(table)
        rater = Recommender(Experts(engine, store=None), source, checkpointer=kept)
        if dies_at == "never":
            print(rater.resume("mon").rating)
        else:
            rater.rate("ann", "x", config=thread("mon"))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
@pytest.mark.parametrize(
    ("dies_at", "repeated"),
    [
        ("reasoner", ["reasoner", "predictor"]),
        ("predictor", ["predictor"]),
    ],
)
def test_a_killed_run_repeats_nothing(
    fake: Fake, tmp_path: Path, dies_at: str, repeated: list[str]
) -> None:
    path, log = tmp_path / "runs.sqlite", tmp_path / "log"
    killed = python(CRASH, path, log, dies_at)
    assert killed.returncode == -signal.SIGKILL
    before = log.read_text().splitlines()
    assert len([line for line in before if line.startswith("summarizer")]) == 4
    with open_runs(path) as kept:
        [run] = list_runs(load(fake, kept).graph)
        assert (run.status, run.user_id, run.item_id) == ("stopped", "ann", "x")
    done = python(CRASH, path, log, "never")
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "4.5\n")
    assert log.read_text().splitlines()[len(before) :] == repeated


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
def test_a_run_killed_among_its_summaries_repeats_the_one(tmp_path: Path) -> None:
    path, log = tmp_path / "runs.sqlite", tmp_path / "log"
    assert python(CRASH, path, log, "last").returncode == -signal.SIGKILL
    before = log.read_text().splitlines()
    assert sorted(before) == [f"summarizer-{n}." for n in range(4)]
    done = python(CRASH, path, log, "never")
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "4.5\n")
    assert log.read_text().splitlines()[4:] == [before[-1], "reasoner", "predictor"]
