"""Requests of every kind, some of them left in the middle, and what their answers say."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
from suites import replies
from suites.replies import Reply

PROMPTS = (
    "The capital of France is",
    "Once upon a time there was a river that",
    "def add(a, b):\n",
    "one two three one two three one two three one",
)
SPECULATION: tuple[dict[str, Any] | None, ...] = (
    None,
    {"drafter": "none"},
    {"drafter": "model", "policy": "static", "options": {"sl": 3}},
    {"drafter": "model", "policy": "heuristic"},
    {"drafter": "model", "policy": "confidence"},
    {"drafter": "ngram", "policy": "static", "options": {"sl": 4}},
    {"drafter": "model", "policy": "goodput"},
    {"drafter": "model", "policy": "static", "max_sl": 0},
    {"drafter": "dyspec", "options": {"budget": 8, "max_depth": 4}},
    {"drafter": "opt_tree", "options": {"budget": 6}},
)
STOPS = ((" the",), ("e",), (" a", "\n"), ("th", "an"), (",",))


@dataclass(frozen=True)
class Ask:
    """One request. `leave_after`: parts of a stream, or seconds of a whole answer, after which it is left."""

    path: str
    body: dict[str, Any]
    leave_after: float | None = None
    lost: int = 0  # tokens of candidates that lose, known beforehand


@dataclass
class Told:
    """What the answers said, in sum."""

    answers: int = 0
    left: int = 0
    prompt_tokens: int = 0
    tokens: int = 0
    sequences: int = 0
    finish: Counter[str] = field(default_factory=Counter)
    speculation: Counter[tuple[str, ...]] = field(default_factory=Counter)  # by figure, drafter, policy
    faults: list[str] = field(default_factory=list)

    def take(self, reply: Reply) -> None:
        """Adds what an answer says of itself."""
        if reply.left:
            self.left += 1
        elif reply.fault is not None or reply.usage is None:
            self.faults.append(f"{reply.status} {reply.fault}")
        else:
            reasons = [str(said.finish) for said in reply.said()]
            self.answers += 1
            self.prompt_tokens += reply.usage["prompt_tokens"] * len(
                reasons
            )  # each sequence reads the prompt
            self.tokens += reply.usage["completion_tokens"]
            self.sequences += len(reasons)
            self.finish.update(reasons)
            for part in reply.speculation:
                for figure in ("iterations", "drafted", "accepted"):
                    self.speculation[figure, part["drafter"], part["policy"]] += part[figure]


def mix(
    count: int, model: str, tokens: int, long: int, bias: dict[str, float] | None = None, seed: int = 0
) -> list[Ask]:
    """So many requests of all kinds: about `tokens` tokens each, `long` those that will be left.

    `bias`: logit_bias of those with stop strings, for a model that would not say them.
    """
    source = random.Random(seed)
    return [_ask(i, model, tokens, long, bias, source) for i in range(count)]


def whole(asks: Sequence[Ask]) -> list[Ask]:
    """Those of which every token reaches its answer, and every figure of speculation."""
    return [ask for ask in asks if ask.leave_after is None and not ask.lost and "stop" not in ask.body]


def _ask(
    i: int, model: str, tokens: int, long: int, bias: dict[str, float] | None, source: random.Random
) -> Ask:
    prompt = source.choice(PROMPTS)
    chat = i % 3 == 1
    body: dict[str, Any] = {"model": model, "max_tokens": source.randrange(1, 2 * tokens), "seed": i}
    body |= {"temperature": source.choice((0, 0, 0.8, 1.0))}
    if (speculation := SPECULATION[i % len(SPECULATION)]) is not None:
        body["speculation"] = speculation
    body |= {"messages": [{"role": "user", "content": prompt}]} if chat else {"prompt": prompt}
    path = "/v1/chat/completions" if chat else "/v1/completions"
    if source.random() < 0.5:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    kind = source.randrange(10)
    if kind == 7:
        return _response(body, prompt)
    if kind < 3:
        body["stop"] = list(source.choice(STOPS))
        body["max_tokens"] = 2 * tokens
        body |= {"logit_bias": bias} if bias else {}
    if kind in (2, 4):
        body["n"] = source.choice((2, 3))
    if kind == 5 and not chat:
        n, best = source.choice(((1, 2), (1, 3), (2, 3)))
        body |= {"n": n, "best_of": best, "ignore_eos": True, "stream": False}
        body.pop("stream_options", None)
        return Ask(path, body, lost=(best - n) * body["max_tokens"])
    if kind == 6 and not chat:
        body["echo"] = True
    if kind >= 8:  # it is left
        body |= {"max_tokens": long, "ignore_eos": True, "n": source.choice((1, 1, 2))}
        return Ask(path, body, leave_after=source.choice((0, 1, 3, 5)) if "stream" in body else 0.3)
    return Ask(path, body)


def _response(body: dict[str, Any], prompt: str) -> Ask:
    """The same for the Responses API, which has no choices, no seed and its usage without being asked."""
    kept = {name: body[name] for name in ("model", "temperature", "stream", "speculation") if name in body}
    return Ask("/v1/responses", kept | {"input": prompt, "max_output_tokens": body["max_tokens"]})


async def ask_all(client: httpx.AsyncClient, asks: Sequence[Ask], at_once: int) -> Told:
    """Asks all of them, at most so many at a time."""
    told, turns = Told(), asyncio.Semaphore(at_once)

    async def one(ask: Ask) -> None:
        async with turns:
            await _one(client, ask, told)

    await asyncio.gather(*(one(ask) for ask in asks))
    return told


async def _one(client: httpx.AsyncClient, ask: Ask, told: Told) -> None:
    told.take(await replies.ask(client, ask.path, ask.body, ask.leave_after))
