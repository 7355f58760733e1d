"""The bodies of POST /tokenize and POST /detokenize, as vLLM has them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field, model_validator

from engine.types import InvalidRequest
from server.protocol.base import Body
from server.protocol.body import validate
from server.protocol.chat import ChatBody, Message
from server.protocol.fields import TokenIds
from server.protocol.tools import MAX_TOOLS, ToolBody

_NAME = "a name that `GET /v1/models` lists; default: the first"
_OF_MESSAGES = ("add_generation_prompt", "continue_final_message", "tools", "chat_template_kwargs")
_LLAMA_CPP = {"content": "it is llama.cpp's name; use 'prompt'"}


class TokenizeBody(Body):
    """A text (`prompt`) or a conversation (`messages`): exactly one of them."""

    unsupported: ClassVar[Mapping[str, str]] = {
        **_LLAMA_CPP,
        "with_pieces": "it is llama.cpp's name; use 'return_token_strs'",
        "add_special": "it is llama.cpp's name; use 'add_special_tokens'",
        "mm_processor_kwargs": "only text goes in",
    }

    model: str | None = Field(None, description=_NAME)
    prompt: str | None = Field(None, description="a text")
    messages: list[Message] | None = Field(
        None, min_length=1, description="a conversation, through the model's chat template"
    )
    add_special_tokens: bool | None = Field(
        None, description="add what the tokenizer adds by itself (BOS); default: with `prompt` only"
    )
    return_token_strs: bool = Field(False, description="the tokens' own names, as the vocabulary has them")
    add_generation_prompt: bool | None = Field(
        None, description="of `messages`: the head of an answer at the end; default: unless a message goes on"
    )
    continue_final_message: bool = Field(False, description="of `messages`: leave the last message open")
    tools: list[ToolBody] = Field(
        [], max_length=MAX_TOOLS, description="of `messages`: what the template is told of tools"
    )
    chat_template_kwargs: dict[str, Any] | None = Field(
        None, description="of `messages`: variables of the template"
    )

    @model_validator(mode="after")
    def _text_or_messages(self) -> TokenizeBody:
        if (self.prompt is None) == (self.messages is None):
            raise InvalidRequest("exactly one of 'prompt' and 'messages' is needed", "prompt")
        for name in _OF_MESSAGES:
            if self.prompt is not None and getattr(self, name):
                raise InvalidRequest(f"'{name}' is allowed only with 'messages'", name)
        if self.messages is not None and self.add_special_tokens:
            message = "'add_special_tokens' is not allowed with 'messages': the template writes them itself"
            raise InvalidRequest(message, "add_special_tokens")
        return self

    def chat(self, model: str) -> ChatBody:
        """The conversation as the request for an answer would have it. Raises InvalidRequest."""
        given = {name: getattr(self, name) for name in ("messages", *_OF_MESSAGES)}
        return validate(ChatBody, {"model": model} | {k: v for k, v in given.items() if v is not None})


class DetokenizeBody(Body):
    """Token ids of any number."""

    unsupported: ClassVar[Mapping[str, str]] = _LLAMA_CPP

    model: str | None = Field(None, description=_NAME)
    tokens: TokenIds = Field(description="token ids, below the size of the vocabulary")
