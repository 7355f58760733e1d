"""A replica: the server's app, with its engine in a process of its own, on the GPU that Ray gave it."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncGenerator, Coroutine
from contextlib import AsyncExitStack, aclosing
from typing import Any

from ray import serve
from starlette.types import Message

from disco_ray import bridge
from disco_ray.call import Call
from engine.client_worker import WorkerEngine
from server import logs
from server.app import create_app
from server.log_lines import formatter
from server.metrics_port import also_on
from server.prepare import prepare
from server.settings import Settings

log = logging.getLogger(__name__)

_LOOK_SECONDS = 0.1  # between looks at an engine that is loading
_PORT_SECONDS = 60.0  # a replica that ends may still hold the port


class Replica:
    """One app and one engine. `settings`: the server's, by name. `metrics_host`, `metrics_port`: where the
    first replica of a node is scraped; the next one has the next port, and so on.

    A constructor that raises tells Ray why the engine cannot load; Ray tries again.
    """

    _life: AsyncExitStack | None = None  # what ends with the replica

    async def __init__(self, settings: dict[str, Any], metrics_host: str, metrics_port: int) -> None:
        context = serve.get_replica_context()
        self._name = context.replica_id.unique_id
        labels = [*Settings(**settings).metrics_label, f"replica={self._name}"]
        self._settings = Settings(**{**settings, "metrics_label": labels})
        logs.configure(self._settings.log_level, self._settings.log_format)
        tokenizer = await asyncio.to_thread(prepare, self._settings.engine_config())
        lines = formatter(self._settings.log_format)
        self._engine = WorkerEngine(
            self._settings.engine_config(), step_timeout=self._settings.step_seconds, log_formatter=lines
        )
        self._app = create_app(self._settings, self._engine, tokenizer)
        async with AsyncExitStack() as life:
            await life.enter_async_context(self._app.router.lifespan_context(self._app))
            await self._loaded()
            port = metrics_port + context.rank.local_rank
            listener = life.enter_context(await _bound(metrics_host, port))
            await life.enter_async_context(also_on(listener, self._app.state.context.metrics))
            self._life = life.pop_all()
        log.info("replica %s is ready; its metrics are on port %d", self._name, port)

    async def answer(self, call: Call) -> AsyncGenerator[list[Message], None]:
        """The app's answer: see `bridge.run`."""
        async with aclosing(bridge.run(self._app, call, self._name)) as answer:
            async for messages in answer:
                yield messages

    async def check_health(self) -> None:
        """Raises RuntimeError once the engine is dead for good: Ray then replaces the replica. While the
        engine is merely being started again, requests get 503 from the app."""
        if self._engine.state in ("dead", "closed"):
            raise RuntimeError(f"the engine is {self._engine.state}")

    def __del__(self) -> Coroutine[Any, Any, None] | None:
        """Ray calls it once open requests have ended, or their time is up, and awaits what it returns.
        Python calls it too, at the very end, when there is nothing left to do."""
        life, self._life = self._life, None
        return None if life is None else life.aclose()

    async def _loaded(self) -> None:
        """Raises RuntimeError that says why it cannot be."""
        context = self._app.state.context
        while self._engine.state != "ready" and context.loading_error is None:
            await asyncio.sleep(_LOOK_SECONDS)
        if context.loading_error is not None:
            raise RuntimeError(f"the engine cannot load: {context.loading_error}")


async def _bound(host: str, port: int) -> socket.socket:
    """A listening socket. Raises OSError if the port stays taken."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + _PORT_SECONDS
    while True:
        try:
            return socket.create_server((host, port))
        except OSError:
            if loop.time() > deadline:
                raise
        await asyncio.sleep(1.0)
