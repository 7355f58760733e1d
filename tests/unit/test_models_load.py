"""Loading, early exit, and the comparison of tokenizers."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GenerationConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PhiConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Starcoder2Config,
)

from engine.models import load
from engine.models.load import (
    ModelError,
    UnsafeWeights,
    early_exit,
    eos_token_ids,
    load_config,
    load_model,
    load_tokenizer,
    pick_device,
    pick_dtype,
    real_vocab_size,
    same_tokenizer,
)

MakeTokenizer = Callable[..., PreTrainedTokenizerFast]
IDS = torch.tensor([[5, 9, 2, 7, 7, 1, 30, 12, 3, 8]])
SHAPE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
GROUPED = {**SHAPE, "num_key_value_heads": 2}
ALTERNATING = ["sliding_attention", "full_attention"] * 2
CONFIGS = {
    "llama": LlamaConfig(**GROUPED),
    "llama-tied": LlamaConfig(**GROUPED, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**GROUPED, use_sliding_window=True, sliding_window=4, max_window_layers=2),
    "qwen3": Qwen3Config(**GROUPED, head_dim=8),
    "mistral": MistralConfig(**GROUPED, sliding_window=4),
    "gemma2": Gemma2Config(**GROUPED, head_dim=8, sliding_window=4),
    "gemma3": Gemma3TextConfig(**GROUPED, head_dim=8, sliding_window=4, layer_types=ALTERNATING),
    "gpt2": GPT2Config(vocab_size=64, n_embd=32, n_layer=4, n_head=4, n_positions=64),
    "gpt-neox": GPTNeoXConfig(**SHAPE),
    "phi": PhiConfig(**SHAPE),
    "starcoder2": Starcoder2Config(**GROUPED),
}


def random_model(config: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(copy.deepcopy(config)).eval()


def test_loads_in_float32_on_a_cpu_for_inference(tiny_llama: Path) -> None:
    model = load_model(str(tiny_llama), device="cpu")
    assert model.dtype == torch.float32
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_dtype_and_attention_are_passed_on(tiny_llama: Path) -> None:
    model = load_model(str(tiny_llama), dtype="bfloat16", device="cpu", attn_implementation="eager")
    assert model.dtype == torch.bfloat16
    assert model.config._attn_implementation == "eager"


def test_missing_weights_are_refused_not_made_up(tiny_llama: Path, tmp_path: Path) -> None:
    weights = load_file(tiny_llama / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((tiny_llama / "config.json").read_bytes())
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(str(tmp_path), device="cpu")


def test_pickles_are_refused_by_name(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((tiny_llama / "config.json").read_bytes())
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UnsafeWeights, match=r"pytorch_model\.bin"):
        load_model(str(tmp_path), device="cpu")


def indexed(model: Path, copy: Path, file: str, index: str = "model.safetensors.index.json") -> str:
    """A copy of a model whose weights are a pickle in `file`, named by an index; its safetensors are none."""
    shutil.copytree(model, copy)
    weights = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    save_file({"x": torch.ones(1)}, copy / "extra.safetensors")
    torch.save(weights, copy / file)
    named = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(weights, file)}
    (copy / index).write_text(json.dumps(named))
    return str(copy)


@pytest.mark.parametrize("file", ["pytorch_model.bin", "../outside.bin", "../outside.safetensors"])
def test_an_index_names_only_safetensors_of_its_folder(file: str, tiny_llama: Path, tmp_path: Path) -> None:
    where = indexed(tiny_llama, tmp_path / "it", file)
    for reads in (load_model, load_config, load_tokenizer):
        with pytest.raises(UnsafeWeights, match=rf"index\.json' names '{file}'") as raised:
            reads(where)
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "file", ["adapter_model.bin", "a.index.json", "../it/x.safetensors", "/x.safetensors", 5]
)
def test_a_config_names_only_safetensors_of_its_folder(file: Any, tiny_llama: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_llama, tmp_path / "it")
    said = json.loads((tiny_llama / "config.json").read_text())
    (tmp_path / "it" / "config.json").write_text(json.dumps(said | {"transformers_weights": file}))
    with pytest.raises(UnsafeWeights, match=r"config\.json of"):
        load_model(str(tmp_path / "it"), device="cpu")


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": [1]}}'])
def test_an_index_that_is_none_is_told(content: str, tiny_llama: Path, tmp_path: Path) -> None:
    where = indexed(tiny_llama, tmp_path / "it", "pytorch_model.bin")
    Path(where, "model.safetensors.index.json").write_text(content)
    with pytest.raises(ModelError, match=r"model\.safetensors\.index\.json' is no index of weights"):
        load_model(where, device="cpu")


def test_the_index_of_pickles_beside_safetensors_is_not_read(tiny_llama: Path, tmp_path: Path) -> None:
    where = indexed(tiny_llama, tmp_path / "it", "pytorch_model.bin", "pytorch_model.bin.index.json")
    with pytest.raises(UnsafeWeights, match="no safetensors"):
        load_model(where, device="cpu")
    shutil.copy(tiny_llama / "model.safetensors", where)
    load_model(where, device="cpu")


def test_shards_may_be_links_as_in_the_hubs_cache(tiny_llama: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "snapshot", tmp_path / "blobs"
    snapshot.mkdir()
    load_model(str(tiny_llama), device="cpu").save_pretrained(blobs, max_shard_size="50KB")
    assert len(list(blobs.glob("*.safetensors"))) > 1
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(file)
    load_model(str(snapshot), device="cpu")


def test_an_index_on_the_hub_is_looked_at_before_its_files_are_fetched(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = indexed(tiny_llama, tmp_path / "it", "pytorch_model.bin")
    monkeypatch.setattr(load, "resolve", lambda _: "some-org/model")
    monkeypatch.setattr(load, "load_config", lambda *_: AutoConfig.from_pretrained(tiny_llama))
    monkeypatch.setattr(load, "cached_file", lambda _, name, **__: f"{where}/{name}")
    with pytest.raises(ModelError, match=r"names 'pytorch_model\.bin' as weights"):
        load_model("some-org/model", device="cpu")


def test_a_broken_checkpoint_is_a_model_error(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "no_such_type"}')
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match="no_such_type"):
        load_model(str(tmp_path), device="cpu")
    with pytest.raises(ModelError, match="tokenizer"):
        load_tokenizer(str(tmp_path))


def test_devices_and_dtypes_by_name() -> None:
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_dtype("auto", torch.device("cpu")) == torch.float32
    assert pick_dtype("auto", torch.device("cuda")) == torch.bfloat16
    with pytest.raises(ModelError, match="cuda:99"):
        pick_device("cuda:99")
    with pytest.raises(ModelError, match="gpu"):
        pick_device("gpu")
    with pytest.raises(ModelError, match="int4"):
        pick_dtype("int4", torch.device("cpu"))


@pytest.mark.parametrize("name", CONFIGS)
def test_early_exit_is_the_model_with_fewer_layers(name: str) -> None:
    model = random_model(CONFIGS[name])
    draft = early_exit(model, 2)

    config = copy.deepcopy(model.config)
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = config.layer_types[:2]
    config.num_hidden_layers = 2
    plain = type(model)(config).eval()  # made in the ordinary way, with buffers of its own
    plain.load_state_dict({key: model.state_dict()[key] for key in plain.state_dict()})
    with torch.no_grad():
        torch.testing.assert_close(draft(IDS).logits, plain(IDS).logits, rtol=0, atol=0)
    assert model.config.num_hidden_layers == 4


@pytest.mark.parametrize("name", CONFIGS)
def test_early_exit_shares_every_parameter(name: str) -> None:
    model = random_model(CONFIGS[name])
    draft = early_exit(model, 3)
    own = dict(model.named_parameters(remove_duplicate=False))
    for key, parameter in draft.named_parameters(remove_duplicate=False):
        assert parameter is own[key], key


def test_early_exit_after_all_layers_is_the_model() -> None:
    model = random_model(CONFIGS["llama-tied"])
    with torch.no_grad():
        torch.testing.assert_close(early_exit(model, 4)(IDS).logits, model(IDS).logits, rtol=0, atol=0)


@pytest.mark.parametrize("layers", [-1, 0, 5])
def test_early_exit_needs_a_layer_that_is_there(layers: int) -> None:
    with pytest.raises(ValueError, match="1 to 4"):
        early_exit(random_model(CONFIGS["llama"]), layers)


def test_a_tokenizer_is_the_same_as_itself(make_tokenizer: MakeTokenizer) -> None:
    merges = (("a", "b"), ("ab", "c"))
    assert same_tokenizer(make_tokenizer(merges, ("<x>",)), make_tokenizer(merges, ("<x>",))) is None


def test_another_meaning_of_an_id_is_named(make_tokenizer: MakeTokenizer) -> None:
    problem = same_tokenizer(make_tokenizer((("a", "b"),)), make_tokenizer((("a", "c"),)))
    assert problem is not None
    assert "259" in problem and "'ab'" in problem and "'ac'" in problem


@pytest.mark.parametrize("target_has_it", [True, False])
def test_an_id_that_only_one_knows_is_named(make_tokenizer: MakeTokenizer, target_has_it: bool) -> None:
    plain, more = make_tokenizer(), make_tokenizer(added=("<tool>",))
    problem = same_tokenizer(*((more, plain) if target_has_it else (plain, more)))
    assert problem is not None
    assert "259" in problem and "<tool>" in problem and "no token" in problem


def test_other_merges_of_one_vocabulary_are_named(make_tokenizer: MakeTokenizer) -> None:
    a = make_tokenizer((("a", "b"), ("b", "c"), ("ab", "c")))
    b = make_tokenizer((("a", "b"), ("b", "c"), ("a", "bc")))
    problem = same_tokenizer(a, b)
    assert problem is not None
    assert problem.startswith("merge 2")


def test_another_normaliser_shows_in_the_encoding(make_tokenizer: MakeTokenizer) -> None:
    from tokenizers import normalizers

    b = make_tokenizer()
    b.backend_tokenizer.normalizer = normalizers.Lowercase()
    problem = same_tokenizer(make_tokenizer(), b)
    assert problem is not None
    assert "encode" in problem


def test_real_vocabulary_ends_with_the_last_token(make_tokenizer: MakeTokenizer, tiny_llama: Path) -> None:
    assert real_vocab_size(make_tokenizer()) == 259
    assert real_vocab_size(make_tokenizer(added=("<x>", "<y>"))) == 261
    assert load_model(str(tiny_llama), device="cpu").config.vocab_size > 259  # the rest is padding


def test_ends_of_sequence(make_tokenizer: MakeTokenizer, tiny_llama: Path) -> None:
    tokenizer = make_tokenizer()
    assert eos_token_ids(GenerationConfig(eos_token_id=[9, 2]), tokenizer) == (9, 2)
    assert eos_token_ids(GenerationConfig(eos_token_id=7), tokenizer) == (7,)
    assert eos_token_ids(GenerationConfig(), tokenizer) == (2,)
    assert eos_token_ids(load_model(str(tiny_llama), device="cpu"), tokenizer) == (2,)
