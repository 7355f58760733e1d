"""What the routes answer, for the OpenAPI page; tests hold the answers to it."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from server.protocol.base import nullable, optional_shown, without_null

FINISH = "stop: EOS, a stop string or id, or a grammar's end; length: `max_tokens`"


class Answer(BaseModel):
    """An object in an answer. A field with a default may be missing, and is not null unless listed."""

    model_config = ConfigDict(extra="forbid", strict=True)
    missing_or_null: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        return optional_shown(core_schema, handler, cls._shown)

    @classmethod
    def _shown(cls, name: str, field: JsonSchemaValue) -> JsonSchemaValue:
        bare = {key: value for key, value in field.items() if key != "default"}
        return nullable(bare) if name in cls.missing_or_null else without_null(bare)


class ErrorDetail(Answer):
    """Every key is there, whatever went wrong."""

    message: str = Field(description="what is wrong, in a sentence")
    type: Literal["invalid_request_error", "server_error", "service_unavailable_error"]
    param: str | None = Field(description="the field at fault, as `messages[0].content`")
    code: str | None = Field(description="a name for programs, as context_length_exceeded")


class ErrorAnswer(Answer):
    """OpenAI's error body."""

    error: ErrorDetail


class PromptDetails(Answer):
    cached_tokens: int = Field(ge=0, description="tokens of the prompt whose KV was there already")


class CompletionDetails(Answer):
    accepted_prediction_tokens: int = Field(ge=0, description="draft tokens that are part of the answer")
    rejected_prediction_tokens: int = Field(ge=0, description="draft tokens that are not")
    reasoning_tokens: int | None = Field(None, ge=0, description="of chat: tokens of the reasoning")


class Usage(Answer):
    """Tokens of a request: each prompt once, every choice."""

    prompt_tokens: int = Field(ge=0)
    completion_tokens: int = Field(ge=0)
    total_tokens: int = Field(ge=0)
    prompt_tokens_details: PromptDetails
    completion_tokens_details: CompletionDetails


class Speculated(Answer):
    """What speculation did for an answer; ours. Policy and drafter are "none" if nothing was drafted."""

    policy: str
    drafter: str
    iterations: int = Field(ge=0, description="passes of the target after the first token")
    drafted: int = Field(ge=0, description="draft tokens, of trees all nodes")
    accepted: int = Field(ge=0, description="of these in the answer")
    mean_sl: float = Field(ge=0, description="tokens on the longest way of each draft, by iterations")
    acceptance_rate: float = Field(ge=0, le=1, description="accepted by drafted")
    mean_emitted: float = Field(ge=0, description="tokens of an iteration")
    draft_seconds: float = Field(ge=0)
    verify_seconds: float = Field(ge=0)


class PromptLogprob(Answer):
    """One token at one place of a prompt, as vLLM has it."""

    logprob: float = Field(le=0)
    rank: int | None = Field(ge=1, description="1 is the likeliest; null: not among those asked for")
    decoded_token: str


class CompletionLogprobs(Answer):
    """OpenAI's four lists, one entry for each token. Log-probabilities are the target's own, in nats."""

    tokens: list[str]
    token_logprobs: list[float | None] = Field(description="null for the first token of a prompt")
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int] = Field(description="where each token begins in `text`, in characters")


class PassToken(Answer):
    """A token that a pass gave."""

    id: int = Field(ge=0)
    text: str = Field(
        description="what it added to the raw text, which think tags and calls are a part of; all of them "
        "add up to it. Empty where a later token makes the character whole"
    )
    origin: Literal["draft", "correction", "bonus", "target"] = Field(
        description="draft: drafted and accepted; correction: the target's, in place of a draft token that "
        "fell; bonus: the target's, where nothing more had been drafted; target: there was no draft"
    )


class Pass(Answer):
    """One pass of the target for a choice; ours. Sums over all are the choice's `speculation`."""

    iteration: bool = Field(description="false: the pass over the prompt, which gives the first token")
    drafted: int = Field(ge=0, description="draft tokens, of a tree all nodes")
    lookahead: int = Field(ge=0, description="of these on the longest way: a chain's are all")
    accepted: int = Field(ge=0, description="of these in the answer")
    stop_reason: str | None = Field(description="why drafting stopped, as policy, cap, room, drafter")
    draft_seconds: float = Field(ge=0)
    verify_seconds: float = Field(ge=0)
    tokens: list[PassToken] = Field(description="those of the answer; a stop string takes its own")


PASSES = "in chunks with `include_speculation`: each pass once, as soon as its tokens are final"


class CompletionChoice(Answer):
    """One continuation."""

    index: int = Field(ge=0, description="prompt by prompt, `n` each")
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None = Field(description=FINISH)
    prompt_logprobs: list[dict[str, PromptLogprob] | None] | None = Field(
        None, description="with `prompt_logprobs`: by token id; null for the first token"
    )
    token_ids: list[int] | None = Field(None, description="with `return_token_ids`")
    prompt_token_ids: list[int] | None = Field(None, description="with `return_token_ids`")
    passes: list[Pass] | None = Field(None, description=PASSES)
    speculation: Speculated | None = Field(None, description="of this choice, if there are several")


class CompletionAnswer(Answer):
    """The whole answer of POST /v1/completions."""

    id: str
    object: Literal["text_completion"]
    created: int = Field(description="seconds since 1970")
    model: str = Field(description="the name that was asked for")
    choices: list[CompletionChoice]
    usage: Usage
    speculation: Speculated = Field(description="over all choices")


class CompletionChunk(Answer):
    """The data of one event of a streamed completion; the last event is `[DONE]`."""

    missing_or_null: ClassVar[frozenset[str]] = frozenset({"usage"})

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice] = Field(max_length=1, description="none in the chunk that has the usage")
    usage: Usage | None = Field(None, description="with `include_usage`: null but for the last chunk")
    speculation: Speculated | None = Field(None, description="with a choice's `finish_reason`")


class ModelCard(Answer):
    """A name that requests may use."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int | None = Field(description="tokens; null until the model was loaded once")


class ModelList(Answer):
    object: Literal["list"]
    data: list[ModelCard]


class PolicyCard(Answer):
    """A stop policy."""

    name: str
    options: dict[str, Any] = Field(description="a JSON schema")
    unavailable: dict[str, str] = Field(description="by drafter: why it cannot govern it here")
    head: dict[str, Any] | None = Field(description="what it was taught on")


class TreeCard(Answer):
    """A drafter of trees: it needs no policy."""

    name: str
    options: dict[str, Any] = Field(description="a JSON schema")
    unavailable: str | None = Field(description="why it cannot draft here; null: it can")
    head: dict[str, Any] | None = Field(description="what it was taught on")


class PolicyDefault(Answer):
    drafter: str
    policy: str
    options: dict[str, Any]


class PolicyList(Answer):
    """What the field `speculation` may name."""

    object: Literal["list"]
    drafters: list[str]
    policies: list[PolicyCard]
    trees: list[TreeCard]
    max_sl: int = Field(ge=0)
    default: PolicyDefault


class Health(Answer):
    status: Literal["ok"]
    engine: Literal["ready"]
    restarts: int = Field(ge=0)


class Ready(Answer):
    status: Literal["ready"]
    target: str
    draft: str | None
    device: str


class Version(Answer):
    version: str


class TokenizeAnswer(Answer):
    """vLLM's shape."""

    count: int = Field(ge=0)
    max_model_len: int = Field(ge=1, description="prompt and answer together, in tokens")
    tokens: list[int]
    token_strs: list[str] | None = Field(description="with `return_token_strs`, as the vocabulary has them")


class DetokenizeAnswer(Answer):
    """vLLM's shape."""

    prompt: str
