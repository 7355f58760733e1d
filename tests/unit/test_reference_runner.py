"""The reference runner against transformers' own eager forward, over a scattered and poisoned KV pool."""

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    GraniteConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    OlmoConfig,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Starcoder2Config,
)

from engine.models.packed import can_pack
from engine.models.reference import ReferenceRunner, UnsupportedModel
from engine.models.runner import Batch, Chunk

VOCAB, BLOCK, BLOCKS, WINDOW = 61, 4, 48, 9
LENGTHS = (41, 26, 34)  # of the rows; all longer than the window
TOLERANCE = 1e-4

SIZE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.15,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GROUPED = SIZE | {"num_key_value_heads": 2}

CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**GROUPED),
    "llama, biases and tied": lambda: LlamaConfig(
        **GROUPED, attention_bias=True, mlp_bias=True, tie_word_embeddings=True
    ),
    "qwen2": lambda: Qwen2Config(**GROUPED),
    "qwen2, sliding": lambda: Qwen2Config(
        **GROUPED, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=2
    ),
    "qwen3": lambda: Qwen3Config(**GROUPED, head_dim=16),
    "mistral, sliding": lambda: MistralConfig(**GROUPED, sliding_window=WINDOW),
    "gemma2": lambda: Gemma2Config(
        **GROUPED, head_dim=16, sliding_window=WINDOW, attn_logit_softcapping=2.0, final_logit_softcapping=5.0
    ),
    "gemma3": lambda: Gemma3TextConfig(
        **GROUPED,
        head_dim=16,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention"] * 2,
    ),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCAB,
        n_embd=32,
        n_layer=3,
        n_head=4,
        n_positions=64,
        initializer_range=0.15,
        scale_attn_by_inverse_layer_idx=True,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "gpt-neox": lambda: GPTNeoXConfig(**SIZE),
    "phi": lambda: PhiConfig(**GROUPED),
    "starcoder2": lambda: Starcoder2Config(**GROUPED, sliding_window=None),
    "starcoder2, sliding": lambda: Starcoder2Config(**GROUPED, sliding_window=WINDOW),
    "olmo": lambda: OlmoConfig(**GROUPED, clip_qkv=0.5),
    "granite": lambda: GraniteConfig(
        **GROUPED, attention_multiplier=0.3, embedding_multiplier=2.0, logits_scaling=3.0
    ),
    "opt": lambda: OPTConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        word_embed_proj_dim=16,
        ffn_dim=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=64,
        init_std=0.15,
    ),
}


def make(config: PreTrainedConfig) -> PreTrainedModel:
    """A random model in which biases and norm weights are not what they are initialised to."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def rows() -> list[list[int]]:
    source = random.Random(1)
    return [[source.randrange(3, VOCAB) for _ in range(length)] for length in LENGTHS]


@torch.inference_mode()
def own_logits(model: PreTrainedModel) -> list[torch.Tensor]:
    return [model(input_ids=torch.tensor([row]), use_cache=False).logits[0] for row in rows()]


def whole(lengths: tuple[int, ...]) -> Iterator[list[int]]:
    """All of every row in one pass."""
    yield list(lengths)


def chunks(lengths: tuple[int, ...]) -> Iterator[list[int]]:
    """Uneven chunks, and steps in which rows wait."""
    source, left = random.Random(2), list(lengths)
    while any(left):
        step = [min(source.choice((0, 1, 2, 5, 11)), n) for n in left]
        if any(step):
            left = [n - k for n, k in zip(left, step, strict=True)]
            yield step


def decode(lengths: tuple[int, ...]) -> Iterator[list[int]]:
    """One long prefill each, then a token for every row in every step."""
    left = list(lengths)
    for row in range(len(left)):
        step = [left[row] - 12 if row == r else 0 for r in range(len(left))]
        left[row] = 12
        yield step
    for _ in range(12):
        yield [1] * len(left)


def verify(lengths: tuple[int, ...]) -> Iterator[list[int]]:
    """Prefill, then five tokens for every row: as many queries each over contexts of different lengths."""
    yield [n - 10 for n in lengths]
    yield [5] * len(lengths)
    yield [5] * len(lengths)


SCHEDULES = [whole, chunks, decode, verify]


def paged_logits(runner: Any, steps: Iterator[list[int]], seed: int) -> list[torch.Tensor]:
    """Logits at every position of every row; whatever the rows do not write is NaN."""
    runner.allocate(BLOCKS)
    assert runner._pool is not None
    for tensors in (runner._pool.keys, runner._pool.values):
        for tensor in tensors.values():
            tensor.fill_(float("nan"))
    free = random.Random(seed).sample(range(BLOCKS), BLOCKS)
    tables = [[free.pop() for _ in range(-(-length // BLOCK) + 1)] for length in LENGTHS]
    got: list[list[torch.Tensor]] = [[] for _ in LENGTHS]
    done = [0] * len(LENGTHS)
    for step in steps:
        active = [r for r, count in enumerate(step) if count]
        batch = [Chunk(rows()[r][done[r] : done[r] + step[r]], done[r], tables[r], step[r]) for r in active]
        logits = runner.forward(Batch.pack(batch, BLOCK))
        for r, part in zip(active, logits.split([step[r] for r in active]), strict=True):
            got[r].append(part)
            done[r] += step[r]
    assert done == list(LENGTHS)
    return [torch.cat(parts) for parts in got]


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_the_models_own(name: str, packed: bool):
    if packed and not can_pack():
        pytest.skip("this torch cannot pack linear layers")
    model = make(CONFIGS[name]())
    expected = own_logits(model)
    assert max(row.std(-1).mean() for row in expected) > 0.05  # something is there to compare
    runner = ReferenceRunner(model, BLOCK, {} if packed else None)
    for seed, schedule in enumerate(SCHEDULES):
        for want, got in zip(expected, paged_logits(runner, schedule(LENGTHS), seed), strict=True):
            worst = (want - got).abs().max().item()
            assert worst <= TOLERANCE, f"{schedule.__name__}: {worst} off"


@pytest.mark.parametrize("name", ["mistral, sliding", "gemma2", "gemma3", "qwen2, sliding"])
def test_the_window_matters_to_these_models(name: str):
    """Otherwise the test above would pass with the window ignored."""
    config = CONFIGS[name]()
    narrow = own_logits(make(config))
    config = CONFIGS[name]()
    config.sliding_window = 64
    assert (own_logits(make(config))[0] - narrow[0]).abs().max() > 100 * TOLERANCE


def test_only_the_wanted_positions_give_logits():
    model = make(CONFIGS["llama"]())
    expected = own_logits(model)
    runner = ReferenceRunner(model, BLOCK)
    runner.allocate(BLOCKS)
    tables = [list(range(16 * r, 16 * r + 16)) for r in range(3)]
    first = [
        Chunk(row[:20], 0, table, wanted)
        for row, table, wanted in zip(rows(), tables, (0, 1, 20), strict=True)
    ]
    got = runner.forward(Batch.pack(first, BLOCK))
    want = torch.cat([expected[1][19:20], expected[2][:20]])
    torch.testing.assert_close(got, want, atol=TOLERANCE, rtol=0)


def test_a_block_that_two_rows_share_serves_both():
    model = make(CONFIGS["mistral, sliding"]())
    row = rows()[0]
    with torch.inference_mode():
        other = [*row[:8], 5, 6, 7, 8, 9, 10]
        expected = [model(input_ids=torch.tensor([ids]), use_cache=False).logits[0] for ids in (row, other)]
    runner = ReferenceRunner(model, BLOCK)
    runner.allocate(BLOCKS)
    runner.forward(Batch.pack([Chunk(row[:8], 0, [7, 3], 1)], BLOCK))
    tails = [
        Chunk(row[8:14], 8, [7, 3, 20, 21], 6),
        Chunk(other[8:], 8, [7, 3, 11, 2], 6),
    ]
    got = runner.forward(Batch.pack(tails, BLOCK))
    torch.testing.assert_close(got, torch.cat([expected[0][8:14], expected[1][8:]]), atol=TOLERANCE, rtol=0)


REFUSED: dict[str, Callable[[], PreTrainedConfig]] = {
    "BloomForCausalLM": lambda: BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4),
    "MambaForCausalLM": lambda: MambaConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, state_size=4
    ),
    "FalconForCausalLM": lambda: FalconConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4
    ),
    "GptOssForCausalLM": lambda: GptOssConfig(
        **GROUPED, head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=WINDOW
    ),
    # One longer row switches the rotary frequencies of the whole batch.
    "Phi3ForCausalLM": lambda: Phi3Config(
        **GROUPED,
        original_max_position_embeddings=32,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "original_max_position_embeddings": 32,
            "factor": 2.0,
            "short_factor": [1.0] * 4,
            "long_factor": [4.0] * 4,
        },
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_cannot_be_served_is_refused_by_name(name: str):
    model = make(REFUSED[name]())
    with pytest.raises(UnsupportedModel, match=name):
        ReferenceRunner(model, BLOCK)


def test_a_wrong_kernel_is_found_at_start(monkeypatch: pytest.MonkeyPatch):
    """The check at start is what keeps an unknown architecture from being served wrongly."""
    from engine.models import attention

    right = attention.attend

    def wrong(groups, pool, layer, query, scaling, window=None, softcap=None):  # type: ignore[no-untyped-def]
        return right(groups, pool, layer, query, scaling * 1.5, window, softcap)

    monkeypatch.setattr(attention, "attend", wrong)
    with pytest.raises(UnsupportedModel, match="LlamaForCausalLM does not run over a paged KV"):
        ReferenceRunner(make(CONFIGS["llama"]()), BLOCK)
