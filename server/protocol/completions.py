"""The body of POST /v1/completions."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator

from engine.types import InvalidRequest
from server.bounds import MAX_SEQUENCES
from server.grammar import Structure
from server.protocol.base import integral
from server.protocol.common import GenerationBody
from server.protocol.fields import INT64, Only
from server.protocol.response_format import ResponseFormat


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and set(map(type, value)) <= {int}


def _whole_numbers(value: Any) -> Any:
    """1.0 is the integer 1, in a list and in its lists. What holds no such number is not copied."""
    if not isinstance(value, list) or set(map(type, value)) <= {int, str}:
        return value
    return [_integers(item) if isinstance(item, list) else integral(item) for item in value]


def _integers(row: list[Any]) -> list[Any]:
    return row if set(map(type, row)) <= {int} else [integral(item) for item in row]


def _prompts(value: Any) -> list[str | list[int]]:
    """The four forms (string, strings, token ids, lists of token ids) as one list of prompts."""
    if isinstance(value, str):
        return [value]
    value = _whole_numbers(value)
    if not isinstance(value, list):
        raise InvalidRequest("'prompt' must be a string, strings, token ids or lists of token ids")
    if not value:
        raise InvalidRequest("'prompt' is empty", code="empty_prompt")
    if _is_ids(value):
        return [value]
    if all(isinstance(item, str) for item in value) or all(_is_ids(item) for item in value):
        return value
    raise InvalidRequest("'prompt' must hold strings only, token ids only, or lists of token ids only")


_ID = {"type": "integer", "minimum": 0, "exclusiveMaximum": INT64}
_IDS = {"type": "array", "items": _ID, "minItems": 1}
_TEXT = {"type": "string", "minLength": 1}
_PROMPT_SCHEMA = {
    "anyOf": [
        _TEXT,
        {"type": "array", "items": _TEXT, "minItems": 1, "maxItems": MAX_SEQUENCES},
        _IDS,
        {"type": "array", "items": _IDS, "minItems": 1, "maxItems": MAX_SEQUENCES},
    ]
}
Prompts = Annotated[list[str | list[int]], BeforeValidator(_prompts), WithJsonSchema(_PROMPT_SCHEMA)]


class CompletionBody(GenerationBody):
    """OpenAI's fields and ours. `prompt` is always a list here, one item per prompt."""

    prompt: Prompts = Field(
        description=f"a string, strings, token ids or lists of token ids; prompts times choices: at most "
        f"{MAX_SEQUENCES}"
    )
    suffix: Annotated[str, Only("", why="the model has no fill-in-the-middle")] = Field(
        "", description='OpenAI\'s; only ""'
    )
    max_tokens: int = Field(
        16, ge=0, lt=INT64, description="tokens to generate at most; 0 with `echo` scores"
    )
    best_of: int | None = Field(
        None,
        ge=1,
        le=20,
        description="generate so many, answer the `n` likeliest; above `n` not with `stream`",
    )
    echo: bool = Field(False, description="the prompt in front of the text, and of `logprobs`")
    logprobs: int | None = Field(
        None, ge=0, le=5, description="log-probabilities of the tokens, and of so many others at each place"
    )
    response_format: ResponseFormat | None = Field(
        None, description="vLLM's: as chat has it; not with `structured_outputs`"
    )
    add_special_tokens: bool = Field(
        True, description="vLLM's: give text the special tokens that the tokenizer adds (BOS)"
    )

    @property
    def candidates(self) -> int:
        """Sequences to generate for each prompt, of which `n` are answered."""
        return self.n if self.best_of is None else self.best_of

    @property
    def sequences(self) -> tuple[int, str]:
        """How many are asked for, and the field that says so."""
        return len(self.prompt) * self.candidates, "prompt"

    @property
    def scored(self) -> int | None:
        """How many likely tokens to tell at each place of the prompt; None: its tokens are not scored."""
        wanted = [self.logprobs if self.echo else None, self.prompt_logprobs]
        return max((count for count in wanted if count is not None), default=None)

    def structure(self) -> Structure | None:
        """What the answer must look like; None: anything goes."""
        asked = None if self.response_format is None else self.response_format.structure()
        return super().structure() if asked is None else asked

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
        formed = self.response_format is not None and self.response_format.type != "text"
        if formed and self.structured_outputs is not None:
            message = "'response_format' and 'structured_outputs' exclude each other"
            raise InvalidRequest(message, "structured_outputs")
        sequences, _ = self.sequences
        if sequences > MAX_SEQUENCES:
            message = f"prompts times choices are {sequences}; at most {MAX_SEQUENCES} are allowed"
            raise InvalidRequest(message, "prompt")
        return self
