"""One sequence as the engine keeps it from arrival to finish."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from engine.constraints import Constraint
from engine.kv.blocks import BlockTable
from engine.speculation.ngrams import NgramIndex
from engine.types import GenerateRequest, SamplingParams, TokenLogprob

Status = Literal["waiting", "running", "finished"]


@dataclass(eq=False)
class Sequence:
    """Tokens, KV lengths and random state of one request.

    `kv_len` of the tokens have their target KV; the rest is pending. `seed` is the request's, or a
    fresh one; `draws` counts the numbers taken from it under rejection sampling and never rewinds.
    """

    request: GenerateRequest
    seed: int
    coupled: bool  # greedy or coupled sampling: the target's own choice decides
    drafter: str
    policy: str
    options: object
    max_sl: int
    tokens: list[int] = field(default_factory=list)
    prompt_len: int = 0
    table: BlockTable | None = None
    kv_len: int = 0
    draft_kv_len: int = 0
    slot: int = -1  # of the policies' state, while running
    policy_state: dict[str, Tensor] | None = None  # what the policy remembers, while preempted
    order: int = 0  # of arrival
    aged: bool = False  # it got its place by having waited: no priority goes before it any more
    counted: int = 0  # tokens of its output that its tenant was charged with
    status: Status = "waiting"
    draws: int = 0
    cached_tokens: int = 0
    started: bool = False  # the first event went out
    mistrusted: bool = False  # its draft gave NaN: it goes on without
    scheduled: float | None = None  # when it first ran, by `time.monotonic`
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=list)
    ngrams: NgramIndex | None = None
    counts: TokenCounts | None = None  # kept only for penalties
    constraint: Constraint | None = None  # grammar, allowed_token_ids, bad_words

    def __post_init__(self) -> None:
        self.tokens = list(self.request.prompt_ids)
        self.prompt_len = len(self.tokens)

    @property
    def id(self) -> str:
        return self.request.id

    @property
    def params(self) -> SamplingParams:
        return self.request.params

    @property
    def pending(self) -> int:
        """Tokens whose target KV is not there yet; 1 when it is all but the newest."""
        return len(self.tokens) - self.kv_len

    @property
    def decodes(self) -> bool:
        """Whether its next pass is an iteration: it may draft. The pass of the first token is prefill."""
        return self.pending == 1 and self.generated > 0

    @property
    def generated(self) -> int:
        return len(self.tokens) - self.prompt_len

    @property
    def blocks(self) -> list[int]:
        return self.table.blocks if self.table is not None else []

    @property
    def rank(self) -> tuple[bool, int, float, int]:
        """Who runs first and is preempted last: smallest."""
        return not self.aged, self.request.priority, self.request.arrival, self.order


class TokenCounts:
    """How often each token occurs: `output` int64[V] generated ones, `seen` bool[V] prompt and output."""

    def __init__(self, prompt: list[int], output: list[int], vocab: int, device: torch.device) -> None:
        self.output = torch.zeros(vocab, dtype=torch.int64, device=device)
        self.seen = torch.zeros(vocab, dtype=torch.bool, device=device)
        self.seen[torch.tensor(prompt, dtype=torch.int64, device=device)] = True
        self.add(output)

    def add(self, tokens: list[int]) -> None:
        ids = torch.tensor(tokens, dtype=torch.int64, device=self.output.device)
        self.output.index_add_(0, ids, torch.ones_like(ids))
        self.seen[ids] = True

    def after(self, drafted: list[int]) -> tuple[Tensor, Tensor]:
        """(output, seen) as they would be if the drafted tokens were accepted."""
        if not drafted:
            return self.output, self.seen
        ids = torch.tensor(drafted, dtype=torch.int64, device=self.output.device)
        return self.output.index_add(0, ids, torch.ones_like(ids)), self.seen.index_fill(0, ids, True)
