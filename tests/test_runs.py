"""Runs that are kept: found, listed, gone on with after a crash, shared by processes, forgotten."""

from __future__ import annotations

import asyncio
import json
import operator
import sqlite3
import stat
from contextlib import closing
from pathlib import Path
from typing import Annotated, Any

import pytest
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, StateGraph
from langgraph.store.memory import InMemoryStore
from langgraph.types import Overwrite
from typing_extensions import TypedDict

from r4r_graph import caches, runs
from r4r_graph.engine.base import RateRequest
from r4r_graph.errors import (
    DataError,
    EngineFailure,
    InputError,
    RunPausedError,
    SettingError,
    UnknownRunError,
)
from r4r_graph.recommender import Recommender
from r4r_graph.runs import delete_run, find, history, info, list_runs, open_runs, thread
from tests.processes import python, run_together
from tests.scripted import Request, Script, at, make_bench, mark
from tests.small_runs import OFF_SCALE, PAIR, TABLE, Fake, load

# Where they are kept ---------------------------------------------------------------------------


def test_the_file_is_made_for_its_owner_alone(fake: Fake, tmp_path: Path) -> None:
    with open_runs() as kept:
        load(fake, kept).rate("ann", "target", config=thread("mon"))
        for file in caches.cache_dir().glob("runs.sqlite*"):
            assert stat.S_IMODE(file.stat().st_mode) == 0o600 or file.suffix == ".lock"
    assert caches.runs_path().is_file()
    with open_runs(tmp_path / "new" / "mine.sqlite") as kept:
        load(fake, kept).rate("ann", "target", config=thread("tue"))
    with open_runs() as kept:
        assert [run.thread_id for run in list_runs(load(fake, kept).graph)] == ["mon"]


def damage(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"SQLite format 3\0" + b"\xff" * 5000)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    damage(caches.runs_path())
    with pytest.raises(SettingError, match=r"runs\.sqlite is damaged .*`r4r cache clear`"):
        open_runs().__enter__()
    damage(tmp_path / "mine.sqlite")
    with pytest.raises(SettingError, match=r"mine\.sqlite is damaged .*delete that file"):
        open_runs(tmp_path / "mine.sqlite").__enter__()
    (tmp_path / "folder").mkdir()
    with pytest.raises(SettingError, match=r"cannot open the file of runs .*folder"):
        open_runs(tmp_path / "folder").__enter__()


def test_a_file_that_is_damaged_later_is_named(fake: Fake, tmp_path: Path) -> None:
    path = tmp_path / "runs.sqlite"
    with open_runs(path) as kept:
        load(fake, kept).rate("ann", "target", config=thread("mon"))
    with path.open("r+b") as file:
        file.seek(8192)
        file.write(b"\xff" * (path.stat().st_size - 8192))
    with pytest.raises(SettingError, match=r"runs\.sqlite is damaged"), open_runs(path) as kept:
        history(load(fake, kept).graph, "mon")


def test_a_locked_file_is_named(fake: Fake, tmp_path: Path) -> None:
    path = tmp_path / "runs.sqlite"

    def rate() -> None:
        with open_runs(path) as kept, closing(sqlite3.connect(path, isolation_level=None)) as other:
            kept.conn.execute("PRAGMA busy_timeout = 50")
            other.execute("BEGIN IMMEDIATE")
            load(fake, kept).rate("ann", "target", config=thread("mon"))

    with pytest.raises(SettingError, match=r"cannot open the file of runs .*locked"):
        rate()


def test_a_fault_of_the_program_stays_one(tmp_path: Path) -> None:
    def use_after_closing() -> None:
        with open_runs(tmp_path / "runs.sqlite") as kept:
            kept.conn.close()
            list(kept.list(None))

    with pytest.raises(sqlite3.ProgrammingError):
        use_after_closing()


WRITER = """
    import sys
    from pathlib import Path
    from r4r_graph import Recommender, Review, fake_engine
    from r4r_graph.runs import open_runs, thread

    table = [Review("ann", f"i{n}", 4, 1e9 + n, "", f"words {n}") for n in range(6)]
    print("ready", flush=True)
    sys.stdin.readline()
    with open_runs(Path(sys.argv[1])) as kept, fake_engine() as engine:
        rater = Recommender.load(table, engine=engine, checkpointer=kept)
        for n in range(8):
            rater.rate("ann", "x", record=True, config=thread(f"{sys.argv[2]}-{n}"))
"""


def test_processes_that_write_at_once_lose_nothing(fake: Fake, tmp_path: Path) -> None:
    path = tmp_path / "runs.sqlite"
    run_together(WRITER, *((path, n) for n in range(3)))
    with open_runs(path) as kept:
        graph = load(fake, kept).graph
        found = list_runs(graph)
        assert {run.thread_id for run in found} == {f"{p}-{n}" for p in range(3) for n in range(8)}
        assert {run.status for run in found} == {"finished"}
        assert {len(history(graph, run.thread_id)) for run in found} == {6}
        assert {len(find(graph, run.thread_id).values["records"]) for run in found} == {8}


# Finding ---------------------------------------------------------------------------------------


def test_an_unknown_run_is_named(fake: Fake) -> None:
    rater = load(fake, InMemorySaver())
    for call in (
        lambda: find(rater.graph, "nobody"),
        lambda: history(rater.graph, "nobody"),
        lambda: delete_run(rater.graph, "nobody"),
        lambda: rater.resume("nobody"),
        lambda: rater.stream_resumed("nobody"),
        lambda: rater.fork("nobody", {}),
        lambda: asyncio.run(rater.aresume("nobody")),
    ):
        with pytest.raises(UnknownRunError, match="no run is kept under thread 'nobody'"):
            call()


@pytest.mark.parametrize("saver", [None, False, True])
def test_a_graph_that_keeps_nothing_says_so(fake: Fake, saver: Any) -> None:
    graph = make_bench(fake, TABLE, checkpointer=saver).graph
    for call in (find, history, delete_run):
        with pytest.raises(SettingError, match="keeps no runs"):
            call(graph, "mon")
    with pytest.raises(SettingError, match="keeps no runs"):
        list_runs(graph)


def test_a_finished_run_is_not_resumed(fake: Fake) -> None:
    rater = load(fake, InMemorySaver())
    rater.rate("ann", "target", config=thread("mon"))
    for answer in (None, "accept"):
        with pytest.raises(InputError, match="run mon is finished; fork it"):
            rater.resume("mon", answer)


def test_the_history_is_told_from_its_beginning(fake: Fake) -> None:
    rater = load(fake, InMemorySaver())
    found = rater.rate("ann", "target", as_of=at(9), config=thread("mon"), record=True)
    states = history(rater.graph, "mon")
    nodes = [state.next[0] if state.next else "" for state in states]
    assert nodes == ["__start__", "recall", "summarizer", "reasoner", "predictor", ""]
    assert [(state.metadata or {})["step"] for state in states] == [-1, 0, 1, 2, 3, 4]
    assert states[-1].values["recommendation"] == found.to_dict()
    assert "recommendation" not in states[1].values
    assert info(states, "mon") == info(states[-1:], "mon") == list_runs(rater.graph)[0]


def test_a_thread_used_again_is_its_latest_run(fake: Fake) -> None:
    rater = load(fake, InMemorySaver())
    rater.rate("ann", "target", config=thread("mon"), rationales=2, seed=1)
    before = list_runs(rater.graph)[0]
    rater.rate("ben", "folk", config=thread("mon"))
    [run] = list_runs(rater.graph)
    assert (run.user_id, run.item_id) == ("ben", "folk")
    assert run.started > before.started
    states = history(rater.graph, "mon")
    assert len(states) == 6
    assert states[0].next == ("__start__",)
    assert runs.knobs_of_run(states[0]).rationales == runs.knobs_of_run(states[-1]).rationales == 1
    assert info(states[:1], "mon").user_id == "ben"
    assert info(states[:1], "mon").rating is None


def test_langgraphs_own_time_travel_is_followed(fake: Fake) -> None:
    """On one thread: its history is the branch that was taken last."""
    rater = load(fake, InMemorySaver())
    rater.rate("ann", "target", config=thread("mon"))
    [before] = [s for s in history(rater.graph, "mon") if s.next == ("predictor",)]
    told = {"rationales": Overwrite([{"text": "Mine.", "seed": 0}])}
    changed = rater.graph.update_state(before.config, told)
    state = rater.graph.invoke(None, changed)
    assert state["recommendation"]["rationale"] == "Mine."
    states = history(rater.graph, "mon")
    nodes = [s.next[0] if s.next else "" for s in states]
    assert nodes == ["__start__", "recall", "summarizer", "reasoner", "predictor", "predictor", ""]
    assert len(list(rater.graph.get_state_history(thread("mon")))) == 8
    [run] = list_runs(rater.graph)
    assert run.started == pytest.approx(info(states, "mon").started, abs=1)
    assert runs.seconds(states[0]) == pytest.approx(run.started, abs=1e-3)


def test_runs_are_listed_with_how_they_stand(fake: Fake) -> None:
    broken = [True]

    def before(request: Request) -> None:
        if isinstance(request, RateRequest) and broken:
            raise RuntimeError("out of memory")

    rater = load(fake, InMemorySaver(), Script(before=before))
    with pytest.raises(EngineFailure):
        rater.rate("ann", "target", config=thread("failed"))
    with pytest.raises(DataError):
        rater.rate("ann", "target", as_of=at(9), config=thread("bad"), user_history=[OFF_SCALE])
    with pytest.raises(RunPausedError):
        rater.rate("ann", "target", ask=True, config=thread("waiting"))
    stream = rater.stream("ann", "target", config=thread("stopped"))
    next(iter(stream))
    stream.close()  # type: ignore[attr-defined]
    broken.clear()
    rater.rate("ann", "target", config=thread("done"))
    fork = rater.fork("done", {})
    found = {run.thread_id: run for run in list_runs(rater.graph)}
    assert {name: run.status for name, run in found.items()} == {
        "failed": "failed",
        "bad": "failed",
        "waiting": "waiting",
        "stopped": "stopped",
        "done": "finished",
        fork: "stopped",
    }
    assert {(run.user_id, run.item_id) for run in found.values()} == {("ann", "target")}
    assert [name for name, run in found.items() if run.rating is not None] == ["done"]
    assert [name for name, run in found.items() if run.forked_from == "done"] == [fork]
    assert list(found)[::-1] == ["failed", "bad", "waiting", "stopped", "done", fork]
    assert [run.thread_id for run in list_runs(rater.graph, 2)] == [fork, "done"]


def test_a_run_that_no_facade_began_is_listed(fake: Fake) -> None:
    made = make_bench(fake, TABLE, checkpointer=InMemorySaver())
    made.graph.invoke(PAIR, thread("mon"), context={"rationales": 2})  # type: ignore[call-overload]
    [run] = list_runs(made.graph)
    assert (run.user_id, run.item_id, run.status) == ("ann", "target", "finished")
    assert runs.knobs_of_run(find(made.graph, "mon")).rationales == 2


class Note(TypedDict, total=False):
    """Another graph's state; its `case` is no mapping."""

    case: Any
    user_id: str
    log: Annotated[list[str], operator.add]


class Trip(TypedDict, total=False):
    """A parent's state."""

    user_id: str
    item_id: str
    as_of: Any
    recommendation: dict[str, Any]


def test_runs_of_other_graphs_are_left_alone(fake: Fake, tmp_path: Path) -> None:
    with open_runs(tmp_path / "runs.sqlite") as kept:
        rater = load(fake, kept)
        builder = StateGraph(Note)
        builder.add_node("note", lambda state: {"case": 3, "log": ["x"], "user_id": "zoe"})
        builder.add_edge(START, "note")
        other = builder.compile(checkpointer=kept)
        other.invoke({"log": []}, thread("other"))
        parent = StateGraph(Trip)
        parent.add_node("rating", make_bench(fake, TABLE).graph)
        parent.add_edge(START, "rating")
        outer: Any = parent.compile(checkpointer=kept)
        assert outer.invoke(PAIR, thread("outer"))["recommendation"]["rating"] == 3
        rater.rate("ann", "target", config=thread("mon"))
        assert [run.thread_id for run in list_runs(rater.graph)] == ["mon"]
        for name in ("other", "outer"):
            with pytest.raises(UnknownRunError, match="no run of the rating graph"):
                find(rater.graph, name)
            with pytest.raises(UnknownRunError):
                delete_run(rater.graph, name)
        assert other.get_state(thread("other")).values["user_id"] == "zoe"


def test_many_runs_are_listed_at_once(fake: Fake, tmp_path: Path) -> None:
    """Two states a run are read, not all: a fifth of what reading all of them takes, or less."""
    with open_runs(tmp_path / "runs.sqlite") as kept:
        rater = load(fake, kept)
        for n in range(30):
            rater.rate("ann", "target", config=thread(str(n)), record=True)
        loaded = []
        load_state = kept.serde.loads_typed
        kept.serde.loads_typed = lambda data: loaded.append(data) or load_state(data)  # type: ignore[method-assign,func-returns-value]
        assert len(list_runs(rater.graph)) == 30
        assert len([data for data in loaded if len(data[1]) > 5000]) == 30  # the last state of each
        loaded.clear()
        assert len(list_runs(rater.graph, 5)) == 5
        assert len([data for data in loaded if len(data[1]) > 5000]) == 5


# Forgetting ------------------------------------------------------------------------------------


def test_a_deleted_run_leaves_no_word(fake: Fake, tmp_path: Path) -> None:
    word = mark("ann", "folk").encode()

    def kept_words() -> list[str]:
        files = tmp_path.glob("runs.sqlite*")
        return [file.name for file in files if word in file.read_bytes()]

    with open_runs(tmp_path / "runs.sqlite") as kept:
        rater = load(fake, kept)
        rater.rate("ann", "target", config=thread("mon"), record=True)
        rater.rate("ben", "other", config=thread("tue"))
        assert kept_words()
        delete_run(rater.graph, "mon")
        assert kept_words() == []
        assert [run.thread_id for run in list_runs(rater.graph)] == ["tue"]
        with pytest.raises(UnknownRunError):
            rater.resume("mon")
        rater.rate("ann", "target", config=thread("mon"))  # the name is free again


def test_a_cleared_cache_has_no_runs(fake: Fake) -> None:
    with open_runs() as kept:
        load(fake, kept).rate("ann", "target", config=thread("mon"))
        assert [(e.name, e.holds_reviews) for e in caches.cache_info()] == [("runs", True)]
        assert [e.name for e in caches.clear_cache()] == ["runs"]  # in use: emptied
        rater = load(fake, kept)
        assert list_runs(rater.graph) == []
        rater.rate("ann", "target", config=thread("tue"))
        assert caches.clear_cache(runs=False) == []
        assert len(list_runs(rater.graph)) == 1
    assert [e.name for e in caches.clear_cache(summaries=False)] == ["runs"]
    assert not caches.runs_path().exists()


# What is in a checkpoint -----------------------------------------------------------------------

STRICT = """
    import json, sys
    from pathlib import Path
    from langgraph.checkpoint.memory import InMemorySaver
    from langgraph.checkpoint.serde import _msgpack
    from r4r_graph import Recommender, Review, fake_engine
    from r4r_graph.errors import RunPausedError
    from r4r_graph.runs import history, list_runs, open_runs, thread

    assert _msgpack.STRICT_MSGPACK_ENABLED
    table = [Review("ann", f"i{n}", 4, 1e9 + n, "", f"words {n}") for n in range(3)]
    with open_runs(Path(sys.argv[1])) as kept, fake_engine() as engine:
        for saver in (kept, InMemorySaver()):
            rater = Recommender.load(table, engine=engine, checkpointer=saver)
            try:
                rater.rate("ann", "x", ask=True, influence="new", record=True, config=thread("a"))
            except RunPausedError as pause:
                assert pause.question["about"] == "rationale"
            found = rater.resume("a", {"action": "edit", "rationale": "Mine."})
            assert len(found.influence) == 5
            fork = rater.fork("a", {"without": [("ann", "i1")]}, at="recall")
            try:
                rater.resume(fork)
            except RunPausedError:
                forked = rater.resume(fork, "accept")
            assert len(forked.user_aspects) == 2
            for run in list_runs(rater.graph):
                for state in history(rater.graph, run.thread_id):
                    assert json.loads(json.dumps(state.values)) == state.values
            print(len(list_runs(rater.graph)))
"""


def test_strict_checkpoints_hold_no_foreign_types(tmp_path: Path) -> None:
    done = python(STRICT, tmp_path / "runs.sqlite", LANGGRAPH_STRICT_MSGPACK="true")
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "2\n2\n")


def test_a_run_is_labelled_without_a_text(fake: Fake) -> None:
    rater = load(fake, InMemorySaver())
    config: Any = {**thread("mon"), "metadata": {"mine": "yes"}, "tags": ["t"]}
    with pytest.raises(RunPausedError):
        rater.rate("ann", "target", ask=True, seed=4, config=config)
    rater.resume("mon", "accept")
    for state in history(rater.graph, "mon"):
        labels = runs.labels_of(state)
        assert (labels["r4r_user"], labels["r4r_item"]) == ("ann", "target")
        assert json.loads(labels["r4r_knobs"])["seed"] == 4
        assert "Reason" not in json.dumps(state.metadata)
    assert (history(rater.graph, "mon")[0].metadata or {})["mine"] == "yes"  # type: ignore[typeddict-item]


def test_going_on_with_another_model_is_told(fake: Fake, caplog: pytest.LogCaptureFixture) -> None:
    saver = InMemorySaver()
    with pytest.raises(RunPausedError):
        load(fake, saver).rate("ann", "target", ask=True, config=thread("mon"))
    other = Recommender.load(
        TABLE, engine=fake(adapters=["predictor"]), store=InMemoryStore(), checkpointer=saver
    )
    other.resume("mon", "accept")
    assert "run mon began with another model" in caplog.text
    caplog.clear()
    rater = load(fake, saver)
    with pytest.raises(RunPausedError):
        rater.rate("ann", "target", ask=True, config=thread("tue"))
    rater.resume("tue", "accept")
    assert "another model" not in caplog.text
