"""From engine events to pieces of text: one `Choice` per sequence, many choices at once."""

from __future__ import annotations

import asyncio
from bisect import bisect_left
from collections.abc import AsyncGenerator, Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import anyio

from engine.client import EngineClient
from engine.types import (
    EngineUnavailable,
    GenerateRequest,
    InvalidRequest,
    RequestFailed,
    TokenEvent,
    TokenLogprob,
)
from server import admission
from server.detokenize import TextStream
from server.metrics import Metrics
from server.metrics_ledger import Reason
from server.passes import Passes
from server.record import current
from server.render import Prompt
from server.statistics import Speculated, total, usage
from server.turn import Delta, TurnReader
from server.turns import others_turn

Ending = Literal["stop", "length", "tool_calls"]


@dataclass(frozen=True)
class Piece:
    """What may be shown of a choice since the last piece. The last one has a `finish_reason`."""

    choice: Choice
    text: str
    delta: Delta  # the same text as a chat's client is told of it
    token_ids: list[int]
    logprobs: list[TokenLogprob]  # one per token id if the request asks for them, else empty
    offsets: list[int]  # where each token begins in the choice's text
    first: bool
    finish_reason: Ending | None
    passes: range = range(0)  # passes of the target that may be told now; see `Choice.passes`


class Choice:
    """One sequence: its request, and what has come of it so far.

    `turn` reads the text as a chat's answer; tokens in `hidden` have no text.
    """

    def __init__(
        self,
        index: int,
        request: GenerateRequest,
        prompt: Prompt,
        stream: TextStream,
        include_stop: bool,
        turn: TurnReader | None = None,
        hidden: Collection[int] = (),
    ) -> None:
        self.index, self.request, self.prompt = index, request, prompt
        self.turn = TurnReader() if turn is None else turn
        self._hidden = hidden
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.prompt_logprobs: Sequence[TokenLogprob | None] | None = None
        self.cached_tokens = 0
        self.finish_reason: Ending | None = None
        self.speculated = Speculated()
        self._stream = stream
        self._include_stop = include_stop
        self._blocks: list[TokenEvent] = []
        self.passes = Passes(self._blocks, self.token_ids, stream)
        self._shown = self._shown_tokens = 0
        self._begun = False

    @property
    def text(self) -> str:
        return self._stream.text

    @property
    def offsets(self) -> list[int]:
        return self._stream.starts

    @property
    def events(self) -> Sequence[TokenEvent]:
        """What the engine gave so far."""
        return self._blocks

    @property
    def shown_tokens(self) -> int:
        """Tokens in the pieces so far; all that count once it is finished."""
        return self._shown_tokens

    @property
    def reasoning_tokens(self) -> int:
        """How many of the tokens shown are reasoning; they come first."""
        end = self.turn.reasoning_end
        return self._shown_tokens if end is None else min(bisect_left(self.offsets, end), self._shown_tokens)

    def tokens_of(self, start: int, end: int) -> range:
        """The tokens that have a part of the text from `start` to before `end`, which is not empty."""
        first = bisect_left(self.offsets, start)
        if first == len(self.offsets) or self.offsets[first] > start:
            first -= 1  # its text begins before
        return range(first, bisect_left(self.offsets, end))

    def take(self, event: TokenEvent) -> Piece | None:
        """Takes one event in; None if it gives nothing to show yet.

        Raises RequestFailed and EngineUnavailable if the event says that the engine gave up, and
        InvalidRequest if nothing can follow the request's own grammar and masks.
        """
        if event.finish_reason == "error" and event.refused:
            raise InvalidRequest(event.error or "nothing may follow", None, "no_token_allowed")
        if event.finish_reason == "error":
            raise RequestFailed(event.error or "the engine gave up this request")
        if event.finish_reason == "abort":
            raise EngineUnavailable("the engine aborted this request")
        self.cached_tokens += event.cached_tokens
        if event.prompt_logprobs is not None:
            self.prompt_logprobs = event.prompt_logprobs
        self._read(event)
        if event.finish_reason is not None and not self._stream.finish():
            self.finish_reason = event.finish_reason
        if self._stream.stopped:
            self.finish_reason = "stop"
            kept = len(self._stream.starts)  # the stop string takes its tokens with it
            del self.token_ids[kept:], self.logprobs[kept:]
        self._account(event)
        return self._piece()

    def _read(self, event: TokenEvent) -> None:
        self.token_ids += event.token_ids
        self.logprobs += event.logprobs or ()
        last = len(event.token_ids) - 1
        for i, token_id in enumerate(event.token_ids):
            ends = event.stop_token_id is not None and i == last
            silent = (ends and not self._include_stop) or token_id in self._hidden
            if self._stream.push(token_id, silent=silent):
                return

    def _piece(self) -> Piece | None:
        start, end = self._shown, self._stream.safe
        first_token, last_token = self._shown_tokens, self._stream.safe_tokens
        if self.finish_reason is None and start == end and first_token == last_token and self._begun:
            return None
        text = self.text[start:end]
        delta = self.turn.push(text, final=self.finish_reason is not None)
        if self.finish_reason == "stop" and self.turn.called:
            self.finish_reason = "tool_calls"
        piece = Piece(
            choice=self,
            text=text,
            delta=delta,
            token_ids=self.token_ids[first_token:last_token],
            logprobs=self.logprobs[first_token:last_token],
            offsets=self.offsets[first_token:last_token],
            first=not self._begun,
            finish_reason=self.finish_reason,
            passes=self.passes.news(last=self.finish_reason is not None),
        )
        self._shown, self._shown_tokens, self._begun = end, last_token, True
        return piece

    def _account(self, event: TokenEvent) -> None:
        """Keeps `speculated` the sum over the events, without tokens that a stop string took."""
        self._blocks.append(event)
        if not self._stream.stopped:
            self.speculated.add(event, len(event.token_ids))
            return
        self.speculated = Speculated()  # the cut may reach into earlier events
        room = len(self.token_ids)
        for block in self._blocks:
            kept = min(len(block.token_ids), room)
            room -= kept
            self.speculated.add(block, kept)

    def mean_logprob(self) -> float:
        """Mean log-probability in nats of its tokens; of nothing, the worst there is."""
        if not self.logprobs:
            return float("-inf")
        return sum(logprob.logprob for logprob in self.logprobs) / len(self.logprobs)


def usage_of(choices: Sequence[Choice], answered: Sequence[Choice] | None = None) -> dict[str, Any]:
    """Usage of a request so far: each prompt once, and the tokens shown of those `answered`; None: of all."""
    answered = choices if answered is None else answered
    by_prompt = {id(choice.prompt): choice for choice in reversed(choices)}  # the first choice of each
    prompts = sum(len(choice.prompt.ids) for choice in by_prompt.values())
    cached = sum(choice.cached_tokens for choice in by_prompt.values())
    tokens = sum(choice.shown_tokens for choice in answered)
    told = usage(prompts, cached, tokens, total(choice.speculated for choice in answered))
    if any(choice.prompt.place is not None for choice in answered):
        reasoning = sum(choice.reasoning_tokens for choice in answered)
        told["completion_tokens_details"]["reasoning_tokens"] = reasoning
    return told


async def generate(
    engine: EngineClient, choices: Sequence[Choice], metrics: Metrics
) -> AsyncGenerator[Piece, None]:
    """Runs all choices at once; pieces come as they are made. Closing it aborts what still runs.

    Raises what the first choice to fail raised: InvalidRequest, EngineUnavailable, RequestFailed; and
    ApiError when the request's time is over, or the server's.
    """
    pieces: asyncio.Queue[Piece | Exception] = asyncio.Queue()
    tasks: list[asyncio.Task[None]] = []
    record = current()
    record.begin(choices)
    lost: Reason | None = "aborted"

    def stop(error: Exception) -> None:
        """The engine is free at once, however slowly the client reads."""
        for task in tasks:
            task.cancel()
        pieces.put_nowait(error)

    stops = ExitStack()
    stops.enter_context(admission.current().stopping(stop))
    try:
        for choice in choices:
            tasks.append(asyncio.create_task(_run(engine, choice, metrics, pieces)))
            await others_turn(len(tasks))
        running, taken = len(tasks), 0
        while running:
            piece = await pieces.get()
            if isinstance(piece, Exception):
                lost = "error"
                raise piece
            if piece.choice.token_ids:
                record.first_token()
            running -= piece.finish_reason is not None
            yield piece
            taken += 1
            await others_turn(taken)
        lost = None
    finally:
        stops.close()
        for task in tasks:
            task.cancel()
        with anyio.CancelScope(shield=True):  # a client that left must not cut the aborts short
            await asyncio.gather(*tasks, return_exceptions=True)
        for choice in choices:
            kept = len(choice.token_ids) if lost is None else 0
            metrics.ledger.settle(choice.request.id, kept, lost or "stop_string")


async def _run(
    engine: EngineClient, choice: Choice, metrics: Metrics, pieces: asyncio.Queue[Piece | Exception]
) -> None:
    outcome = "abort"  # what stands if this task is cancelled
    metrics.in_flight.inc()
    metrics.prompt_tokens.inc(len(choice.prompt.ids))
    metrics.ledger.begin(choice.request.id, engine.restarts)
    try:
        last = await _follow(engine, choice, metrics, pieces)
        outcome = "stop" if last.finish_reason == "tool_calls" else str(last.finish_reason)
        pieces.put_nowait(last)
    except Exception as error:  # handed to `generate`, which raises it where the answer is made
        outcome = "error"
        if isinstance(error, EngineUnavailable | InvalidRequest | RequestFailed):
            metrics.ledger.over(choice.request.id)  # it is the engine that ended it
        pieces.put_nowait(error)
    finally:
        admission.current().left(choice.request.id)
        metrics.in_flight.dec()
        metrics.requests.labels(outcome).inc()


async def _follow(
    engine: EngineClient, choice: Choice, metrics: Metrics, pieces: asyncio.Queue[Piece | Exception]
) -> Piece:
    """Reads the events of one choice; returns its last piece once the engine's side is closed."""
    times = metrics.times.of(choice.request.arrival)
    events = engine.generate(choice.request)
    try:
        async for event in events:
            times.take(event)
            piece = choice.take(event)
            if piece is not None and piece.finish_reason is not None:
                times.end()
                if event.finish_reason is None:  # a stop string, of which the engine knows nothing
                    engine.cut(choice.request.id, len(choice.token_ids))
                return piece
            if piece is not None:
                pieces.put_nowait(piece)
    finally:
        if isinstance(events, AsyncGenerator):
            await events.aclose()  # where its end has not come, this aborts the engine's request
    raise EngineUnavailable("the engine ended this request without a last event")
