"""A scripted EngineClient: says what it is told to, in blocks as speculation gives them, or fails."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import msgspec

from engine.client import EngineState
from engine.types import (
    EngineUnavailable,
    GenerateRequest,
    ModelInfo,
    StepStats,
    TokenEvent,
    TokenLogprob,
)
from engine.validate import validate

EOS = 0
BLOCK = 3
Listener = Callable[[StepStats, list[TokenEvent]], None]


def logprob_of(token_id: int) -> float:
    """The made-up log-probability of a token: different for neighbours, never positive."""
    return -0.25 * (1 + token_id % 7)


class FakeEngine:
    """Answers every request with `answer`, or with `script(request)`; a first token, then blocks.

    A block of n tokens is an iteration that drafted BLOCK tokens and accepted n - 1.
    """

    def __init__(self, vocab_size: int, max_model_len: int = 96) -> None:
        self.answer: list[int] = []
        self.script: Callable[[GenerateRequest], list[int]] | None = None
        self.block = BLOCK
        self.stall_after: int | None = None  # tokens, then silence until `go_on`
        self.die_after: int | None = None  # tokens, then EngineUnavailable
        self.fail_after: int | None = None  # tokens, then finish_reason "error"
        self.masks_fail = False  # that it is the request's own masks' fault
        self.load_error: Exception | None = None
        self.hold_loading: asyncio.Event | None = None
        self.cached_tokens = 0
        self.requests: list[GenerateRequest] = []
        self.aborts = 0
        self.cuts: list[tuple[str, int]] = []
        self.stalled, self.go_on = asyncio.Event(), asyncio.Event()
        self.restarts = 0
        self.why = ""
        self.state: EngineState = "loading"
        self._listeners: list[Listener] = []
        self._kept: list[AsyncIterator[TokenEvent]] = []
        self._info = ModelInfo(
            target="fake",
            draft=None,
            vocab_size=vocab_size,
            max_model_len=max_model_len,
            eos_token_ids=(EOS,),
            bos_token_id=None,
            dtype="float32",
            device="cpu",
            kv_blocks=64,
            block_size=16,
            drafters=("ngram", "none"),
            default_drafter="ngram",
            default_policy="heuristic",
            default_options={},
            max_sl=16,
        )

    @property
    def info(self) -> ModelInfo:
        if self.state == "loading":
            raise EngineUnavailable("loading")
        return self._info

    def make_room(self, max_model_len: int) -> None:
        """Another context length, in tokens."""
        self._info = msgspec.structs.replace(self._info, max_model_len=max_model_len)

    async def start(self) -> None:
        if self.hold_loading is not None:
            await self.hold_loading.wait()
        if self.load_error is not None:
            self.state = "dead"
            raise self.load_error
        self.state = "ready"

    async def close(self) -> None:
        self.state = "closed"
        self.go_on.set()

    async def check(self, request: GenerateRequest) -> None:
        validate(request, self.info)

    def cut(self, request_id: str, n_tokens: int) -> None:
        self.cuts.append((request_id, n_tokens))

    def on_step(self, listener: Listener) -> None:
        self._listeners.append(listener)

    def generate(self, request: GenerateRequest) -> AsyncIterator[TokenEvent]:
        events = self._generate(request)
        self._kept.append(events)  # so that only closing one ends it, never the garbage collector
        return events

    async def _generate(self, request: GenerateRequest) -> AsyncIterator[TokenEvent]:
        self.requests.append(request)
        over = False
        try:
            async for event in self._events(request):
                over = event.finish_reason is not None
                self._report(event)
                yield event
                await asyncio.sleep(0)
        except EngineUnavailable:
            over = True
            raise
        finally:
            self.aborts += not over

    async def _events(self, request: GenerateRequest) -> AsyncIterator[TokenEvent]:
        params = request.params
        wanted = list(self.answer if self.script is None else self.script(request))[: params.max_tokens]
        ends = params.stop_token_ids if params.ignore_eos else (EOS, *params.stop_token_ids)
        stop_at = next((i for i, token_id in enumerate(wanted) if token_id in ends), None)
        if stop_at is not None:
            wanted = wanted[: stop_at + 1]
        if not wanted:
            yield self._event(request, [], first=True, done=True, stop=False)
        for start in (0, *range(1, len(wanted), self.block)) if wanted else ():
            if self.fail_after is not None and start >= self.fail_after:
                error = "nothing may follow" if self.masks_fail else "the logits are NaN"
                yield TokenEvent(id=request.id, finish_reason="error", error=error, refused=self.masks_fail)
                return
            if self.die_after is not None and start >= self.die_after:
                self.state = "restarting"
                raise EngineUnavailable("the engine's process died")
            if self.stall_after is not None and start >= self.stall_after:
                self.stalled.set()
                await self.go_on.wait()
                if self.state == "closed":
                    raise EngineUnavailable("the engine is closed")
            ids = wanted[start : start + 1] if start == 0 else wanted[start : start + self.block]
            done = start + len(ids) == len(wanted)
            yield self._event(request, ids, first=start == 0, done=done, stop=stop_at is not None)

    def _event(
        self, request: GenerateRequest, ids: list[int], *, first: bool, done: bool, stop: bool
    ) -> TokenEvent:
        params = request.params
        prompt_logprobs = None
        if first and params.prompt_logprobs is not None:
            prompt = request.prompt_ids[1:]
            prompt_logprobs = (None, *(_logprob(token_id, params.prompt_logprobs) for token_id in prompt))
        return TokenEvent(
            id=request.id,
            token_ids=tuple(ids),
            logprobs=None if params.logprobs is None else tuple(_logprob(i, params.logprobs) for i in ids),
            prompt_logprobs=prompt_logprobs,
            finish_reason=("stop" if stop else "length") if done else None,
            stop_token_id=ids[-1] if done and stop else None,
            policy="static",
            drafter="ngram",
            iterations=0 if first else 1,
            drafted=0 if first else self.block,
            lookahead=0 if first else self.block,
            accepted=0 if first else len(ids) - 1,
            bonus=len(ids) > self.block,
            stop_reason=None if first else "policy",
            draft_seconds=0.0 if first else 0.25,
            verify_seconds=0.0 if first else 0.5,
            cached_tokens=self.cached_tokens if first else 0,
        )

    def _report(self, event: TokenEvent) -> None:
        stats = StepStats(
            rows=1,
            emitted=len(event.token_ids),
            drafted=event.drafted,
            accepted=event.accepted,
            draft_seconds=event.draft_seconds,
            verify_seconds=event.verify_seconds,
            step_seconds=0.75,
            running=1,
            waiting=2,
            kv_blocks_used=16,
            kv_blocks_total=64,
            preemptions=3,
        )
        for listener in self._listeners:
            listener(stats, [event])


def _logprob(token_id: int, k: int) -> TokenLogprob:
    neighbours = [token_id + 1 + i for i in range(k)]
    return TokenLogprob(token_id, logprob_of(token_id), tuple((i, logprob_of(i) - 0.125) for i in neighbours))
