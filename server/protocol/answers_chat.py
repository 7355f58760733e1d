"""What POST /v1/chat/completions answers, for the OpenAPI page; tests hold the answers to it."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from server.protocol.answers import FINISH, PASSES, Answer, Pass, PromptLogprob, Speculated, Usage

_CHAT_FINISH = f"{FINISH}; tool_calls: the answer calls tools"


class ChatLogprob(Answer):
    """A token and its log-probability, the target's own, in nats."""

    token: str
    logprob: float = Field(le=0)
    bytes: list[int] = Field(description="of the token's text, which may be half a character")


class ChosenChatLogprob(ChatLogprob):
    """A token of the answer, and the likeliest at its place."""

    top_logprobs: list[ChatLogprob]


class ChatLogprobs(Answer):
    """One entry for each token."""

    content: list[ChosenChatLogprob]
    refusal: None


class FunctionCall(Answer):
    name: str
    arguments: str = Field(description="JSON, as the model wrote it")


class ToolCallAnswer(Answer):
    """A call of one of the request's tools."""

    id: str
    type: Literal["function"]
    function: FunctionCall


class ChatMessageAnswer(Answer):
    """The whole answer's message."""

    role: Literal["assistant"]
    content: str | None = Field(description="null only beside tool calls")
    refusal: None
    reasoning_content: str | None = Field(None, description="what stood between think tags, if anything did")
    tool_calls: list[ToolCallAnswer] | None = Field(None, min_length=1)


class ChatChoice(Answer):
    """One answer."""

    index: int = Field(ge=0)
    message: ChatMessageAnswer
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"] = Field(description=_CHAT_FINISH)
    token_ids: list[int] | None = Field(None, description="with `return_token_ids`")
    speculation: Speculated | None = Field(None, description="of this choice, if there are several")


class ChatAnswer(Answer):
    """The whole answer of POST /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int = Field(description="seconds since 1970")
    model: str = Field(description="the name that was asked for")
    choices: list[ChatChoice]
    usage: Usage
    speculation: Speculated = Field(description="over all choices")
    prompt_token_ids: list[int] | None = Field(None, description="with `return_token_ids`")
    prompt_logprobs: list[dict[str, PromptLogprob] | None] | None = Field(
        None, description="with `prompt_logprobs`: by token id; null for the first token"
    )


class FunctionDelta(Answer):
    name: str | None = Field(None, description="in a call's first delta")
    arguments: str = Field(description="the next piece of its JSON")


class ToolCallDelta(Answer):
    """What is new of a call: `id`, `type` and name come first, then pieces of its arguments."""

    index: int = Field(ge=0)
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionDelta


class ChatDelta(Answer):
    """What is new; empty with the `finish_reason`."""

    role: Literal["assistant"] | None = Field(None, description="in a choice's first chunk only")
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCallDelta] | None = Field(None, min_length=1)


class ChatChunkChoice(Answer):
    """What is new of one choice."""

    index: int = Field(ge=0)
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"] | None = Field(description=_CHAT_FINISH)
    token_ids: list[int] | None = Field(None, description="with `return_token_ids`")
    passes: list[Pass] | None = Field(None, description=PASSES)


class ChatChunk(Answer):
    """The data of one event of a streamed chat; the last event is `[DONE]`."""

    missing_or_null: ClassVar[frozenset[str]] = frozenset({"usage"})

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice] = Field(max_length=1, description="none in the chunk that has the usage")
    usage: Usage | None = Field(None, description="with `include_usage`: null but for the last chunk")
    speculation: Speculated | None = Field(None, description="with a choice's `finish_reason`")
    prompt_token_ids: list[int] | None = Field(None, description="with `return_token_ids`, first")
