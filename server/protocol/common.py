"""What completions and chat have in common: the fields of sampling, stopping, streaming, speculation."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from engine.types import CompiledGrammar, InvalidRequest, SamplingParams, SpeculationParams, TokenSet
from server.bounds import MAX_N, MAX_STOP_TOKENS, MAX_TIMEOUT
from server.grammar import Structure
from server.protocol.base import Body
from server.protocol.fields import INT64, MAX_WORDS, LogitBias, Only, Stops, TokenIds, Words
from server.protocol.structured import StructuredOutputs

__all__ = ["Body", "GenerationBody", "Speculation", "StreamOptions", "choice_seed"]

_OLD = "use 'structured_outputs', which took its place"
_NOT_STORED = "answers are not stored"
_ONE_TIER = "there is one tier of service"
_BEAMS = "the server samples; it has no beam search"


class StreamOptions(Body):
    """What a stream tells besides its text."""

    include_usage: bool = Field(
        False, description="a last chunk with `usage` and no choices; `usage` is null in the others"
    )
    continuous_usage_stats: bool = Field(False, description="vLLM's: every chunk has the usage so far")
    include_speculation: bool = Field(
        False, description="ours: choices have `passes`, which tell of each token whose it is"
    )
    include_obfuscation: Annotated[bool, Only(False, why="chunks are not padded")] = Field(
        False, description="OpenAI's; only false: chunks are not padded"
    )


class Speculation(Body):
    """Who proposes and who stops, for this request; `GET /v1/policies` lists the names and options."""

    drafter: str | None = Field(
        default=None,
        description="who drafts: chains, or trees as dyspec; default: the server's",
        examples=["model", "ngram", "dyspec", "none"],
    )
    policy: str | None = Field(
        default=None, description="who decides when a chain stops; default: the server's; not with trees"
    )
    options: dict[str, Any] | None = Field(
        default=None,
        description="options of that policy, or of a drafter of trees",
        examples=[{"sl": 4}, {"budget": 32, "max_depth": 8}],
    )
    max_sl: int | None = Field(
        default=None,
        ge=0,
        lt=INT64,
        description="the most draft tokens of one iteration, of a tree on one way; at most the server's",
    )

    def params(self) -> SpeculationParams:
        return SpeculationParams(
            drafter=self.drafter, policy=self.policy, options=self.options, max_sl=self.max_sl
        )


@dataclass(frozen=True)
class Masks:
    """What an answer may hold, as the engine takes it; the same for all choices."""

    grammar: CompiledGrammar | None
    allowed: TokenSet | None
    bad_words: tuple[tuple[int, ...], ...]


class GenerationBody(Body):
    """The fields that all ways to generate share. Bounds are OpenAI's where OpenAI has the field."""

    unsupported: ClassVar[Mapping[str, str]] = {
        **{f"guided_{name}": _OLD for name in ("json", "regex", "choice", "grammar", "json_object")},
        "guided_decoding_backend": _OLD,
        "guided_whitespace_pattern": _OLD,
        "truncate_prompt_tokens": "a prompt is never cut",
        "logits_processors": "no code comes with a request",
        "prompt_embeds": "prompts are text or token ids",
        "kv_transfer_params": "there is one engine, which keeps its KV to itself",
        "vllm_xargs": "it has no meaning here",
        "request_id": "send it as the header 'x-request-id'",
    }

    model: str = Field(description="a name that `GET /v1/models` lists; the answer's `model` is the same")
    n: int = Field(1, ge=1, le=MAX_N, description="choices for each prompt")
    stop: Stops = Field(
        [], description="up to 4 strings that end the text; they are not part of it unless asked for"
    )
    stream: bool = Field(False, description="send tokens as they come, as server-sent events")
    stream_options: StreamOptions | None = Field(None, description="only with `stream`")
    user: str | None = Field(None, description="accepted; changes nothing")
    safety_identifier: str | None = Field(None, description="OpenAI's; accepted; changes nothing")
    prompt_cache_key: str | None = Field(
        None, description="OpenAI's; accepted; changes nothing: prefixes are found by their tokens"
    )
    metadata: dict[str, str] | None = Field(
        None, max_length=16, description="OpenAI's; accepted; changes nothing"
    )
    store: Annotated[bool, Only(False, why=_NOT_STORED)] = Field(
        False, description="OpenAI's; only false: answers are not stored"
    )
    service_tier: Annotated[str, Only("auto", "default", why=_ONE_TIER)] = Field(
        "auto", description="OpenAI's; changes nothing: there is one tier"
    )

    temperature: float = Field(1.0, ge=0, le=2, description="0 is greedy")
    top_p: float = Field(1.0, ge=0, le=1, description="keep the likeliest tokens up to this mass")
    top_k: int = Field(0, ge=-1, lt=INT64, description="vLLM's: keep so many; 0 and -1 keep every token")
    min_p: float = Field(
        0.0, ge=0, le=1, description="vLLM's: keep tokens of at least this share of the best"
    )
    presence_penalty: float = Field(0.0, ge=-2, le=2, description="off tokens that the answer has")
    frequency_penalty: float = Field(0.0, ge=-2, le=2, description="off tokens, for each time it has them")
    repetition_penalty: float = Field(
        1.0, ge=1e-3, le=10, description="vLLM's: divides the logits of tokens in prompt or answer; 1: none"
    )
    length_penalty: Annotated[float, Only(1.0, why=_BEAMS)] = Field(
        1.0, description="vLLM's; only 1: there is no beam search"
    )
    use_beam_search: Annotated[bool, Only(False, why=_BEAMS)] = Field(False, description="vLLM's; only false")
    logit_bias: LogitBias = Field({}, description="by token id: added to the logit, -100 to 100")
    seed: int | None = Field(
        None, ge=-INT64, lt=INT64, description="the same seed gives the same text, whatever is drafted"
    )
    sampling_method: Literal["auto", "coupled", "rejection"] = Field(
        "auto", description="ours: how drafts are verified; auto: coupled with a seed, else rejection"
    )

    structured_outputs: StructuredOutputs | None = Field(
        None, description="vLLM's: what the whole answer must look like"
    )
    allowed_token_ids: TokenIds | None = Field(
        None, min_length=1, description="vLLM's: no other token may come, EOS neither unless it is listed"
    )
    bad_words: Words = Field(
        [],
        max_length=MAX_WORDS,
        description="vLLM's: strings whose tokens never come in a row, nor those of the string after a space",
    )
    min_tokens: int = Field(0, ge=0, lt=INT64, description="vLLM's: no EOS and no stop before so many")
    ignore_eos: bool = Field(False, description="vLLM's: EOS does not end the answer")
    stop_token_ids: TokenIds = Field(
        [], max_length=MAX_STOP_TOKENS, description="vLLM's: tokens that end the answer, as EOS does"
    )
    include_stop_str_in_output: bool = Field(
        False, description="vLLM's: keep the stop string, or token, in the text"
    )
    skip_special_tokens: bool = Field(True, description="vLLM's: leave special tokens out of the text")
    spaces_between_special_tokens: bool = Field(
        True, description="vLLM's; changes nothing: fast tokenizers put none"
    )
    return_token_ids: bool = Field(
        False, description="vLLM's: `token_ids` of choices and `prompt_token_ids` in the answer"
    )
    return_tokens_as_token_ids: bool = Field(
        False, description="vLLM's: in logprobs a token's name is `token_id:` and its id"
    )
    prompt_logprobs: int | None = Field(
        None,
        ge=0,
        le=20,
        description="vLLM's: for each token of the prompt its log-probability, and that of so many others; "
        "not with `stream`",
    )

    priority: int = Field(0, ge=-INT64, lt=INT64, description="vLLM's: lower runs first")
    cache_salt: str = Field(
        "", description="vLLM's: prefixes are shared only among requests of the same salt"
    )
    speculation: Speculation = Field(Speculation(), description="ours: who drafts and who stops")
    timeout: float | None = Field(
        None,
        gt=0,
        le=MAX_TIMEOUT,
        description="ours: seconds from the request's arrival in which its answer must be whole, else it is "
        "given up; default: the server's, which is the most there is",
    )

    @model_validator(mode="after")
    def _stream_fits(self) -> GenerationBody:
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("'stream_options' is allowed only with 'stream': true", "stream_options")
        if self.prompt_logprobs is not None and self.stream:
            raise InvalidRequest("'prompt_logprobs' is not allowed with 'stream': true", "prompt_logprobs")
        return self

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def continuous_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.continuous_usage_stats

    @property
    def include_speculation(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_speculation

    @property
    def sequences(self) -> tuple[int, str]:
        """How many are asked for, and the field that says so."""
        return self.n, "n"

    def structure(self) -> Structure | None:
        """What the answer must look like; None: anything goes. Raises InvalidRequest."""
        return None if self.structured_outputs is None else self.structured_outputs.structure()

    def sampling(
        self,
        *,
        choice: int,
        max_tokens: int,
        logprobs: int | None,
        prompt_logprobs: int | None = None,
        masks: Masks,
    ) -> SamplingParams:
        """Sampling of choice `choice` of a prompt; `Context` makes the `masks` of the body."""
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
            prompt_logprobs=self.prompt_logprobs if prompt_logprobs is None else prompt_logprobs,
            grammar=masks.grammar,
            allowed_token_ids=masks.allowed,
            bad_words=masks.bad_words,
            sampling_method=self.sampling_method,
        )


def choice_seed(seed: int, choice: int) -> int:
    """Choice 0 has the request's own seed; the others get theirs from (seed, choice), below 2**63."""
    if choice == 0:
        return seed
    digest = hashlib.blake2b(f"{seed}:{choice}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
