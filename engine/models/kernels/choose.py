"""From logits to a token, and to the signals of stop policies, in two launches over the vocabulary.

The same numbers as `engine.sampling`, `engine.speculation.noise` and `engine.speculation.features`
give for rows without penalties and filters; a test holds them together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.speculation.features import TOP

_BLOCK = 4096
_KEEP = 16  # power of two >= TOP


def block_of(vocab: int) -> int:
    """Tokens of a vocabulary that one program looks at."""
    return min(_BLOCK, max(_KEEP, int(triton.next_power_of_2(vocab))))


@triton.jit
def _mix(x):
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def gumbel(state, key, at):
    """float64 noise of `engine.speculation.noise` for these tokens, of a seed's state and a counter."""
    lane = _mix(state.to(tl.uint64) + key.to(tl.uint64) * 0x9E3779B97F4A7C15)
    lane = _mix(lane + (at + 1).to(tl.uint64) * 0x9E3779B97F4A7C15)
    uniform = ((lane >> 11).to(tl.float64) + 0.5) * 1.1102230246251565e-16
    return -tl.log(-tl.log(uniform))


@triton.jit(do_not_specialize_on_alignment=["places", "states", "keys", "temperatures"])
def _scan(
    logits,
    stride,
    places,
    states,
    keys,
    temperatures,
    values,
    tokens,
    sums,
    tops,
    laws,
    rejecting,
    step,
    vocab,
    blocks,
    SIGNALS: tl.constexpr,
    TOPS: tl.constexpr,
    BLOCK: tl.constexpr,
    KEEP: tl.constexpr,
    STEPS: tl.constexpr,
):
    row, block = tl.program_id(0), tl.program_id(1)
    place = tl.load(places + row)
    out = row * blocks + block
    at = block * BLOCK + tl.arange(0, BLOCK)
    inside = at < vocab
    x = tl.load(logits + place.to(tl.int64) * stride + at, inside, float("-inf")).to(tl.float32)
    temperature = tl.load(temperatures + row)
    # float64 as in the reference: two tokens must not tie because noise was rounded.
    if temperature > 0:
        law = x
        if STEPS > 0:  # what a rejecting row samples from is what its verification will read
            rounded = x.to(tl.bfloat16)
            keep = tl.load(rejecting + row) != 0
            to = laws + (row * STEPS + tl.load(step)).to(tl.int64) * vocab + at
            tl.store(to, rounded, inside & keep)
            law = tl.where(keep, rounded.to(tl.float32), x)
        noise = gumbel(tl.load(states + row), tl.load(keys + row), at)
        value = (law / temperature).to(tl.float64) + noise
    else:
        value = x.to(tl.float64)
    value = tl.where(inside, value, float("-inf"))
    broken = tl.max(tl.where(x != x, 1, 0), 0)
    best, index = tl.max(value, 0, return_indices=True, return_indices_tie_break_left=True)
    tl.store(values + out, tl.where(broken > 0, float("nan"), best))
    tl.store(tokens + out, block * BLOCK + index)
    if SIGNALS:
        high = tl.max(x, 0)
        base = tl.where(high == float("-inf"), 0.0, high)
        p = tl.exp(x - base)
        tl.store(sums + out * 3, high)
        tl.store(sums + out * 3 + 1, tl.sum(p, 0))
        tl.store(sums + out * 3 + 2, tl.sum(tl.where(p > 0, p * (x - base), 0.0), 0))
    if TOPS:
        for i in tl.static_range(10):
            best32, where = tl.max(x, 0, return_indices=True, return_indices_tie_break_left=True)
            tl.store(tops + out * KEEP + i, best32)
            x = tl.where(tl.arange(0, BLOCK) == where, float("-inf"), x)


@triton.jit(do_not_specialize_on_alignment=["places"])
def _merge(
    logits,
    stride,
    places,
    values,
    tokens,
    sums,
    tops,
    chosen,
    fine,
    prob,
    largest,
    entropy,
    top,
    blocks,
    SIGNALS: tl.constexpr,
    TOPS: tl.constexpr,
    WIDTH: tl.constexpr,
    KEEP: tl.constexpr,
):
    row = tl.program_id(0)
    at = tl.arange(0, WIDTH)
    inside = at < blocks
    value = tl.load(values + row * blocks + at, inside, float("-inf"))
    broken = tl.max(tl.where(value != value, 1, 0), 0)
    best, block = tl.max(value, 0, return_indices=True, return_indices_tie_break_left=True)
    token = tl.load(tokens + row * blocks + tl.where(broken > 0, 0, block))
    finite = (broken == 0) & (best > float("-inf")) & (best < float("inf"))
    tl.store(chosen + row, token)
    tl.store(fine + row, finite.to(tl.int8))
    if SIGNALS:
        high = tl.load(sums + (row * blocks + at) * 3, inside, float("-inf"))
        mass = tl.load(sums + (row * blocks + at) * 3 + 1, inside, 0.0)
        first = tl.load(sums + (row * blocks + at) * 3 + 2, inside, 0.0)
        most = tl.max(high, 0)
        weight = tl.where(high == float("-inf"), 0.0, tl.exp(high - most))
        total = tl.sum(mass * weight, 0)
        # sum of p (x - most): each block's is relative to its own maximum
        mean = (
            tl.sum(weight * tl.where(mass > 0, first + mass * tl.where(weight > 0, high - most, 0.0), 0.0), 0)
            / total
        )
        x = tl.load(logits + tl.load(places + row).to(tl.int64) * stride + token).to(tl.float32)
        tl.store(prob + row, tl.exp(x - most) / total)
        tl.store(largest + row, 1.0 / total)
        tl.store(entropy + row, tl.log(total) - mean)
        if TOPS:
            n = tl.arange(0, WIDTH * KEEP)
            there = (n // KEEP < blocks) & (n % KEEP < 10)
            x = tl.load(tops + row * blocks * KEEP + n, there, float("-inf"))
            for i in tl.static_range(10):
                best32, where = tl.max(x, 0, return_indices=True, return_indices_tie_break_left=True)
                tl.store(top + row * 10 + i, tl.exp(best32 - most) / total)
                x = tl.where(n == where, float("-inf"), x)


@dataclass
class Choice:
    """What `choose` found for B rows, in buffers that the next call writes again."""

    token: Tensor  # int32[B]
    fine: Tensor  # int8[B]; 0 where the logits were NaN, infinite, or allowed no token
    prob: Tensor  # float32[B], of the token in the draft's own law (signals only)
    largest: Tensor  # float32[B], the largest probability of that law
    entropy: Tensor  # float32[B], nats
    top: Tensor  # float32[B, 10], descending


class Laws(NamedTuple):
    """Where the logits go that rejecting rows sample from: `kept` bfloat16[B, steps, vocab].

    `rejecting` int32[B]: whether the row's are kept; `step` int32[1], which of `steps` this is.
    """

    kept: Tensor
    rejecting: Tensor
    step: Tensor


class Chooser:
    """Buffers for at most `rows` rows over `vocab` tokens."""

    def __init__(self, rows: int, vocab: int, device: torch.device) -> None:
        self._vocab, self._blocks = vocab, triton.cdiv(vocab, block_of(vocab))

        def empty(dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self._values = empty(torch.float64, rows, self._blocks)
        self._tokens = empty(torch.int32, rows, self._blocks)
        self._sums = empty(torch.float32, rows, self._blocks, 3)
        self._tops = empty(torch.float32, rows, self._blocks, _KEEP)
        self.choice = Choice(
            token=empty(torch.int32, rows),
            fine=empty(torch.int8, rows),
            prob=empty(torch.float32, rows),
            largest=empty(torch.float32, rows),
            entropy=empty(torch.float32, rows),
            top=empty(torch.float32, rows, TOP),
        )

    def __call__(
        self,
        logits: Tensor,
        places: Tensor,
        states: Tensor,
        keys: Tensor,
        temperatures: Tensor,
        *,
        signals: bool = False,
        top: bool = False,
        laws: Laws | None = None,
    ) -> Choice:
        """The token of each row: argmax of logits / temperature + Gumbel noise, of the logits alone at 0.

        logits [N, >= vocab]; places int32[B], which of them; states int64[B] of `noise.coupled_state` or
        `noise.draws_state`; keys int64[B], position or draw counter; temperatures float32[B].
        """
        choice, rows = self.choice, places.shape[0]
        _scan[(rows, self._blocks)](
            logits, logits.stride(0), places, states, keys, temperatures,
            self._values, self._tokens, self._sums, self._tops,
            *((logits, places, places) if laws is None else (laws.kept, laws.rejecting, laws.step)),
            self._vocab, self._blocks, SIGNALS=signals, TOPS=top, BLOCK=block_of(self._vocab), KEEP=_KEEP,
            STEPS=0 if laws is None else laws.kept.shape[1], num_warps=8,
        )  # fmt: skip
        _merge[(rows,)](
            logits, logits.stride(0), places, self._values, self._tokens, self._sums, self._tops,
            choice.token, choice.fine, choice.prob, choice.largest, choice.entropy, choice.top, self._blocks,
            SIGNALS=signals, TOPS=top, WIDTH=triton.next_power_of_2(self._blocks), KEEP=_KEEP,
            num_warps=4,
        )  # fmt: skip
        return choice
