"""Linear layers with oneDNN's packed weights, for fp32 on CPUs.

torch's own linear reads an fp32 weight at a fraction of the memory bandwidth for the few rows of
decoding and verification; oneDNN's blocked layout reads it two to three times faster. The result
differs in rounding only.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

ROWS_HINT = 8  # the row count that the layout is chosen for: a verification's


class PackedLinear(nn.Module):
    """Drop-in for a frozen fp32 nn.Linear on the CPU."""

    def __init__(self, packed: Tensor, bias: Tensor | None, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.packed, self.bias = packed, bias  # plain attributes: opaque to state_dict and to .to()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        return out


def can_pack() -> bool:
    """Whether this torch has the operations."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")  # type: ignore[no-untyped-call]


PackedWeights = dict[int, tuple[Tensor, Tensor]]
"""Weight and packed weight by address. Holding the weight keeps its address from being used again."""


def pack_linears(model: nn.Module, packed: PackedWeights) -> None:
    """Replaces every fp32 nn.Linear on the CPU in place. Models that share weights pass one `packed`."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is not nn.Linear or child.weight.dtype != torch.float32 or child.weight.is_cuda:
                continue
            weight = child.weight.detach()
            if weight.data_ptr() not in packed:
                reordered = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), ROWS_HINT)
                packed[weight.data_ptr()] = (weight, reordered)
            bias = None if child.bias is None else child.bias.detach()
            linear = PackedLinear(packed[weight.data_ptr()][1], bias, child.in_features, child.out_features)
            setattr(parent, name, linear)
