"""Puts the server together and runs it: tokenizer, engine process, app, uvicorn."""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import signal
import socket
import ssl
from importlib.metadata import version
from typing import Any

import uvicorn
from transformers import PreTrainedTokenizerBase

from engine.client import EngineClient
from engine.client_worker import WorkerEngine
from engine.heaps import lean_heaps
from engine.speculation.tree import rules
from engine.types import EngineUnavailable
from server import drain, logs, metrics_port, tls
from server.app import create_app
from server.http1_protocol import fitting, most_open
from server.keys import KeyRing
from server.log_lines import formatter
from server.prepare import prepare
from server.settings import Settings

log = logging.getLogger(__name__)

_BACKLOG = 2048  # connections that the system takes before the server does; uvicorn's
_LOOK_SECONDS = 0.1  # between looks at an engine that is loading
_OWN_FILES = 256  # that are no connections of the API: the metrics port's are among them
_COMPLAINT_SECONDS = 60.0  # between log lines of connections that no file is left for


class PortTaken(Exception):
    """Another server began to listen after the port had been found free."""


def run(settings: Settings, listener: socket.socket, metrics_listener: socket.socket | None = None) -> int:
    """Serves on the bound socket until a signal ends it, and /metrics on the other one, if there is one.

    Returns the exit code. Raises what `prepare` raises, BadCertificate and PortTaken, before the engine is
    started, and EngineUnavailable if it cannot load.
    """
    lean_heaps()
    if settings.api_key_file is not None or settings.ssl_certfile is not None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # they are read anyway; later it has them read again
    certificate = None
    if settings.ssl_certfile is not None:
        certificate = tls.context(settings.ssl_certfile, settings.ssl_keyfile)
    settings = _with_room(settings)
    config = settings.engine_config()
    address = _address(listener, certificate is not None)
    governed = f"drafter {config.drafter}" if config.drafter in rules() else f"policy {config.policy}"
    models = f"target {config.target}, draft {config.draft}, {governed}"
    logs.say(f"disco-serve {version('disco-serve')} on {address}\n  {models}; loading", settings.log_format)
    tokenizer = prepare(config)
    for each in (listener, metrics_listener):
        _listen(each)
    return asyncio.run(_serve(settings, tokenizer, listener, metrics_listener, certificate))


class _Complaints:
    """The loop's exception handler. Where no file is left, asyncio complains of every connection that waits,
    two thousand times a second: one line a minute says it."""

    def __init__(self) -> None:
        self._said = float("-inf")

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        if "out of system resource" not in context.get("message", ""):
            loop.default_exception_handler(context)
        elif loop.time() >= self._said + _COMPLAINT_SECONDS:
            self._said = loop.time()
            log.error("connections cannot be accepted now: %s", context.get("exception"))


def _listen(listener: socket.socket | None) -> None:
    """Two sockets can be bound to one port, but only one can listen."""
    if listener is None:
        return
    try:
        listener.listen(_BACKLOG)
    except OSError as error:
        host, port = listener.getsockname()[:2]
        raise PortTaken(f"cannot listen on {host}:{port}: {error.strerror or error}") from error


async def _serve(
    settings: Settings,
    tokenizer: PreTrainedTokenizerBase,
    listener: socket.socket,
    metrics_listener: socket.socket | None,
    certificate: ssl.SSLContext | None,
) -> int:
    engine = WorkerEngine(
        settings.engine_config(),
        step_timeout=settings.step_seconds,
        log_formatter=formatter(settings.log_format),
    )
    asyncio.get_running_loop().set_exception_handler(_Complaints())
    app = create_app(settings, engine, tokenizer)
    server = drain.Server(app, settings.shutdown_seconds, engine, tls=certificate)
    _read_again_on_hangup(settings, app.state.keys, certificate)
    address = _address(listener, certificate is not None)
    loading = asyncio.create_task(_watch_loading(server, engine, address, settings))
    try:
        async with metrics_port.also_on(metrics_listener, app.state.context):
            await server.serve(sockets=[listener])
            if server.force_exit:
                await server.left_at_once()
                logging.shutdown()
                os._exit(server.exit_code)  # whatever else is under way
    finally:
        loading.cancel()
    if not server.started:
        raise EngineUnavailable("the server did not start; the log says why")
    if loading.done() and not loading.cancelled():
        loading.result()
    return server.exit_code


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


def _read_again_on_hangup(settings: Settings, keys: KeyRing, certificate: ssl.SSLContext | None) -> None:
    """SIGHUP reads the files of keys and the certificate again; without such files it ends the server."""

    def read_again() -> None:
        keys.reload()
        if certificate is not None and settings.ssl_certfile is not None:
            tls.reload(certificate, settings.ssl_certfile, settings.ssl_keyfile)

    if settings.api_key_file is not None or certificate is not None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, read_again)


def _with_room(settings: Settings) -> Settings:
    """Raises this process's limit of open files as far as it may; fewer connections, if that is too low."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = most_open(settings.max_connections) + _OWN_FILES
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return settings
    soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft >= wanted:
        return settings
    room = fitting(soft - _OWN_FILES)
    log.warning("at most %d connections: no more than %d files may be open (ulimit -n)", room, soft)
    return settings.model_copy(update={"max_connections": room})


def _address(listener: socket.socket, secure: bool) -> str:
    scheme = "https" if secure else "http"
    host, port = listener.getsockname()[:2]
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"
