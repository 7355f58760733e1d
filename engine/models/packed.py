"""Linear layers with oneDNN's packed weights, for fp32 on CPUs.

torch's own linear reads an fp32 weight at a fraction of the memory bandwidth for the few rows of
decoding and verification; oneDNN's blocked layout reads it two to three times faster. The result
differs in rounding only.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ROWS_HINT = 8  # the row count that the layout is chosen for: a verification's


class PackedLinear(nn.Module):
    """Drop-in for a frozen fp32 nn.Linear on the CPU."""

    def __init__(self, packed: Tensor, bias: Tensor | None, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.packed, self.bias = packed, bias  # plain attributes: opaque to state_dict and to .to()

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        count = len(rows)
        if (taken := padded(count)) != count:
            rows = F.pad(rows, (0, 0, 0, taken - count))
        out: Tensor = torch.ops.mkldnn._linear_pointwise(rows, self.packed, self.bias, "none", [], "")
        return out[:count].view(*x.shape[:-1], self.out_features)


def padded(rows: int) -> int:
    """The row count that a product of so many rows is computed with.

    oneDNN keeps 0.5 to 1 MiB for every shape that it has ever multiplied, for good: of each weight there are
    to be few shapes. The rows of decoding alone are computed as they are.
    """
    for most, step in ((16, 1), (64, 4), (256, 16)):
        if rows <= most:
            return -(-rows // step) * step
    return -(-rows // 64) * 64


INT8_STEP = 32
"""torch's int8 product is wrong, or crashes, where the inputs are not a multiple of this (seen: 33, 40)."""


class Int8Linear(nn.Module):
    """Linear layers of one input side by side, weights in int8 by row, for drafts on the CPU.

    A draft may be imprecise, and a quarter of the bytes is read in a quarter of the time; inputs
    and products are bfloat16. Bytes are what counts up to a few rows; beyond, fp32 would be faster.
    """

    def __init__(self, linears: Seq[nn.Linear]) -> None:
        super().__init__()
        self.weight, scale = quantize(torch.cat([linear.weight.detach() for linear in linears]))
        self.scale = scale.to(torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2).to(torch.bfloat16)
        out = torch._weight_int8pack_mm(rows, self.weight, self.scale)
        return out.to(x.dtype).view(*x.shape[:-1], -1)


def can_int8() -> bool:
    """Whether this torch has the operation."""
    return hasattr(torch, "_weight_int8pack_mm")


def quantize(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """int8 [R, C] and float32 scale [R]: symmetric, by row."""
    scale = matrix.float().abs().amax(1).clamp(min=1e-12) / 127
    return (matrix.float() / scale[:, None]).round().to(torch.int8), scale


def can_pack() -> bool:
    """Whether this torch has the operations."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


PackedWeights = dict[tuple[int, ...], tuple[list[Tensor], Tensor]]
"""Weights and their packed form by address. Held weights keep their addresses from being used again."""


def packable(module: nn.Module) -> bool:
    """Whether it is a plain fp32 linear layer on the CPU."""
    return type(module) is nn.Linear and module.weight.dtype == torch.float32 and not module.weight.is_cuda


def packed_linear(linears: Seq[nn.Linear], packed: PackedWeights) -> PackedLinear:
    """Layers of one input as one, their outputs side by side. Models that share weights pass one `packed`."""
    weights = [linear.weight.detach() for linear in linears]
    key = tuple(weight.data_ptr() for weight in weights)
    if key not in packed:
        whole = torch.cat(weights).contiguous()
        packed[key] = weights, torch.ops.mkldnn._reorder_linear_weight(whole, ROWS_HINT)
    bias = None
    if any(linear.bias is not None for linear in linears):
        biases = [
            w.new_zeros(len(w)) if m.bias is None else m.bias for m, w in zip(linears, weights, strict=True)
        ]
        bias = torch.cat(tuple(biases)).detach()
    out_features = sum(linear.out_features for linear in linears)
    return PackedLinear(packed[key][1], bias, linears[0].in_features, out_features)


def pack_linears(model: nn.Module, packed: PackedWeights) -> None:
    """Replaces every fp32 nn.Linear on the CPU in place."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if packable(child):
                assert isinstance(child, nn.Linear)
                setattr(parent, name, packed_linear([child], packed))
