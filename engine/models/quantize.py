"""Weight-only quantization: linear layers whose weights are int8, fp8 or int4 and whose inputs are not.

Decoding and verification read every weight for a few rows, so their time is the weights' bytes.
The kinds, exactly, for a weight W [N, K] (rounding is to nearest, ties to even):

* int8: a float32 scale for each row, s = max|W| / 127; q = round(W / s), int8.
* fp8: likewise s = max|W| / 448; q = W / s in e4m3 (bits kept: 1 sign, 4 exponent, 3 mantissa).
* int4: for each `group` of weights along K a bfloat16 step s and a zero point z. Asymmetric: of the
  range from lo = min(W, 0) to hi = max(W, 0), s = (hi - lo) / 15, z = round(-lo / s). Symmetric:
  s = max|W| / 7, z = 8. q = clamp(round(W / s) + z, 0, 15), and W is read as (q - z) s.

Rows do not know of each other, so matrices of one input may be quantized apart and joined. int8 and
fp8 take the same bytes; of weights like normal ones int8 loses a third of what fp8 does, and int4 four
times as much as fp8.
"""

from __future__ import annotations

import logging
from collections.abc import MutableMapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.weak import WeakIdKeyDictionary
from transformers import PreTrainedModel

from engine.models.prequantized import check_quantization_config, dequantize_at_load

__all__ = [
    "GROUPS",
    "KERNEL_ROWS",
    "Kind",
    "QuantizedLinear",
    "QuantizedWeight",
    "Shared",
    "check_quantization_config",
    "dequantize_at_load",
    "quantize",
    "quantize_linears",
    "shared_weights",
    "weight_only_linear",
]

log = logging.getLogger("disco.models")

Kind = Literal["int8", "fp8", "int4"]
GROUPS = (128, 64)
"""What may share an int4 scale, in falling order of preference."""
KERNEL_ROWS = 64
"""Up to this many rows the kernel reads the quantized weights; beyond, they are dequantized once."""
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_LARGEST = {"int8": 127.0, "fp8": 448.0}
_STEP_BITS = -65536  # the upper half of an int32
_AT_ONCE = 1 << 25  # weights that are quantized at a time, in float32


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A weight [N, K] of a linear layer.

    int8, fp8: `data` [N, K] of int8 or float8_e4m3fn, `scale` float32 [N].
    int4: two to a byte. `data` int16 [K / group, N, group / 4]; element j of a group has its weights
    j, j + group / 4, j + group / 2 and j + 3 group / 4, from the lowest four bits up. `scale` int32
    [K / group, N]: the bits of the bfloat16 step above those of the zero point. Groups come first,
    so that what a kernel reads at a time lies together.
    """

    kind: Kind
    data: Tensor
    scale: Tensor
    group: int | None = None

    def __post_init__(self) -> None:
        if not (self.data.is_contiguous() and self.scale.is_contiguous()):
            raise ValueError("a quantized weight's tensors must be contiguous: kernels read them as they lie")

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K), that is (out_features, in_features)."""
        if self.group is None:
            return self.data.shape[0], self.data.shape[1]
        return self.data.shape[1], self.data.shape[0] * self.group

    @property
    def nbytes(self) -> int:
        """Bytes of data, scales and zero points."""
        return self.data.nbytes + self.scale.nbytes

    @property
    def device(self) -> torch.device:
        return self.data.device

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[N, K] on the same device; each weight is computed in float32 and rounded to `dtype` once."""
        if self.group is None:
            levels = self.data.to(dtype) if self.kind == "fp8" else self.data  # every level fits a float
            out = torch.empty(self.shape, dtype=dtype, device=self.device)
            return torch.mul(levels, self.scale[:, None], out=out)
        levels = torch.cat([self.data >> bits & 15 for bits in (0, 4, 8, 12)], -1)
        step = (self.scale & _STEP_BITS).view(torch.float32)
        values = (levels - (self.scale & 15)[..., None]) * step[..., None]  # [K / group, N, group]
        return values.to(dtype).transpose(0, 1).reshape(self.shape)

    @staticmethod
    def cat(parts: Seq[QuantizedWeight]) -> QuantizedWeight:
        """Weights of one input as one, along rows; exact. Raises ValueError where kind, K or group differ."""
        facts = {(part.kind, part.shape[1], part.group) for part in parts}
        if len(facts) != 1:
            raise ValueError(f"these cannot be joined: (kind, inputs, group) are {sorted(facts, key=str)}")
        first = parts[0]
        data = torch.cat([part.data.view(torch.int8) for part in parts], -2).view(first.data.dtype)
        return QuantizedWeight(first.kind, data, torch.cat([part.scale for part in parts], -1), first.group)


def quantize(
    weight: Tensor, kind: Kind, *, group: int | None = None, symmetric: bool = False
) -> QuantizedWeight:
    """Quantizes a floating-point weight [N, K], on its device. `group` and `symmetric` are int4's;
    `group` None takes the largest of `GROUPS` that divides K.

    Raises ValueError for an unknown kind, a weight that is empty, not floating point, not of two
    dimensions or not finite, and for int4 if K is no multiple of `group`.
    """
    if kind not in get_args(Kind):
        raise ValueError(f"quantization {kind!r}: known are {', '.join(get_args(Kind))}")
    if weight.ndim != 2 or not weight.numel() or weight.dtype not in _FLOATS:
        raise ValueError(
            f"only a floating-point matrix is quantized, not {weight.dtype} {tuple(weight.shape)}"
        )
    group = _group(weight.shape[1], group) if kind == "int4" else None
    parts = []
    for rows in torch.split(weight.detach(), max(1, _AT_ONCE // weight.shape[1])):
        values = rows.float().contiguous()
        if not bool(torch.isfinite(values).all()):
            raise ValueError("the weight has values that are not finite")
        parts.append(_by_row(values, kind) if group is None else _int4(values, group, symmetric))
    return QuantizedWeight.cat(parts) if len(parts) > 1 else parts[0]


def _by_row(values: Tensor, kind: Kind) -> QuantizedWeight:
    scale = _no_zeros(values.abs().amax(1) / _LARGEST[kind])
    scaled = (values / scale[:, None]).clamp_(-_LARGEST[kind], _LARGEST[kind])
    data = scaled.round_().to(torch.int8) if kind == "int8" else scaled.to(torch.float8_e4m3fn)
    return QuantizedWeight(kind, data, scale)


def _int4(values: Tensor, group: int, symmetric: bool) -> QuantizedWeight:
    grouped = values.view(len(values), -1, group).transpose(0, 1)  # [K / group, N, group]
    low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
    whole = torch.maximum(high, -low) / 7 if symmetric else (high - low) / 15
    step = _no_zeros(whole.to(torch.bfloat16).float())
    zero = torch.full_like(step, 8) if symmetric else (-low / step).round().clamp(0, 15)
    levels = ((grouped / step[..., None]).round_() + zero[..., None]).clamp_(0, 15).to(torch.int32)
    a, b, c, d = levels.chunk(4, -1)
    data = (a | b << 4 | c << 8 | d << 12).to(torch.int16)
    scale = step.contiguous().view(torch.int32) | zero.to(torch.int32)
    return QuantizedWeight("int4", data.contiguous(), scale.contiguous(), group)


def _group(width: int, group: int | None) -> int:
    fitting = [each for each in GROUPS if width % each == 0 and group in (None, each)]
    if not fitting:
        raise ValueError(
            f"int4 in groups of {group or GROUPS}: groups are of {GROUPS}, and must divide {width} inputs"
        )
    return fitting[0]


def _no_zeros(scale: Tensor) -> Tensor:
    """Where all weights are 0, or nearly, any scale will do but 0."""
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def weight_only_linear(x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None) -> Tensor:
    """x [..., K] -> [..., N] in x's dtype. Raises ValueError if K differs.

    On a GPU a kernel serves up to `KERNEL_ROWS` rows (16 of float32) and sums in float32; more rows,
    and every CPU, get the dequantized weight, so that there it saves memory and no time.
    """
    if x.shape[-1] != weight.shape[1]:
        raise ValueError(f"inputs of width {x.shape[-1]} do not fit a weight of {weight.shape[1]} inputs")
    rows = x.numel() // x.shape[-1]
    most = min(KERNEL_ROWS, 16) if x.dtype == torch.float32 else KERNEL_ROWS  # without tensor cores
    if 0 < rows <= most and x.is_cuda and _has_kernel(weight.kind, x.device):
        from engine.models.kernels.weight_only import few_rows

        out = few_rows(x.reshape(rows, -1), weight, bias)
        return out.view(*x.shape[:-1], -1)
    return F.linear(x, weight.dequantize(x.dtype), bias)


@cache
def _has_kernel(kind: Kind, device: torch.device) -> bool:
    """e4m3 is converted by hardware from compute capability 8.9 on; Triton has bfloat16 from 8.0 on."""
    return torch.cuda.get_device_capability(device) >= ((8, 9) if kind == "fp8" else (8, 0))


class QuantizedLinear(nn.Module):
    """Drop-in for a frozen nn.Linear. Its weight is no parameter: `.to()` and `state_dict` pass it by."""

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight, self.bias = weight, bias

    def forward(self, x: Tensor) -> Tensor:
        return weight_only_linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {self.weight.kind}"


Shared = MutableMapping[Any, QuantizedWeight]
"""Quantized weights by the parameter that they were made of, for as long as that lives."""


def shared_weights() -> Shared:
    return WeakIdKeyDictionary()


def quantize_linears(
    model: PreTrainedModel,
    kind: Kind,
    *,
    head: bool = True,
    skip: Seq[str] = (),
    group: int | None = None,
    shared: Shared | None = None,
) -> None:
    """Replaces the model's nn.Linear layers in place and on their device, one by one: a weight that
    nothing else uses is freed before the next is quantized, so that memory never holds two models.

    `head`: the output layer too. It is read whole for every token and is a small model's largest
    matrix, so that this pays even where it is tied to the embedding, which then stays as it is, in
    memory beside it. Under int4 the head becomes int8, since its errors are the logits' own.
    `skip`: parts of the dotted names of layers to leave alone, as "o_proj" or "mlp.gate".
    `group`: int4's. `shared`: models with parameters in common pass one `shared_weights()`.

    Raises ValueError, with nothing changed, for an unknown kind, where int4 does not fit a layer's
    inputs (the layer is named), for a checkpoint's own quantization, and where there is no layer.
    """
    kinds = _kinds(model, kind, head, skip, group)
    shared = shared_weights() if shared is None else shared
    before = after = 0
    for name, its_kind in kinds.items():
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        quantized = shared.get(linear.weight)
        if quantized is None or quantized.kind != its_kind or group not in (None, quantized.group):
            quantized = shared[linear.weight] = quantize(linear.weight, its_kind, group=group)
        before, after = before + linear.weight.nbytes, after + quantized.nbytes
        model.set_submodule(name, QuantizedLinear(quantized, linear.bias))
    log.info(
        "%d layers as %s: %.0f MB of weights became %.0f MB", len(kinds), kind, before / 1e6, after / 1e6
    )


def _kinds(
    model: PreTrainedModel, kind: Kind, head: bool, skip: Seq[str], group: int | None
) -> dict[str, Kind]:
    """What the layers become, by name: holding the modules would keep their weights alive."""
    if kind not in get_args(Kind):
        raise ValueError(f"quantization {kind!r}: known are {', '.join(get_args(Kind))}")
    if getattr(model, "is_quantized", False):
        raise ValueError("the model's checkpoint is quantized already: only plain weights are")
    last = model.get_output_embeddings()
    of_head = set() if last is None else set(last.modules())
    kinds: dict[str, Kind] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if type(module) is not nn.Linear or any(f".{part}." in f".{name}." for part in skip):
            continue
        if module not in of_head:
            kinds[name] = kind
        elif head:
            kinds[name] = "int8" if kind == "int4" else kind
        if kinds.get(name) == "int4":
            try:
                _group(module.in_features, group)
            except ValueError as error:
                raise ValueError(f"layer {name}: {error}") from None
    if not kinds:
        raise ValueError(f"{type(model).__name__} has no linear layers to quantize")
    return kinds
