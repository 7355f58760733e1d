"""POST /v1/completions."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from fastapi import APIRouter, Request, Response

from engine.types import GenerateRequest, TokenLogprob
from server.context import Context, context_of
from server.detokenize import TextStream
from server.generation import Choice, Piece, generate, usage_of
from server.logprobs import completion_logprobs, prompt_logprobs
from server.openapi import documented
from server.protocol import body as bodies
from server.protocol.answers import CompletionAnswer, CompletionChunk
from server.protocol.common import Masks
from server.protocol.completions import CompletionBody
from server.protocol.examples import COMPLETION
from server.render import Prompt
from server.statistics import total
from server.stream import plain, sse, timely
from server.turn import Delta
from server.turns import others_turn

router = APIRouter(tags=["generation"])


@router.post(
    "/v1/completions",
    **documented(CompletionBody, CompletionAnswer, chunk=CompletionChunk, examples=COMPLETION),
)
async def completions(request: Request) -> Response:
    """Continues one or several prompts; `stream` sends tokens as they come."""
    context = context_of(request)
    body = await bodies.read(request, CompletionBody, context.settings)
    context.check_model(body.model)
    info = context.ready()
    answer = _Answer(context, body)
    context.accept(body, answer.arrival)
    special = body.add_special_tokens
    prompts = await context.renderer.prompts(body.prompt, info.max_model_len, special=special)
    choices = await timely(request, answer.choices(prompts))
    if body.stream:
        return sse(answer.chunks(choices), context.settings.shutdown_seconds)
    return await plain(request, answer.whole(choices))


@dataclass
class _Answer:
    """One request's answer, streamed or whole."""

    context: Context
    body: CompletionBody
    id: str = field(default_factory=lambda: f"cmpl-{uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))
    arrival: float = field(default_factory=time.monotonic)

    async def choices(self, prompts: list[Prompt]) -> list[Choice]:
        """All candidates of all prompts. Raises InvalidRequest if the engine would refuse any."""
        masks = self.context.masks(self.body, await self.context.grammar(self.body))
        numbers = range(self.body.candidates)
        own = [(prompt, i) for prompt in prompts for i in numbers]
        requests: list[GenerateRequest] = []
        for prompt, i in own:
            requests.append(self._request(f"{self.id}-{len(requests)}", prompt, i, masks))
            await others_turn(len(requests))
        choices: list[Choice] = []
        for request, (prompt, _) in zip(await self.context.admit(requests), own, strict=True):
            text = self.context.text_stream(self.body, prompt.ids)
            include_stop = self.body.include_stop_str_in_output
            choices.append(Choice(len(choices), request, prompt, text, include_stop))
            await others_turn(len(choices))
        return choices

    def _request(self, id: str, prompt: Prompt, choice: int, masks: Masks) -> GenerateRequest:
        body = self.body
        return GenerateRequest(
            id=id,
            prompt_ids=prompt.ids,
            params=body.sampling(
                choice=choice,
                max_tokens=body.max_tokens,
                # without them there is no telling which candidate is the best
                logprobs=0 if body.logprobs is None and body.candidates > body.n else body.logprobs,
                prompt_logprobs=body.scored,
                masks=masks,
            ),
            speculation=body.speculation.params(),
            priority=body.priority,
            arrival=self.arrival,
            cache_salt=body.cache_salt,
        )

    def head(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.body.model,
        }

    async def whole(self, choices: list[Choice]) -> dict[str, Any]:
        async with aclosing(generate(self.context.engine, choices, self.context.metrics)) as pieces:
            async for _ in pieces:
                pass
        best = self._best(choices)
        made, told = (sum(len(choice.token_ids) for choice in some) for some in (choices, best))
        self.context.metrics.ledger.discard(made - told, "best_of")
        entries = [self._entry(index, choice) for index, choice in enumerate(best)]
        if len(entries) > 1:
            for entry, choice in zip(entries, best, strict=True):
                entry["speculation"] = choice.speculated.body()
        speculation = total(choice.speculated for choice in choices).body()
        usage = usage_of(choices, best)
        return {**self.head(), "choices": entries, "usage": usage, "speculation": speculation}

    def _best(self, choices: list[Choice]) -> list[Choice]:
        """The `n` of each prompt's candidates with the highest mean log-probability."""
        step, n = self.body.candidates, self.body.n
        if step == n:
            return choices
        best: list[Choice] = []
        for start in range(0, len(choices), step):
            ranked = sorted(choices[start : start + step], key=Choice.mean_logprob, reverse=True)
            best += ranked[:n]
        return best

    def _entry(self, index: int, choice: Choice) -> dict[str, Any]:
        """A choice as a whole: as one piece that holds everything."""
        everything = Piece(
            choice=choice,
            text=choice.text,
            delta=Delta(),  # of chats
            token_ids=choice.token_ids,
            logprobs=choice.logprobs,
            offsets=choice.offsets,
            first=True,
            finish_reason=choice.finish_reason,
        )
        return self._piece(index, everything)

    def _piece(self, index: int, piece: Piece) -> dict[str, Any]:
        """A piece as an entry of `choices`; the first one has the prompt in front, if echoed."""
        body, choice = self.body, piece.choice
        echo = self._echo(choice.prompt) if body.echo else ""
        entry: dict[str, Any] = {
            "index": index,
            "text": (echo if piece.first else "") + piece.text,
            "logprobs": None,
            "finish_reason": piece.finish_reason,
        }
        if body.logprobs is not None:
            offsets = [len(echo) + offset for offset in piece.offsets]
            entry["logprobs"] = self._logprobs(piece.token_ids, piece.logprobs, offsets)
            if body.echo and piece.first:
                own = entry["logprobs"]
                entry["logprobs"] = {k: v + own[k] for k, v in self._prompt_logprobs(choice).items()}
        if body.prompt_logprobs is not None:
            scores = _scores_of(choice)
            entry["prompt_logprobs"] = prompt_logprobs(self.context.table, scores, body.prompt_logprobs)
        if body.return_token_ids:
            entry["token_ids"] = piece.token_ids
            if piece.first:
                entry["prompt_token_ids"] = list(choice.prompt.ids)
        if body.include_speculation:
            entry["passes"] = choice.passes.bodies(piece.passes)
        return entry

    def _echo(self, prompt: Prompt) -> str:
        """The prompt as the client wrote it; ids as the tokenizer writes them."""
        if prompt.text is not None:
            return prompt.text
        skip = self.body.skip_special_tokens
        return self.context.tokenizer.decode(list(prompt.ids), skip_special_tokens=skip)

    def _prompt_logprobs(self, choice: Choice) -> dict[str, Any]:
        prompt = choice.prompt
        skip = self.body.skip_special_tokens and prompt.text is None  # a text is echoed as it was written
        text = TextStream(self.context.tokenizer, skip_special_tokens=skip)
        for token_id in prompt.ids:
            text.push(token_id)
        added = 0  # what the tokenizer puts before a text, and the echo has not
        if prompt.text is not None and text.text.endswith(prompt.text):
            added = len(text.text) - len(prompt.text)
        offsets = [max(0, start - added) for start in text.starts]
        return self._logprobs(prompt.ids, _scores_of(choice), offsets)

    def _logprobs(
        self, ids: Sequence[int], logprobs: Sequence[TokenLogprob | None], offsets: Sequence[int]
    ) -> dict[str, Any]:
        as_ids = self.body.return_tokens_as_token_ids
        top = self.body.logprobs
        return completion_logprobs(self.context.table, ids, logprobs, offsets, top=top, as_ids=as_ids)

    async def chunks(self, choices: list[Choice]) -> AsyncGenerator[dict[str, Any], None]:
        body, head = self.body, self.head()
        async with aclosing(generate(self.context.engine, choices, self.context.metrics)) as pieces:
            async for piece in pieces:
                if not self._worth_sending(piece):
                    continue
                chunk = {**head, "choices": [self._piece(piece.choice.index, piece)]}
                if body.continuous_usage:
                    chunk["usage"] = usage_of(choices)
                elif body.include_usage:
                    chunk["usage"] = None
                if piece.finish_reason is not None:
                    chunk["speculation"] = piece.choice.speculated.body()
                yield chunk
        if body.include_usage:
            yield {**head, "choices": [], "usage": usage_of(choices)}

    def _worth_sending(self, piece: Piece) -> bool:
        body = self.body
        tokens_shown = bool(piece.token_ids) and (body.logprobs is not None or body.return_token_ids)
        wanted = piece.first and (body.echo or body.return_token_ids)
        told = bool(piece.passes) and body.include_speculation
        return bool(piece.text or piece.finish_reason or tokens_shown or wanted or told)


def _scores_of(choice: Choice) -> Sequence[TokenLogprob | None]:
    if choice.prompt_logprobs is None:
        raise RuntimeError("the engine sent no log-probabilities of the prompt")
    return choice.prompt_logprobs
