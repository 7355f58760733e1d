"""Toy models for exact tests: float64 logits that are a function of the context in their own paged KV.

A toy keeps token ids where a model keeps keys and values, and reads its whole context back through
the block table. KV that is missing, stale or at a wrong position therefore changes the logits.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from functools import cache

import torch
from lossless.toy_heads import toy_heads
from torch import Tensor
from torch.nn import functional

from engine.config import EngineConfig
from engine.core import Engine
from engine.models.runner import Batch
from engine.parts import assemble
from engine.speculation.heads import Head
from engine.speculation.noise import RandomSource
from engine.types import GenerateRequest, TokenEvent

Context = tuple[int, ...]
Logits = Callable[[Context], list[float]]

_SPACING = 1000  # an entry is token + _SPACING * position: a wrong position reads as a strange token
CONTEXT = 96
HIDDEN = 4  # width of what a toy shows as its state: its first logits


class ToyRunner:
    """An `engine.models.runner.Runner` around `logits`, with `blocks` blocks of KV."""

    def __init__(self, logits: Logits, vocab: int, blocks: int, block_size: int) -> None:
        self.vocab_size, self.context, self.device = vocab, CONTEXT, torch.device("cpu")
        self.hidden_size, self.hidden = HIDDEN, torch.empty(0, HIDDEN)
        self._logits, self._block_size = logits, block_size
        self._kv = [-1] * (blocks * block_size)

    def forward(self, batch: Batch) -> Tensor:
        """float64 [M, vocab_size]."""
        inputs = batch.on_device(self.device)
        entries = zip(inputs.slots.tolist(), batch.ids, inputs.positions.tolist(), strict=True)
        for slot, token, position in entries:
            self._kv[slot] = token + _SPACING * position
        trunks, sees, masks = batch.sights()
        tables = [
            (trunk, table)
            for query, trunk, table in zip(batch.query_lens, trunks, batch.block_tables, strict=True)
            for _ in range(query)
        ]
        rows = [self._logits(self._read(sees[at], masks[at], *tables[at])) for at in batch.logits_at]
        logits = torch.tensor(rows, dtype=torch.float64).reshape(len(rows), self.vocab_size)
        self.hidden = functional.pad(logits, (0, HIDDEN))[:, :HIDDEN].float()
        return logits

    def warm(self, rows: int, longest: int) -> None:
        return None

    def move(self, pairs: Seq[tuple[int, int]]) -> None:
        moved = [self._kv[at] for at, _ in pairs]
        for (_, to), entry in zip(pairs, moved, strict=True):
            self._kv[to] = entry

    def _read(self, sees: int, mask: int, trunk: int, table: Seq[int]) -> Context:
        """The tokens that a token of the pass attends, each read as what it is at its place."""
        size = self._block_size
        seen = [*range(sees), *(trunk + i for i in range(64) if mask >> i & 1)]
        slots = [table[n // size] * size + n % size for n in seen]
        return tuple(self._kv[slot] - _SPACING * at for at, slot in enumerate(slots))


@dataclass(frozen=True)
class Pair:
    """A target and a draft over `vocab` tokens; no draft model if `draft` is None."""

    vocab: int
    target: Logits
    draft: Logits | None


def spoilt(vocab: int) -> Pair:
    """The target gives NaN where the context's length is even and its last token is the vocabulary's last."""
    plain = different(vocab)

    def target(context: Context) -> list[float]:
        none = len(context) % 2 == 0 and context[-1] == vocab - 1
        return [math.nan] * vocab if none else plain.target(context)

    return Pair(vocab, target, plain.draft)


def _gauss(name: str, vocab: int, context: Context) -> list[float]:
    source = random.Random(f"{name}{context}")
    return [source.gauss(0.0, 1.0) for _ in range(vocab)]


def different(vocab: int) -> Pair:
    """A draft that resembles its target."""

    @cache
    def target(context: Context) -> list[float]:
        return _gauss("target", vocab, context)

    @cache
    def draft(context: Context) -> list[float]:
        own = _gauss("draft", vocab, context)
        return [0.7 * t + 0.9 * d for t, d in zip(target(context), own, strict=True)]

    return Pair(vocab, target, draft)


def twins(vocab: int) -> Pair:
    """The draft is the target: every draft token must be accepted."""
    target = different(vocab).target
    return Pair(vocab, target, target)


def disjoint(vocab: int) -> Pair:
    """Where the context's length is even, the draft proposes only the one token that the target forbids."""
    plain = different(vocab)
    assert plain.draft is not None
    own = plain.draft

    def forbidden(context: Context) -> int | None:
        return sum(context) % vocab if len(context) % 2 == 0 else None

    def target(context: Context) -> list[float]:
        hole = forbidden(context)
        return [float("-inf") if t == hole else x for t, x in enumerate(plain.target(context))]

    def draft(context: Context) -> list[float]:
        hole = forbidden(context)
        return [x if hole in (None, t) else float("-inf") for t, x in enumerate(own(context))]

    return Pair(vocab, target, draft)


def broken(vocab: int) -> Pair:
    """The draft gives NaN where the context's length is even."""
    plain = different(vocab)
    assert plain.draft is not None
    own = plain.draft
    return Pair(vocab, plain.target, lambda context: own(context) if len(context) % 2 else [math.nan] * vocab)


def toy_engine(
    pair: Pair,
    *,
    random: RandomSource | None = None,
    eos: Seq[int] = (),
    blocks: int = 64,
    block_size: int = 2,
    rows: int = 8,
    token_budget: int = 1 << 20,
    prefix_cache: bool = True,
) -> Engine:
    """The shipped engine around the pair. `blocks` of `block_size` tokens for at most `rows` rows."""
    config = EngineConfig(
        target="toy",
        draft="toy",
        policy="static",
        max_num_seqs=rows,
        token_budget=token_budget,
        prefix_cache=prefix_cache,
        block_size=block_size,
    )
    parts = assemble(
        config,
        ToyRunner(pair.target, pair.vocab, blocks, block_size),
        None if pair.draft is None else ToyRunner(pair.draft, pair.vocab, blocks, block_size),
        blocks=blocks,
        max_model_len=CONTEXT,
        vocab=pair.vocab,
        eos_ids=eos,
        random=random,
        heads=_heads(),
    )
    return Engine(config, parts)


@cache
def _heads() -> dict[str, Head]:
    return toy_heads(HIDDEN)


def run(engine: Engine, requests: Seq[GenerateRequest], errors: bool = False) -> dict[str, list[TokenEvent]]:
    """Every event of the requests, by id. Asserts that all of them end, without an error if not with."""
    events: dict[str, list[TokenEvent]] = {request.id: [] for request in requests}
    for request in requests:
        engine.add(request)
    steps = 20 + sum(len(r.prompt_ids) + 4 * r.params.max_tokens for r in requests)
    while engine.has_work():
        assert steps > 0, "the engine steps on and requests do not end"
        steps -= 1
        for event in engine.step()[0]:
            assert errors or event.finish_reason != "error", event.error
            events[event.id].append(event)
    assert all(own and own[-1].finish_reason for own in events.values())
    return events


def tokens_of(events: Seq[TokenEvent]) -> tuple[int, ...]:
    return tuple(token for event in events for token in event.token_ids)
