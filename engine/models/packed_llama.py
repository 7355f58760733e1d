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

from engine.models.draft import DraftConfig
from engine.models.packed import INT8_STEP, Int8Linear, PackedWeights, can_int8, packable, packed_linear


class PackedLlamaLayer(nn.Module):
    """Drop-in for a frozen LlamaDecoderLayer whose attention a paged runner serves."""

    def __init__(self, layer: LlamaDecoderLayer, packed: PackedWeights, int8: bool = False) -> None:
        super().__init__()

        def join(*linears: nn.Linear) -> nn.Module:
            return Int8Linear(linears) if int8 else packed_linear(linears, packed)

        attention, mlp = layer.self_attn, layer.mlp
        self.layer_idx = attention.layer_idx
        self.head_dim, self.scaling = attention.head_dim, attention.scaling
        self.heads = attention.q_proj.out_features // self.head_dim
        self.kv_heads = attention.k_proj.out_features // self.head_dim
        self.qkv = join(attention.q_proj, attention.k_proj, attention.v_proj)
        self.out = join(attention.o_proj)
        self.gate_up = join(mlp.gate_proj, mlp.up_proj)
        self.down = join(mlp.down_proj)
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


def int8_layers(model: PreTrainedModel) -> bool:
    """Whether its layers are computed in int8: those of a draft that was saved so. Its head stays fp32."""
    config = model.config
    if not (isinstance(config, DraftConfig) and config.weights == "int8" and can_int8()):
        return False
    dim = config.head_dim or config.hidden_size // config.num_attention_heads
    widths = config.hidden_size, config.num_attention_heads * dim, config.intermediate_size
    return all(width % INT8_STEP == 0 for width in widths)


def pack_llama_layers(model: PreTrainedModel, packed: PackedWeights) -> None:
    """Replaces the decoder layers of a Llama in place; other architectures are left as they are."""
    int8 = int8_layers(model)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is LlamaDecoderLayer and _plain(child, int8):
                setattr(parent, name, PackedLlamaLayer(child, packed, int8))


def _plain(layer: LlamaDecoderLayer, int8: bool) -> bool:
    linears = [module for module in layer.modules() if isinstance(module, nn.Linear)]
    biased = any(linear.bias is not None for linear in linears)
    return (
        len(linears) == 7
        and not (int8 and biased)
        and all(map(packable, linears))
        and isinstance(layer.mlp.act_fn, SiLUActivation)
    )


def _norm(x: Tensor, norm: nn.Module) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], norm.weight, norm.variance_epsilon)  # type: ignore[arg-type]


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions: x [1, heads, N, D]; cos, sin [1, N, D]."""
    left, right = x.chunk(2, -1)
    return torch.addcmul(x * cos[:, None], torch.cat((-right, left), -1), sin[:, None])
