"""/metrics as text, and on a port of its own: `--metrics-port`."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import uvicorn
from prometheus_client.exposition import choose_encoder
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from server.context import Context
from server.http1 import protocol
from server.metrics import Metrics

CONNECTIONS = 64
"""At most, on a port of its own: however many the API has, this one answers."""
_LAST_SECONDS = 1  # for a scrape under way at the end


def exposition(metrics: Metrics, accept: str) -> Response:
    """Everything in Prometheus' text, or in OpenMetrics if the `accept` header asks for that.

    vLLM's names have colons, which OpenMetrics would write as underscores: they are told as text always.
    """
    try:
        encode, content_type = choose_encoder(accept if metrics.plain_names else "")
        text = encode(metrics)
    except (TypeError, ValueError):  # it compares versions, and not every text is one
        encode, content_type = choose_encoder("")
        text = encode(metrics)
    return Response(text, media_type=content_type)


@asynccontextmanager
async def also_on(listener: socket.socket | None, context: Context) -> AsyncIterator[None]:
    """Serves /metrics, and nothing else, on the bound socket meanwhile; None serves nothing. Clients are held
    to the API's clocks, and are fewer.
    """
    if listener is None:
        yield
        return

    async def answer(request: Request) -> Response:
        return exposition(context.metrics, request.headers.get("accept", ""))

    app = Starlette(routes=[Route("/metrics", answer)])
    server = _Beside(
        uvicorn.Config(
            app,
            http=protocol(context, connections=CONNECTIONS),
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=_LAST_SECONDS,
        )
    )
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        yield
    finally:
        server.should_exit = True
        await serving


class _Beside(uvicorn.Server):
    """A server that leaves signals to the one that it stands beside."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
