"""POST /v1/responses: text in and out, tools, structured text. Nothing is kept."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request, Response

from engine.types import InvalidRequest
from server.context import Context, context_of
from server.conversation import choices_of
from server.errors import to_api_error
from server.generation import Choice, Piece, generate
from server.logprobs import chat_logprobs, prompt_logprobs
from server.openapi import documented
from server.protocol import body as bodies
from server.protocol.responses import ResponsesBody
from server.protocol.responses_answer import ResponsesAnswer, ResponsesEvent
from server.protocol.responses_examples import RESPONSES
from server.responses_chat import chat_body, renamed
from server.responses_events import Event, Logprobs, Output, Status
from server.responses_object import ResponseObject
from server.responses_stream import named_events
from server.stream import plain, timely

router = APIRouter(tags=["generation"])


@router.post(
    "/v1/responses",
    **documented(ResponsesBody, ResponsesAnswer, chunk=ResponsesEvent, examples=RESPONSES, done=False),
)
async def responses(request: Request) -> Response:
    """Answers a conversation given as items; `stream` sends events as the answer grows."""
    context = context_of(request)
    body = await bodies.read(request, ResponsesBody, context.settings)
    context.check_model(body.model)
    arrival = time.monotonic()
    context.accept(body, arrival)
    answer = _Answer(context, body, arrival)
    choice = await timely(request, answer.choice())
    if body.stream:
        return named_events(answer.events(choice), context.settings.shutdown_seconds)
    return await plain(request, answer.whole(choice))


class _Answer:
    """One request's answer, streamed or whole: the whole one is the stream's last state."""

    def __init__(self, context: Context, body: ResponsesBody, arrival: float) -> None:
        self._context, self._body, self._arrival = context, body, arrival
        self._chat = chat_body(body)
        self._object = ResponseObject(body)
        self._output = Output()
        self._told = 0  # tokens whose log-probabilities are told, or passed over
        self._status: Status = "completed"

    async def choice(self) -> Choice:
        """The one choice. Raises InvalidRequest if the engine, the template or the grammar refuses it."""
        try:
            choices = await choices_of(self._context, self._chat, id=self._object.id, arrival=self._arrival)
        except InvalidRequest as error:
            raise renamed(error) from error
        return choices[0]

    async def whole(self, choice: Choice) -> dict[str, Any]:
        async for _ in self._growth(choice):
            pass
        return self._ended(choice)

    async def events(self, choice: Choice) -> AsyncGenerator[Event, None]:
        """All events. What goes wrong is told as `error` and `response.failed`: the status is out."""
        yield {"type": "response.created", "response": self._object.started()}
        yield {"type": "response.in_progress", "response": self._object.started()}
        try:
            async with aclosing(self._growth(choice)) as growth:
                async for event in growth:
                    yield event
            last = {"type": f"response.{self._status}", "response": self._ended(choice)}
        except Exception as error:
            fault = to_api_error(error)
            yield {"type": "error", "code": fault.code, "message": fault.message, "param": fault.param}
            failed = self._object.failed(self._output.items("incomplete"), fault)
            last = {"type": "response.failed", "response": failed}
        yield last

    async def _growth(self, choice: Choice) -> AsyncGenerator[Event, None]:
        """The events of the output items. Closing it aborts the generation."""
        context = self._context
        async with aclosing(generate(context.engine, [choice], context.metrics)) as pieces:
            async for piece in pieces:
                for event in self._take(piece):
                    yield event

    def _take(self, piece: Piece) -> list[Event]:
        choice = piece.choice
        told: list[Logprobs] = []
        if self._body.logprobs:
            told = [self._logprobs(choice, choice.tokens_of(*span)) for span in piece.delta.spans]
        events = self._output.push(piece.delta, told)
        if piece.finish_reason is not None:
            self._status = "incomplete" if piece.finish_reason == "length" else "completed"
            events += self._output.finish(self._status, self._last_logprobs(choice))
        return events

    def _logprobs(self, choice: Choice, tokens: range) -> Logprobs:
        """Of those of `tokens` that have not been told: the text of one may be in two pieces."""
        untold = choice.logprobs[max(tokens.start, self._told) : tokens.stop]
        self._told = max(self._told, tokens.stop)
        as_ids = self._body.return_tokens_as_token_ids
        told: Logprobs = chat_logprobs(self._context.table, untold, as_ids=as_ids)["content"]
        return told

    def _last_logprobs(self, choice: Choice) -> Logprobs:
        """Of the tokens after all text, unless they end the reasoning."""
        if not self._body.logprobs or choice.turn.reasoning_end is None:
            return ()
        first = bisect_left(choice.offsets, len(choice.text))
        return self._logprobs(choice, range(first, len(choice.offsets)))

    def _ended(self, choice: Choice) -> dict[str, Any]:
        result = self._object.ended(self._status, self._output.items(), choice)
        if choice.prompt_logprobs is not None and self._body.prompt_logprobs is not None:
            result["prompt_logprobs"] = prompt_logprobs(
                self._context.table, choice.prompt_logprobs, self._body.prompt_logprobs
            )
        return result
