"""Traces: what a run tells a collector, and that nobody's words are in it unless asked for."""

from __future__ import annotations

import asyncio
import gzip
import json
import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from typing import Any

import pytest
from langgraph.checkpoint.memory import InMemorySaver

from r4r_graph.engine.base import GenerateRequest
from r4r_graph.engine.batching import BatchingEngine
from r4r_graph.errors import EngineFailure, MissingExtraError, SettingError
from r4r_graph.tracing import Tracing, trace_to
from tests.scripted import Bench, Request, Script, at, make_bench, review

Fake = Callable[..., BatchingEngine]

EXTRA = ("openinference.instrumentation.langchain", "opentelemetry.sdk")
needs_extra = pytest.mark.skipif(
    not all(find_spec(name.split(".")[0]) for name in EXTRA), reason="no tracing extra here"
)

TABLE = [
    review("ann", "folk", 1, 5),
    review("ann", "rock", 2, 1),
    review("ben", "target", 1, 2),
]
PAIR: Any = {"user_id": "ann", "item_id": "target", "as_of": at(9)}
WRITTEN = "They long for quiet songs."
WORDS = ("mark_", "So much", "Folk", "quiet songs", "secret")
"""Parts of reviews, titles, rationales and error messages."""


@dataclass
class Collector:
    """A server that notes what is posted to it."""

    url: str = ""
    posts: list[tuple[str, dict[str, str], bytes]] = field(default_factory=list)
    """Path, headers, body."""

    @property
    def bodies(self) -> bytes:
        return b"\n".join(body for _, _, body in self.posts)


@pytest.fixture
def collector() -> Iterator[Collector]:
    found = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            found.posts.append((self.path, dict(self.headers), body))
            self.answer()

        def do_GET(self) -> None:
            self.answer()

        def answer(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        found.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield found
        server.shutdown()
        thread.join()


def memory() -> Any:
    """An exporter that keeps spans."""
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    return InMemorySpanExporter()


@pytest.fixture
def traced() -> Iterator[Callable[..., Tracing]]:
    """`trace_to`, closed afterwards."""
    opened: list[Tracing] = []

    def trace(*given: Any, **settings: Any) -> Tracing:
        opened.append(trace_to(*given, **settings))
        return opened[-1]

    yield trace
    for tracing in opened:
        tracing.close()


Trace = Callable[..., Tracing]


def bench(fake: Fake, **settings: Any) -> Bench:
    script = Script(rationale=lambda _: WRITTEN)
    return make_bench(fake, TABLE, **{"script": script, **settings})


def spans_of(exporter: Any, tracing: Tracing) -> list[Any]:
    tracing.flush()
    return list(exporter.get_finished_spans())


def told(spans: list[Any]) -> str:
    """All that spans say."""
    return "\n".join(span.to_json() for span in spans)


def words_in(text: str) -> set[str]:
    return {word for word in WORDS if word in text}


def prompt_of(made: Bench) -> str:
    """How the reasoner's prompt begins."""
    return made.script.rationales[0].messages[0].content[:20]


def metadata(span: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(span.attributes.get("metadata", "{}"))
    return found


# What is told ----------------------------------------------------------------------------------


@needs_extra
@pytest.mark.parametrize("world", ["sync", "async"])
def test_a_span_a_step_and_no_words(fake: Fake, traced: Trace, world: str) -> None:
    exporter = memory()
    tracing = traced(exporter)
    made = bench(fake, checkpointer=InMemorySaver())
    graph = made.graph
    config: Any = {"configurable": {"thread_id": "run-7"}}
    if world == "sync":
        graph.invoke(PAIR, config)
    else:
        asyncio.run(graph.ainvoke(PAIR, config))
    spans = spans_of(exporter, tracing)
    names = [span.name for span in spans]
    assert {"recall", "summarizer", "reasoner", "predictor", "r4r"} <= set(names)
    assert names.count("summarizer") == 3
    [whole] = [span for span in spans if span.parent is None]
    assert whole.name == "r4r"
    assert len({span.context.trace_id for span in spans}) == 1
    [written] = [s for s in spans if s.attributes["openinference.span.kind"] == "LLM"]
    assert written.attributes["llm.token_count.completion"] == 6
    assert written.attributes["llm.finish_reason"] == "stop"
    assert metadata(written)["langgraph_node"] == "reasoner"
    assert metadata(written)["thread_id"] == "run-7"
    assert all(span.start_time <= span.end_time for span in spans)
    assert words_in(told(spans)) == set()
    assert prompt_of(made) not in told(spans)


@needs_extra
def test_with_texts_everything_is_told(fake: Fake, traced: Trace) -> None:
    exporter = memory()
    tracing = traced(exporter, texts=True)
    made = bench(fake)
    made.rate("ann", "target", at(9))
    spans = spans_of(exporter, tracing)
    assert words_in(told(spans)) == set(WORDS) - {"secret"}
    assert prompt_of(made) in told(spans)


@needs_extra
@pytest.mark.parametrize("texts", [False, True])
def test_an_error_tells_its_kind(fake: Fake, traced: Trace, texts: bool) -> None:
    def before(request: Request) -> None:
        if isinstance(request, GenerateRequest) and request.format == "text":
            raise RuntimeError(f"secret: {request.messages[1].content}")

    exporter = memory()
    tracing = traced(exporter, texts=texts)
    with pytest.raises(EngineFailure, match="secret"):
        bench(fake, script=Script(before=before)).rate("ann", "target", at(9))
    spans = spans_of(exporter, tracing)
    failed = [span for span in spans if span.status.status_code.name == "ERROR"]
    assert {"EngineChatModel", "reasoner", "r4r"} <= {span.name for span in failed}
    for span in failed:
        kinds = [event.attributes["exception.type"] for event in span.events]
        assert kinds == ["r4r_graph.errors.EngineFailure"]
    assert ("secret" in told(spans)) == texts
    assert bool(words_in(told(spans))) == texts


@needs_extra
@pytest.mark.parametrize("texts", [False, True])
def test_a_pause_for_a_person_tells_no_rationale(fake: Fake, traced: Trace, texts: bool) -> None:
    """The interrupt is an exception that carries the question."""
    exporter = memory()
    tracing = traced(exporter, texts=texts)
    graph = bench(fake, checkpointer=InMemorySaver()).graph
    context: Any = {"ask": True}
    graph.invoke(PAIR, {"configurable": {"thread_id": "1"}}, context=context)
    spans = spans_of(exporter, tracing)
    [person] = [span for span in spans if span.name == "human" and span.events]
    assert person.status.status_code.name == "OK"
    assert ("quiet songs" in person.to_json()) == texts
    assert bool(words_in(told(spans))) == texts


@needs_extra
def test_attributes_of_others_are_kept_out(fake: Fake, traced: Trace) -> None:
    """What a caller tells LangGraph of a run: metadata, tags, and who asks."""
    from openinference.instrumentation import using_attributes

    exporter = memory()
    tracing = traced(exporter)
    config: Any = {"metadata": {"note": "secret", "prompt": "secret"}, "tags": ["secret"]}
    with using_attributes(session_id="s-1", user_id="secret", prompt_template="secret"):
        bench(fake).graph.invoke(PAIR, config)
    spans = spans_of(exporter, tracing)
    assert {span.attributes["session.id"] for span in spans} == {"s-1"}
    assert words_in(told(spans)) == set()


# Where it is sent ------------------------------------------------------------------------------


@needs_extra
@pytest.mark.parametrize("texts", [False, True])
def test_spans_reach_a_collector(
    fake: Fake, traced: Trace, collector: Collector, texts: bool
) -> None:
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    tracing = traced(collector.url, texts=texts, headers={"x-key": "mine"}, service="shop")
    bench(fake).rate("ann", "target", at(9))
    tracing.close()
    names: list[str] = []
    for path, headers, body in collector.posts:
        assert path == "/v1/traces"
        assert headers["x-key"] == "mine"
        for sent in ExportTraceServiceRequest.FromString(body).resource_spans:
            resource = {each.key: each.value.string_value for each in sent.resource.attributes}
            assert resource["service.name"] == "shop"
            names += [span.name for scope in sent.scope_spans for span in scope.spans]
    assert {"recall", "summarizer", "reasoner", "EngineChatModel", "predictor"} <= set(names)
    found = {word for word in WORDS if word.encode() in collector.bodies}
    assert found == (set(WORDS) - {"secret"} if texts else set())


@needs_extra
def test_an_address_may_have_a_path(fake: Fake, traced: Trace, collector: Collector) -> None:
    tracing = traced(f"{collector.url}/api/otel/v1/traces")
    bench(fake).rate("ann", "target", at(9))
    tracing.close()
    assert {path for path, *_ in collector.posts} == {"/api/otel/v1/traces"}


@needs_extra
@pytest.mark.parametrize("address", ["localhost:4318", "ftp://localhost", "", "http://"])
def test_a_bad_address_is_named(address: str) -> None:
    with pytest.raises(SettingError, match="bad collector address"):
        trace_to(address)


@needs_extra
def test_a_collector_that_is_not_there_costs_no_run(
    fake: Fake, traced: Trace, collector: Collector
) -> None:
    tracing = traced("http://127.0.0.1:9")  # the discard port: nobody listens
    assert bench(fake).rate("ann", "target", at(9))["rationale"] == WRITTEN
    started = time.monotonic()
    tracing.close()
    assert time.monotonic() - started < 10


# On and off ------------------------------------------------------------------------------------


@needs_extra
def test_it_ends_when_it_is_closed(fake: Fake) -> None:
    first, second = memory(), memory()
    with trace_to(first) as tracing:
        bench(fake).rate("ann", "target", at(9))
        assert spans_of(first, tracing)
    count = len(first.get_finished_spans())
    bench(fake).rate("ann", "target", at(9))
    assert len(first.get_finished_spans()) == count
    with trace_to(second) as other:
        tracing.close()  # a second time: it ends nobody else's
        bench(fake).rate("ann", "target", at(9))
        assert spans_of(second, other)
    assert len(first.get_finished_spans()) == count


@needs_extra
def test_one_at_a_time(traced: Trace) -> None:
    traced(memory())
    with pytest.raises(SettingError, match="traced already"):
        trace_to(memory())


def test_what_it_needs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openinference.instrumentation.langchain", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'r4r-graph\[tracing\]'"):
        trace_to("http://localhost:4318")


# LangSmith -------------------------------------------------------------------------------------

LANGSMITH = """
    from langchain_core.tracers.langchain import wait_for_all_tracers
    from langgraph.store.memory import InMemoryStore
    from r4r_graph import Experts, Review, TableReviewSource, build_graph, fake_engine

    table = [Review("ann", "folk", 5, 1e9, "Folk", "So much mark_ann_folk in it.")]
    source = TableReviewSource.from_reviews(table)
    with fake_engine() as engine:
        graph = build_graph(Experts(engine, InMemoryStore()), source)
        graph.invoke({"user_id": "ann", "item_id": "target"})
    wait_for_all_tracers()
"""


@pytest.mark.parametrize(
    ("switches", "requests", "words"),
    [
        ({}, False, False),
        ({"LANGSMITH_TRACING": "false"}, False, False),
        ({"LANGSMITH_TRACING": "true"}, True, True),
        (
            {
                "LANGSMITH_TRACING": "true",
                "LANGSMITH_HIDE_INPUTS": "true",
                "LANGSMITH_HIDE_OUTPUTS": "true",
            },
            True,
            False,
        ),
    ],
    ids=["unasked", "off", "on", "on, hidden"],
)
def test_langsmith_is_told_nothing_unasked(
    collector: Collector, switches: dict[str, str], requests: bool, words: bool
) -> None:
    """A key alone asks for nothing."""
    own = ("LANGSMITH_", "LANGCHAIN_")
    environ = {
        **{name: value for name, value in os.environ.items() if not name.startswith(own)},
        "LANGSMITH_API_KEY": "lsv2_pt_nobodys",
        "LANGSMITH_ENDPOINT": collector.url,
        "LANGSMITH_DISABLE_RUN_COMPRESSION": "true",
        **switches,
    }
    code = textwrap.dedent(LANGSMITH)
    done = subprocess.run(
        [sys.executable, "-c", code], env=environ, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert bool(collector.posts) == requests
    assert (b"mark_ann_folk" in collector.bodies) == words
