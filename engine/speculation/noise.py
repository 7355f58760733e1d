"""Randomness of one request, from a counter-based generator: a function of its seed alone.

Coupled sampling takes Gumbel noise g(seed, position) over the vocabulary, the same for target and
draft (arXiv 2408.07978). Rejection sampling takes uniforms u(seed, draw counter): keyed by
position they would be biased, since a redrafted position would reuse noise the policy has seen.
Both hash with the finaliser of SplitMix64 (Steele, Lea, Flood 2014).
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Seq
from typing import Protocol

import torch
from torch import Tensor

from engine.sequence import Sequence

_MASK = (1 << 64) - 1
_STEP = 0x9E3779B97F4A7C15
_MUL1, _MUL2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_COUPLED, _DRAWS, _VECTORS = 1, 2, 3  # separate streams of one seed


def _mix(x: int) -> int:
    x = ((x ^ (x >> 30)) * _MUL1) & _MASK
    x = ((x ^ (x >> 27)) * _MUL2) & _MASK
    return x ^ (x >> 31)


def _state(seed: int, stream: int) -> int:
    return _mix(((seed & _MASK) + stream * _STEP) & _MASK)


def _key(seed: int, stream: int, counter: int) -> int:
    return _mix((_state(seed, stream) + counter * _STEP) & _MASK)


def coupled_state(seed: int) -> int:
    """What of g(seed, position) does not depend on the position, as int64: where kernels go on from."""
    return _signed(_state(seed, _COUPLED))


def draws_state(seed: int) -> int:
    """As `coupled_state`, of the noise keyed by the draw counter, by which kernels sample for rejection."""
    return _signed(_state(seed, _VECTORS))


def _signed(x: int) -> int:
    return x - (1 << 64) if x >> 63 else x


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def uniform(seed: int, counter: int) -> float:
    """A number in [0, 1), the `counter`-th of the seed's draws."""
    return (_key(seed, _DRAWS, counter) >> 11) * 2.0**-53


class GumbelNoise:
    """g(seed, position): standard Gumbel noise over the vocabulary."""

    def __init__(self, vocab: int, device: torch.device) -> None:
        self._lanes = lanes_of(vocab, device)

    def __call__(self, seeds: Seq[int], positions: Seq[int]) -> Tensor:
        """float64[M, V], row i for (seeds[i], positions[i])."""
        keys = [coupled_key(seed, at) for seed, at in zip(seeds, positions, strict=True)]
        return gumbel(torch.tensor(keys, dtype=torch.int64, device=self._lanes.device), self._lanes)


def lanes_of(vocab: int, device: torch.device) -> Tensor:
    """int64[V]: what tells the tokens' noise apart."""
    return torch.arange(1, vocab + 1, dtype=torch.int64, device=device) * _signed(_STEP)


def coupled_key(seed: int, position: int) -> int:
    """Of g(seed, position), as int64: where `gumbel` goes on from."""
    return _signed(_key(seed, _COUPLED, position))


def gumbel(keys: Tensor, lanes: Tensor) -> Tensor:
    """float64[M, V]: standard Gumbel noise, a row for each key int64[M]."""
    x = keys[:, None] + lanes
    x = (x ^ _shift(x, 30)) * _signed(_MUL1)
    x = (x ^ _shift(x, 27)) * _signed(_MUL2)
    x = x ^ _shift(x, 31)
    u = (_shift(x, 11).to(torch.float64) + 0.5) * 2.0**-53
    return u.log_().neg_().log_().neg_()


class RandomSource(Protocol):
    """Where rejection sampling takes its outcomes from. Tests script it to enumerate every branch."""

    def categorical(self, laws: Tensor, owners: Seq[Sequence]) -> Tensor:
        """int64[B]: one outcome of each row of `laws` float[B, V] (each sums to 1)."""
        ...

    def bernoulli(self, probs: Tensor, owners: Seq[Sequence]) -> Tensor:
        """bool[B]: True with probability probs[i]."""
        ...

    def ordered(self, laws: Tensor, owners: Seq[Sequence], most: int) -> list[Iterator[tuple[int, float]]]:
        """By row of `laws` float[B, V] up to `most` tokens and probabilities, drawn without replacement."""
        ...


class CounterDraws:
    """Draws keyed by (seed, draw counter) of the sequence that owns the row."""

    def _uniforms(self, owners: Seq[Sequence], device: torch.device) -> Tensor:
        values = []
        for owner in owners:
            values.append(uniform(owner.seed, owner.draws))
            owner.draws += 1
        return torch.tensor(values, dtype=torch.float64, device=device)

    def categorical(self, laws: Tensor, owners: Seq[Sequence]) -> Tensor:
        sums = laws.to(torch.float64).cumsum(-1)
        at = torch.searchsorted(sums, self._uniforms(owners, laws.device)[:, None], right=True)[:, 0]
        last = (sums < sums[:, -1:]).sum(-1)  # last token of the support: rounding must not pass it
        return torch.minimum(at, last)

    def bernoulli(self, probs: Tensor, owners: Seq[Sequence]) -> Tensor:
        return self._uniforms(owners, probs.device) < probs.to(torch.float64)

    def ordered(self, laws: Tensor, owners: Seq[Sequence], most: int) -> list[Iterator[tuple[int, float]]]:
        """The largest of log q + g are a sample without replacement, in its order (Gumbel top-k)."""
        keys = []
        for owner in owners:
            keys.append(_signed(_key(owner.seed, _VECTORS, owner.draws)))
            owner.draws += 1
        there = torch.tensor(keys, dtype=torch.int64, device=laws.device)
        noise = gumbel(there, lanes_of(laws.shape[1], laws.device))
        return [iter(each) for each in first(laws.log() + noise, most, laws)]


def first(scores: Tensor, most: int, laws: Tensor | None = None) -> list[list[tuple[int, float]]]:
    """By row the tokens of the highest scores float[B, V], with their probabilities under `laws` [B, V], else
    under softmax(scores); none that have no probability, and none at all where there are NaNs. One read-back.
    """
    best, ids = scores.topk(min(most, scores.shape[1]), dim=-1)
    probs = (best - scores.logsumexp(-1, keepdim=True)).exp() if laws is None else laws.gather(1, ids)
    told = torch.cat([ids.to(probs.dtype), probs], dim=1).tolist()  # ids are exact in float32
    width = ids.shape[1]
    return [[(int(t), p) for t, p in zip(row[:width], row[width:], strict=True) if p > 0] for row in told]
