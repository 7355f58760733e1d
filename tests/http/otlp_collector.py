"""A collector of traces on a free port: takes OTLP by HTTP and keeps the spans, decoded from protobuf."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span


@dataclass(frozen=True)
class Seen:
    """One span as it came. Times in nanoseconds since 1970; `parent` is "" for a root."""

    name: str
    kind: str
    trace: str
    id: str
    parent: str
    state: str
    attributes: dict[str, Any]
    failed: bool
    start: int
    end: int
    service: dict[str, Any]


class Collector:
    def __init__(self, url: str) -> None:
        self.url = url
        self.spans: list[Seen] = []
        self.paths: list[str] = []

    @property
    def requests(self) -> list[Seen]:
        return [span for span in self.spans if span.kind == "SERVER"]

    def request(self) -> Seen:
        """The one request that was traced."""
        (span,) = self.requests
        return span

    def children(self, of: Seen) -> list[Seen]:
        return [span for span in self.spans if span.parent == of.id]

    def take(self, raw: bytes) -> None:
        for resource in ExportTraceServiceRequest.FromString(raw).resource_spans:
            service = _plain(resource.resource.attributes)
            self.spans += [_seen(span, service) for scope in resource.scope_spans for span in scope.spans]


@contextmanager
def collecting() -> Iterator[Collector]:
    """A collector that listens until the end."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            raw = self.rfile.read(int(self.headers["content-length"]))
            collector.paths.append(self.path)
            collector.take(raw)
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    collector = Collector(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield collector
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _seen(span: Span, service: dict[str, Any]) -> Seen:
    return Seen(
        name=span.name,
        kind=Span.SpanKind.Name(span.kind).removeprefix("SPAN_KIND_"),
        trace=span.trace_id.hex(),
        id=span.span_id.hex(),
        parent=span.parent_span_id.hex(),
        state=span.trace_state,
        attributes=_plain(span.attributes),
        failed=span.status.code == 2,
        start=span.start_time_unix_nano,
        end=span.end_time_unix_nano,
        service=service,
    )


def _plain(pairs: Any) -> dict[str, Any]:
    return {pair.key: _value(pair.value) for pair in pairs if isinstance(pair, KeyValue)}


def _value(value: AnyValue) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(item) for item in value.array_value.values]
    return getattr(value, str(kind))
