"""A small server with OpenAI's API and other people's habits: the model's name says which."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

STEP = 0.002

CHUNKS: dict[str, bytes] = {
    "no text": b'{"choices":[{"index":0,"text":"\xff"}]}',
    "nests": b'{"choices":[{"text":"a"}],"speculation":' + b"[" * 100_000,
    "many digits": b'{"choices":[],"usage":{"completion_tokens":' + b"9" * 500 + b"}}",
    "very many digits": b'{"choices":[],"usage":{"completion_tokens":' + b"9" * 5000 + b"}}",
    "below nothing": b'{"choices":[],"usage":{"completion_tokens":-9}}',
    "counts in words": b'{"choices":[],"usage":{"completion_tokens":"five"}}',
    "counts in truths": b'{"choices":[],"usage":{"prompt_tokens":true}}',
    "predicts too much": b'{"choices":[],"usage":{"completion_tokens_details":'
    b'{"accepted_prediction_tokens":1e300}}}',
    "drafts words": b'{"choices":[],"timings":{"draft_n":"x"}}',
    "speculates words": b'{"choices":[],"speculation":{"drafted":"x"}}',
    "speculates below nothing": b'{"choices":[],"speculation":{"mean_emitted":-1}}',
    "drafts nothing": b'{"choices":[],"timings":{"draft_n":null}}',
}
"""What a model of that name sends at the end, instead of usage."""
LEAP = (1, 2_000_000_000)  # tokens of two chunks of the model "leaps"


class FakeOpenAI:
    """Two tokens a chunk. Remembers what it was asked, and how many streams were open at most."""

    def __init__(self) -> None:
        self.models = ["good"]
        self.owner = "somebody"
        self.cards: bytes | None = None  # the whole answer of /models
        self.key: str | None = None
        self.status = 500  # of the model "repeats the key"
        self.tokenize: str | None = None  # whose form: "vllm" or "llama.cpp"
        self.longest = 1000  # words that it tokenizes
        self.refuses: tuple[str, ...] = ()  # fields
        self.bodies: list[dict[str, Any]] = []
        self.heads: list[dict[str, str]] = []
        self.running = self.most = 0
        self.url = ""

    def app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/v1/models", self._models),
                Route("/v1/completions", self._answer, methods=["POST"]),
                Route("/v1/chat/completions", self._answer, methods=["POST"]),
                Route("/tokenize", self._tokenize, methods=["POST"]),
            ]
        )

    @property
    def sent(self) -> list[dict[str, Any]]:
        """The bodies of the load: those after the probe of one token."""
        return [body for body in self.bodies if body["max_tokens"] > 1]

    async def _models(self, request: Request) -> Response:
        if self.key is not None and request.headers.get("authorization") != f"Bearer {self.key}":
            return JSONResponse({"error": {"message": "no key"}}, status_code=401)
        if self.cards is not None:
            return Response(self.cards, media_type="application/json")
        return JSONResponse({"data": [{"id": name, "owned_by": self.owner} for name in self.models]})

    async def _tokenize(self, request: Request) -> Response:
        body = await request.json()
        if len(str(body.get("prompt")).split()) > self.longest:
            return JSONResponse({"error": {"message": "too long"}}, status_code=400)
        if self.tokenize == "vllm" and "prompt" in body:
            return JSONResponse({"count": 1 + count(body["prompt"])})  # a BOS before it
        if self.tokenize == "llama.cpp" and "content" in body:
            return JSONResponse({"tokens": [0] * count(body["content"])})
        return JSONResponse({"error": {"message": "?"}}, status_code=404 if self.tokenize is None else 400)

    async def _answer(self, request: Request) -> Response:
        body = await request.json()
        self.bodies.append(body)
        self.heads.append(dict(request.headers))
        for name in self.refuses:
            if name in body:
                return JSONResponse({"detail": f"extra field: {name}"}, status_code=422)
        match body["model"]:
            case "repeats the key":
                return JSONResponse({"error": request.headers["authorization"]}, status_code=self.status)
            case "full":
                error = {"error": {"message": "too many requests"}}
                return JSONResponse(error, status_code=429, headers={"retry-after": "1"})
            case "fails every third" if len(self.bodies) % 3 == 0:
                return JSONResponse({"error": {"message": "on fire"}}, status_code=500)
            case "does not stream":
                return JSONResponse({"choices": [{"text": "all of it"}]})
        return StreamingResponse(self._stream(body, "messages" in body), media_type="text/event-stream")

    async def _stream(self, body: dict[str, Any], chat: bool) -> AsyncIterator[bytes]:
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            for number, event in enumerate(events(body, chat)):
                if body["model"] == "breaks off" and number == 2:
                    raise ConnectionError("the connection closes here")
                yield event if isinstance(event, bytes) else f"data: {json.dumps(event)}\n\n".encode()
                await asyncio.sleep(0.05 if body["model"] == "slow" else STEP)
        finally:
            self.running -= 1


def count(text: str) -> int:
    """Tokens of a text here: words, of which those of over six letters are two."""
    return sum(1 + (len(word) > 6) for word in text.split())


def events(body: dict[str, Any], chat: bool) -> list[Any]:
    """Of an answer of max_tokens tokens, two a chunk; the last chunk of an odd number has one."""
    model, tokens = body["model"], body["max_tokens"]
    sizes = [2] * (tokens // 2) + [1] * (tokens % 2)
    found: list[Any] = [{"choices": [{"delta": {"role": "assistant", "content": ""}}]}] if chat else []
    told = 0
    for size in sizes:
        told += size
        choice = {"delta": {"content": "ab " * size}} if chat else {"text": "ab " * size}
        event: dict[str, Any] = {"choices": [{"index": 0, **choice, "finish_reason": None}]}
        if (body.get("stream_options") or {}).get("continuous_usage_stats"):
            event["usage"] = {"completion_tokens": told, "prompt_tokens": 7}
        found.append(event)
    if model == "says nothing":
        return [b"data: [DONE]\n\n"]
    end: dict[str, Any] = {"choices": [{"delta": {}, "text": None, "finish_reason": "length"}]}
    if model == "speculates":
        end["speculation"] = {
            "policy": "disco", "drafter": "model", "iterations": 4, "drafted": 10, "accepted": 6,
            "mean_emitted": 2.0,
        }  # fmt: skip
    if model == "llama":
        end["timings"] = {"draft_n": 8, "draft_n_accepted": 2}
    if chat or model in ("speculates", "llama"):
        found.append(end)
    usage = {"completion_tokens": tokens, "prompt_tokens": 7}
    if model == "predicts":
        usage |= {
            "completion_tokens_details": {"accepted_prediction_tokens": 3, "rejected_prediction_tokens": 1}
        }
    if model != "counts nothing" and body.get("stream_options", {}).get("include_usage"):
        found.append({"choices": [], "usage": usage})
    if model == "errs in the middle":
        found[2:] = [{"error": {"message": "on fire"}}]
    if model == "errs as llama.cpp":
        found[1:] = [b'error: {"code":500,"message":"on fire"}\n\n']
    if model in CHUNKS:
        found[-1:] = [b"data: " + CHUNKS[model] + b"\n\n"]
    if model == "leaps":
        found[:2] = [{"choices": [{"text": "a"}], "usage": {"completion_tokens": told}} for told in LEAP]
    if model == "cut lines":
        found[1:1] = [b'data: {"choices"', b":[]}\n\n"]
    if model == "talks nonsense":
        found[1] = b"data: {nonsense\n\n"
    if model != "ends without a word":
        found.append(b"data: [DONE]\n\n")
    return found


@contextmanager
def serving() -> Iterator[FakeOpenAI]:
    """One on a free port, in a thread."""
    fake = FakeOpenAI()
    listener = socket.create_server(("127.0.0.1", 0))
    fake.url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    server = uvicorn.Server(uvicorn.Config(fake.app(), log_config=None, access_log=False, lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    while not server.started:
        time.sleep(0.005)
    try:
        yield fake
    finally:
        server.should_exit = True
        thread.join()
        listener.close()
