"""Models of random weights in the shapes that speed is spoken of: right in cost, without meaning in text."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

SHAPES = {
    "7b": (3584, 18944, 28, 28, 4, 152064),
    "0.5b": (896, 4864, 24, 14, 2, 151936),
}
"""By name: hidden, inner, layers, heads, KV heads, vocabulary (Qwen2.5's)."""


def random_model(
    name: str, device: str = "cuda", dtype: torch.dtype = torch.bfloat16, context: int = 40960
) -> PreTrainedModel:
    """Every weight normal with a deviation of 0.02, norms near 1; on the device from the start."""
    hidden, inner, layers, heads, kv_heads, vocab = SHAPES[name]
    config = Qwen2Config(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocab,
        max_position_embeddings=context,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    with torch.device("meta"):
        model = Qwen2ForCausalLM(config)
    model = model.to(dtype).to_empty(device=device)
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        parameter.normal_(0.0, 0.02) if parameter.ndim > 1 else parameter.normal_(1.0, 0.05)
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    return model.eval()
