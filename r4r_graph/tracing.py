"""Traces of runs, by OpenTelemetry: one span a step, sent to a collector of your choice.

    from r4r_graph.tracing import trace_to

    with trace_to("http://localhost:4318"):
        recommender.rate("mara", "glass-harbour")

The spans are those of OpenInference's instrumentation of LangChain, so they cover every LangGraph
in the process, yours too. Unless `texts` is asked for, nothing leaves that somebody wrote, neither
a reviewer nor the model: what is sent is chosen name by name, and of an error its type alone.
(OpenInference's own switches hide inputs and outputs, but not what errors say.)
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import urlsplit

from r4r_graph.errors import MissingExtraError, SettingError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter

_SECONDS = 5.0
"""For one attempt to reach the collector."""

_KEPT = (
    "openinference.span.kind",
    "session.id",
    "llm.model_name",
    "llm.provider",
    "llm.system",
    "llm.finish_reason",
)
_KEPT_BEGINNING = "llm.token_count."
_KEPT_OF_METADATA = ("thread_id", "langgraph_node", "langgraph_step", "rationale")


@dataclass(frozen=True, slots=True)
class Tracing:
    """Tracing that is on until it is closed; also a context manager."""

    provider: TracerProvider
    """OpenTelemetry's own, for span processors of yours (which see all texts)."""
    _teardown: ExitStack

    def flush(self) -> None:
        """Send what is finished, and wait for it (30 seconds at most)."""
        self.provider.force_flush()

    def close(self) -> None:
        """Send what is finished, and trace no more. A second time does nothing."""
        self._teardown.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def trace_to(
    collector: str | SpanExporter,
    *,
    texts: bool = False,
    headers: Mapping[str, str] | None = None,
    service: str = "r4r-graph",
) -> Tracing:
    """Trace all runs of this process from now on.

    A collector that cannot be reached costs log messages, no run.

    Args:
        collector: address of an OTLP collector over HTTP, as `http://localhost:4318` (its path is
            `/v1/traces` unless you give one), or any span exporter of OpenTelemetry.
        texts: send inputs and outputs of every step, prompts, rationales and error messages, too:
            people's reviews, that is. Without them a span says which step ran, in which thread and
            graph, when, how long, with how many tokens of which model, and how it failed.
        headers: HTTP headers for the collector, such as a key.
        service: what the collector calls this process.

    Raises:
        SettingError: the address is none, or this process is traced already.
        MissingExtraError: the `tracing` extra is not installed.
    """
    try:
        from openinference.instrumentation.langchain import LangChainInstrumentor
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import SERVICE_NAME, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        raise MissingExtraError("tracing with OpenTelemetry", "tracing") from None

    instrumentor = LangChainInstrumentor()
    if instrumentor.is_instrumented_by_opentelemetry:
        raise SettingError("this process is traced already: close that first")
    exporter = (
        OTLPSpanExporter(_address(collector), headers=dict(headers or {}), timeout=_SECONDS)
        if isinstance(collector, str)
        else collector
    )
    provider = TracerProvider(resource=Resource.create({SERVICE_NAME: service}))
    provider.add_span_processor(BatchSpanProcessor(exporter if texts else _without_texts(exporter)))
    instrumentor.instrument(tracer_provider=provider)
    teardown = ExitStack()
    teardown.callback(provider.shutdown)
    teardown.callback(instrumentor.uninstrument)
    return Tracing(provider, teardown)


def _address(collector: str) -> str:
    parts = urlsplit(collector)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise SettingError(
            f"bad collector address {collector!r}: write it as http://localhost:4318"
        )
    return collector if parts.path.strip("/") else f"{collector.rstrip('/')}/v1/traces"


def _without_texts(inner: SpanExporter) -> SpanExporter:
    """An exporter that passes spans on to another, bare of texts."""
    from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

    class WithoutTexts(SpanExporter):
        def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
            return inner.export([_bare(span) for span in spans])

        def shutdown(self) -> None:
            inner.shutdown()

        def force_flush(self, timeout_millis: int = 30_000) -> bool:
            return inner.force_flush(timeout_millis)

    return WithoutTexts()


def _bare(span: ReadableSpan) -> ReadableSpan:
    """The span with what is known to hold no text."""
    from opentelemetry.sdk.trace import Event, ReadableSpan
    from opentelemetry.trace import Status

    attributes = {
        name: value
        for name, value in (span.attributes or {}).items()
        if name in _KEPT or name.startswith(_KEPT_BEGINNING)
    }
    about = _metadata(span)
    events = [
        Event(
            event.name,
            {name: v for name, v in (event.attributes or {}).items() if name == "exception.type"},
            event.timestamp,
        )
        for event in span.events
    ]
    return ReadableSpan(
        name=span.name,
        context=span.context,
        parent=span.parent,
        resource=span.resource,
        attributes={**attributes, **({"metadata": json.dumps(about)} if about else {})},
        events=events,
        kind=span.kind,
        status=Status(span.status.status_code),
        start_time=span.start_time,
        end_time=span.end_time,
        instrumentation_scope=span.instrumentation_scope,
    )


def _metadata(span: ReadableSpan) -> dict[str, Any]:
    """What of LangGraph's own notes about a step is kept."""
    notes = json.loads(str((span.attributes or {}).get("metadata", "{}")))
    return {name: notes[name] for name in _KEPT_OF_METADATA if name in notes}
