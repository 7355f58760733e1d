"""Llama's decoder layer in fewer, larger operations, for fp32 on CPUs.

For the few rows of decoding a layer of transformers spends as long between its operations as in
them. Here query, key and value are one product, gate and up another, and rotary positions are
applied to queries and keys together. The result differs in rounding only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.activations import SiLUActivation
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from engine.models.packed import PackedWeights, packable, packed_linear


class PackedLlamaLayer(nn.Module):
    """Drop-in for a frozen LlamaDecoderLayer whose attention a paged runner serves."""

    def __init__(self, layer: LlamaDecoderLayer, packed: PackedWeights) -> None:
        super().__init__()
        attention, mlp = layer.self_attn, layer.mlp
        self.layer_idx = attention.layer_idx
        self.head_dim, self.scaling = attention.head_dim, attention.scaling
        self.heads = attention.q_proj.out_features // self.head_dim
        self.kv_heads = attention.k_proj.out_features // self.head_dim
        self.qkv = packed_linear([attention.q_proj, attention.k_proj, attention.v_proj], packed)
        self.out = packed_linear([attention.o_proj], packed)
        self.gate_up = packed_linear([mlp.gate_proj, mlp.up_proj], packed)
        self.down = packed_linear([mlp.down_proj], packed)
        self.norms = layer.input_layernorm, layer.post_attention_layernorm  # a tuple: the weights stay theirs

    def forward(
        self, hidden_states: Tensor, *, position_embeddings: tuple[Tensor, Tensor], **unused: Any
    ) -> Tensor:
        """[1, N, H] -> [1, N, H]; attention is `paged`, which the runner attaches."""
        states = self.qkv(_norm(hidden_states, self.norms[0])).unflatten(-1, (-1, self.head_dim))
        states = states.transpose(1, 2)  # [1, heads + 2 kv_heads, N, D]
        turned = _rotate(states[:, : -self.kv_heads], *position_embeddings)
        query, key = turned[:, : self.heads], turned[:, self.heads :]
        value = states[:, -self.kv_heads :]
        paged = self.__dict__["paged"]
        attended = paged(self, query, key, value, None, scaling=self.scaling)  # [1, N, heads, D]
        hidden_states = hidden_states + self.out(attended.flatten(2))
        gate, up = self.gate_up(_norm(hidden_states, self.norms[1])).chunk(2, -1)
        out: Tensor = hidden_states + self.down(F.silu(gate) * up)
        return out


def pack_llama_layers(model: PreTrainedModel, packed: PackedWeights) -> None:
    """Replaces the decoder layers of a Llama in place; other architectures are left as they are."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is LlamaDecoderLayer and _plain(child):
                setattr(parent, name, PackedLlamaLayer(child, packed))


def _plain(layer: LlamaDecoderLayer) -> bool:
    linears = [module for module in layer.modules() if isinstance(module, nn.Linear)]
    return len(linears) == 7 and all(map(packable, linears)) and isinstance(layer.mlp.act_fn, SiLUActivation)


def _norm(x: Tensor, norm: nn.Module) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], norm.weight, norm.variance_epsilon)  # type: ignore[arg-type]


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions: x [1, heads, N, D]; cos, sin [1, N, D]."""
    left, right = x.chunk(2, -1)
    return torch.addcmul(x * cos[:, None], torch.cat((-right, left), -1), sin[:, None])
