"""Damaged files of a model, and configs that lie about them, are told in one line."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from engine.models.damage import check_weights, ends_within, load_config
from engine.models.folder import ModelError
from engine.models.load import load_model, load_tokenizer


def edited(model: Path, copy: Path, file: str = "config.json", **values: Any) -> str:
    """A copy of a model of which one JSON file says something else."""
    shutil.copytree(model, copy)
    said = json.loads((copy / file).read_text())
    (copy / file).write_text(json.dumps(said | values))
    return str(copy)


def with_weights(model: Path, copy: Path, *names: str, **values: Any) -> str:
    """A copy of a model whose file has more weights."""
    where = edited(model, copy, **values)
    weights = load_file(copy / "model.safetensors") | {name: torch.ones(2) for name in names}
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    return where


def test_weights_that_the_model_does_not_have_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    fewer = edited(tiny_llama, tmp_path / "fewer", num_hidden_layers=3)
    with pytest.raises(
        ModelError, match=r"hold 9 weights .* first model\.layers\.3\.input_layernorm\.weight"
    ):
        load_model(fewer, device="cpu")
    more = with_weights(tiny_llama, tmp_path / "more", "model.layers.0.self_attn.q_proj.input_scale")
    with pytest.raises(ModelError, match=r"hold 1 weights .*q_proj\.input_scale"):
        load_model(more, device="cpu")


def test_weights_that_change_nothing_are_not(tiny_llama: Path, tmp_path: Path) -> None:
    names = ("model.layers.0.self_attn.rotary_emb.inv_freq", "mtp.fc.weight", "model.layers.4.eh_proj.weight")
    more = with_weights(tiny_llama, tmp_path / "more", *names, num_nextn_predict_layers=1)
    load_model(more, device="cpu")


def test_scales_of_a_quantized_layer_are_no_strangers(tiny_llama: Path) -> None:
    model = load_model(str(tiny_llama), device="cpu")
    config = copy.deepcopy(model.config)
    report = {"mismatched_keys": (), "missing_keys": ()}
    of = {
        name: {**report, "unexpected_keys": {f"{name}.k_scale"}}
        for name in ("model.layers.0", "model.layers.4")
    }
    with pytest.raises(ModelError, match="k_scale"):
        check_weights("it", config, model, of["model.layers.0"])
    config.quantization_config = {"quant_method": "fp8"}
    check_weights("it", config, model, of["model.layers.0"])
    with pytest.raises(ModelError, match=r"layers\.4\.k_scale"):
        check_weights("it", config, model, of["model.layers.4"])


@pytest.mark.parametrize(
    ("said", "name", "shapes"),
    [
        ({"hidden_size": 64, "head_dim": 8}, "lm_head.weight", "(272, 32) in its files, (272, 64)"),
        ({"vocab_size": 300}, "lm_head.weight", "(272, 32) in its files, (300, 32)"),
        ({"num_key_value_heads": 4}, "layers.0.self_attn.k_proj.weight", "(16, 32) in its files, (32, 32)"),
    ],
)
def test_weights_of_another_shape_are_named(
    said: dict[str, Any], name: str, shapes: str, tiny_llama: Path, tmp_path: Path
) -> None:
    with pytest.raises(ModelError) as raised:
        load_model(edited(tiny_llama, tmp_path / "it", **said), device="cpu")
    assert name in str(raised.value) and shapes in str(raised.value)


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ({"max_position_embeddings": 0}, "max_position_embeddings is 0"),
        ({"max_position_embeddings": -5}, "max_position_embeddings is -5"),
        ({"num_attention_heads": 0}, "self.num_attention_heads"),
        ({"num_key_value_heads": 0}, "config.num_key_value_heads"),
        ({"num_hidden_layers": "x"}, "'num_hidden_layers' expected int, got str"),
        ({"eos_token_id": "x"}, "Field 'eos_token_id' with value 'x'"),
        ({"pad_token_id": 9999}, "self.padding_idx"),
        ({"hidden_act": "zzz"}, "ACT2FN[config.hidden_act]"),
        ({"rope_parameters": {"rope_type": "zzz", "rope_theta": 1.0}}, "ROPE_INIT_FUNCTIONS[self.rope_type]"),
        ({"quantization_config": [1]}, "self.quantization_config"),
    ],
)
def test_a_config_that_lies_is_told_in_one_line(
    said: dict[str, Any], why: str, tiny_llama: Path, tmp_path: Path
) -> None:
    where = edited(tiny_llama, tmp_path / "it", **said)
    with pytest.raises(ModelError) as raised:
        load_model(where, device="cpu")
    assert f"model {where!r}" in str(raised.value) and why in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json"]
)
@pytest.mark.parametrize("content", [b"", b"\xff\x00", b'{"a', b"[]", b"5"])
def test_a_file_that_is_no_json_object_is_named(
    name: str, content: bytes, tiny_llama: Path, tmp_path: Path
) -> None:
    where = edited(tiny_llama, tmp_path / "it")
    Path(where, name).write_bytes(content)
    with pytest.raises(ModelError, match=name):
        load_config(where)


def test_a_tokenizer_that_cannot_be_read_is_a_model_error(tiny_llama: Path, tmp_path: Path) -> None:
    where = edited(tiny_llama, tmp_path / "it")
    Path(where, "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match=r"tokenizer of .*KeyError: 'added_tokens', at "):
        load_tokenizer(where)
    Path(where, "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"tokenizer of .* from one of: \(1\)"):
        load_tokenizer(where)


@pytest.mark.parametrize(
    ("file", "said", "why"),
    [
        ("tokenizer_config.json", {"model_max_length": "x"}, "self.model_max_length"),
        ("tokenizer_config.json", {"model_max_length": [5]}, "self.model_max_length"),
        ("tokenizer_config.json", {"eos_token": 5}, "eos_token"),
        ("tokenizer_config.json", {"extra_special_tokens": 5}, "extra_special_tokens must be"),
        ("special_tokens_map.json", {"model_max_length": {"a": 1}}, "self.model_max_length"),
        ("special_tokens_map.json", {"unk_token": {"a": 1}}, "RecursionError"),
    ],
)
def test_what_requests_need_of_a_tokenizer_is_tried(
    file: str, said: dict[str, Any], why: str, tiny_llama: Path, tmp_path: Path
) -> None:
    where = edited(tiny_llama, tmp_path / "it")
    before = json.loads(Path(where, file).read_text()) if Path(where, file).exists() else {}
    Path(where, file).write_text(json.dumps(before | said))
    with pytest.raises(ModelError, match="tokenizer of") as raised:
        load_tokenizer(where)
    assert why in str(raised.value) and "\n" not in str(raised.value)


def test_memory_that_runs_out_is_no_fault_of_the_files(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", full)
    with pytest.raises(torch.OutOfMemoryError):
        load_model(str(tiny_llama), device="cpu")


@pytest.mark.parametrize("named", ["x", ["x"], 1.5])
def test_ends_that_are_no_ids_are_refused(named: Any, tiny_llama: Path, tmp_path: Path) -> None:
    where = edited(tiny_llama, tmp_path / "it", "generation_config.json", eos_token_id=named)
    with pytest.raises(ModelError, match="is no token id"):
        load_model(where, device="cpu")


def test_ends_outside_the_vocabulary(caplog: pytest.LogCaptureFixture) -> None:
    assert ends_within("it", (2, 258), 259) == (2, 258)
    assert ends_within("it", (), 259) == ()
    assert caplog.messages == []
    assert ends_within("it", (2, 259), 259) == (2,)
    assert "eos_token_id 259 is outside" in caplog.text
    with pytest.raises(ModelError, match="eos_token_id -1, 9999 is outside its vocabulary of 259 tokens"):
        ends_within("it", (-1, 9999), 259)
