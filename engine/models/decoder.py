"""The Llama family as the fused runner sees it: which models, and their weights, stacked.

The weights stay those that transformers loaded; query, key and value (and gate and up) become one
matrix, of which the model's own layers keep views.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import SiLUActivation

from engine.models.draft import DraftForCausalLM
from engine.models.quantize import QuantizedLinear, QuantizedWeight
from engine.models.selfcheck import batch_dependence

FAMILY = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
"""Architectures that differ only in biases, norms of query and key, windows and sizes."""


Matrix = Tensor | QuantizedWeight


@dataclass
class DecoderLayer:
    """Weights of one layer; a matrix is [rows, inputs]. `window`: positions attended, None for all."""

    qkv: Matrix  # [(heads + 2 kv_heads) * head_dim, hidden]
    qkv_bias: Tensor | None
    out: Matrix  # [hidden, heads * head_dim]
    out_bias: Tensor | None
    gate_up: Matrix  # [2 * inner, hidden]
    gate_up_bias: Tensor | None
    down: Matrix  # [hidden, inner]
    down_bias: Tensor | None
    norm_in: Tensor  # [hidden]
    norm_mid: Tensor
    query_norm: Tensor | None  # [head_dim]
    key_norm: Tensor | None
    window: int | None


class Layers(Protocol):
    """A model's layers in order: a list, or what brings each to the device when it is its turn."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[DecoderLayer]: ...


@dataclass
class Decoder:
    """A whole model. `embed` and `head` are modules, for a draft's may be reduced."""

    layers: Layers
    embed: nn.Module
    head: nn.Module
    norm: Tensor
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    inner: int
    vocab: int
    eps: float
    inv_freq: Tensor  # float32[head_dim / 2]
    rope_scale: float  # yarn's factor on cos and sin; 1 for the others
    scaling: float  # of the scores

    @property
    def dtype(self) -> torch.dtype:
        return self.norm.dtype

    @property
    def device(self) -> torch.device:
        return self.norm.device


def unsupported(model: PreTrainedModel) -> str | None:
    """Why the fused runner cannot run the model, or None."""
    name = type(model).__name__
    if name not in FAMILY and not isinstance(model, DraftForCausalLM):
        return f"{name} is not of the Llama family ({', '.join(FAMILY)})"
    if (reason := batch_dependence(model)) is not None:
        return reason
    core: Any = model.model
    layer = core.layers[0]
    if not isinstance(layer.mlp.act_fn, SiLUActivation | nn.SiLU):
        return f"{name} has the activation {type(layer.mlp.act_fn).__name__}, not SiLU"
    kinds = {type(m) for m in layer.modules() if hasattr(m, "in_features")}
    if kinds != {nn.Linear} and kinds != {QuantizedLinear}:
        return f"{name} has linear layers of type {', '.join(sorted(k.__name__ for k in kinds))}"
    if layer.self_attn.head_dim % 2 or layer.self_attn.head_dim > 256:
        return f"{name} has a head dimension of {layer.self_attn.head_dim}"
    return None


def extract(model: PreTrainedModel, layers: Layers | None = None) -> Decoder:
    """The model's weights, stacked in place, or with these layers. The model must be supported."""
    core: Any = model.model
    config: Any = model.config
    if layers is None:
        layers = [layer_weights(model, i) for i in range(len(core.layers))]
    attention, mlp = core.layers[0].self_attn, core.layers[0].mlp
    dim = int(attention.head_dim)
    return Decoder(
        layers=layers,
        embed=core.embed_tokens,
        head=model.lm_head,
        norm=core.norm.weight.detach(),
        heads=attention.q_proj.out_features // dim,
        kv_heads=attention.k_proj.out_features // dim,
        head_dim=dim,
        hidden=int(config.hidden_size),
        inner=mlp.gate_proj.out_features,
        vocab=int(config.vocab_size),
        eps=float(core.norm.variance_epsilon),
        inv_freq=core.rotary_emb.inv_freq.detach().float(),
        rope_scale=float(core.rotary_emb.attention_scaling),
        scaling=float(attention.scaling),
    )


def layer_weights(model: PreTrainedModel, index: int) -> DecoderLayer:
    """Weights of one layer, stacked in place."""
    core: Any = model.model
    layer = core.layers[index]
    attention, mlp = layer.self_attn, layer.mlp
    qkv = (attention.q_proj, attention.k_proj, attention.v_proj)
    window = getattr(attention, "sliding_window", getattr(model.config, "sliding_window", None))
    norms = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
    return DecoderLayer(
        qkv=_matrix(qkv),
        qkv_bias=_stack([each.bias for each in qkv]),
        out=_matrix([attention.o_proj]),
        out_bias=_detached(attention.o_proj.bias),
        gate_up=_matrix([mlp.gate_proj, mlp.up_proj]),
        gate_up_bias=_stack([mlp.gate_proj.bias, mlp.up_proj.bias]),
        down=_matrix([mlp.down_proj]),
        down_bias=_detached(mlp.down_proj.bias),
        norm_in=layer.input_layernorm.weight.detach(),
        norm_mid=layer.post_attention_layernorm.weight.detach(),
        query_norm=None if norms[0] is None else norms[0].weight.detach(),
        key_norm=None if norms[1] is None else norms[1].weight.detach(),
        window=None if window is None else int(window),
    )


def _matrix(linears: Seq[Any]) -> Matrix:
    """The linears' weights as one. Quantized ones are taken from them, so that memory has them once."""
    weights = [each.weight for each in linears]
    if isinstance(weights[0], QuantizedWeight):
        if len(weights) > 1:
            for each in linears:
                each.weight = None
        return QuantizedWeight.cat(weights) if len(weights) > 1 else weights[0]
    whole: Tensor = _stack(weights)
    return whole.detach()


def _detached(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.detach()


def _stack(parts: Seq[Any]) -> Any:
    """The parts as one tensor, of which they become views; None if they are None (no bias)."""
    if parts[0] is None:
        return None
    rows = sum(part.shape[0] for part in parts)
    if _adjacent(parts):  # stacked before: an early-exit draft has its target's parameters
        first = parts[0].data
        return first.as_strided((rows, *first.shape[1:]), first.stride())
    whole = torch.cat([part.data for part in parts])
    for part, view in zip(parts, whole.split([part.shape[0] for part in parts]), strict=True):
        part.data = view
    return whole


def _adjacent(parts: Seq[Tensor]) -> bool:
    ends = [part.data_ptr() + part.numel() * part.element_size() for part in parts]
    same = len({part.untyped_storage().data_ptr() for part in parts}) == 1
    return same and all(end == nxt.data_ptr() for end, nxt in zip(ends, parts[1:], strict=False))
