"""The body of POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator

from engine.types import InvalidRequest
from server.protocol.common import Body, GenerationBody

_TOOLS = "tools are not served yet"
_TEXT_ONLY = "only text goes in and out"


def _content(value: Any) -> str:
    """A string, or text parts joined without anything between them."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise InvalidRequest("'content' must be a string or a list of text parts")
    texts: list[str] = []
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        if not isinstance(kind, str):
            raise InvalidRequest("a content part must be an object with a 'type'")
        if kind != "text":
            message = f"content parts of type '{kind[:64]}' are not supported: {_TEXT_ONLY}"
            raise InvalidRequest(message, code="unsupported_content")
        if part.keys() != {"type", "text"} or not isinstance(part["text"], str):
            raise InvalidRequest("a text part has the string 'text' and no other field")
        texts.append(part["text"])
    return "".join(texts)


def _role(value: Any) -> Any:
    if value in ("tool", "function"):
        raise InvalidRequest(f"the role '{value}' is not supported: {_TOOLS}", code="unsupported_role")
    return value


_CONTENT_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
                "required": ["type", "text"],
                "additionalProperties": False,
            },
        },
    ]
}
Content = Annotated[str, BeforeValidator(_content), WithJsonSchema(_CONTENT_SCHEMA)]
Role = Annotated[Literal["system", "developer", "user", "assistant"], BeforeValidator(_role)]


class Message(Body):
    """One turn. `developer` is OpenAI's newer name for `system`, and is given to the template as such."""

    unsupported: ClassVar[Mapping[str, str]] = {
        "tool_calls": _TOOLS,
        "tool_call_id": _TOOLS,
        "function_call": _TOOLS,
        "audio": _TEXT_ONLY,
        "refusal": "the model has no refusals of its own",
        "annotations": _TEXT_ONLY,
    }

    role: Role
    content: Content
    name: str | None = None

    def for_template(self) -> dict[str, str]:
        role = "system" if self.role == "developer" else self.role
        message = {"role": role, "content": self.content}
        return message if self.name is None else {**message, "name": self.name}


class ResponseFormat(Body):
    """Text is the only format; the others are refused by name."""

    type: Literal["text"]

    @model_validator(mode="before")
    @classmethod
    def _text_only(cls, data: Any) -> Any:
        kind = data.get("type") if isinstance(data, dict) else None
        if isinstance(kind, str) and kind != "text":
            message = (
                f"the response format '{kind[:64]}' is not supported: structured output is not served yet"
            )
            raise InvalidRequest(message, code="unsupported_field")
        return data


class ChatBody(GenerationBody):
    """OpenAI's fields and ours. Without `max_tokens` the answer may take the room left in the context."""

    unsupported: ClassVar[Mapping[str, str]] = {
        "tools": _TOOLS,
        "tool_choice": _TOOLS,
        "parallel_tool_calls": _TOOLS,
        "functions": _TOOLS,
        "function_call": _TOOLS,
        "audio": _TEXT_ONLY,
        "prediction": "the server drafts by itself; see 'speculation'",
        "reasoning_effort": "the model has no such setting",
        "web_search_options": "the server does not search",
    }

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    modalities: list[Literal["text"]] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False

    @property
    def limit(self) -> int | None:
        """Tokens asked for at most; None: the room left in the context."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @model_validator(mode="after")
    def _fields_agree(self) -> ChatBody:
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            message = "'max_tokens' and 'max_completion_tokens' exclude each other"
            raise InvalidRequest(message, "max_completion_tokens")
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequest("'top_logprobs' is allowed only with 'logprobs': true", "top_logprobs")
        if self.limit is not None and self.min_tokens > self.limit:
            message = f"'min_tokens' ({self.min_tokens}) is above 'max_tokens' ({self.limit})"
            raise InvalidRequest(message, "min_tokens")
        if self.continue_final_message:
            if self.add_generation_prompt:
                message = "'add_generation_prompt' and 'continue_final_message' exclude each other"
                raise InvalidRequest(message, "continue_final_message")
            if self.messages[-1].role != "assistant":
                message = "'continue_final_message' needs a last message of the role 'assistant'"
                raise InvalidRequest(message, "continue_final_message")
        return self
