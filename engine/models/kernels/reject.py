"""Verification by rejection sampling in four launches (Leviathan et al., arXiv 2211.17192).

The same law as `engine.speculation.verifier` gives on the host for rows without penalties and
filters, from the logits that the draft was sampled from; a test holds them together.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.models.kernels.choose import block_of, gumbel

# Where a batch's numbers lie varies with their count: no variant for each.
_MOVES = ["place", "law", "heat", "token", "uniform", "begin", "length", "states", "keys"]


@triton.jit(do_not_specialize_on_alignment=_MOVES[:3])
def _masses(
    logits, stride, laws, place, law, heat, sums, vocab, blocks, BLOCK: tl.constexpr
):  # fmt: skip
    """Of each position and block: maximum and sum of exponentials, of p and of q."""
    row, block = tl.program_id(0), tl.program_id(1)
    at = block * BLOCK + tl.arange(0, BLOCK)
    inside = at < vocab
    temperature = tl.load(heat + row)
    out = sums + (row * blocks + block) * 4
    x = tl.load(logits + tl.load(place + row).to(tl.int64) * stride + at, inside, float("-inf"))
    x = x.to(tl.float32) / temperature
    high = tl.max(x, 0)
    base = tl.where(high == float("-inf"), 0.0, high)
    tl.store(out, tl.where(tl.max(tl.where(x != x, 1, 0), 0) > 0, float("nan"), high))
    tl.store(out + 1, tl.sum(tl.exp(x - base), 0))
    kept = tl.load(law + row).to(tl.int64)
    if kept >= 0:
        y = tl.load(laws + kept * vocab + at, inside, float("-inf")).to(tl.float32) / temperature
        high = tl.max(y, 0)
        tl.store(out + 2, high)
        tl.store(out + 3, tl.sum(tl.exp(y - tl.where(high == float("-inf"), 0.0, high)), 0))


@triton.jit
def _log_total(sums, blocks, at, inside):
    """log of the sum of exponentials over all blocks; NaN if one is broken."""
    high = tl.load(sums + at * 4, inside, float("-inf"))
    mass = tl.load(sums + at * 4 + 1, inside, 0.0)
    most = tl.max(high, 0)
    total = tl.sum(tl.where(high == float("-inf"), 0.0, mass * tl.exp(high - most)), 0)
    broken = tl.max(tl.where(high != high, 1, 0), 0)
    return tl.where(broken > 0, float("nan"), most + tl.log(total))


@triton.jit(do_not_specialize_on_alignment=_MOVES[:7])
def _stand(
    logits, stride, laws, place, law, heat, token, uniform, begin, length, sums, totals, found,
    vocab, blocks, WIDTH: tl.constexpr,
):  # fmt: skip
    """Of each row: how many draft tokens stand, and whether every position has a law."""
    row = tl.program_id(0)
    at = tl.arange(0, WIDTH)
    inside = at < blocks
    first, drafted = tl.load(begin + row), tl.load(length + row)
    standing, accepted, fine = 1, 0, 1
    for k in range(0, drafted + 1):
        j = first + k
        temperature, kept = tl.load(heat + j), tl.load(law + j).to(tl.int64)
        p_total = _log_total(sums + j * blocks * 4, blocks, at, inside)
        q_total = _log_total(sums + j * blocks * 4 + 2, blocks, at, inside)
        tl.store(totals + j * 2, p_total)
        tl.store(totals + j * 2 + 1, q_total)
        sound = (p_total == p_total) & (p_total < float("inf")) & (p_total > float("-inf"))
        fine = tl.where(sound, fine, 0)
        if k < drafted:
            y = tl.load(token + j)
            x = tl.load(logits + tl.load(place + j).to(tl.int64) * stride + y).to(tl.float32)
            ratio = x / temperature - p_total
            if kept >= 0:
                ratio -= tl.load(laws + kept * vocab + y).to(tl.float32) / temperature - q_total
            stands = tl.load(uniform + j) < tl.exp(ratio.to(tl.float64))
            standing = tl.where(stands, standing, 0)
            accepted += standing
    tl.store(found + row * 3, accepted)
    tl.store(found + row * 3 + 1, fine)


@triton.jit(do_not_specialize_on_alignment=[*_MOVES[:4], *_MOVES[5:]])
def _residual(
    logits, stride, laws, place, law, heat, token, begin, length, states, keys, totals, found,
    values, tokens, vocab, blocks, BLOCK: tl.constexpr,
):  # fmt: skip
    """The best of each block, with noise, of log max(p - q, 0), and of log p for where nothing is left."""
    row, block = tl.program_id(0), tl.program_id(1)
    accepted = tl.load(found + row * 3)
    j = tl.load(begin + row) + accepted
    at = block * BLOCK + tl.arange(0, BLOCK)
    inside = at < vocab
    temperature, kept = tl.load(heat + j), tl.load(law + j).to(tl.int64)
    x = tl.load(logits + tl.load(place + j).to(tl.int64) * stride + at, inside, float("-inf")).to(tl.float32)
    p = tl.exp(x / temperature - tl.load(totals + j * 2))
    left = p
    if accepted < tl.load(length + row):
        if kept >= 0:
            y = tl.load(laws + kept * vocab + at, inside, float("-inf")).to(tl.float32)
            left = tl.maximum(p - tl.exp(y / temperature - tl.load(totals + j * 2 + 1)), 0.0)
        else:
            left = tl.where(at == tl.load(token + j), 0.0, p)
    noise = gumbel(tl.load(states + row), tl.load(keys + row), at)
    out = row * blocks + block
    for which in tl.static_range(2):
        weight = left if which == 0 else p
        value = tl.where(inside & (weight > 0), tl.log(weight).to(tl.float64) + noise, float("-inf"))
        best, index = tl.max(value, 0, return_indices=True, return_indices_tie_break_left=True)
        tl.store(values + out * 2 + which, best)
        tl.store(tokens + out * 2 + which, block * BLOCK + index)


@triton.jit
def _pick(values, tokens, found, blocks, WIDTH: tl.constexpr):
    row = tl.program_id(0)
    at = tl.arange(0, WIDTH)
    inside = at < blocks
    best, block = tl.max(
        tl.load(values + (row * blocks + at) * 2, inside, float("-inf")), 0, return_indices=True
    )
    _, other = tl.max(
        tl.load(values + (row * blocks + at) * 2 + 1, inside, float("-inf")), 0, return_indices=True
    )
    which = tl.where(best > float("-inf"), 0, 1)  # rounding may leave nothing: then p is q
    chosen = tl.where(which == 0, block, other)
    tl.store(found + row * 3 + 2, tl.load(tokens + (row * blocks + chosen) * 2 + which))


def reject(
    logits: Tensor,
    laws: Tensor | None,
    by_position: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    by_row: tuple[Tensor, Tensor, Tensor, Tensor],
    vocab: int,
) -> Tensor:
    """int32[B, 3]: draft tokens that stand, whether all laws were sound, the token after them.

    logits [M, >= vocab], the target's. laws bfloat16[N, vocab]: logits that draft tokens were sampled
    from. by_position, of B rows' positions in turn, each row's draft tokens and one more: place int32
    in `logits`, law int32 in `laws` or -1 where q is one-hot, token int32, temperature float32 > 0,
    uniform float64. by_row: begin int32 of its positions, length int32 of its draft, state int64 and
    key int64 of the noise of its next token.
    """
    place, law, token, heat, uniform = by_position
    begin, length, states, keys = by_row
    device, rows, positions = logits.device, begin.shape[0], place.shape[0]
    block = block_of(vocab)
    blocks = triton.cdiv(vocab, block)
    width = triton.next_power_of_2(blocks)
    sums = torch.zeros(positions, blocks, 4, dtype=torch.float32, device=device)
    totals = torch.empty(positions, 2, dtype=torch.float32, device=device)
    found = torch.empty(rows, 3, dtype=torch.int32, device=device)
    values = torch.empty(rows, blocks, 2, dtype=torch.float64, device=device)
    tokens = torch.empty(rows, blocks, 2, dtype=torch.int32, device=device)
    kept = logits if laws is None else laws
    stride = logits.stride(0)
    _masses[(positions, blocks)](
        logits, stride, kept, place, law, heat, sums, vocab, blocks, BLOCK=block, num_warps=8
    )
    _stand[(rows,)](
        logits, stride, kept, place, law, heat, token, uniform, begin, length, sums, totals, found,
        vocab, blocks, WIDTH=width, num_warps=1,
    )  # fmt: skip
    _residual[(rows, blocks)](
        logits, stride, kept, place, law, heat, token, begin, length, states, keys, totals, found,
        values, tokens, vocab, blocks, BLOCK=block, num_warps=8,
    )  # fmt: skip
    _pick[(rows,)](values, tokens, found, blocks, WIDTH=width, num_warps=1)
    return found
