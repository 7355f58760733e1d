"""POST /v1/chat/completions."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from fastapi import APIRouter, Request, Response

from engine.types import GenerateRequest
from server.context import Context, context_of
from server.generation import Choice, Piece, check_all, generate, usage_of
from server.logprobs import chat_logprobs
from server.openapi import body_schema
from server.protocol import body as bodies
from server.protocol.chat import ChatBody
from server.render import Prompt, room_left
from server.statistics import total
from server.stream import plain, sse

router = APIRouter()


@router.post("/v1/chat/completions", openapi_extra=body_schema(ChatBody))
async def chat_completions(request: Request) -> Response:
    """Answers a conversation; `stream` sends tokens as they come."""
    context = context_of(request)
    body = await bodies.read(request, ChatBody, context.settings.max_body_bytes)
    context.check_model(body.model)
    info = context.ready()
    answer = _Answer(context, body)
    prompt = await context.renderer.chat(body, info.max_model_len)
    max_tokens = room_left(prompt, info) if body.limit is None else body.limit
    choices = await answer.choices(prompt, max_tokens)
    if body.stream:
        return sse(answer.chunks(choices), context.settings.shutdown_seconds)
    return await plain(request, answer.whole(choices))


@dataclass
class _Answer:
    """One request's answer, streamed or whole."""

    context: Context
    body: ChatBody
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))
    arrival: float = field(default_factory=time.monotonic)

    async def choices(self, prompt: Prompt, max_tokens: int) -> list[Choice]:
        """All `n` choices. Raises InvalidRequest if the engine would refuse any."""
        body = self.body
        requests = [self._request(i, prompt, max_tokens) for i in range(body.n)]
        await check_all(self.context.engine, requests)
        # an answer begins a text of its own, unless it goes on with a message's
        continues = prompt.ids if body.continue_final_message else ()
        include_stop = body.include_stop_str_in_output
        return [
            Choice(i, request, prompt, self.context.text_stream(body, continues), include_stop)
            for i, request in enumerate(requests)
        ]

    def _request(self, index: int, prompt: Prompt, max_tokens: int) -> GenerateRequest:
        body = self.body
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        return GenerateRequest(
            id=f"{self.id}-{index}",
            prompt_ids=prompt.ids,
            params=body.sampling(choice=index, max_tokens=max_tokens, logprobs=logprobs),
            speculation=body.speculation.params(),
            priority=body.priority,
            arrival=self.arrival,
            cache_salt=body.cache_salt,
        )

    def head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.body.model}

    async def whole(self, choices: list[Choice]) -> dict[str, Any]:
        async with aclosing(generate(self.context.engine, choices, self.context.metrics)) as pieces:
            async for _ in pieces:
                pass
        entries = [self._entry(choice) for choice in choices]
        if len(entries) > 1:
            for entry, choice in zip(entries, choices, strict=True):
                entry["speculation"] = choice.speculated.body()
        answer = self.head("chat.completion") | {
            "choices": entries,
            "usage": usage_of(choices),
            "speculation": total(choice.speculated for choice in choices).body(),
        }
        if self.body.return_token_ids:
            answer["prompt_token_ids"] = list(choices[0].prompt.ids)
        return answer

    def _entry(self, choice: Choice) -> dict[str, Any]:
        entry: dict[str, Any] = {
            "index": choice.index,
            "message": {"role": "assistant", "content": choice.text, "refusal": None},
            "logprobs": None,
            "finish_reason": choice.finish_reason,
        }
        if self.body.logprobs:
            entry["logprobs"] = chat_logprobs(self.context.table, choice.logprobs)
        if self.body.return_token_ids:
            entry["token_ids"] = choice.token_ids
        return entry

    async def chunks(self, choices: list[Choice]) -> AsyncGenerator[dict[str, Any], None]:
        async with aclosing(generate(self.context.engine, choices, self.context.metrics)) as pieces:
            async for piece in pieces:
                for chunk in self._chunks_of(piece):
                    if self.body.continuous_usage:
                        chunk["usage"] = usage_of(choices)
                    elif self.body.include_usage:
                        chunk["usage"] = None
                    yield chunk
        if self.body.include_usage:
            yield self.head("chat.completion.chunk") | {"choices": [], "usage": usage_of(choices)}

    def _chunks_of(self, piece: Piece) -> list[dict[str, Any]]:
        """Role, content, finish: a piece has one to three of them, each a chunk of its own."""
        index, body = piece.choice.index, self.body
        chunks: list[dict[str, Any]] = []
        if piece.first:
            role = self._chunk(index, {"role": "assistant", "content": ""})
            if body.return_token_ids:
                role["prompt_token_ids"] = list(piece.choice.prompt.ids)
            chunks.append(role)
        if piece.text or (piece.token_ids and (body.logprobs or body.return_token_ids)):
            chunk = self._chunk(index, {"content": piece.text})
            if body.logprobs:
                chunk["choices"][0]["logprobs"] = chat_logprobs(self.context.table, piece.logprobs)
            if body.return_token_ids:
                chunk["choices"][0]["token_ids"] = piece.token_ids
            chunks.append(chunk)
        if piece.finish_reason is not None:
            last = self._chunk(index, {}, piece.finish_reason)
            chunks.append(last | {"speculation": piece.choice.speculated.body()})
        return chunks

    def _chunk(self, index: int, delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return self.head("chat.completion.chunk") | {"choices": [choice]}
