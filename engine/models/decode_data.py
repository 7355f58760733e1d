"""What `kernels/decode.cu` reads: its parameters, its batch, and maps of the KV pool."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence as Seq
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from engine.models.runner import Branches

MOST = 16  # tokens, and rows
META = 8 + 7 * MOST
"""int32 words of `Meta` in decode_state.cuh: tokens, rows, 6 spare; then by row start, begin, length, line of
the tables; then by token id, position, mask. A row's tokens are neighbours; `start`: its KV length before."""
BLOCK = 16  # positions of a KV block
MAP = 128  # bytes of a tensor map, and what it is aligned to


class Layer(ctypes.Structure):
    """`Layer` in decode_state.cuh: addresses."""

    _fields_ = [
        (name, ctypes.c_uint64)
        for name in (
            *("qkv", "out", "gate_up", "down", "qkv_bias", "out_bias"),
            *("norm_in", "norm_mid", "query_norm", "key_norm", "k", "v", "key_map", "value_map"),
        )
    ]


class Params(ctypes.Structure):
    """`Params` in decode_state.cuh."""

    _fields_ = [
        *((name, ctypes.c_uint64) for name in ("layers", "embed", "hidden", "norm", "head", "inv_freq")),
        *((name, ctypes.c_uint64) for name in ("meta", "tables", "logits", "hn", "attn", "act")),
        *((name, ctypes.c_uint64) for name in ("qkv", "sumsq", "part", "part_ml", "launches")),
        ("table_stride", ctypes.c_int),
        *((name, ctypes.c_float) for name in ("eps", "rope_scale", "scale")),
    ]


def tile_map(pool: Tensor) -> bytes:
    """A tensor map of pool bfloat16[positions, KV heads, head_dim], whose tile is one head of one block."""
    from cuda.bindings import driver

    positions, heads, width = pool.shape
    size = pool.element_size()
    found = checked(
        driver.cuTensorMapEncodeTiled(
            driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
            3,
            pool.data_ptr(),
            [driver.cuuint64_t(n) for n in (width, heads, positions)],
            [driver.cuuint64_t(n * size) for n in (width, heads * width)],
            [driver.cuuint32_t(n) for n in (width, 1, BLOCK)],
            [driver.cuuint32_t(1)] * 3,
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_NONE,
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    )
    return ctypes.string_at(int(found.getPtr()), MAP)


def sees_all(branches: Seq[Branches | None], starts: Seq[int]) -> bool:
    """Whether the kernel can mask these rows: it does so among the tokens of the pass alone."""
    return all(each is None or each.trunk >= start for each, start in zip(branches, starts, strict=True))


def write_meta(
    words: NDArray[np.int32],
    starts: Seq[int],
    tokens: Seq[Seq[int]],
    branches: Seq[Branches | None] | None = None,
) -> None:
    """Rows of tokens, row i after starts[i] positions, into the first `META` of `words`; chains, but for
    `branches`."""
    words[0], words[1] = sum(map(len, tokens)), len(tokens)
    by_row = words[8 : 8 + 4 * MOST].reshape(4, MOST)
    by_token = words[8 + 4 * MOST : META].reshape(3, MOST)
    at = 0
    for row, (start, ids) in enumerate(zip(starts, tokens, strict=True)):
        by_row[:, row] = start, at, len(ids), row
        own = None if branches is None else branches[row]
        for j, token in enumerate(ids):
            place, mask = start + j, (2 << j) - 1
            if own is not None:
                place = own.positions[j]
                mask = ((1 << max(own.sees[j] - start, 0)) - 1) | own.masks[j] << (own.trunk - start)
            by_token[:, at] = token, place, mask
            at += 1


def checked(answer: tuple[Any, ...]) -> Any:
    """What a CUDA call returned after its status. Raises RuntimeError if that is not success."""
    if int(answer[0]):
        raise RuntimeError(f"CUDA: {answer[0]!s}")
    return answer[1] if len(answer) > 1 else None
