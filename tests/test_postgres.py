"""Runs kept in PostgreSQL: a real server, from the wheel `pgserver` or from the machine."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from langgraph.store.memory import InMemoryStore

from r4r_graph.engine.base import RateRequest
from r4r_graph.engine.batching import BatchingEngine
from r4r_graph.errors import EngineFailure, RunPausedError, UnknownRunError
from r4r_graph.recommender import Recommender
from r4r_graph.runs import delete_run, find, history, list_runs, thread
from tests.scripted import Request, Script, at, mark, review

pytestmark = pytest.mark.skipif(
    find_spec("langgraph.checkpoint.postgres") is None or find_spec("psycopg") is None,
    reason="langgraph-checkpoint-postgres is not installed",
)

Fake = Callable[..., BatchingEngine]

TABLE = [
    review("ann", "folk", 1, 5),
    review("ann", "rock", 2, 1),
    review("ben", "target", 1, 2),
]


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The address of a server of our own, on a socket in a new folder."""
    with tempfile.TemporaryDirectory(prefix="r4r-pg-") as folder:  # a short path: it is a socket's
        if find_spec("pgserver") is not None:
            yield from wheel(Path(folder))
        elif programs := installed():
            yield from cluster(Path(folder), programs)
        else:
            pytest.skip("there is no PostgreSQL: neither pgserver nor initdb")


def wheel(folder: Path) -> Iterator[str]:
    """The server that comes as a Python package."""
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("ignore")
        patch.setenv("XDG_RUNTIME_DIR", str(folder))
        import pgserver

        running = pgserver.get_server(folder / "data", cleanup_mode="delete")
        yield running.get_uri()
        running.cleanup()


def installed() -> Path | None:
    """Where the machine's own programs are."""
    found = [*sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)]
    if on_path := shutil.which("initdb"):
        found.append(Path(on_path).parent)
    return found[0] if found else None


def cluster(folder: Path, programs: Path) -> Iterator[str]:
    """A cluster of the machine's server; it refuses to be run by root."""
    data, user = folder / "data", ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []

    def call(program: str, *arguments: str) -> None:
        command = [*user, str(programs / program), "-D", str(data), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd="/")
        if done.returncode:
            pytest.skip(f"{program} does not work here: {done.stderr or done.stdout}")

    if user:
        shutil.chown(folder, "postgres")
    call("initdb", "--username=postgres", "--auth=trust", "--no-sync")
    settings = f"-k {folder} -c listen_addresses=''"
    call("pg_ctl", "-w", "-o", settings, "-l", str(folder / "log"), "start")
    yield f"postgresql://postgres@/postgres?host={folder}"
    call("pg_ctl", "-w", "-m", "immediate", "stop")


@pytest.fixture
def saver(server: str) -> Iterator[Any]:
    """An empty saver."""
    import psycopg
    from langgraph.checkpoint.postgres import PostgresSaver

    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute("DROP SCHEMA public CASCADE; CREATE SCHEMA public")
    with PostgresSaver.from_conn_string(server) as made:
        made.setup()
        yield made


def load(fake: Fake, saver: Any, script: Script | None = None) -> Recommender:
    script = script or Script()
    engine = fake(write=script.write, rate=script.rate)
    return Recommender.load(TABLE, engine=engine, store=InMemoryStore(), checkpointer=saver)


def test_runs_are_kept_listed_and_deleted(fake: Fake, saver: Any) -> None:
    rater = load(fake, saver)
    found = rater.rate(
        "ann", "target", as_of=at(9), record=True, influence="same", config=thread("a")
    )
    rater.rate("ben", "folk", config=thread("b"))
    states = history(rater.graph, "a")
    assert states[-1].values["recommendation"] == found.to_dict()
    assert [s.next[0] if s.next else "" for s in states][2:] == [
        "summarizer",
        "reasoner",
        "predictor",
        "influence",
        "",
    ]
    listed = list_runs(rater.graph)
    assert [(run.thread_id, run.user_id, run.status) for run in listed] == [
        ("b", "ben", "finished"),
        ("a", "ann", "finished"),
    ]
    delete_run(rater.graph, "a")
    assert [run.thread_id for run in list_runs(rater.graph)] == ["b"]
    with pytest.raises(UnknownRunError):
        find(rater.graph, "a")


def test_a_failed_run_is_resumed_by_another_connection(fake: Fake, saver: Any, server: str) -> None:
    from langgraph.checkpoint.postgres import PostgresSaver

    broken = [True]

    def before(request: Request) -> None:
        if isinstance(request, RateRequest) and broken:
            raise RuntimeError("out of memory")

    script = Script(before=before)
    rater = load(fake, saver, script)
    with pytest.raises(EngineFailure):
        rater.rate("ann", "target", as_of=at(9), config=thread("a"))
    assert [run.status for run in list_runs(rater.graph)] == ["failed"]
    broken.clear()
    with PostgresSaver.from_conn_string(server) as other:
        assert load(fake, other, script).resume("a").rationale == "Reason 0."
    assert (len(script.summaries), len(script.rationales)) == (3, 1)


def test_a_person_answers_and_a_fork_goes_its_way(fake: Fake, saver: Any) -> None:
    script = Script()
    rater = load(fake, saver, script)
    with pytest.raises(RunPausedError):
        rater.rate("ann", "target", as_of=at(9), ask=True, ask_below=0.9, config=thread("a"))
    assert [run.status for run in list_runs(rater.graph)] == ["waiting"]
    with pytest.raises(RunPausedError):
        rater.resume("a", {"action": "edit", "rationale": "Mine."})
    assert rater.resume("a", {"action": "rate", "rating": 4}).rating == 4
    for step in ("recall", "summarizer", "reasoner"):
        fork = rater.fork("a", {"without": [("ann", "folk")], "knobs": {"ask": False}}, at=step)
        with pytest.raises(RunPausedError):
            rater.resume(fork)
        assert len(rater.resume(fork, "accept").user_aspects) == 1
        assert mark("ann", "folk") not in str(script.ratings[-1].messages)
    listed = list_runs(rater.graph)
    assert [run.forked_from for run in listed] == ["a", "a", "a", None]
    assert len(script.summaries) == 3


def test_the_asynchronous_saver(fake: Fake, saver: Any, server: str) -> None:
    from langgraph.checkpoint.postgres.aio import AsyncPostgresSaver

    async def everything() -> tuple[Any, Any, Any]:
        async with AsyncPostgresSaver.from_conn_string(server) as kept:
            rater = load(fake, kept)
            with pytest.raises(RunPausedError):
                await rater.arate("ann", "target", ask=True, config=thread("a"))
            found = await rater.aresume("a", "accept")
            forked = await rater.aresume(await rater.afork("a", {"rationale": "Mine."}))
            return found, forked, await asyncio.to_thread(list_runs, rater.graph)

    found, forked, listed = asyncio.run(everything())
    assert (found.rationale, forked.rationale) == ("Reason 0.", "Mine.")
    assert len(listed) == 2


def test_two_connections_write_at_once(fake: Fake, saver: Any, server: str) -> None:
    from concurrent.futures import ThreadPoolExecutor

    from langgraph.checkpoint.postgres import PostgresSaver

    def rate(number: int) -> None:
        with PostgresSaver.from_conn_string(server) as kept:
            rater = load(fake, kept)
            for n in range(5):
                rater.rate("ann", "target", config=thread(f"{number}-{n}"))

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(rate, range(3)))
    found = list_runs(load(fake, saver).graph)
    assert len(found) == 15
    assert {run.status for run in found} == {"finished"}
