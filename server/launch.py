"""Puts the server together and runs it: tokenizer, engine process, app, uvicorn."""

from __future__ import annotations

import asyncio
import socket
from importlib.metadata import version

import uvicorn
from transformers import PreTrainedTokenizerBase

from engine.client import EngineClient
from engine.client_worker import WorkerEngine
from engine.types import EngineUnavailable
from server import http1, logs, metrics_port
from server.app import create_app
from server.log_lines import formatter
from server.prepare import prepare
from server.settings import Settings

_LOOK_SECONDS = 0.1  # between looks at an engine that is loading


def run(settings: Settings, listener: socket.socket, metrics_listener: socket.socket | None = None) -> None:
    """Serves on the bound socket until a signal ends it, and /metrics on the other one, if there is one.

    Raises what `prepare` raises, before the engine is started, and EngineUnavailable if it cannot load.
    """
    config = settings.engine_config()
    address = _address(listener)
    models = f"target {config.target}, draft {config.draft}, policy {config.policy}"
    logs.say(f"disco-serve {version('disco-serve')} on {address}\n  {models}; loading", settings.log_format)
    tokenizer = prepare(config)
    asyncio.run(_serve(settings, tokenizer, listener, metrics_listener))


async def _serve(
    settings: Settings,
    tokenizer: PreTrainedTokenizerBase,
    listener: socket.socket,
    metrics_listener: socket.socket | None,
) -> None:
    engine = WorkerEngine(settings.engine_config(), log_formatter=formatter(settings.log_format))
    app = create_app(settings, engine, tokenizer)
    server = http1.Server(app, settings.shutdown_seconds, late=engine.close)
    loading = asyncio.create_task(_watch_loading(server, engine, _address(listener), settings))
    try:
        async with metrics_port.also_on(metrics_listener, app.state.context.metrics):
            await server.serve(sockets=[listener])
    finally:
        loading.cancel()
    if not server.started:
        raise EngineUnavailable("the server did not start; the log says why")
    if loading.done() and not loading.cancelled():
        loading.result()


async def _watch_loading(
    server: uvicorn.Server, engine: EngineClient, address: str, settings: Settings
) -> None:
    """Says when the engine is ready, and what the KV pool took. Ends a server that can never be ready."""
    while engine.state == "loading":
        await asyncio.sleep(_LOOK_SECONDS)
    if engine.state == "dead":
        server.should_exit = True
    if engine.state != "closed":
        ready = _ready_lines(engine, address, settings.served_model_name[0])  # raises if it is dead
        logs.say(ready, settings.log_format)


def _ready_lines(engine: EngineClient, address: str, model: str) -> str:
    info = engine.info
    tokens = info.kv_blocks * info.block_size
    return (
        f"  ready: {info.dtype} on {info.device}, context {info.max_model_len}, "
        f"KV pool {info.kv_blocks} blocks = {tokens} tokens\n"
        f"  try: curl -N {address}/v1/completions -H 'content-type: application/json' "
        '-d \'{"model": "%s", "prompt": "The capital of France is", "stream": true}\'' % model
    )


def _address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
