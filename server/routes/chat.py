"""POST /v1/chat/completions."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from fastapi import APIRouter, Request, Response

from engine.types import TokenLogprob
from server.context import Context, context_of
from server.conversation import choices_of
from server.generation import Choice, Piece, generate, usage_of
from server.logprobs import chat_logprobs, prompt_logprobs
from server.openapi import documented
from server.protocol import body as bodies
from server.protocol.answers_chat import ChatAnswer, ChatChunk
from server.protocol.chat import ChatBody
from server.protocol.examples import CHAT
from server.statistics import total
from server.stream import plain, sse, timely
from server.turn import Delta, ToolDelta, TurnReader

router = APIRouter(tags=["generation"])


@router.post("/v1/chat/completions", **documented(ChatBody, ChatAnswer, chunk=ChatChunk, examples=CHAT))
async def chat_completions(request: Request) -> Response:
    """Answers a conversation; `stream` sends tokens as they come."""
    context = context_of(request)
    body = await bodies.read(request, ChatBody, context.settings)
    context.check_model(body.model)
    answer = _Answer(context, body)
    context.accept(body, answer.arrival)
    choices = await timely(request, choices_of(context, body, id=answer.id, arrival=answer.arrival))
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
        scored = choices[0].prompt_logprobs  # one prompt: the same for every choice
        if self.body.prompt_logprobs is not None and scored is not None:
            answer["prompt_logprobs"] = prompt_logprobs(self.context.table, scored, self.body.prompt_logprobs)
        return answer

    def _entry(self, choice: Choice) -> dict[str, Any]:
        entry: dict[str, Any] = {
            "index": choice.index,
            "message": _message(choice.turn),
            "logprobs": None,
            "finish_reason": choice.finish_reason,
        }
        if self.body.logprobs:
            entry["logprobs"] = self._logprobs(choice.logprobs)
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
        """Role, what is new, finish: a chunk each. What is told of tokens comes with what is new first."""
        index, body = piece.choice.index, self.body
        chunks: list[dict[str, Any]] = []
        if piece.first:
            role = self._chunk(index, {"role": "assistant", "content": ""})
            if body.return_token_ids:
                role["prompt_token_ids"] = list(piece.choice.prompt.ids)
            chunks.append(role)
        said = [self._chunk(index, delta) for delta in _deltas(piece.delta)]
        told = bool(piece.passes) and body.include_speculation
        if told or (piece.token_ids and (body.logprobs or body.return_token_ids)):
            said = said or [self._chunk(index, {"content": ""})]
            if body.logprobs:
                said[0]["choices"][0]["logprobs"] = self._logprobs(piece.logprobs)
            if body.return_token_ids:
                said[0]["choices"][0]["token_ids"] = piece.token_ids
            if told:
                said[0]["choices"][0]["passes"] = piece.choice.passes.bodies(piece.passes)
        chunks += said
        if piece.finish_reason is not None:
            last = self._chunk(index, {}, piece.finish_reason)
            chunks.append(last | {"speculation": piece.choice.speculated.body()})
        return chunks

    def _logprobs(self, logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
        return chat_logprobs(self.context.table, logprobs, as_ids=self.body.return_tokens_as_token_ids)

    def _chunk(self, index: int, delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return self.head("chat.completion.chunk") | {"choices": [choice]}


def _message(turn: TurnReader) -> dict[str, Any]:
    """A whole message. Content is null only beside calls."""
    content = None if turn.tool_calls and not turn.content else turn.content
    message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
    if turn.reasoning:
        message["reasoning_content"] = turn.reasoning
    if turn.tool_calls:
        message["tool_calls"] = [call.body() for call in turn.tool_calls]
    return message


def _deltas(delta: Delta) -> list[dict[str, Any]]:
    """What is new as deltas of one kind each: reasoning, content, pieces of calls."""
    reasoning = [{"reasoning_content": delta.reasoning}] if delta.reasoning else []
    return reasoning + [
        {"content": part} if isinstance(part, str) else {"tool_calls": [_call_delta(part)]}
        for part in delta.parts
    ]


def _call_delta(call: ToolDelta) -> dict[str, Any]:
    """A call's first delta has its id and name, later ones pieces of its arguments."""
    if call.id is None:
        return {"index": call.index, "function": {"arguments": call.arguments}}
    function = {"name": call.name, "arguments": call.arguments}
    return {"index": call.index, "id": call.id, "type": "function", "function": function}
