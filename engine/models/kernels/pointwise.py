"""What lies between a layer's matrix products: norms, rotary positions with the KV write, SiLU.

Each takes its inputs in the model's dtype and computes in float32; the residual stream is float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.models.decoder import Decoder, DecoderLayer


@triton.jit
def _add_norm(hidden, delta, weight, out, width, eps, HAS_DELTA: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    x = tl.load(hidden + row * width + at, inside, 0.0)
    if HAS_DELTA:
        x += tl.load(delta + row * width + at, inside, 0.0).to(tl.float32)
        tl.store(hidden + row * width + at, x, inside)
    rstd = 1.0 / tl.sqrt(tl.sum(x * x, 0) / width + eps)
    w = tl.load(weight + at, inside, 0.0).to(tl.float32)
    tl.store(out + row * width + at, (x * rstd * w).to(out.dtype.element_ty), inside)


def add_norm(hidden: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of the residual stream `hidden` float32[N, H]; `delta` [N, H] is added to it, in place."""
    rows, width = hidden.shape
    out = torch.empty_like(hidden, dtype=weight.dtype)
    block = triton.next_power_of_2(width)
    warps = 8 if block >= 2048 else 4
    _add_norm[(rows,)](
        hidden,
        hidden if delta is None else delta,
        weight,
        out,
        width,
        eps,
        HAS_DELTA=delta is not None,
        BLOCK=block,
        num_warps=warps,
    )
    return out


@triton.jit(do_not_specialize_on_alignment=["positions", "slots"])  # they vary with every prompt
def _rotate(
    qkv,
    keys,
    values,
    positions,
    slots,
    inv_freq,
    query_norm,
    key_norm,
    rope_scale,
    eps,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    NORMED: tl.constexpr,
    HALF: tl.constexpr,  # power of two >= DIM / 2
):
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = tl.arange(0, HALF)
    inside = at < DIM // 2
    base = qkv + (token * (HEADS + 2 * KV_HEADS) + head) * DIM
    a = tl.load(base + at, inside, 0.0).to(tl.float32)
    b = tl.load(base + at + DIM // 2, inside, 0.0).to(tl.float32)
    slot = tl.load(slots + token).to(tl.int64)
    if head >= HEADS + KV_HEADS:
        to = values + (slot * KV_HEADS + head - HEADS - KV_HEADS) * DIM
        tl.store(to + at, a.to(values.dtype.element_ty), inside)
        tl.store(to + at + DIM // 2, b.to(values.dtype.element_ty), inside)
    else:
        if NORMED:
            rstd = 1.0 / tl.sqrt((tl.sum(a * a, 0) + tl.sum(b * b, 0)) / DIM + eps)
            weight = query_norm if head < HEADS else key_norm
            a *= rstd * tl.load(weight + at, inside, 0.0).to(tl.float32)
            b *= rstd * tl.load(weight + at + DIM // 2, inside, 0.0).to(tl.float32)
        angle = tl.load(positions + token).to(tl.float32) * tl.load(inv_freq + at, inside, 0.0)
        cosine, sine = tl.cos(angle) * rope_scale, tl.sin(angle) * rope_scale
        low, high = a * cosine - b * sine, b * cosine + a * sine
        to = keys + (slot * KV_HEADS + head - HEADS) * DIM
        if head < HEADS:
            to = base
        tl.store(to + at, low.to(keys.dtype.element_ty), inside)
        tl.store(to + at + DIM // 2, high.to(keys.dtype.element_ty), inside)


def rotate_and_store(
    qkv: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    slots: Tensor,
    decoder: Decoder,
    layer: DecoderLayer,
) -> None:
    """Turns the queries of `qkv` [N, heads + 2 kv_heads, dim] in place; keys and values go to the pool.

    keys, values [pool slots, kv_heads, dim]; positions, slots int[N].
    """
    normed = layer.query_norm is not None
    _rotate[(qkv.shape[0], decoder.heads + 2 * decoder.kv_heads)](
        qkv,
        keys,
        values,
        positions,
        slots,
        decoder.inv_freq,
        layer.query_norm if normed else decoder.norm,
        layer.key_norm if normed else decoder.norm,
        decoder.rope_scale,
        decoder.eps,
        HEADS=decoder.heads,
        KV_HEADS=decoder.kv_heads,
        DIM=decoder.head_dim,
        NORMED=normed,
        HALF=triton.next_power_of_2(decoder.head_dim // 2),
        num_warps=1,
    )


@triton.jit
def _gate(gate_up, out, inner, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < inner
    gate = tl.load(gate_up + row * 2 * inner + at, inside, 0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * inner + inner + at, inside, 0.0).to(tl.float32)
    tl.store(out + row * inner + at, (gate / (1.0 + tl.exp(-gate)) * up).to(out.dtype.element_ty), inside)


def gate(gate_up: Tensor) -> Tensor:
    """SiLU(gate) * up of [N, 2 * inner] -> [N, inner]."""
    rows, inner = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, inner)
    _gate[(rows, triton.cdiv(inner, 1024))](gate_up, out, inner, BLOCK=1024)
    return out
