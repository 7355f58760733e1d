"""What crosses the engine's border: requests in, token events and step statistics out.

Everything here is an immutable `msgspec.Struct`, so that the same objects serve the in-process
engine and the messages to the worker process. No text, no HTTP, no tensors.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

FinishReason = Literal["stop", "length", "abort", "error"]
SamplingMethod = Literal["auto", "coupled", "rejection"]


class InvalidRequest(ValueError):
    """The request cannot be served as asked. `param` names the field, `code` is OpenAI's or None."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message, self.param, self.code = message, param, code


class CannotLoad(ValueError):
    """The engine cannot be built as configured; the message says why, in one line."""


class EngineUnavailable(RuntimeError):
    """The engine is loading, restarting or dead: the request was not, or not wholly, served."""


class RequestFailed(RuntimeError):
    """The engine gave up this one request (NaN logits, a fault in a step); others go on."""


class CompiledGrammar(msgspec.Struct, frozen=True):
    """A grammar compiled for the target's tokenizer: what the whole output must match.

    `key`: sha256 of the grammar's kind and text; the engine caches by it. `data`: xgrammar's
    serialized compiled grammar, JSON in UTF-8.
    """

    key: str
    data: bytes


class TokenSet(msgspec.Struct, frozen=True):
    """Token ids as bits, so that the list of a whole vocabulary is small, for each of many choices too.

    `bits`: bit t % 8, from the lowest, of byte t // 8 says whether token t is in the set.
    """

    bits: bytes


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How the target's logits become the law p, and when a sequence ends.

    Order of application: penalties, logit_bias, the masks (min_tokens, allowed_token_ids, bad_words,
    grammar), temperature, top_k, top_p, min_p. `allowed_token_ids` None allows all; it may leave out
    EOS. No sequence of `bad_words` is ever completed within the output. A `grammar` holds for the
    whole output. Once nothing but EOS may follow, the output ends with "stop", whatever min_tokens
    and ignore_eos say; the latter forbids EOS where the grammar could go on. Where the masks leave no
    token and the grammar is not complete, the request fails.
    `temperature` 0 is greedy. `top_k` 0 keeps every token. `seed` None draws a fresh one.
    `logprobs` k asks for the target's log-softmax (of the raw logits) of the chosen token and of
    the k most likely ones; None for none; `prompt_logprobs` likewise for the prompt's tokens.
    `sampling_method` "auto" is coupled with a seed and rejection without.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    seed: int | None = None
    max_tokens: int = 16
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    grammar: CompiledGrammar | None = None
    allowed_token_ids: TokenSet | None = None
    bad_words: tuple[tuple[int, ...], ...] = ()
    sampling_method: SamplingMethod = "auto"


class SpeculationParams(msgspec.Struct, frozen=True, kw_only=True):
    """Who proposes and who stops, for one request. None means the server's default.

    `drafter`: "model", "ngram", "none", or a rule for trees, which takes the `options` itself and no policy.
    `policy` and its `options`: see `engine.speculation`. `max_sl` bounds the speculation lookahead, a tree's
    depth, whatever the policy says.
    """

    drafter: str | None = None
    policy: str | None = None
    options: dict[str, Any] | None = None
    max_sl: int | None = None


class GenerateRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One sequence to generate. `arrival`: seconds, any one clock. `tenant`: on whose behalf; places in the
    batch are shared fairly between tenants. `priority`: within one, lower runs first.
    """

    id: str
    prompt_ids: tuple[int, ...]
    params: SamplingParams = SamplingParams()
    speculation: SpeculationParams = SpeculationParams()
    priority: int = 0
    arrival: float = 0.0
    cache_salt: str = ""
    tenant: str = ""


class TokenLogprob(msgspec.Struct, frozen=True):
    """The target's log-probability (nats) of `token_id`, its rank's neighbours in `top`."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()  # (token id, logprob), most likely first


class TokenEvent(msgspec.Struct, frozen=True, kw_only=True):
    """What one step gave one request. The last event of a request has a `finish_reason`.

    `token_ids` may be empty (a last event after an abort or an error). `iterations` is 0 for
    the pass of the target that gives the first token, which is prefill, and 1 for every later one, so that
    sums over events are the request's speculation statistics. `drafted` counts all nodes of a tree,
    `lookahead` those of its longest way; of a chain both are its tokens. `accepted` counts emitted draft
    tokens only; `bonus` tells that nothing had been drafted behind them, where the target's own token came.
    Seconds are this request's share of the step (the whole step's wall time: rows run together).
    """

    id: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] | None = None  # one per token id, if asked for
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None  # on the first event; [0] is None
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None  # the EOS or stop id that ended it (it is the last of token_ids)
    error: str | None = None  # with finish_reason "error"
    refused: bool = False  # with it: it is the request's own masks or grammar that cannot be followed
    policy: str = "none"  # the policy that decided, "none" without a drafter and of a tree
    drafter: str = "none"
    iterations: int = 0
    drafted: int = 0
    lookahead: int = 0
    accepted: int = 0
    bonus: bool = False
    stop_reason: str | None = None  # why drafting stopped: policy, cap, room, drafter
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0
    cached_tokens: int = 0  # prompt tokens served from the prefix cache; on the first event
    scheduled: float | None = None  # when it first ran; on the first event
    at: float | None = None  # when the step's verdicts were there
    baseline_seconds: float = 0.0  # what these tokens would have cost without a draft, see StepStats


class StepStats(msgspec.Struct, frozen=True, kw_only=True):
    """One engine step in numbers, for metrics. Times in seconds, counts of tokens or rows.

    `draft_seconds`: drafting, with what policies decide on the device. `decide_seconds`: the host asking and
    teaching policies. `verify_seconds`: the target's pass and the verdicts. `step_seconds` less these three
    is the rest: planning, keeping books.
    What a token would have cost without a draft (an event's `baseline_seconds`): its row's share of a plain
    pass over the rows of the step that decode, by the engine's cost table, and of the step's rest.
    """

    rows: int = 0
    prefill_tokens: int = 0
    emitted: int = 0
    drafted: int = 0
    accepted: int = 0
    draft_seconds: float = 0.0
    decide_seconds: float = 0.0
    verify_seconds: float = 0.0
    step_seconds: float = 0.0
    running: int = 0
    waiting: int = 0
    kv_blocks_used: int = 0
    kv_blocks_total: int = 0
    prefix_queries: int = 0  # tokens looked up in the prefix cache, since start
    prefix_hits: int = 0  # tokens found there, since start
    preemptions: int = 0  # since start
    generated: int = 0  # tokens in all events since start
    uncounted: int = 0  # of these, those of aborted requests, and those behind a cut
    speculation_faults: dict[str, int] = {}  # of drafters and their policies, by drafter, since start
    left: tuple[str, ...] = ()  # requests that their readers left: no event of them comes after this step


class ModelInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What the front end must know of the loaded models, sent once the engine is ready."""

    target: str
    draft: str | None
    vocab_size: int  # ids >= this are rejected
    max_model_len: int  # prompt + output tokens
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    dtype: str
    device: str
    kv_blocks: int
    block_size: int
    drafters: tuple[str, ...]  # what requests may name
    default_drafter: str
    default_policy: str  # of chains
    default_options: dict[str, Any]  # of the default drafter if it drafts trees, else of the default policy
    max_sl: int
    refusals: dict[str, dict[str, str]] = {}  # by drafter: policies it cannot serve here, and why
    absent: dict[str, str] = {}  # drafters that there are, but not here, and why
    heads: dict[str, dict[str, Any]] = {}  # by policy or tree drafter: of its head, what the API shows
