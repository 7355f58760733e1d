"""For those who run the server: /health, /ready, /version, /metrics. None of them needs a key."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import PlainTextResponse

from server.context import context_of
from server.errors import shutting_down, unavailable
from server.metrics_port import exposition
from server.openapi import documented
from server.protocol.answers import Health, Ready, Version

router = APIRouter(tags=["operations"])


def product_version() -> str:
    """The installed version; "unknown" in a source tree that was never installed."""
    try:
        return version("disco-serve")
    except PackageNotFoundError:
        return "unknown"


@router.get("/health", **documented(answer=Health, errors=(500, 503)))
async def health(request: Request) -> dict[str, Any]:
    """200 while the engine lives and answers; 503 while it loads, is stalled, restarts, or is dead."""
    context = context_of(request)
    engine = context.engine
    if engine.state != "ready":
        why = engine.why or str(context.loading_error or "")
        raise unavailable(f"the engine is {engine.state}{why and ': '}{why}")
    return {"status": "ok", "engine": engine.state, "restarts": engine.restarts}


@router.get("/ready", **documented(answer=Ready, errors=(500, 503)))
async def ready(request: Request) -> dict[str, Any]:
    """200 if a request would be served now: whether to send traffic here. 503 once the server ends."""
    context = context_of(request)
    if context.door.draining:
        raise shutting_down()
    info = context.ready()
    return {"status": "ready", "target": info.target, "draft": info.draft, "device": info.device}


@router.get("/version", **documented(answer=Version, errors=(500,)))
async def get_version() -> dict[str, str]:
    """The version of disco-serve."""
    return {"version": product_version()}


@router.get("/metrics", **documented(errors=(500,)), response_class=PlainTextResponse)
async def metrics(request: Request) -> Response:
    """Prometheus' text, or OpenMetrics if asked for."""
    return exposition(context_of(request).metrics, request.headers.get("accept", ""))
