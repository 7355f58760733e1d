"""The body of POST /v1/completions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator

from engine.types import InvalidRequest
from server.protocol.common import MAX_SEQUENCES, GenerationBody


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int for item in value)


def _prompts(value: Any) -> list[str | list[int]]:
    """The four forms (string, strings, token ids, lists of token ids) as one list of prompts."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise InvalidRequest("'prompt' must be a string, strings, token ids or lists of token ids")
    if not value:
        raise InvalidRequest("'prompt' is empty", code="empty_prompt")
    if _is_ids(value):
        return [value]
    if all(isinstance(item, str) for item in value) or all(_is_ids(item) for item in value):
        return value
    raise InvalidRequest("'prompt' must hold strings only, token ids only, or lists of token ids only")


_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_PROMPT_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}, "minItems": 1},
        _IDS,
        {"type": "array", "items": _IDS, "minItems": 1},
    ]
}
Prompts = Annotated[list[str | list[int]], BeforeValidator(_prompts), WithJsonSchema(_PROMPT_SCHEMA)]


class CompletionBody(GenerationBody):
    """OpenAI's fields and ours. `prompt` is always a list here, one item per prompt."""

    unsupported: ClassVar[Mapping[str, str]] = {"suffix": "the model has no fill-in-the-middle"}

    prompt: Prompts
    max_tokens: int = Field(16, ge=0)
    best_of: int | None = Field(None, ge=0, le=20)
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=5)

    @property
    def candidates(self) -> int:
        """Sequences to generate for each prompt, of which `n` are answered."""
        return self.n if self.best_of is None else self.best_of

    @model_validator(mode="after")
    def _fields_agree(self) -> CompletionBody:
        if self.candidates < self.n:
            raise InvalidRequest(
                f"'best_of' ({self.best_of}) must not be less than 'n' ({self.n})", "best_of"
            )
        if self.candidates > self.n and self.stream:
            raise InvalidRequest("'best_of' above 'n' cannot be streamed", "best_of")
        if self.min_tokens > self.max_tokens:
            raise InvalidRequest(
                f"'min_tokens' ({self.min_tokens}) is above 'max_tokens' ({self.max_tokens})", "min_tokens"
            )
        sequences = len(self.prompt) * self.candidates
        if sequences > MAX_SEQUENCES:
            message = f"prompts times choices are {sequences}; at most {MAX_SEQUENCES} are allowed"
            raise InvalidRequest(message, "prompt")
        return self
