"""The body of POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from engine.types import InvalidRequest
from server.grammar import Structure
from server.protocol.common import GenerationBody
from server.protocol.fields import Only
from server.protocol.messages import Message, check_calls
from server.protocol.parts import TEXT_ONLY
from server.protocol.response_format import ResponseFormat
from server.protocol.tools import MAX_TOOLS, NamedTool, ToolBody, ToolChoice, check_tools
from server.tools.calls import Tool

__all__ = ["ChatBody", "Message"]

_OLD = "it is the older name of tools; use 'tools' and 'tool_choice'"
_OWN_TEMPLATE = "the model's own chat template is used"


class ChatBody(GenerationBody):
    """OpenAI's fields and ours. Without `max_tokens` the answer may take the room left in the context."""

    unsupported: ClassVar[Mapping[str, str]] = {
        "functions": _OLD,
        "function_call": _OLD,
        "audio": TEXT_ONLY,
        "prediction": "the server drafts by itself; see 'speculation'",
        "web_search_options": "the server does not search",
        "chat_template": _OWN_TEMPLATE,
        "documents": "put them into the messages",
        "verbosity": "the model has no such setting",
        "moderation": "the server does not moderate",
    }

    messages: list[Message] = Field(min_length=1, description="the conversation so far")
    max_tokens: int | None = Field(
        None, ge=1, description="the most tokens to answer with; default: the room left in the context"
    )
    max_completion_tokens: int | None = Field(
        None, ge=1, description="OpenAI's newer name of `max_tokens`; only one of them"
    )
    logprobs: bool = Field(False, description="log-probabilities of the answer's tokens, reasoning included")
    top_logprobs: int | None = Field(
        None, ge=0, le=20, description="so many likeliest tokens at each place; only with `logprobs`"
    )
    response_format: ResponseFormat | None = Field(None, description="what the answer must look like")
    modalities: Annotated[list[Literal["text"]], Field(fail_fast=True)] | None = Field(
        None, description="only text"
    )

    tools: list[ToolBody] = Field([], max_length=MAX_TOOLS, description="functions that the model may call")
    tool_choice: ToolChoice | None = Field(
        None,
        description="none, auto (the default with tools), required, or a function that must be called; "
        "required and named choices are enforced",
    )
    parallel_tool_calls: bool = Field(True, description="false: at most one call in an answer; enforced")

    add_generation_prompt: bool | None = Field(
        None, description="vLLM's: the head of an answer at the end; default: unless a message goes on"
    )
    continue_final_message: bool = Field(
        False, description="vLLM's: the answer goes on with the last message, an assistant's"
    )
    add_special_tokens: Annotated[bool, Only(False, why="the chat template writes them")] = Field(
        False, description="vLLM's; only false: the chat template writes them"
    )
    chat_template_kwargs: dict[str, Any] = Field(
        {}, description="vLLM's: variables of the chat template, such as `enable_thinking`"
    )
    reasoning_effort: str | None = Field(
        None, max_length=32, description="for chat templates that have this variable; others refuse it"
    )
    include_reasoning: Annotated[bool, Only(True, why="reasoning is answered apart")] = Field(
        True, description="vLLM's; only true: reasoning is answered as `reasoning_content`"
    )

    @property
    def limit(self) -> int | None:
        """Tokens asked for at most; None: the room left in the context."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def forced(self) -> bool:
        """The answer must be a call."""
        return self.tool_choice == "required" or isinstance(self.tool_choice, NamedTool)

    def offered(self) -> tuple[Tool, ...]:
        """The tools that the model is told of: none if it may call none."""
        return () if self.tool_choice == "none" else tuple(tool.tool() for tool in self.tools)

    def callable(self) -> tuple[Tool, ...]:
        """The tools that the answer may call: one if the choice names it."""
        choice = self.tool_choice
        wanted = choice.function.name if isinstance(choice, NamedTool) else None
        return tuple(tool for tool in self.offered() if wanted in (None, tool.name))

    @property
    def parallel(self) -> bool:
        """More than one call may come."""
        return self.parallel_tool_calls and not isinstance(self.tool_choice, NamedTool)

    def structure(self) -> Structure | None:
        """What the answer must look like where it is not a tool call; None: anything goes."""
        if self.response_format is None or self.response_format.type == "text":
            return super().structure()
        return self.response_format.structure()

    @model_validator(mode="after")
    def _limits_agree(self) -> ChatBody:
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            message = "'max_tokens' and 'max_completion_tokens' exclude each other"
            raise InvalidRequest(message, "max_completion_tokens")
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequest("'top_logprobs' is allowed only with 'logprobs': true", "top_logprobs")
        if self.limit is not None and self.min_tokens > self.limit:
            message = f"'min_tokens' ({self.min_tokens}) is above 'max_tokens' ({self.limit})"
            raise InvalidRequest(message, "min_tokens")
        return self

    @model_validator(mode="after")
    def _messages_agree(self) -> ChatBody:
        check_calls(self.messages)
        if self.continue_final_message:
            if self.add_generation_prompt:
                message = "'add_generation_prompt' and 'continue_final_message' exclude each other"
                raise InvalidRequest(message, "continue_final_message")
            last = self.messages[-1]
            if last.role != "assistant" or last.tool_calls:
                message = (
                    "'continue_final_message' needs a last message of the role 'assistant' without calls"
                )
                raise InvalidRequest(message, "continue_final_message")
        return self

    @model_validator(mode="after")
    def _one_structure(self) -> ChatBody:
        check_tools(self.tools, self.tool_choice)
        formed = self.response_format is not None and self.response_format.type != "text"
        if formed and self.structured_outputs is not None:
            message = "'response_format' and 'structured_outputs' exclude each other"
            raise InvalidRequest(message, "structured_outputs")
        if self.forced and (formed or self.structured_outputs is not None):
            name = "response_format" if formed else "structured_outputs"
            message = f"a 'tool_choice' that must be called and '{name}' exclude each other"
            raise InvalidRequest(message, "tool_choice")
        return self
