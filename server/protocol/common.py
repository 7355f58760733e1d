"""What completions and chat have in common: the fields of sampling, stopping, streaming, speculation."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator

from engine.types import InvalidRequest, SamplingParams, SpeculationParams

MAX_SEQUENCES = 2048
"""The most sequences that one request may ask for: prompts times choices."""

_INT64 = 2**63


class Body(BaseModel):
    """A JSON object of the API. Unknown names are refused; null means the field's default.

    `unsupported` maps the name of an OpenAI field that is refused to the reason.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
    unsupported: ClassVar[Mapping[str, str]] = {}

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls_and_refuse(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        for name in cls.unsupported.keys() & data.keys():
            if data[name] is not None:
                message = f"'{name}' is not supported: {cls.unsupported[name]}"
                raise InvalidRequest(message, name, "unsupported_field")
        nullable = {name for name, field in cls.model_fields.items() if not field.is_required()}
        nullable |= cls.unsupported.keys()
        return {name: value for name, value in data.items() if value is not None or name not in nullable}


def _stops(value: Any) -> Any:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise InvalidRequest("'stop' must be a string or a list of strings")
    if len(stops) > 4:
        raise InvalidRequest(f"'stop' has {len(stops)} strings; at most 4 are allowed")
    if "" in stops:
        raise InvalidRequest("'stop' must not hold an empty string")
    return stops


def _bias(value: Any) -> Any:
    if not isinstance(value, dict):
        raise InvalidRequest("'logit_bias' must be an object of token ids and numbers")
    for key, bias in value.items():
        if not (key.isascii() and key.isdigit() and str(int(key[:20])) == key):
            raise InvalidRequest(f"'logit_bias': {key!r} is not a token id", code="invalid_token_id")
        if isinstance(bias, bool) or not isinstance(bias, int | float) or not -100 <= bias <= 100:
            raise InvalidRequest(f"'logit_bias': the bias of token {key} must be a number from -100 to 100")
    return {int(key): float(bias) for key, bias in value.items()}


_STOP_SCHEMA = {
    "anyOf": [
        {"type": "string", "minLength": 1},
        {"type": "array", "items": {"type": "string", "minLength": 1}, "maxItems": 4},
    ]
}
_BIAS_SCHEMA = {
    "type": "object",
    "propertyNames": {"pattern": "^[0-9]+$"},
    "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
}

Stops = Annotated[list[str], BeforeValidator(_stops), WithJsonSchema(_STOP_SCHEMA)]
LogitBias = Annotated[dict[int, float], BeforeValidator(_bias), WithJsonSchema(_BIAS_SCHEMA)]


class StreamOptions(Body):
    """`include_usage`: a last chunk with usage. `continuous_usage_stats`: running usage on every chunk."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


class Speculation(Body):
    """Who proposes and who stops, for this request. The engine knows the names and options."""

    drafter: str | None = None
    policy: str | None = None
    options: dict[str, Any] | None = None
    max_sl: int | None = Field(default=None, ge=0, lt=_INT64)

    def params(self) -> SpeculationParams:
        return SpeculationParams(
            drafter=self.drafter, policy=self.policy, options=self.options, max_sl=self.max_sl
        )


class GenerationBody(Body):
    """The fields that both ways to generate share. Bounds are OpenAI's where OpenAI has the field."""

    model: str
    n: int = Field(1, ge=1, le=128)
    stop: Stops = []
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None

    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, ge=0, le=1)
    top_k: int = Field(0, ge=-1, lt=_INT64, description="0 and -1 keep every token")
    min_p: float = Field(0.0, ge=0, le=1)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    repetition_penalty: float = Field(1.0, gt=0)
    logit_bias: LogitBias = {}
    seed: int | None = Field(None, ge=-_INT64, lt=_INT64)
    sampling_method: Literal["auto", "coupled", "rejection"] = "auto"

    min_tokens: int = Field(0, ge=0, lt=_INT64)
    ignore_eos: bool = False
    stop_token_ids: list[int] = []
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    return_token_ids: bool = False

    priority: int = Field(0, ge=-_INT64, lt=_INT64, description="lower runs first")
    cache_salt: str = ""
    speculation: Speculation = Speculation()

    @model_validator(mode="after")
    def _stream_options_need_stream(self) -> GenerationBody:
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("'stream_options' is allowed only with 'stream': true", "stream_options")
        return self

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def continuous_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.continuous_usage_stats

    def sampling(
        self, *, choice: int, max_tokens: int, logprobs: int | None, prompt_logprobs: int | None = None
    ) -> SamplingParams:
        """Sampling of choice number `choice` of one prompt."""
        return SamplingParams(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=max(self.top_k, 0),
            min_p=self.min_p,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            logit_bias=self.logit_bias,
            seed=None if self.seed is None else choice_seed(self.seed, choice),
            max_tokens=max_tokens,
            min_tokens=self.min_tokens,
            ignore_eos=self.ignore_eos,
            stop_token_ids=tuple(self.stop_token_ids),
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            sampling_method=self.sampling_method,
        )


def choice_seed(seed: int, choice: int) -> int:
    """Choice 0 has the request's own seed; the others get theirs from (seed, choice), below 2**63."""
    if choice == 0:
        return seed
    digest = hashlib.blake2b(f"{seed}:{choice}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
