"""Apps around real engines for tests that are no coroutines: a toy that says what it is told, tiny models."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import httpx
from http_support import events_of, running
from lossless.toys import CONTEXT, Context, Pair, toy_engine
from transformers import PreTrainedTokenizerBase

from engine.client import EngineClient
from engine.client_local import LocalEngine
from engine.config import EngineConfig
from server.app import create_app
from server.settings import Settings

_SURE = 30.0  # a logit that leaves nothing to the others


class Live:
    """A running app and its client, driven step by step from outside of any event loop."""

    def __init__(self, runner: asyncio.Runner, client: httpx.AsyncClient) -> None:
        self._runner, self._client = runner, client

    def post(self, path: str, body: dict[str, Any]) -> httpx.Response:
        return self._runner.run(self._client.post(path, json=body))

    def ask(self, path: str, **body: Any) -> dict[str, Any]:
        response = self.post(path, {"model": "tiny"} | body)
        assert response.status_code == 200, response.text
        return response.json()

    def stream(self, path: str, **body: Any) -> list[Any]:
        response = self.post(path, {"model": "tiny", "stream": True} | body)
        assert response.status_code == 200, response.text
        *chunks, done = events_of(response)
        assert done == "[DONE]", chunks[-1]
        return chunks


@contextmanager
def live(engine: EngineClient, tokenizer: PreTrainedTokenizerBase) -> Iterator[Live]:
    """An app around `engine`, ready to be asked."""
    app = create_app(Settings(target="tiny"), engine, tokenizer)

    async def until_ready() -> None:
        while engine.state == "loading":
            await asyncio.sleep(0.01)
        assert engine.state == "ready"

    with asyncio.Runner() as runner:
        clients = running(app)
        client = runner.run(clients.__aenter__())
        try:
            runner.run(until_ready())
            yield Live(runner, client)
        finally:
            runner.run(clients.__aexit__(None, None, None))


class Script:
    """A toy pair whose target says `answer` after a prompt of `prompt` tokens; its draft is wrong at `slips`.

    Positions of `slips` are those of the answer's tokens. Change them between requests, not within.
    """

    def __init__(self, vocab: int, eos: int) -> None:
        self.vocab, self.eos = vocab, eos
        self.prompt = 1
        self.answer: Sequence[int] = ()
        self.slips: frozenset[int] = frozenset()

    def engine(self) -> LocalEngine:
        """The shipped engine around the pair, without a prefix cache: the answer changes."""
        pair = Pair(self.vocab, self._target, self._draft)
        make: Callable[[EngineConfig], Any] = lambda _: toy_engine(pair, eos=[self.eos], prefix_cache=False)  # noqa: E731
        return LocalEngine(EngineConfig(target="toy"), make)

    def _says(self, context: Context) -> int:
        place = len(context) - self.prompt
        return self.answer[place] if place < len(self.answer) else self.eos

    def _target(self, context: Context) -> list[float]:
        return self._sure_of(self._says(context))

    def _draft(self, context: Context) -> list[float]:
        token = self._says(context)
        slip = len(context) - self.prompt in self.slips
        return self._sure_of(
            (token + 1 + random.Random(token).randrange(self.vocab - 1)) % self.vocab if slip else token
        )

    def _sure_of(self, token: int) -> list[float]:
        logits = [0.0] * self.vocab
        logits[token] = _SURE
        return logits


__all__ = ["CONTEXT", "Live", "Script", "live"]
