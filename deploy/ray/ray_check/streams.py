"""Streams of /v1/completions as a client sees them: the text, who served it, and how it ended."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

REPLICA_HEADER = "x-disco-replica"
_TOPICS = ("rivers", "clocks", "bread", "whales", "bridges", "tea", "glass", "maps",
           "chess", "volcanoes", "paper", "trains", "honey", "deserts", "violins", "snow")  # fmt: skip
_FRAMES = (
    "A short history of {}:",
    "Three facts about {}:\n1.",
    "def describe_{}():\n    return",
    "My view on {} is",
)


@dataclass
class Outcome:
    """How one request went. `code`: the error's, if it failed with a clear error."""

    text: str = ""
    replica: str | None = None
    status: int = 0
    code: str | None = None
    whole: bool = False
    broken: str | None = None
    tokens: int = 0
    chunks: int = 0
    sent: float = field(default_factory=time.monotonic)
    ended: float = 0.0

    @property
    def clear_error(self) -> bool:
        """It failed, and the client was told so in OpenAI's shape."""
        return self.code is not None and self.broken is None and not self.whole


def bodies(model: str, tokens: int) -> list[dict[str, Any]]:
    """64 requests: every other one greedy, the others sampled with a seed. All give `tokens` tokens."""
    prompts = [frame.format(topic) for topic in _TOPICS for frame in _FRAMES]
    ways = ({"temperature": 0}, {"temperature": 0.8, "seed": 7})
    fixed = {"model": model, "max_tokens": tokens, "ignore_eos": True, "stream": True}
    usage = {"stream_options": {"include_usage": True}}
    return [{**fixed, **usage, "prompt": prompt, **ways[i % 2]} for i, prompt in enumerate(prompts)]


async def run(
    url: str, requests: Sequence[dict[str, Any]], told: Callable[[], None] = lambda: None
) -> list[Outcome]:
    """All requests at once; `told` is called at every chunk of any of them."""
    limits = httpx.Limits(max_connections=len(requests) + 1)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        return list(await asyncio.gather(*(_stream(client, body, told) for body in requests)))


async def _stream(client: httpx.AsyncClient, body: dict[str, Any], told: Callable[[], None]) -> Outcome:
    outcome = Outcome()
    try:
        async with client.stream("POST", "/v1/completions", json=body) as response:
            outcome.status, outcome.replica = response.status_code, response.headers.get(REPLICA_HEADER)
            if response.status_code != 200:
                outcome.code = json.loads(await response.aread())["error"]["code"]
            else:
                async for line in response.aiter_lines():
                    if line.startswith("data: "):
                        _take(outcome, line.removeprefix("data: "))
                        told()
    except (httpx.HTTPError, ValueError, KeyError) as error:
        outcome.broken = f"{type(error).__name__}: {error}"
    outcome.ended = time.monotonic()
    return outcome


def _take(outcome: Outcome, data: str) -> None:
    if data == "[DONE]":
        outcome.whole = True
        return
    chunk = json.loads(data)
    if "error" in chunk:
        outcome.code = chunk["error"]["code"]
        return
    outcome.chunks += 1
    outcome.text += "".join(choice["text"] for choice in chunk["choices"])
    if chunk.get("usage"):
        outcome.tokens = chunk["usage"]["completion_tokens"]


def throughput(outcomes: Sequence[Outcome]) -> float:
    """Output tokens per second, from the first request sent to the last one ended."""
    seconds = max(each.ended for each in outcomes) - min(each.sent for each in outcomes)
    return sum(each.tokens for each in outcomes) / seconds


async def leave_early(url: str, body: dict[str, Any], chunks: int) -> str:
    """Reads `chunks` chunks of a stream and leaves; with 0, leaves an answer in one body after a second.
    The replica's id, if it was told before."""
    async with httpx.AsyncClient(base_url=url, timeout=httpx.Timeout(600)) as client:
        if not chunks:
            try:
                await client.post(
                    "/v1/completions", json={**body, "stream": False, "stream_options": None}, timeout=1.0
                )
            except httpx.TimeoutException:
                return ""
            raise RuntimeError("the answer came before the client left: give it more tokens")
        async with client.stream("POST", "/v1/completions", json=body) as response:
            response.raise_for_status()
            seen = 0
            async for line in response.aiter_lines():
                seen += line.startswith("data: ")
                if seen == chunks:
                    return str(response.headers[REPLICA_HEADER])
    raise RuntimeError("the stream ended before the client left: give it more tokens")
