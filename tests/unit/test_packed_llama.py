"""Llama's layers are replaced where that is exact, and left alone where it is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from engine.models.draft import DraftConfig, DraftForCausalLM, load_draft, save_draft
from engine.models.load import early_exit
from engine.models.packed import Int8Linear, PackedLinear, PackedWeights, can_int8, can_pack
from engine.models.packed_llama import PackedLlamaLayer
from engine.models.reference import ReferenceRunner
from engine.models.runner import Batch, Chunk

pytestmark = pytest.mark.skipif(not can_pack(), reason="this torch has no packed linears")

SIZE: dict[str, Any] = dict(
    vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.15,
)  # fmt: skip
IDS = [(7 * i + 3) % 61 for i in range(40)]


def logits(runner: ReferenceRunner) -> torch.Tensor:
    runner.allocate(8)
    return runner.forward(Batch.pack([Chunk(IDS, 0, [5, 1, 7], len(IDS))], 16))


def layers(runner: ReferenceRunner) -> list[type]:
    return [type(layer) for layer in runner.model.model.layers]


@pytest.mark.parametrize(
    "change",
    [{}, {"head_dim": 16}, {"num_key_value_heads": 1}, {"attention_bias": True, "mlp_bias": True}],
    ids=str,
)
def test_a_llama_gives_its_own_logits(change: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZE | change)).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.normal_()
    own = model(input_ids=torch.tensor([IDS])).logits[0]
    runner = ReferenceRunner(model, 16, {})
    assert layers(runner) == [PackedLlamaLayer] * 3
    assert torch.allclose(logits(runner), own, atol=1e-4)


@pytest.mark.parametrize(
    "config", [Qwen2Config(**SIZE), LlamaConfig(**SIZE, hidden_act="gelu")], ids=["qwen2", "gelu"]
)
def test_others_keep_their_layers(config: Any) -> None:
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    assert PackedLlamaLayer not in layers(ReferenceRunner(model, 16, {}))


def test_an_early_exit_shares_the_targets_packed_weights() -> None:
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZE)).eval().requires_grad_(False)
    draft = early_exit(model, 2)
    packed: PackedWeights = {}
    ReferenceRunner(model, 16, packed)
    whole = len(packed)
    runner = ReferenceRunner(draft, 16, packed)
    assert len(packed) == whole
    assert layers(runner) == [PackedLlamaLayer] * 2


@pytest.mark.skipif(not can_int8(), reason="this torch has no int8 products")
def test_an_int8_draft_computes_its_layers_in_int8(tmp_path: Path) -> None:
    """Close to the dequantised model, its choices nearly all the same; the head stays fp32."""
    torch.manual_seed(0)
    config = DraftConfig(**SIZE | {"intermediate_size": 64}, draft_vocab_size=50, tie_word_embeddings=False)
    save_draft(DraftForCausalLM(config), tmp_path, "int8")
    model = load_draft(tmp_path, torch.float32, torch.device("cpu"))
    own = model(input_ids=torch.tensor([IDS])).logits[0, :, :50]
    runner = ReferenceRunner(model, 16, {})
    found = logits(runner)[:, :50]
    assert isinstance(runner.model.model.layers[0].qkv, Int8Linear)
    assert isinstance(runner.model.lm_head.linear, PackedLinear)
    assert 0 < float((found - own).abs().max()) < 0.05 * float(own.abs().max())
    assert float((found.argmax(-1) == own.argmax(-1)).float().mean()) > 0.9


@pytest.mark.skipif(not can_int8(), reason="this torch has no int8 products")
def test_an_int8_draft_of_an_odd_width_is_computed_in_fp32(tmp_path: Path) -> None:
    """torch's int8 product is wrong there, without an error."""
    config = DraftConfig(**SIZE, draft_vocab_size=50, tie_word_embeddings=False)  # intermediate 48
    save_draft(DraftForCausalLM(config), tmp_path, "int8")
    runner = ReferenceRunner(load_draft(tmp_path, torch.float32, torch.device("cpu")), 16, {})
    assert isinstance(runner.model.model.layers[0].qkv, PackedLinear)


def test_int8_linear_is_its_matrices_side_by_side() -> None:
    parts = [torch.nn.Linear(32, 8, bias=False), torch.nn.Linear(32, 16, bias=False)]
    x = torch.randn(1, 3, 32)
    expected = torch.cat([part(x) for part in parts], -1)
    got = Int8Linear(parts)(x)
    assert got.shape == expected.shape
    assert got.dtype == torch.float32
    assert torch.allclose(got, expected, atol=0.03)
