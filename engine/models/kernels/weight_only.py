"""Products of a few rows with a quantized weight, in Triton: what a decoding step spends its time on.

A program makes BLOCK_N outputs of every row: it streams its part of the weight once, widens it in
registers to the inputs' dtype (exactly: the levels of every kind fit in bfloat16) and sums in
float32. Scales are applied to sums, by row at the end or by group on the way, never to weights.
"""

# mypy: disable-error-code="import-not-found,import-untyped,no-untyped-call,no-untyped-def,untyped-decorator"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.models.quantize import KERNEL_ROWS, QuantizedWeight


@triton.jit
def _by_row_kernel(
    x_ptr,  # [M, K], contiguous
    w_ptr,  # [N, K], int8 or e4m3
    scale_ptr,  # float32 [N]
    bias_ptr,  # [N], if HAS_BIAS
    out_ptr,  # [M, N]
    M,
    N,
    K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    rows = tl.arange(0, BLOCK_M)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    ks = tl.arange(0, BLOCK_K)
    row_ok = rows[:, None] < M
    column_ok = columns < N
    x_at = x_ptr + rows[:, None] * K + ks[None, :]
    w_at = w_ptr + columns.to(tl.int64)[None, :] * K + ks[:, None]
    total = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    for k in range(0, K, BLOCK_K):
        x_ok, w_ok = row_ok, column_ok[None, :]
        if K % BLOCK_K != 0:
            x_ok &= ks[None, :] < K - k
            w_ok &= ks[:, None] < K - k
        x = tl.load(x_at, x_ok, 0.0)
        w = tl.load(w_at, w_ok, 0.0)
        if w.dtype == tl.float8e4nv:
            w = w.to(tl.float32)  # in two fast steps instead of one slow
        total = tl.dot(x, w.to(x.dtype), total, input_precision=PRECISION)
        x_at += BLOCK_K
        w_at += BLOCK_K
    total *= tl.load(scale_ptr + columns, column_ok, 0.0)[None, :]
    if HAS_BIAS:
        total += tl.load(bias_ptr + columns, column_ok, 0.0).to(tl.float32)[None, :]
    at = out_ptr + rows[:, None] * N + columns[None, :]
    tl.store(at, total.to(out_ptr.dtype.element_ty), row_ok & column_ok[None, :])


@triton.jit
def _int4_kernel(
    x_ptr,  # [M, GROUPS * 4 * QUARTER], contiguous
    w_ptr,  # int16 [GROUPS, N, QUARTER]: element j has the group's weights j + i * QUARTER, i = 0..3
    scale_ptr,  # int32 [GROUPS, N]: bfloat16 step, then zero point
    bias_ptr,  # [N], if HAS_BIAS
    out_ptr,  # [M, N]
    M,
    N,
    GROUPS: tl.constexpr,
    QUARTER: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,  # PTX for the inputs' dtype, or "" for arithmetic
    OFFSET: tl.constexpr,  # what WIDEN adds to a level
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    dtype = x_ptr.dtype.element_ty
    rows = tl.arange(0, BLOCK_M)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    ks = tl.arange(0, QUARTER)
    row_ok = rows[:, None] < M
    column_ok = columns < N
    x_at = x_ptr + rows[:, None] * (GROUPS * 4 * QUARTER) + ks[None, :]
    w_at = w_ptr + columns[None, :] * QUARTER + ks[:, None]
    scale_at = scale_ptr + columns
    total = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    # Stages are named, so that the scales, which are no operands of a product, are fetched ahead too.
    for _ in tl.range(0, GROUPS, num_stages=STAGES):
        x0 = tl.load(x_at, row_ok, 0.0)
        x1 = tl.load(x_at + QUARTER, row_ok, 0.0)
        x2 = tl.load(x_at + 2 * QUARTER, row_ok, 0.0)
        x3 = tl.load(x_at + 3 * QUARTER, row_ok, 0.0)
        packed = tl.load(w_at, column_ok[None, :], 0)
        word = tl.load(scale_at, column_ok, 0)
        step = (word & -65536).to(tl.float32, bitcast=True)
        zero = ((word & 15) + OFFSET).to(tl.float32).to(dtype)[None, :]
        if WIDEN == "":
            w0 = (packed & 15).to(dtype)
            w1 = ((packed >> 4) & 15).to(dtype)
            w2 = ((packed >> 8) & 15).to(dtype)
            w3 = ((packed >> 12) & 15).to(dtype)
        else:
            w0, w1, w2, w3 = tl.inline_asm_elementwise(
                WIDEN, "=&r,=&r,=&r,=&r,r", [packed], (dtype, dtype, dtype, dtype), True, 2
            )
        part = tl.dot(x0, w0 - zero, input_precision=PRECISION)
        part = tl.dot(x1, w1 - zero, part, input_precision=PRECISION)
        part = tl.dot(x2, w2 - zero, part, input_precision=PRECISION)
        part = tl.dot(x3, w3 - zero, part, input_precision=PRECISION)
        total += part * step[None, :]
        x_at += 4 * QUARTER
        w_at += N * QUARTER
        scale_at += N
    if HAS_BIAS:
        total += tl.load(bias_ptr + columns, column_ok, 0.0).to(tl.float32)[None, :]
    at = out_ptr + rows[:, None] * N + columns[None, :]
    tl.store(at, total.to(out_ptr.dtype.element_ty), row_ok & column_ok[None, :])


def _widen(one: int) -> str:
    """PTX: two packed int16 to four pairs of 16-bit floats. `one` is a float whose last bit counts 1:
    or-ed into its mantissa, a level is added to it. 0xEA is (a & b) | c."""
    pairs = (
        f"shr.u32 t, $4, {4 * i}; lop3.b32 ${i}, t, 0x000F000F, {one:#06x}{one:04x}, 0xEA;" for i in range(4)
    )
    return "{ .reg .b32 t; " + " ".join(pairs) + " }"


_WIDE = 64 * 256  # outputs; with fewer, more programs count for more than larger ones
_INTERPRETED = not isinstance(_int4_kernel, triton.JITFunction)
_WIDEN = {torch.bfloat16: (_widen(0x4300), 128), torch.float16: (_widen(0x6400), 1024)}


def few_rows(x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None) -> Tensor:
    """x [M, K] of bfloat16, float16 or float32, 1 <= M <= KERNEL_ROWS -> [M, N] in its dtype.

    Raises ValueError for more rows and for another width, device or dtype.
    """
    out = x.new_empty((x.shape[0], weight.shape[0]))
    few_rows_into(out, x, weight, bias)
    return out


def few_rows_into(out: Tensor, x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None) -> None:
    """`few_rows`, every element of `out` [M, N], which is contiguous, being written."""
    rows, width = x.shape[0], weight.shape[1]
    if not 1 <= rows <= KERNEL_ROWS or x.shape[1] != width:
        raise ValueError(f"inputs {tuple(x.shape)}: 1 to {KERNEL_ROWS} rows of width {width} are served")
    if x.device != weight.device:
        raise ValueError(f"inputs are on {x.device}, the weight on {weight.device}")
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"inputs of {x.dtype}: bfloat16, float16 and float32 are served")
    with torch.cuda.device_of(x):  # kernels go to the current device
        _launch(out, x.contiguous(), weight, bias)


def _launch(out: Tensor, x: Tensor, weight: QuantizedWeight, bias: Tensor | None) -> None:
    rows, (outputs, width) = x.shape[0], weight.shape
    exact = x.dtype == torch.float32
    block_m = 16 if rows <= 16 else 64  # 32 would have two warps widen the same weights
    block_n = 64 if outputs >= _WIDE and not exact else 32
    grid = (triton.cdiv(outputs, block_n),)
    tensors = (x, weight.data, weight.scale, bias, out, rows, outputs)
    common = {
        **{"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": 4, "HAS_BIAS": bias is not None},
        "PRECISION": "ieee" if exact else "tf32",  # matters to float32 alone
    }
    if weight.group is None:
        block_k = 64 if exact else 128
        stages = _stages(block_k * block_m * x.itemsize, block_k * block_n)
        _by_row_kernel[grid](*tensors, width, BLOCK_K=block_k, num_stages=stages, **common)
    else:
        widen, offset = ("", 0) if _INTERPRETED or exact else _WIDEN[x.dtype]
        stages = _stages(weight.group * block_m * x.itemsize, weight.group * block_n // 2)
        _int4_kernel[grid](
            *(*tensors, width // weight.group, weight.group // 4),
            **{"WIDEN": widen, "OFFSET": offset, "STAGES": stages, **common},
        )


def _stages(*tiles: int) -> int:
    """How many loads of these bytes are on the way: many, within a small GPU's shared memory."""
    return max(2, min(6, 72 * 1024 // sum(tiles)))
