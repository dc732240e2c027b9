"""The facade: loading, rating, streaming, closing, and the package's public names."""

from __future__ import annotations

import asyncio
import json
import logging
import sqlite3
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.store.memory import InMemoryStore

import r4r_graph
from r4r_graph import caches
from r4r_graph.engine.base import GenerateRequest
from r4r_graph.engine.batching import BatchingEngine
from r4r_graph.engine.fake import FakeBackend
from r4r_graph.errors import (
    DataError,
    EngineError,
    ModelNotFoundError,
    SettingError,
    UnknownPairError,
)
from r4r_graph.recommender import RationaleToken, Recommender, SummaryProgress
from r4r_graph.reviews import TableReviewSource
from r4r_graph.schema import Item, Recommendation, Review
from tests.scripted import Request, Script, at, mark, review

Fake = Callable[..., BatchingEngine]

TABLE = [
    review("ann", "folk", 1, 5),
    review("ann", "rock", 2, 1),
    review("ben", "target", 1, 2.5),
    review("ann", "later", 20, 5),
]
CATALOGUE = {"target": Item("target", "The Target", "album", "Ten songs.")}

KEYS = {
    "user_id",
    "item_id",
    "title",
    "rating",
    "readout",
    "mean",
    "median",
    "mode",
    "distribution",
    "rating_mass",
    "entropy",
    "rationale",
    "user_aspects",
    "item_aspects",
    "cold_start",
    "truncated",
    "model",
    "usage",
    "as_of",
    "warnings",
    "influence",
    "answers",
}


def load(engine: BatchingEngine, reviews: Any = TABLE, **settings: Any) -> Recommender:
    return Recommender.load(reviews, engine=engine, store=InMemoryStore(), **settings)


@pytest.fixture
def rater(fake: Fake) -> Iterator[Recommender]:
    with load(fake(), items=CATALOGUE) as recommender:
        yield recommender


# Loading ---------------------------------------------------------------------------------------


def written(folder: Path) -> Path:
    path = folder / "reviews.jsonl"
    path.write_text("\n".join(json.dumps(row.to_dict()) for row in TABLE), encoding="utf-8")
    return path


@pytest.mark.parametrize("kind", ["path", "text", "source", "list", "iterator"])
def test_reviews_come_in_many_shapes(fake: Fake, tmp_path: Path, kind: str) -> None:
    shapes: dict[str, Callable[[], Any]] = {
        "path": lambda: written(tmp_path),
        "text": lambda: str(written(tmp_path)),
        "source": lambda: TableReviewSource.from_reviews(TABLE),
        "list": lambda: TABLE,
        "iterator": lambda: iter(TABLE),
    }
    found = load(fake(), shapes[kind]()).rate("ann", "target", as_of=at(9))
    assert [row.item_id for row in found.user_aspects] == ["folk", "rock"]
    assert [row.rating for row in found.item_aspects] == [2.5]


def test_items_come_as_a_file_or_a_mapping(fake: Fake, tmp_path: Path) -> None:
    path = tmp_path / "items.csv"
    path.write_text("item_id,title\ntarget,From a File\n", encoding="utf-8")
    for items, title in ((path, "From a File"), (CATALOGUE, "The Target")):
        for reviews in (TABLE, written(tmp_path)):
            assert load(fake(), reviews, items=items).rate("ann", "target").title == title
    alone = load(fake(), None, items=CATALOGUE).rate("ann", "target")
    assert (alone.title, alone.cold_start) == ("The Target", "both")


def test_items_beside_a_source_are_refused(fake: Fake) -> None:
    with pytest.raises(SettingError, match="items belong to the review source"):
        load(fake(), TableReviewSource.from_reviews(TABLE), items=CATALOGUE)


def test_without_reviews_each_call_brings_its_own(fake: Fake) -> None:
    rater = load(fake(), None)
    passed = {"user_history": TABLE[:2], "item_history": [TABLE[2]]}
    found = rater.rate("ann", "target", as_of=at(9), item=CATALOGUE["target"], **passed)
    assert found.title == "The Target"
    assert (len(found.user_aspects), len(found.item_aspects), found.cold_start) == (2, 1, None)


def test_a_rating_off_the_scale_is_refused_at_once(fake: Fake) -> None:
    nine = replace(TABLE[0], rating=9.0)
    with pytest.raises(DataError, match="9 is off the scale 1 to 5"):
        load(fake(), [nine])
    assert load(fake(), [nine], scale="1-10").rate("ann", "folk").distribution.scale.high == 10
    with pytest.raises(SettingError, match="bad rating scale"):
        load(fake(), [nine], scale="ten")


# Rating ----------------------------------------------------------------------------------------


def test_the_result_is_the_json_object(rater: Recommender) -> None:
    found = rater.rate("ann", "target", as_of=at(9))
    row = found.to_dict()
    assert set(row) == KEYS
    assert json.loads(json.dumps(row, allow_nan=False)) == row
    assert Recommendation.from_dict(row).to_dict() == row
    assert (row["user_id"], row["item_id"], row["title"]) == ("ann", "target", "The Target")
    assert sum(row["distribution"].values()) == pytest.approx(1)
    assert list(row["distribution"]) == ["1", "2", "3", "4", "5"]
    assert row["rating"] == row["mean"] == found.rating
    aspects = {"user_id", "item_id", "title", "timestamp", "rating"}
    assert set(row["user_aspects"][0]) == aspects | {"positive", "negative", "values"}
    assert row["user_aspects"][0]["timestamp"] == at(1)
    assert set(row["model"]) >= {"base", "adapters", "prompts"}
    assert set(row["model"]["prompts"]) == {"summarizer", "reasoner", "predictor"}
    assert set(row["usage"]) == {"summarizer", "reasoner", "predictor"}
    costs = {"calls", "cache_hits", "prompt_tokens", "completion_tokens", "seconds"}
    assert all(set(usage) == costs for usage in row["usage"].values())
    assert [row["usage"][node]["calls"] for node in ("summarizer", "reasoner")] == [3, 1]


def test_rationales_are_told_when_there_are_several(rater: Recommender) -> None:
    row = rater.rate("ann", "target", rationales=3, sure=1.0).to_dict()
    assert set(row) == KEYS | {"rationales"}
    assert len(row["rationales"]) == 3
    assert row["rationale"] == row["rationales"][0]
    assert Recommendation.from_dict(row).to_dict() == row


@pytest.mark.parametrize(
    "as_of", [at(2), "2020-09-15T12:26:40", datetime.fromtimestamp(at(2), tz=UTC)]
)
def test_as_of_may_be_a_datetime(rater: Recommender, as_of: Any) -> None:
    found = rater.rate("ann", "target", as_of=as_of)
    assert found.as_of == at(2)
    assert [row.item_id for row in found.user_aspects] == ["folk"]


@pytest.mark.parametrize("verb", ["rate", "arate", "stream", "astream"])
def test_errors_reach_the_caller(rater: Recommender, verb: str) -> None:
    async def take(events: Any) -> None:
        async for _ in events:
            pass

    def call(*pair: str, **knobs: Any) -> None:
        answer = getattr(rater, verb)(*pair, **knobs)
        if verb == "arate":
            asyncio.run(answer)
        elif verb == "astream":
            asyncio.run(take(answer))
        elif verb == "stream":
            list(answer)

    with pytest.raises(SettingError, match=r"unknown setting readouts; there are: history"):
        call("ann", "target", readouts="mean")
    with pytest.raises(SettingError, match="bad setting readout='best'"):
        call("ann", "target", readout="best")
    with pytest.raises(UnknownPairError, match=r"'nobody'.*'nothing'"):
        call("nobody", "nothing")
    with pytest.raises(DataError, match="bad as_of 'soon'"):
        call("ann", "target", as_of="soon")


def test_a_checkpointer_keeps_runs(fake: Fake) -> None:
    rater = load(fake(), checkpointer=InMemorySaver())
    threads = [{"configurable": {"thread_id": name}} for name in "ab"]
    for thread, item in zip(threads, ("target", "folk"), strict=True):
        rater.rate("ann", item, config=thread)
    kept = [rater.graph.get_state(thread).values["recommendation"] for thread in threads]
    assert [row["item_id"] for row in kept] == ["target", "folk"]
    # each run without a thread has one of its own
    events = list(rater.stream("ann", "target"))
    assert events[-1] == replace(rater.rate("ann", "target"), **times(events[-1]))
    asyncio.run(rater.arate("ann", "target"))
    checkpoints: Any = rater.graph.checkpointer
    assert len(checkpoints.storage) == 5


def times(found: Any) -> dict[str, Any]:
    """What differs between two runs of one pair."""
    return {"as_of": found.as_of, "usage": found.usage}


# Streaming -------------------------------------------------------------------------------------


def check_stream(events: list[Any], of: int, cached: bool) -> None:
    """Progress, then tokens, then the recommendation; the tokens make up the rationales."""
    *told, result = events
    assert isinstance(result, Recommendation)
    kinds = [type(event) for event in told]
    progress = [event for event in told if isinstance(event, SummaryProgress)]
    assert kinds == [SummaryProgress] * of + [RationaleToken] * (len(told) - of)
    assert [event.done for event in progress] == list(range(1, of + 1))
    assert {event.of for event in progress} == {of}
    assert {event.cached for event in progress} == {cached}
    assert {event.item_id for event in progress} == {"folk", "rock", "target"}
    texts: dict[int, str] = {}
    for event in told[of:]:
        texts[event.rationale] = texts.get(event.rationale, "") + event.text
    assert texts == dict(enumerate(result.rationales))
    assert len(told) - of > 3 * len(result.rationales)


class FirstComesLast(BatchingEngine):
    """The rationale with seed 0 reaches the engine after its siblings."""

    def submit(self, request: Any, on_text: Any = None) -> Any:
        if request.format == "text" and request.seed == 0:
            time.sleep(0.1)
        return super().submit(request, on_text)

    async def asubmit(self, request: Any, on_text: Any = None) -> Any:
        if request.format == "text" and request.seed == 0:
            await asyncio.sleep(0.1)
        return await super().asubmit(request, on_text)


@pytest.mark.parametrize("world", ["sync", "async"])
def test_streams_tell_progress_then_tokens_then_the_result(world: str) -> None:
    async def collect(rater: Recommender, **knobs: Any) -> list[Any]:
        return [event async for event in rater.astream("ann", "target", as_of=at(9), **knobs)]

    def events(rater: Recommender, **knobs: Any) -> list[Any]:
        if world == "async":
            return asyncio.run(collect(rater, **knobs))
        return list(rater.stream("ann", "target", as_of=at(9), **knobs))

    with load(FirstComesLast(FakeBackend())) as rater:
        check_stream(events(rater), of=3, cached=False)
        check_stream(events(rater, rationales=5, round_size=3, sure=1.0), of=3, cached=True)


def test_a_stream_may_be_left_early(rater: Recommender) -> None:
    events = rater.stream("ann", "target", as_of=at(9))
    assert isinstance(next(iter(events)), SummaryProgress)
    events.close()  # type: ignore[attr-defined]
    assert rater.rate("ann", "target", as_of=at(9)).rationale


# Many at once, and the end ---------------------------------------------------------------------


def test_a_hundred_at_once(fake: Fake) -> None:
    people = [f"p{n}" for n in range(100)]
    table = [review(who, item, day) for who in people for day, item in enumerate(("folk", "rock"))]
    engine = fake(delay=0.002)
    rater = load(engine, [*table, review("ben", "target", 1)])

    async def everyone() -> list[Recommendation]:
        return await asyncio.gather(*(rater.arate(who, "target", as_of=at(9)) for who in people))

    found = asyncio.run(everyone())
    assert [row.user_id for row in found] == people
    for row in found:
        assert [(a.user_id, a.item_id) for a in row.user_aspects] == [
            (row.user_id, "folk"),
            (row.user_id, "rock"),
        ]
    assert sum(row.usage["summarizer"].calls for row in found) == 201
    backend: Any = engine._backend
    assert sum(backend.batches) == 201 + 100 + 100
    assert len(backend.batches) < 100  # joined into few passes


def test_a_cancelled_run_frees_the_engine(fake: Fake) -> None:
    go, reached = threading.Event(), threading.Event()

    def before(request: Request) -> None:
        if isinstance(request, GenerateRequest) and "folk" in str(request.messages):
            reached.set()
            assert go.wait(10)

    script = Script(before=before)
    rater = load(fake(write=script.write, rate=script.rate), [*TABLE, review("zoe", "x", 1)])

    async def cancel() -> Recommendation:
        run = asyncio.create_task(rater.arate("ann", "target", as_of=at(9)))
        await asyncio.to_thread(reached.wait, 10)
        run.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(run, 5)
        go.set()
        return await rater.arate("zoe", "target", as_of=at(9))

    found = asyncio.run(cancel())
    assert found.user_aspects[0].summary.positive == (mark("zoe", "x"),)
    assert len(script.rationales) == len(script.ratings) == 1


def test_leaving_the_context_closes_engine_and_store(fake: Fake) -> None:
    with Recommender.load(TABLE, engine=fake()) as rater:
        rater.rate("ann", "target", as_of=at(9))
    assert caches.count_summaries() == 3
    with pytest.raises(EngineError, match="closed"):
        rater.rate("ann", "target", as_of=at(9))
    store: Any = rater.experts.store
    with pytest.raises(sqlite3.ProgrammingError, match="closed"):
        store.conn.execute("SELECT 1")
    rater.close()  # twice is once


def test_a_failed_load_leaves_no_open_store(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    opened: list[Any] = []

    def spy(open_store: Any = caches.open_summary_store) -> Any:
        opened.append(open_store())
        return opened[-1]

    monkeypatch.setattr(caches, "open_summary_store", spy)
    with pytest.raises(ModelNotFoundError):
        Recommender.load(TABLE, base=tmp_path / "nowhere")
    [store] = opened
    with pytest.raises(sqlite3.ProgrammingError, match="closed"):
        store.conn.execute("SELECT 1")


# Adapters --------------------------------------------------------------------------------------


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("adapters", [None, "none", {}])
def test_missing_adapters_are_said_once(
    tiny_base: Path, caplog: pytest.LogCaptureFixture, adapters: Any
) -> None:
    silent = [Review(r.user_id, r.item_id, r.rating, r.timestamp) for r in TABLE]
    with Recommender.load(silent, base=tiny_base, adapters=adapters, device="cpu") as rater:
        if adapters is None:
            found = rater.rate("ann", "target", as_of=at(9))
            assert found.model["adapters"] == dict.fromkeys(("summarizer", "reasoner", "predictor"))
            assert found.model["base"] == tiny_base.name
            assert 0 < found.distribution.mass < 1
    [told] = warnings_of(caplog)
    assert told.startswith("no adapter for summarizer, reasoner, predictor: the base model tiny")


@pytest.mark.parametrize("kind", ["folder", "mapping"])
def test_some_adapters_may_be_absent(
    tiny_base: Path,
    tiny_adapters: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    kind: str,
) -> None:
    folder = tmp_path / "adapters"
    folder.mkdir()
    (folder / "reasoner").symlink_to(tiny_adapters / "reasoner")
    chosen: Any = folder
    if kind == "mapping":
        chosen = {"reasoner": tiny_adapters / "reasoner", "predictor": None}
    with Recommender.load(TABLE, base=tiny_base, adapters=chosen, device="cpu") as rater:
        card = rater.experts.model_card()["adapters"]
    assert [name for name, digest in card.items() if digest] == ["reasoner"]
    told = [message for message in warnings_of(caplog) if message.startswith("no adapter")]
    assert [message.split(":")[0] for message in told] == ["no adapter for summarizer, predictor"]


# The package -----------------------------------------------------------------------------------


def test_the_public_names_are_sorted_and_there() -> None:
    assert r4r_graph.__all__ == sorted(r4r_graph.__all__)
    assert set(r4r_graph.__all__) <= set(dir(r4r_graph))
    for name in r4r_graph.__all__:
        assert getattr(r4r_graph, name) is not None
    assert set(r4r_graph._HOMES) == set(r4r_graph.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Recommendr'"):
        r4r_graph.Recommendr  # noqa: B018


IMPORTS = """
    import logging, os, sys
    before = dict(os.environ)
    import r4r_graph
    assert "langgraph" not in sys.modules
    from r4r_graph import Recommender, build_graph, fake_engine
    from r4r_graph.cli import main
    heavy = {"torch", "transformers", "peft", "outlines", "datasets"} & set(sys.modules)
    assert not heavy, heavy
    assert dict(os.environ) == before
    assert not logging.getLogger().handlers and not logging.getLogger("r4r_graph").handlers
"""


def test_importing_loads_no_model_library() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(IMPORTS)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_the_options_of_a_run_hold_all_knobs() -> None:
    from r4r_graph import Knobs
    from r4r_graph.recommender import RunOptions

    assert set(Knobs.__dataclass_fields__) <= set(RunOptions.__annotations__)


def test_a_stream_with_a_concurrency_of_one_ends(fake: Fake) -> None:
    """LangGraph's own waiting takes a thread; it must not be the last one."""
    with Recommender.load(TABLE, engine=fake(), store=InMemoryStore()) as rater:
        events = list(rater.stream("ann", "target", as_of=at(9), config={"max_concurrency": 1}))
    assert isinstance(events[-1], Recommendation)
