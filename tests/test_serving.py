"""LangGraph's development server over our graph: what a client and Studio do, for real."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import pytest
from langgraph_sdk import get_sync_client

from r4r_graph import serving
from r4r_graph.errors import DataError, SettingError
from r4r_graph.graph import Knobs
from r4r_graph.recommender import Recommender
from tests.scripted import at, review

ROOT = Path(__file__).parents[1]
PAIR = {"user_id": "mara", "item_id": "glass-harbour", "as_of": "2026-01-01"}
STARTS_WITHIN = 60.0


# Without a server ------------------------------------------------------------------------------


@pytest.fixture
def opened() -> Iterator[list[Recommender]]:
    """Recommenders to close afterwards."""
    found: list[Recommender] = []
    yield found
    for recommender in found:
        recommender.close()


def test_by_default_it_serves_the_sample(opened: list[Recommender]) -> None:
    opened.append(serving.load_from({"R4R_ENGINE": "fake"}))
    found = opened[0].rate(PAIR["user_id"], PAIR["item_id"], as_of=PAIR["as_of"])
    assert found.title == "Glass Harbour"
    assert len(found.user_aspects) == 7


def test_environment_variables_name_ones_own(opened: list[Recommender], tmp_path: Path) -> None:
    rows = [review("ann", "folk", 1, 9), review("ben", "target", 2, 3)]
    reviews, items = tmp_path / "reviews.jsonl", tmp_path / "items.jsonl"
    reviews.write_text("\n".join(json.dumps(row.to_dict()) for row in rows))
    items.write_text(json.dumps({"item_id": "target", "title": "The Target"}))
    environ = {"R4R_ENGINE": "fake", "R4R_REVIEWS": str(reviews), "R4R_SCALE": "1-10"}
    opened.append(serving.load_from({**environ, "R4R_ITEMS": str(items)}))
    found = opened[0].rate("ann", "target", as_of=at(9))
    assert (found.title, len(found.distribution.probabilities)) == ("The Target", 10)


@pytest.mark.parametrize(
    ("environ", "error", "reason"),
    [
        ({"R4R_ENGINE": "vllm"}, SettingError, r"bad engine 'vllm'.*R4R_ENGINE"),
        ({"R4R_ITEMS": "items.csv"}, SettingError, "R4R_ITEMS without reviews"),
        ({"R4R_REVIEWS": "absent.csv"}, DataError, "absent.csv"),
        ({"R4R_SCALE": "five"}, SettingError, "five"),
    ],
)
def test_a_bad_variable_is_named(
    environ: dict[str, str], error: type[Exception], reason: str
) -> None:
    with pytest.raises(error, match=reason):
        serving.load_from({"R4R_ENGINE": "fake", **environ})


def test_base_and_adapters_reach_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(Recommender, "load", lambda *given, **settings: asked.append(given))
    serving.load_from({"R4R_BASE": "tiny", "R4R_ADAPTERS": "adapters"})
    serving.load_from({})
    assert [given[2:] for given in asked] == [("tiny", "adapters"), ("smollm2-135m", None)]


def test_many_first_calls_load_once(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[Recommender] = []

    def load(_: Any) -> Recommender:
        time.sleep(0.1)
        loaded.append(load_from({"R4R_ENGINE": "fake"}))
        return loaded[-1]

    load_from = serving.load_from
    monkeypatch.setattr(serving, "load_from", load)
    serving._load.cache_clear()

    async def calls() -> list[Any]:
        return await asyncio.gather(*(serving.graph() for _ in range(4)))

    graphs = asyncio.run(calls())
    serving._load.cache_clear()
    assert len(loaded) == 1
    assert all(graph is loaded[0].graph for graph in graphs)
    loaded[0].close()


# A started server ------------------------------------------------------------------------------


@dataclass
class Server:
    """A development server in a process of its own, and whom it tried to reach."""

    url: str
    log: Path
    strangers: list[str] = field(default_factory=list)
    """First lines of requests that were meant for other machines."""

    @property
    def client(self) -> Any:
        return get_sync_client(url=self.url)


def free_port() -> int:
    with socket.socket() as chosen:
        chosen.bind(("127.0.0.1", 0))
        port: int = chosen.getsockname()[1]
        return port


def overhear(listener: socket.socket, heard: list[str]) -> None:
    """Stand in for the network: note who is asked for, and hang up."""
    while True:
        try:
            line, _ = listener.accept()
        except OSError:
            return
        with line:
            line.settimeout(1)
            heard.append(line.recv(200).decode(errors="replace").partition("\r\n")[0])


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Our `langgraph.json`, served with the fake engine. A LangSmith key lies about, as on many
    a developer's machine, and whatever goes elsewhere goes to us instead."""
    if find_spec("langgraph_api") is None:
        pytest.skip("the development server is not installed: pip install 'langgraph-cli[inmem]'")
    folder = tmp_path_factory.mktemp("server")
    port, listener = free_port(), socket.create_server(("127.0.0.1", 0))
    found = Server(f"http://127.0.0.1:{port}", folder / "log.txt")
    threading.Thread(target=overhear, args=(listener, found.strangers), daemon=True).start()
    network = f"http://127.0.0.1:{listener.getsockname()[1]}"
    ours = ("LANGSMITH_", "LANGCHAIN_", "LANGGRAPH_", "R4R_")
    environ = {
        **{name: value for name, value in os.environ.items() if not name.startswith(ours)},
        **dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), network),
        **dict.fromkeys(("NO_PROXY", "no_proxy"), "127.0.0.1,localhost"),
        "LANGGRAPH_CLI_NO_ANALYTICS": "1",
        "LANGSMITH_API_KEY": "lsv2_pt_nobodys",
        "R4R_ENGINE": "fake",
    }
    command = [sys.executable, "-m", "langgraph_cli", "dev", "--no-browser", "--no-reload"]
    command += ["--port", str(port), "--config", str(ROOT / "langgraph.json")]
    with found.log.open("w") as log:
        process = subprocess.Popen(
            command, cwd=folder, env=environ, stdout=log, stderr=subprocess.STDOUT
        )
    try:
        deadline = time.monotonic() + STARTS_WITHIN
        while not answers(found.url):
            assert process.poll() is None, found.log.read_text()
            assert time.monotonic() < deadline, found.log.read_text()
            time.sleep(0.1)
        yield found
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise
        finally:
            listener.close()


def answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/ok", trust_env=False).is_success
    except httpx.TransportError:
        return False


@pytest.fixture
def client(server: Server) -> Iterator[Any]:
    with server.client as client:
        yield client


@pytest.fixture(scope="module")
def at_home() -> Iterator[Recommender]:
    """The same recommender in this process."""
    with serving.load_from({"R4R_ENGINE": "fake"}) as recommender:
        yield recommender


def test_it_lists_the_graph_and_its_schemas(client: Any) -> None:
    [assistant] = client.assistants.search()
    assert assistant["graph_id"] == "rating"
    schemas = client.assistants.get_schemas(assistant["assistant_id"])
    asked = schemas["input_schema"]["properties"]
    assert set(asked) == {
        "user_id", "item_id", "as_of", "item", "user_history", "item_history", "siblings",
    }  # fmt: skip
    assert set(schemas["context_schema"]["properties"]) == set(Knobs.__dataclass_fields__)
    assert "recommendation" in schemas["state_schema"]["properties"]


def test_it_draws_what_runs(client: Any, at_home: Recommender) -> None:
    [assistant] = client.assistants.search()
    drawn = client.assistants.get_graph(assistant["assistant_id"], xray=True)["edges"]
    there = at_home.graph.get_graph(xray=True).edges
    assert {(e["source"], e["target"], e.get("conditional", False)) for e in drawn} == {
        (e.source, e.target, e.conditional) for e in there
    }


def test_it_rates_as_at_home(client: Any, at_home: Recommender) -> None:
    # More steps than a server's own recursion limit would allow.
    knobs: Any = {"rationales": 20, "round_size": 1, "sure": 1.0, "readout": "median"}
    state = client.runs.wait(None, "rating", input=PAIR, context=knobs)
    found = state["recommendation"]
    pair = (PAIR["user_id"], PAIR["item_id"])
    expected = at_home.rate(*pair, as_of=PAIR["as_of"], **knobs).to_dict()
    for name in ("rating", "readout", "distribution", "rationales", "user_aspects", "model"):
        assert found[name] == expected[name]
    assert len(found["rationales"]) == 20


def test_it_rates_with_passed_histories(client: Any) -> None:
    given = {
        "user_id": "zoe",
        "item_id": "target",
        "item": {"title": "Passed"},
        "user_history": [review("zoe", "poles", 1, 2).to_dict()],
        "item_history": [],
    }
    found = client.runs.wait(None, "rating", input=given)["recommendation"]
    assert (found["title"], found["cold_start"]) == ("Passed", "item")
    assert [row["item_id"] for row in found["user_aspects"]] == ["poles"]


def test_it_streams_tokens_progress_and_steps(client: Any) -> None:
    modes = ["messages-tuple", "custom", "updates", "values"]
    parts = list(client.runs.stream(None, "rating", input=PAIR, stream_mode=modes))
    by_kind: dict[str, list[Any]] = {}
    for part in parts:
        by_kind.setdefault(part.event, []).append(part.data)
    state = by_kind["values"][-1]
    written = [chunk for chunk, about in by_kind["messages"] if about["langgraph_node"]]
    assert "".join(chunk["content"] for chunk in written) == state["rationales"][0]["text"]
    assert len(written) > 5
    told = [event for event in by_kind["custom"] if event.get("event") == "summary"]
    assert {event["of"] for event in told} == {len(told)} == {13}
    nodes = [name for update in by_kind["updates"] for name in update]
    assert list(dict.fromkeys(nodes)) == ["recall", "summarizer", "reasoner", "predictor"]
    assert nodes.count("summarizer") == 13
    kinds = [part.event for part in parts]
    assert kinds.index("messages") < len(kinds) - 1 - kinds[::-1].index("updates")


def paused(client: Any) -> tuple[str, dict[str, Any]]:
    """A thread that waits for a person, and what it asks."""
    thread = client.threads.create()["thread_id"]
    client.runs.wait(thread, "rating", input=PAIR, context={"ask": True})
    state = client.threads.get_state(thread)
    assert state["next"] == ["human"]
    assert client.threads.get(thread)["status"] == "interrupted"
    [asked] = state["interrupts"]
    return thread, asked["value"]


def test_an_interrupt_is_resumed(client: Any) -> None:
    thread, asked = paused(client)
    assert asked["about"] == "rationale"
    state = client.runs.wait(
        thread, "rating", command={"resume": {"action": "accept"}}, context={"ask": True}
    )
    assert state["recommendation"]["rationale"] == asked["rationales"][0]
    assert client.threads.get(thread)["status"] == "idle"


def test_an_interrupt_is_resumed_with_an_edit(client: Any) -> None:
    thread, asked = paused(client)
    answer = {"action": "edit", "rationale": "Because they said so."}
    state = client.runs.wait(thread, "rating", command={"resume": answer}, context={"ask": True})
    assert state["recommendation"]["rationale"] == "Because they said so."
    accepted = client.runs.wait(None, "rating", input=PAIR)["recommendation"]
    assert accepted["rationale"] == asked["rationales"][0]
    assert accepted["distribution"] != state["recommendation"]["distribution"]


def test_a_refusal_asks_again(client: Any) -> None:
    thread, asked = paused(client)
    client.runs.wait(
        thread, "rating", command={"resume": {"action": "refuse"}}, context={"ask": True}
    )
    [again] = client.threads.get_state(thread)["interrupts"]
    assert again["value"]["about"] == "rationale"
    assert again["value"]["rationales"] != asked["rationales"]


def test_a_checkpoint_is_forked(client: Any) -> None:
    thread = client.threads.create()["thread_id"]
    first = client.runs.wait(thread, "rating", input=PAIR)["recommendation"]
    past = client.threads.get_history(thread, limit=20)
    [step] = [state for state in past if state["next"] == ["predictor"]]
    other = {"rationales": {"__overwrite__": [{"text": "They never liked harbours.", "seed": 0}]}}
    fork = client.threads.update_state(
        thread, other, as_node="reasoner", checkpoint=step["checkpoint"]
    )
    state = client.runs.wait(thread, "rating", input=None, checkpoint=fork["checkpoint"])
    second = state["recommendation"]
    assert second["rationale"] == "They never liked harbours."
    assert second["distribution"] != first["distribution"]
    assert second["user_aspects"] == first["user_aspects"]
    before = past[0]["checkpoint"]
    kept = client.threads.get_state(thread, checkpoint=before)["values"]["recommendation"]
    assert kept["rationale"] == first["rationale"]


def test_the_page_does_what_it_says(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    """The client's code in the docs, against the server."""
    pages = [page.read_text(encoding="utf-8") for page in (ROOT / "docs").glob("debugging*.md")]
    blocks = re.findall(r"^```python\n(.*?)^```$", "\n".join(pages), re.DOTALL | re.MULTILINE)
    [code] = [block for block in blocks if "get_sync_client" in block]
    names: dict[str, Any] = {}
    try:
        exec(code.replace("http://127.0.0.1:2024", server.url), names)
    finally:
        names["client"].close()
    found = names["state"]["recommendation"]
    assert found["rationale"] == "They never liked harbours."
    asked, rating = capsys.readouterr().out.splitlines()
    assert asked.startswith("[")
    assert float(rating) == found["rating"]


def test_bad_input_is_named(client: Any) -> None:
    with pytest.raises(Exception, match="user 'nobody' and item 'nothing' appear nowhere"):
        client.runs.wait(None, "rating", input={"user_id": "nobody", "item_id": "nothing"})
    with pytest.raises(Exception, match="bad setting rationales=0"):
        client.runs.wait(None, "rating", input=PAIR, context={"rationales": 0})


@pytest.mark.parametrize(
    ("origin", "allowed"),
    [("https://smith.langchain.com", True), ("https://elsewhere.example", False)],
)
def test_only_studios_page_may_ask_from_a_browser(
    server: Server, origin: str, allowed: bool
) -> None:
    headers = {"Origin": origin, "Access-Control-Request-Method": "POST"}
    found = httpx.options(f"{server.url}/threads/search", headers=headers, trust_env=False)
    assert (found.headers.get("access-control-allow-origin") == origin) == allowed


def test_nothing_is_sent_elsewhere_and_the_loop_never_waits(server: Server) -> None:
    """Stands last: all that the tests above did."""
    assert server.strangers == []
    log = server.log.read_text()
    assert "BlockingError" not in log
