"""A widened model has the source's logits, and what is new in it is read."""

from __future__ import annotations

import importlib
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from engine.models.load import eos_token_ids, load_model, load_tokenizer, same_tokenizer
from engine.models.reference import ReferenceRunner
from engine.models.runner import Batch, Chunk

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
widening = importlib.import_module("widen")
Shape, widen = widening.Shape, widening.widen

VOCAB = 50
# 4 query heads to a KV head, of 2; a norm's eps large enough to matter.
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "rms_norm_eps": 0.05,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SAME = Shape(32, 40, 2, 8, 2, 8, VOCAB)
KINDS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {"attention_bias": True, "mlp_bias": True}),
    "llama-tied": (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": True}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": 6}),
    "qwen2": (
        Qwen2Config,
        Qwen2ForCausalLM,
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"attention_bias": True}),
}
CHANGES = {
    "nothing": {},
    "hidden": {"hidden": 80},
    "intermediate": {"intermediate": 72},
    "layers": {"layers": 5},
    "vocab": {"vocab": 64},
    "heads": {"heads": 16, "kv_heads": 4},
    "larger fold": {"heads": 16},
    "smaller fold": {"kv_heads": 4},  # 2 to a KV head: each KV head twice
    "uneven fold": {"hidden": 36, "heads": 12, "kv_heads": 4},  # 3 and 1
    "no fold": {"heads": 8, "kv_heads": 8},
    "head_dim": {"head_dim": 16},
    "head_dim x 3": {"head_dim": 24},
    "all": {
        "hidden": 96,
        "intermediate": 72,
        "layers": 4,
        "heads": 24,
        "kv_heads": 8,
        "head_dim": 16,
        "vocab": 64,
    },
}


def make(kind: str, **more: Any) -> PreTrainedModel:
    """A random model in which every weight and bias matters."""
    config, cls, extra = KINDS[kind]
    torch.manual_seed(1)
    model = cls(config(**SIZES, **extra, **more)).eval()
    with torch.no_grad():
        for name, each in model.named_parameters():
            if each.ndim == 1:
                each.normal_(1.0 if "norm" in name else 0.0, 0.3)
    return model


@torch.inference_mode()
def logits(model: PreTrainedModel) -> torch.Tensor:
    ids = torch.arange(40)[None] * 7 % VOCAB
    return model(ids).logits[0]


# A tied head matters to hidden and vocabulary alone, and Qwen3's heads stay as wide as they are.
CASES = [
    (kind, change)
    for kind in KINDS
    for change in (("nothing", "hidden", "vocab", "all") if kind == "llama-tied" else CHANGES)
    if not (kind == "qwen3" and "head_dim" in change)
]


@pytest.mark.parametrize(("kind", "change"), CASES)
def test_logits_stay(kind: str, change: str) -> None:
    source = make(kind)
    shape = replace(SAME, **CHANGES[change])
    if kind == "qwen3":
        shape = replace(shape, head_dim=8)
    wide = widen(source, shape)
    assert type(wide) is type(source) and widening.shape_of(wide.config) == shape
    expected, found = logits(source), logits(wide)
    assert expected.std() > 0.5
    torch.testing.assert_close(found[:, :VOCAB], expected, atol=1e-4, rtol=0)
    # padding is the mean, so it is never chosen
    mean = expected.mean(-1, keepdim=True).expand(-1, shape.vocab - VOCAB)
    torch.testing.assert_close(found[:, VOCAB:], mean, atol=1e-4, rtol=0)
    assert torch.equal(found.argmax(-1), expected.argmax(-1))
    assert wide.config.tie_word_embeddings == (kind == "llama-tied" and shape.hidden == 32)


@pytest.mark.parametrize("rope", [{"rope_type": "linear", "factor": 4.0},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 16}], ids=lambda each: each["rope_type"])  # fmt: skip
def test_wider_heads_keep_scaled_angles(rope: dict[str, Any]) -> None:
    source = make("llama", rope_parameters={"rope_theta": 10000.0, **rope})
    wide = widen(source, replace(SAME, **CHANGES["all"]))
    torch.testing.assert_close(logits(wide)[:, :VOCAB], logits(source), atol=1e-4, rtol=0)


def zeros(name: str, weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """bool like `weight`: what must be zero in it, after CHANGES["all"]. Nothing else may be."""
    what, mask = name.split(".")[-2], torch.zeros_like(weight, dtype=torch.bool)
    spare_layer = "layers.2." in name or "layers.3." in name
    # 4 query heads to a KV head become 3 and 1, of two KV heads; pair i of 4 is pair 2 i of 8
    dims = [0, 1, 2, 3, 4, 5, 6, 7] if head_dim == 8 else [0, 2, 4, 6, 8, 10, 12, 14]
    columns = [head * head_dim + dim for head in (0, 1, 2, 3, 6, 7, 8, 9) for dim in dims]
    if what == "embed_tokens":
        mask[:, 32:] = True
    elif what in ("o_proj", "down_proj"):
        mask[:] = True
        if not spare_layer and weight.ndim == 1:
            mask[:32] = False
        elif not spare_layer:
            mask[:32, columns if what == "o_proj" else slice(40)] = False
    elif what == "k_proj" and not spare_layer:
        heads = mask.unflatten(0, (8, head_dim))
        heads[:4] = True
        heads[:4, dims] = False
    return mask


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_new_is_not_zero(kind: str) -> None:
    """Only what must not reach the residual stream, or a live head's scores, is zero."""
    head_dim = 8 if kind == "qwen3" else 16
    wide = widen(make(kind), replace(SAME, **{**CHANGES["all"], "head_dim": head_dim}))
    for name, weight in wide.state_dict().items():
        assert torch.equal(weight == 0, zeros(name, weight, head_dim)), name


def test_repeated_kv_heads_are_alike() -> None:
    keys = widen(make("mistral"), replace(SAME, kv_heads=8)).model.layers[0].self_attn.k_proj.weight
    heads = keys.unflatten(0, (8, 8))
    assert torch.equal(heads[:4], heads[:1].expand(4, -1, -1)) and not torch.equal(heads[3], heads[4])


def test_the_source_is_left_alone_and_the_seed_decides() -> None:
    source = make("llama-tied")
    source.generation_config.eos_token_id = [2, 5]
    before = {name: each.clone() for name, each in source.state_dict().items()}
    shape = replace(SAME, **CHANGES["all"])
    a, b, other = widen(source, shape), widen(source, shape), widen(source, shape, seed=1)
    assert all(torch.equal(each, before[name]) for name, each in source.state_dict().items())
    assert widening.shape_of(source.config) == SAME and source.config.tie_word_embeddings
    assert all(torch.equal(each, b.state_dict()[name]) for name, each in a.state_dict().items())
    assert not torch.equal(a.model.layers[3].mlp.up_proj.weight, other.model.layers[3].mlp.up_proj.weight)
    assert not any(each.requires_grad for each in a.parameters()) and not a.training
    assert a.generation_config.eos_token_id == [2, 5] and a.generation_config is not source.generation_config


def test_dtype_and_device() -> None:
    source = make("qwen2")
    wide = widen(source, replace(SAME, **CHANGES["all"]), dtype=torch.bfloat16, device="cpu")
    assert {each.dtype for each in wide.parameters()} == {torch.bfloat16} and wide.config.dtype == wide.dtype
    assert wide.model.rotary_emb.inv_freq.dtype == torch.float32
    assert source.dtype == torch.float32
    assert (logits(wide).float()[:, :VOCAB] - logits(source)).abs().mean() < 0.1 * logits(source).std()


def test_a_larger_vocabulary_stays() -> None:
    assert widening.shape_of(widen(make("qwen2"), replace(SAME, vocab=8)).config).vocab == VOCAB


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("llama", {"hidden": 24}, "hidden: the source has 32, more than the 24"),
        ("llama", {"intermediate": 39}, "intermediate: the source has 40"),
        ("llama", {"layers": 1}, "layers: the source has 2, more than the 1"),
        ("llama", {"heads": 4}, "heads: the source has 8"),
        ("llama", {"kv_heads": 1}, "kv_heads: the source has 2"),
        ("llama", {"head_dim": 4}, "head_dim: the source has 8"),
        ("llama", {"head_dim": 12}, "not a multiple of the source's 8"),
        ("llama", {"heads": 16, "kv_heads": 3}, "16 is not a multiple of the 3"),
        ("mistral", {"heads": 9, "kv_heads": 3}, "3 query heads to each instead of 4, .* 2 times, of 3"),
        ("llama", {"hidden": 33}, "LlamaConfig does not allow this shape: .*not a multiple"),
        ("qwen3", {"head_dim": 16}, "normalised over it"),
    ],
)
def test_what_does_not_fit_is_refused(kind: str, change: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        widen(make(kind), replace(SAME, **change))


@pytest.mark.parametrize("kind", ["yarn", "dynamic"])
def test_wider_heads_are_refused_where_angles_would_change(kind: str) -> None:
    rope = {"rope_type": kind, "factor": 2.0, "rope_theta": 10000.0}
    source = make("llama", rope_parameters=rope)
    with pytest.raises(ValueError, match=f"rope type '{kind}'"):
        widen(source, replace(SAME, head_dim=16))
    wide = widen(source, replace(SAME, hidden=40))  # heads as they are: any type will do
    torch.testing.assert_close(logits(wide), logits(source), atol=1e-4, rtol=0)


def test_other_architectures_are_refused() -> None:
    config = GPT2Config(vocab_size=VOCAB, n_positions=16, n_embd=8, n_layer=1, n_head=2)
    with pytest.raises(ValueError, match="cannot widen a GPT2LMHeadModel"):
        widen(GPT2LMHeadModel(config), SAME)


def test_named_shapes_take_the_pairs_they_are_for() -> None:
    """By sizes alone: a model of these would take gigabytes."""
    half = replace(widening.SHAPES["0.5b"])
    big = Shape(1536, 8960, 28, 12, 2, 128, 151936)
    assert widening._heads(half, half) == (list(range(14)), [0, 1])
    places, kv = widening._heads(big, widening.SHAPES["7b"])
    assert places == [0, 1, 2, 3, 4, 5, 7, 8, 9, 10, 11, 12] and kv == [0, 1]
    places, kv = widening._heads(Shape(576, 1536, 30, 9, 3, 64, 49152), widening.SHAPES["1b"])
    assert places == [0, 1, 2, 4, 5, 6, 8, 9, 10] and kv == [0, 1, 2]


def command(monkeypatch: pytest.MonkeyPatch, *given: str) -> None:
    monkeypatch.setattr(sys, "argv", ["widen", *given])
    widening.main()


def test_the_command_writes_a_checkpoint(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "wide"
    flags = ["--hidden", "48", "--layers", "5", "--kv-heads", "4", "--vocab", "300", "--dtype", "float32"]
    command(monkeypatch, str(tiny_llama), str(out), *flags)
    assert "argmax equal at 100% of positions" in capsys.readouterr().out
    source, wide = load_model(str(tiny_llama), device="cpu"), load_model(str(out), device="cpu")
    assert widening.shape_of(wide.config) == Shape(48, 48, 5, 4, 4, 8, 300)
    assert widening.difference(source, wide)[0] < 1e-4
    assert same_tokenizer(load_tokenizer(str(tiny_llama)), load_tokenizer(str(out))) is None
    assert eos_token_ids(wide, load_tokenizer(str(out))) == (2,)
    assert sorted(path.name for path in out.glob("*.safetensors")) == ["model.safetensors"]


def test_the_command_refuses(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(SystemExit):
        command(monkeypatch, str(tiny_llama), str(tmp_path / "full"))
    assert "is there already" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="layers: the source has 4, more than the 1"):
        command(monkeypatch, str(tiny_llama), str(tmp_path / "out"), "--layers", "1")
    with pytest.raises(SystemExit, match="nowhere"):
        command(monkeypatch, str(tmp_path / "nowhere"), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_the_engines_paged_runner_agrees(tmp_path: Path) -> None:
    """The runner checks its own logits against the model's; heads are of another width and fold."""
    wide = widen(make("qwen2"), replace(SAME, **CHANGES["all"]))
    expected = logits(wide)
    runner = ReferenceRunner(wide, 4)
    runner.allocate(12)
    ids = [i * 7 % VOCAB for i in range(40)]
    chunk = Chunk(ids, 0, list(range(10)), 40)
    found = runner.forward(Batch.pack([chunk], 4))
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)
