"""The spans of a request, by OpenTelemetry's conventions for generative AI and for HTTP servers.

Import this only where tracing is on: it needs the extra `tracing`.
"""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
from itertools import pairwise
from typing import Any

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import (
    Span,
    SpanKind,
    Status,
    StatusCode,
    format_span_id,
    format_trace_id,
    set_span_in_context,
)
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.datastructures import Headers
from starlette.types import Scope

from server.generation import Choice
from server.record import Decode, Record, prompt_text
from server.routes.ops import product_version

_NAME = "disco-serve"
_SCHEMA = "https://opentelemetry.io/schemas/1.37.0"
_OPERATIONS = {
    "/v1/completions": "text_completion",
    "/v1/chat/completions": "chat",
    "/v1/responses": "chat",
}
_complaints = logging.getLogger(OTLPSpanExporter.__module__)

_LAST_SECONDS = 3.0  # for what is not sent yet, at the end
_SELDOM = 60.0  # seconds between complaints about a collector


def exporter_to(url: str) -> SpanExporter:
    """Sends spans to `url` from a thread; headers, TLS, timeout and compression by OTEL_EXPORTER_OTLP_*."""
    _complaints.setLevel(logging.ERROR)  # that it tries again is no news
    for name in ("trace", "propagators", "propagate", "baggage", "context"):
        logging.getLogger(f"opentelemetry.{name}").setLevel(logging.ERROR)  # they quote clients' headers
    if not any(isinstance(each, _Seldom) for each in _complaints.filters):
        _complaints.addFilter(_Seldom())
    return OTLPSpanExporter(endpoint=url)


class Tracing:
    """Makes the spans of one app. Nothing here waits for the collector."""

    def __init__(self, exporter: SpanExporter, target: str, decode: Decode | None) -> None:
        """`decode`: token ids to text, to tell prompts and texts; None: neither is told."""
        self._exporter, self._target, self._decode = exporter, target, decode
        self._provider = TracerProvider(resource=_resource(), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer(_NAME, product_version(), schema_url=_SCHEMA)
        self._w3c = TraceContextTextMapPropagator()

    def start(self, scope: Scope, record: Record) -> Span | None:
        """The span of a request that may generate; None for others. The record gets its ids."""
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        operation = _OPERATIONS.get(path) if scope["method"] == "POST" else None
        if operation is None:
            return None
        span = self._tracer.start_span(
            operation,
            context=self._w3c.extract(_carrier(Headers(scope=scope))),
            kind=SpanKind.SERVER,
            start_time=record.started_ns,
            attributes={
                "gen_ai.operation.name": operation,
                "gen_ai.provider.name": _NAME,
                "http.request.method": scope["method"],
                "url.path": scope["path"],
                "url.scheme": scope.get("scheme", "http"),
                "disco.request.id": record.request_id,
            },
        )
        ids = span.get_span_context()
        record.operation = operation
        record.trace_id, record.span_id = format_trace_id(ids.trace_id), format_span_id(ids.span_id)
        return span

    def end(self, span: Span, record: Record) -> None:
        """Tells what became of the request. `record` must have ended."""
        if not span.is_recording():
            return span.end()
        attributes = _of_http(record)
        if record.choices:
            attributes |= _of_generation(record) | {"gen_ai.response.model": self._target}
            attributes |= {} if self._decode is None else _content(record, self._decode)
        span.set_attributes({name: value for name, value in attributes.items() if value is not None})
        if record.error_status >= 500 or (record.error_status and record.status < 400):
            span.set_status(Status(StatusCode.ERROR))
        if record.model is not None and record.error != "model_not_found":  # names are to be few
            span.update_name(f"{record.operation} {record.model}")
        self._tell_phases(span, record)
        span.end()

    def _tell_phases(self, span: Span, record: Record) -> None:
        """Spans of their own within the request's: queue, prefill, decode."""
        phases = record.phases
        if phases is None:
            return
        within = set_span_in_context(span)
        moments = [phases.arrival, phases.scheduled, phases.first, phases.last]
        at = [record.started_ns + int((moment - record.started) * 1e9) for moment in moments]
        for name, (start, end) in zip(("queue", "prefill", "decode"), pairwise(at), strict=True):
            self._tracer.start_span(name, within, start_time=start).end(end)

    async def close(self) -> None:
        """Sends what is left, for some seconds at most."""
        last = threading.Thread(target=self._provider.shutdown, name="last spans", daemon=True)
        last.start()
        deadline = time.monotonic() + _LAST_SECONDS
        while last.is_alive() and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        if last.is_alive():
            logging.getLogger(__name__).warning("the collector does not take the last spans")
            _complaints.setLevel(logging.CRITICAL)  # enough is said
            self._exporter.shutdown()


def _carrier(headers: Headers) -> dict[str, list[str]]:
    """W3C's headers; several of `traceparent` are as good as none."""
    parents = headers.getlist("traceparent")
    if len(parents) != 1:
        return {}
    return {"traceparent": parents, "tracestate": headers.getlist("tracestate")}


def _of_http(record: Record) -> dict[str, Any]:
    return {
        "http.route": record.route if record.route != "unmatched" else None,
        "http.response.status_code": record.status or None,
        "disco.outcome": record.outcome,
        "error.type": record.error_type,
        "gen_ai.request.model": record.model,
    }


def _of_generation(record: Record) -> dict[str, Any]:
    params = record.choices[0].request.params
    spoken = record.speculated.body()
    figures, phases = record.figures(), record.phases
    reasoning = sum(choice.reasoning_tokens for choice in record.choices if choice.prompt.place is not None)
    return {
        "gen_ai.request.max_tokens": params.max_tokens,
        "gen_ai.request.temperature": params.temperature,
        "gen_ai.request.top_p": params.top_p,
        "gen_ai.request.top_k": params.top_k or None,
        "gen_ai.request.frequency_penalty": params.frequency_penalty,
        "gen_ai.request.presence_penalty": params.presence_penalty,
        "gen_ai.request.seed": params.seed,
        "gen_ai.request.choice.count": len(record.choices) if len(record.choices) > 1 else None,
        "gen_ai.request.stream": record.streamed,
        "gen_ai.response.id": record.id,
        "gen_ai.response.finish_reasons": record.finish_reasons,
        "gen_ai.usage.input_tokens": figures["prompt_tokens"],
        "gen_ai.usage.output_tokens": figures["generated_tokens"],
        "gen_ai.usage.cache_read.input_tokens": figures["cached_tokens"],
        "gen_ai.usage.reasoning.output_tokens": reasoning or None,
        "disco.time_to_first_token": record.time_to_first_token,
        **({} if phases is None else _ours(phases.seconds())),
        **{f"disco.speculation.{name}": value for name, value in spoken.items()},
    }


def _ours(figures: dict[str, float]) -> dict[str, float]:
    return {f"disco.{name}": value for name, value in figures.items()}


def _content(record: Record, decode: Decode) -> dict[str, Any]:
    """Prompts and texts, as JSON in the conventions' form."""
    asked = [_message("user", [_text(prompt_text(prompt, decode))]) for prompt in record.rendered]
    said = [
        _message("assistant", _parts(choice)) | {"finish_reason": reason}
        for choice, reason in zip(record.choices, record.finish_reasons, strict=True)
    ]
    return {"gen_ai.input.messages": json.dumps(asked), "gen_ai.output.messages": json.dumps(said)}


def _message(role: str, parts: list[dict[str, Any]]) -> dict[str, Any]:
    return {"role": role, "parts": parts}


def _text(content: str) -> dict[str, Any]:
    return {"type": "text", "content": content}


def _parts(choice: Choice) -> list[dict[str, Any]]:
    turn = choice.turn
    parts = [{"type": "reasoning", "content": turn.reasoning}] if turn.reasoning else []
    parts += [_text(turn.content)] if turn.content else []
    for call in turn.tool_calls:
        told = {"type": "tool_call", "id": call.id, "name": call.name, "arguments": call.arguments}
        parts.append(told)
    return parts


class _Seldom(logging.Filter):
    """Lets a record through only if none has passed for a while."""

    def __init__(self) -> None:
        super().__init__()
        self._next = 0.0

    def filter(self, record: logging.LogRecord) -> bool:
        now = time.monotonic()
        if now < self._next:
            return False
        self._next = now + _SELDOM
        return True


def _resource() -> Resource:
    """Who sends: OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES, else our own name and version."""
    found = Resource.create()
    own: dict[str, str] = {}
    if str(found.attributes.get("service.name", "")).startswith("unknown_service"):
        own["service.name"] = _NAME
    if "service.version" not in found.attributes:
        own["service.version"] = product_version()
    return found.merge(Resource(own))
