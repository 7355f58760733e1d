"""Prompts and messages to token ids, and the checks that need their number."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from transformers import PreTrainedTokenizerBase

from engine.types import InvalidRequest, ModelInfo
from server.chat_template import ChatTemplate
from server.protocol.chat import ChatBody
from server.reasoning import Place, place_after, place_within, thinks
from server.record import current

T = TypeVar("T")


@dataclass(frozen=True)
class Prompt:
    """Token ids, and the text that they were made of (None if the client sent ids).

    `place`: of a chat whose template has think tags, where in them the answer begins.
    """

    ids: tuple[int, ...]
    text: str | None
    place: Place | None = None


class Renderer:
    """Encodes on a thread of its own: a long prompt must not hold up the streams of others."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, tool_format: str = "auto") -> None:
        """`tool_format`: a name of `server.tools`, or auto. Raises ValueError for an unknown one."""
        self._tokenizer = tokenizer
        self.template = ChatTemplate(tokenizer, tool_format)
        self._longest = max(len(token.encode()) for token in tokenizer.get_vocab())
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tokenize")

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)

    async def prompts(
        self, items: Sequence[str | list[int]], context: int, *, special: bool = True
    ) -> list[Prompt]:
        """Prompts of a completion: strings get the special tokens that the tokenizer adds by itself,
        unless `special` is False.

        Raises InvalidRequest for a text that cannot fit `context` tokens, without encoding it.
        """
        for item in items:
            if isinstance(item, str):
                self._check_length(item, context, "prompt")
        prompts = await self._run(lambda: [self._prompt(item, special) for item in items])
        current().rendered = prompts
        return prompts

    async def chat(self, body: ChatBody, context: int) -> Prompt:
        """Messages through the model's chat template. Raises InvalidRequest with the template's message,
        or for a text that cannot fit `context` tokens, without encoding it."""
        prompt = await self._run(lambda: self._chat(body, context))
        current().rendered = [prompt]
        return prompt

    def _check_length(self, text: str, context: int, param: str) -> None:
        """No token stands for more bytes than the longest one: a text may be refused without encoding it."""
        if len(text) > context * self._longest:
            message = (
                f"the model's context is {context} tokens; a text of {len(text)} characters cannot fit it"
            )
            raise InvalidRequest(message, param, "context_length_exceeded")

    async def _run(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def _prompt(self, item: str | list[int], special: bool) -> Prompt:
        if isinstance(item, str):
            return Prompt(self._encode(item, special=special), item)
        return Prompt(tuple(item), None)

    def _chat(self, body: ChatBody, context: int) -> Prompt:
        text = self.template.render(body)
        self._check_length(text, context, "messages")
        place = None
        if thinks(self.template.text):
            going_on = body.continue_final_message
            place = place_within(body.messages[-1].text) if going_on else place_after(text)
        # the template writes BOS and the like itself
        return Prompt(self._encode(text, special=False), None, place)

    def _encode(self, text: str, *, special: bool) -> tuple[int, ...]:
        return tuple(self._tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])


def room_left(prompt: Prompt, info: ModelInfo) -> int:
    """Tokens that the context still holds after the prompt. Raises InvalidRequest if none."""
    room = info.max_model_len - len(prompt.ids)
    if room < 1:
        message = (
            f"the model's context is {info.max_model_len} tokens; the messages take {len(prompt.ids)} "
            "and leave no room for an answer"
        )
        raise InvalidRequest(message, "messages", "context_length_exceeded")
    return room
