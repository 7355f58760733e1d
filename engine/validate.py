"""What the engine accepts. One check for every client, before a request reaches the engine."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from engine.speculation.policy import options_of
from engine.speculation.tree import rules, tree_options
from engine.types import (
    CompiledGrammar,
    GenerateRequest,
    InvalidRequest,
    ModelInfo,
    SamplingMethod,
    SamplingParams,
    SpeculationParams,
    TokenSet,
)
from engine.words import words_of

_MAX_LOGPROBS = 20
_MAX_BAD_WORDS = 2048  # sequences of tokens: each word as it begins a text, and after a space


def validate(request: GenerateRequest, info: ModelInfo) -> None:
    """Raises InvalidRequest, naming the field and its bounds, if the engine cannot serve the request."""
    _text(request.id, "id")
    if not request.id:
        raise InvalidRequest("id must not be empty", "id")
    _text(request.cache_salt, "cache_salt")
    _text(request.tenant, "tenant")
    _integer(request.priority, "priority", -(2**63), 2**63 - 1)
    _number(request.arrival, "arrival")
    if not request.prompt_ids:
        raise InvalidRequest("the prompt is empty: it must have at least one token", "prompt", "empty_prompt")
    _token_ids(request.prompt_ids, "prompt", info.vocab_size)
    _sampling(request.params, info)
    _length(len(request.prompt_ids), request.params.max_tokens, info.max_model_len)
    _speculation(request.speculation, info)


def token_set(ids: Sequence[int], param: str, vocab_size: int) -> TokenSet:
    """These ids as a set. Raises InvalidRequest, naming `param`, if the vocabulary has fewer or lacks one."""
    if len(ids) > vocab_size:
        raise InvalidRequest(f"{param} has {len(ids)} entries; the vocabulary has {vocab_size} tokens", param)
    _token_ids(ids, param, vocab_size)
    return TokenSet(words_of(ids, vocab_size).tobytes().rstrip(b"\0"))


def _sampling(params: SamplingParams, info: ModelInfo) -> None:
    _number(params.temperature, "temperature", 0, 2)
    _number(params.top_p, "top_p", 0, 1)
    _integer(params.top_k, "top_k", 0, 2**63 - 1)
    _number(params.min_p, "min_p", 0, 1)
    _number(params.presence_penalty, "presence_penalty", -2, 2)
    _number(params.frequency_penalty, "frequency_penalty", -2, 2)
    _number(params.repetition_penalty, "repetition_penalty", 1e-3, 10)
    _token_ids(params.logit_bias, "logit_bias", info.vocab_size)
    for bias in params.logit_bias.values():
        _number(bias, "logit_bias", -100, 100)
    if params.seed is not None:
        _integer(params.seed, "seed", -(2**63), 2**64 - 1)
    _integer(params.max_tokens, "max_tokens", 0, 2**63 - 1)
    _integer(params.min_tokens, "min_tokens", 0, 2**63 - 1)
    if params.min_tokens > params.max_tokens:
        raise InvalidRequest(
            f"min_tokens {params.min_tokens} is more than max_tokens {params.max_tokens}", "min_tokens"
        )
    if not isinstance(params.ignore_eos, bool):
        raise InvalidRequest(f"ignore_eos must be true or false, not {params.ignore_eos!r}", "ignore_eos")
    _token_ids(params.stop_token_ids, "stop_token_ids", info.vocab_size)
    for param in ("logprobs", "prompt_logprobs"):
        if (count := getattr(params, param)) is not None:
            _integer(count, param, 0, _MAX_LOGPROBS)
    _constraints(params, info)
    if params.sampling_method not in get_args(SamplingMethod):
        known = ", ".join(get_args(SamplingMethod))
        raise InvalidRequest(
            f"unknown sampling_method {params.sampling_method!r}; known: {known}", "sampling_method"
        )


def _constraints(params: SamplingParams, info: ModelInfo) -> None:
    """Grammar, allowed_token_ids and bad_words, and that they leave something to begin with."""
    grammar, allowed = params.grammar, params.allowed_token_ids
    if grammar is not None and not isinstance(grammar, CompiledGrammar):
        raise InvalidRequest(f"grammar must be a compiled one, not {type(grammar).__name__}", "grammar")
    if allowed is not None:
        _allowed(allowed, info.vocab_size)
    if len(params.bad_words) > _MAX_BAD_WORDS:
        raise InvalidRequest(
            f"bad_words has {len(params.bad_words)} entries, at most {_MAX_BAD_WORDS} are taken", "bad_words"
        )
    if any(not word for word in params.bad_words):
        raise InvalidRequest("bad_words: a word must have at least one token", "bad_words")
    _token_ids(tuple(token for word in params.bad_words for token in word), "bad_words", info.vocab_size)
    if allowed is None and not params.bad_words:
        return
    known = range(info.vocab_size) if allowed is None else allowed
    never = [word[0] for word in params.bad_words if len(word) == 1]
    left = words_of(known, info.vocab_size) & ~words_of(never, info.vocab_size)
    if not left.any():
        param = "bad_words" if allowed is None else "allowed_token_ids"
        raise InvalidRequest(f"{param}: bad_words forbid every token that is allowed", param)
    if allowed is None or params.min_tokens == 0:
        return
    ends = words_of([*info.eos_token_ids, *params.stop_token_ids], info.vocab_size)
    if not (left & ~ends).any():
        raise InvalidRequest(
            "allowed_token_ids allows nothing but ends (EOS, stop_token_ids), which min_tokens forbids",
            "allowed_token_ids",
        )


def _allowed(allowed: TokenSet, vocab_size: int) -> None:
    param = "allowed_token_ids"
    if not isinstance(allowed, TokenSet):
        raise InvalidRequest(f"{param} must be a set of tokens, not {type(allowed).__name__}", param)
    last = int.from_bytes(allowed.bits, "little").bit_length() - 1
    if last < 0:
        raise InvalidRequest(f"{param} must not be empty", param)
    _token_ids((last,), param, vocab_size)


def _length(prompt: int, output: int, context: int) -> None:
    if prompt + output > context:
        raise InvalidRequest(
            f"the model's context is {context} tokens; the request asks for {prompt + output}: "
            f"{prompt} in the prompt and {output} to generate (max_tokens)",
            "prompt" if prompt > context else "max_tokens",
            "context_length_exceeded",
        )


def _speculation(speculation: SpeculationParams, info: ModelInfo) -> None:
    if (reason := info.absent.get(speculation.drafter or "")) is not None:
        raise InvalidRequest(
            f"drafter {speculation.drafter!r} cannot draft here: {reason}",
            "speculation.drafter",
            "drafter_unavailable",
        )
    if speculation.drafter in rules() and speculation.drafter not in info.drafters:
        message = f"drafter {speculation.drafter!r} cannot draft here: it needs a draft model"
        raise InvalidRequest(message, "speculation.drafter", "drafter_unavailable")
    if speculation.drafter is not None and speculation.drafter not in info.drafters:
        raise InvalidRequest(
            f"unknown drafter {speculation.drafter!r}; this server has: {', '.join(info.drafters)}",
            "speculation.drafter",
            "unknown_drafter",
        )
    if speculation.policy is not None and not isinstance(speculation.policy, str):
        raise InvalidRequest(f"policy must be a name, not {speculation.policy!r}", "speculation.policy")
    if speculation.options is not None:
        if not isinstance(speculation.options, Mapping):
            raise InvalidRequest("options must be an object of names and values", "speculation.options")
        _finite(speculation.options, "speculation.options")
    drafter = speculation.drafter or info.default_drafter
    if drafter in rules():
        if speculation.policy is not None:
            named = "drafter" if speculation.drafter else "this server's drafter"
            chains = ", ".join(name for name in info.drafters if name not in rules())
            message = (
                f"{named} {drafter!r} ends its trees itself: it takes 'options', but no policy; "
                f"a policy needs a drafter of chains beside it: {chains}"
            )
            raise InvalidRequest(message, "speculation.policy", "policy_unavailable")
        tree_options(drafter, speculation.options)
        return _max_sl(speculation, info)
    name = info.default_policy if speculation.policy is None else speculation.policy
    if speculation.policy is not None or speculation.options is not None:
        options_of(name, speculation.options)
    if (reason := info.refusals.get(drafter, {}).get(name)) is not None:
        raise InvalidRequest(
            f"policy {name!r} cannot govern drafter {drafter!r} here: {reason}",
            "speculation.drafter" if speculation.policy is None else "speculation.policy",
            "policy_unavailable",
        )
    _max_sl(speculation, info)


def _max_sl(speculation: SpeculationParams, info: ModelInfo) -> None:
    if speculation.max_sl is not None:
        _integer(speculation.max_sl, "speculation.max_sl", 0, info.max_sl)


def _number(value: Any, param: str, low: float = -math.inf, high: float = math.inf) -> None:
    """A finite number within [low, high]. NaN fails here, as it fails every comparison."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidRequest(f"{param} must be a number, not {value!r}", param)
    if not low <= value <= high or math.isinf(value):
        bounds = f"between {low} and {high}" if math.isfinite(low) else "finite"
        raise InvalidRequest(f"{param} must be {bounds}, not {_short(value)}", param)


def _integer(value: Any, param: str, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidRequest(f"{param} must be an integer, not {value!r}", param)
    if not low <= value <= high:
        raise InvalidRequest(f"{param} must be between {low} and {high}, not {_short(value)}", param)


def _token_ids(ids: Sequence[int] | Mapping[int, float], param: str, vocab_size: int) -> None:
    """Every id an integer in [0, vocab_size). Sets, min and max: long prompts pass at C speed."""
    if not ids:
        return
    if set(map(type, ids)) != {int}:
        raise InvalidRequest(f"{param}: token ids must be integers", param)
    for token in (min(ids), max(ids)):
        if not 0 <= token < vocab_size:
            raise InvalidRequest(
                f"{param}: token id {_short(token)} is out of range: the vocabulary ends at {vocab_size - 1}",
                param,
                "token_id_out_of_range",
            )


def _text(value: Any, param: str) -> None:
    """A string of Unicode scalar values: JSON can spell lone surrogates, no encoding can carry them."""
    if not isinstance(value, str):
        raise InvalidRequest(f"{param} must be a string, not {value!r}", param)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(f"{param} is not valid Unicode: {error.reason}", param) from error


def _finite(value: Any, param: str) -> None:
    """Refuses NaN and infinities at any depth of a JSON-like value."""
    left = [value]
    while left:
        item = left.pop()
        if isinstance(item, float) and not math.isfinite(item):
            raise InvalidRequest(f"{param}: {item} is not a finite number", param)
        if isinstance(item, Mapping):
            left.extend(item.values())
        elif isinstance(item, list | tuple):
            left.extend(item)


def _short(value: float) -> str:
    """A number for a message: one of thousands of digits is named by its size alone."""
    if isinstance(value, int) and value.bit_length() > 80:
        return f"an integer of {value.bit_length()} bits"
    return str(value)
