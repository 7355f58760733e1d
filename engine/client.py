"""The one way to talk to an engine: submit a request, read its events, cut or abort it.

`LocalEngine` runs the engine on a thread of this process (tests, notebooks, `generate`);
`WorkerEngine` runs it in a supervised process of its own (the server).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Literal, Protocol

from engine.types import GenerateRequest, ModelInfo, StepStats, TokenEvent

EngineState = Literal["loading", "ready", "stalled", "restarting", "dead", "closed"]
"""Stalled: no step has ended for so long that it may have hung; it recovers, or is restarted."""


class EngineClient(Protocol):
    """What the server knows of an engine. One event loop; all methods are called on it."""

    @property
    def state(self) -> EngineState: ...

    @property
    def why(self) -> str:
        """Why it is in a state other than "ready", in one line; "" if it is ready."""
        ...

    @property
    def restarts(self) -> int:
        """Times the engine was started anew after a death."""
        ...

    @property
    def info(self) -> ModelInfo:
        """Raises EngineUnavailable before the engine was ready for the first time."""
        ...

    async def start(self) -> None:
        """Starts loading and returns when ready; raises EngineUnavailable if it cannot load."""
        ...

    async def close(self) -> None:
        """Ends the engine; open requests get EngineUnavailable. Idempotent."""
        ...

    def generate(self, request: GenerateRequest) -> AsyncIterator[TokenEvent]:
        """Events of one request, ending with the one that has a finish_reason.

        Raises InvalidRequest before the first event if the engine refuses the request, and
        EngineUnavailable if the engine dies under it. Leaving the iteration early (aclose,
        cancellation) aborts the request and frees its KV.
        """
        ...

    def cut(self, request_id: str, n_tokens: int) -> None:
        """Ends an open request of which the first `n_tokens` tokens count, and no more: its reader has found
        the output's end. Its iteration ends without another event. An id that is not open is no error: the
        engine ended the request first.
        """
        ...

    async def check(self, request: GenerateRequest) -> None:
        """Raises InvalidRequest if the engine would refuse the request. Runs nothing."""
        ...

    def on_step(self, listener: Callable[[StepStats, list[TokenEvent]], None]) -> None:
        """`listener` is called on the event loop after every step with its statistics and events.

        Events of requests that were cut or left come here too, until a step's `left` names them.
        """
        ...
