"""Clients of an app under test, with and without a socket, and reading its streams."""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Any

import httpx
from fastapi import FastAPI

from server import http1


@asynccontextmanager
async def running(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the app without a socket; the engine has had its turn to load."""
    async with app.router.lifespan_context(app):
        await asyncio.sleep(0)
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://tiny") as client:
            yield client


@asynccontextmanager
async def listening(
    app: FastAPI, shutdown_seconds: float = 30, tls: ssl.SSLContext | None = None
) -> AsyncIterator[int]:
    """The port of the app behind uvicorn, as the server runs it."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = http1.Server(app, shutdown_seconds, late=app.state.context.engine.close, tls=tls)
    task = asyncio.create_task(server.serve(sockets=[listener]))
    while not server.started:
        await asyncio.sleep(0.01)
    try:
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        await task
        listener.close()


def events_of(response: httpx.Response) -> list[Any]:
    """The data of a stream's events: JSON, and the string [DONE]."""
    assert response.headers["content-type"].startswith("text/event-stream")
    data = [line.removeprefix("data: ") for line in response.text.split("\n") if line.startswith("data: ")]
    return [item if item == "[DONE]" else json.loads(item) for item in data]


def joined(lists: Iterable[list[Any]]) -> list[Any]:
    return [item for part in lists for item in part]
