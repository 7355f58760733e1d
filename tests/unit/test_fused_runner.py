"""The fused runner against transformers' own forward, in fp32, over a scattered and poisoned KV pool.

On a machine without a GPU its kernels run in Triton's interpreter.
"""

from collections.abc import Callable

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedConfig, PreTrainedModel

pytest.importorskip("triton")

import test_reference_runner as reference
from test_reference_runner import BLOCK, GROUPED, LENGTHS, TOLERANCE, VOCAB

from engine.models import selfcheck
from engine.models.fused import FusedRunner
from engine.models.load import early_exit
from engine.models.quantize import quantize_linears
from engine.models.selfcheck import UnsupportedModel

ROPE = {"rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
NAMES = ("llama", "llama, biases and tied", "qwen2", "qwen2, sliding", "qwen3", "mistral, sliding")


def shallow(config: PreTrainedConfig) -> PreTrainedConfig:
    """Two layers instead of four: the interpreter is slow. A window is then the second's, or both's."""
    config.num_hidden_layers = 2
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[1:3]
    return config


CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {name: reference.CONFIGS[name] for name in NAMES} | {
    "llama, odd sizes": lambda: LlamaConfig(
        **GROUPED | {"hidden_size": 42, "intermediate_size": 50, "num_attention_heads": 6, "head_dim": 10}
    ),
    "llama, no groups": lambda: LlamaConfig(**GROUPED | {"num_key_value_heads": 4}),
    "llama3 rope": lambda: LlamaConfig(
        **GROUPED,
        rope_parameters={"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, **ROPE},
    ),
    "yarn": lambda: LlamaConfig(**GROUPED, rope_parameters={"rope_type": "yarn", **ROPE}),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_the_models_own(name: str) -> None:
    model = reference.make(shallow(CONFIGS[name]()))
    expected = reference.own_logits(model)
    runner = FusedRunner(model, BLOCK)
    schedules = reference.SCHEDULES[1:] if name == "mistral, sliding" else reference.SCHEDULES[1:2]
    for seed, schedule in enumerate(schedules):
        for want, got in zip(expected, reference.paged_logits(runner, schedule(LENGTHS), seed), strict=True):
            worst = (want - got).abs().max().item()
            assert worst <= TOLERANCE, f"{schedule.__name__}: {worst} off"


def test_an_early_exit_shares_the_stacked_weights() -> None:
    model = reference.make(shallow(CONFIGS["qwen2"]()))
    draft = early_exit(model, 1)
    target, exit_ = FusedRunner(model, BLOCK), FusedRunner(draft, BLOCK)
    first, same = target.decoder.layers[0].qkv, exit_.decoder.layers[0].qkv
    assert isinstance(first, torch.Tensor) and isinstance(same, torch.Tensor)
    assert first.data_ptr() == same.data_ptr() and first.shape == same.shape


def test_quantized_layers_run_as_they_are() -> None:
    config = LlamaConfig(**GROUPED | {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2})
    model = reference.make(config)
    quantize_linears(model, "int8")
    expected = reference.own_logits(model)
    runner = FusedRunner(model, BLOCK)
    got = reference.paged_logits(runner, reference.SCHEDULES[1](LENGTHS), 1)
    for want, have in zip(expected, got, strict=True):
        assert (want - have).abs().max() <= TOLERANCE


def test_other_families_are_refused_by_name() -> None:
    config = GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=1, n_head=4, n_positions=64)
    with pytest.raises(UnsupportedModel, match="GPT2LMHeadModel is not of the Llama family"):
        FusedRunner(AutoModelForCausalLM.from_config(config).eval(), BLOCK)
    swapped = LlamaConfig(**GROUPED, hidden_act="gelu")
    with pytest.raises(UnsupportedModel, match="activation"):
        FusedRunner(AutoModelForCausalLM.from_config(swapped).eval(), BLOCK)


def test_frequencies_that_follow_the_longest_row_are_refused() -> None:
    rope = {"rope_type": "dynamic", **ROPE}
    model = AutoModelForCausalLM.from_config(LlamaConfig(**GROUPED, rope_parameters=rope)).eval()
    with pytest.raises(UnsupportedModel, match="dynamic rotary frequencies"):
        FusedRunner(model, BLOCK)


def test_a_wrong_position_is_found_at_start() -> None:
    model: PreTrainedModel = reference.make(shallow(CONFIGS["llama"]()))
    runner_model = reference.make(shallow(CONFIGS["llama"]()))
    rotary = runner_model.model.rotary_emb  # type: ignore[union-attr]
    runner = FusedRunner(model, BLOCK)
    runner.decoder.inv_freq = rotary.inv_freq * 1.3
    expected = selfcheck.own_logits(runner_model)
    with pytest.raises(UnsupportedModel, match="does not run over a paged KV"):
        selfcheck.check(runner, "llama", BLOCK, expected, exact=True)
