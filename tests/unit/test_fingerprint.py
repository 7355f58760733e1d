"""The identity of a checkpoint: what changes it, what does not, and what it is for each kind of draft."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from engine.models import builtin
from engine.models.fingerprint import fingerprint, of_draft, of_model
from engine.models.folder import ModelNotFound
from engine.models.load import load_tokenizer

WEIGHTS = "model.safetensors"


@pytest.fixture
def model(tiny_llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


def test_it_is_of_the_content_alone(tiny_llama: Path, model: Path) -> None:
    found = fingerprint(model)
    assert found == fingerprint(tiny_llama) == of_model(str(model))
    assert len(found) == 64 and int(found, 16) >= 0
    (model / "README.md").write_text("no part of it")
    (model / "tokenizer_config.json").write_text("{}")
    assert fingerprint(model) == found


def _retrain(model: Path) -> None:
    tensors = load_file(model / WEIGHTS)
    tensors["lm_head.weight"][3, 3] += 1e-3
    save_file(tensors, model / WEIGHTS, metadata={"format": "pt"})


def _config(model: Path) -> None:
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rms_norm_eps": 1e-5}))


CHANGES = {
    "a weight": _retrain,
    "the config": _config,
    "a file's name": lambda model: (model / WEIGHTS).rename(model / "other.safetensors"),
    "another file": lambda model: shutil.copy(model / WEIGHTS, model / "more.safetensors"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_every_change_of_the_model_changes_it(model: Path, what: str) -> None:
    before = fingerprint(model)
    CHANGES[what](model)
    assert fingerprint(model) != before


def test_large_files_are_sampled_from_end_to_end(model: Path) -> None:
    path, size = model / WEIGHTS, 40 << 20
    path.write_bytes(bytes(size))
    before = fingerprint(model)
    spaced = [(size - (1 << 16)) * i // 63 for i in range(64)]
    for at in (0, spaced[1], spaced[40] + 100, size - 1):
        with path.open("r+b") as file:
            file.seek(at)
            file.write(b"\1")
        assert fingerprint(model) != before, at
        path.write_bytes(bytes(size))
    with path.open("r+b") as file:
        file.seek(spaced[1] - 1)
        file.write(b"\1")
    assert fingerprint(model) == before  # between two pieces: the price of being quick
    path.write_bytes(bytes(size + 1))
    assert fingerprint(model) != before


@pytest.mark.parametrize("missing", ["config.json", WEIGHTS])
def test_what_is_no_model_is_refused(model: Path, missing: str) -> None:
    (model / missing).unlink()
    with pytest.raises(ModelNotFound, match="config.json" if missing == "config.json" else r"\*.safetensors"):
        fingerprint(model)


def test_a_model_of_the_hub_that_is_not_in_its_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("engine.models.fingerprint.resolve", lambda reference: reference)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelNotFound, match=r"someone/else.* is not in the hub's cache"):
        of_model("someone/else")


def test_drafts_by_the_name_that_serving_takes(
    tiny_llama: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = str(tiny_llama)
    assert of_draft("none", target) is None and of_draft("ngram", target) is None
    assert of_draft("self:2", target) == f"{fingerprint(tiny_llama)}:self:2"
    _retrain(model)
    assert of_draft(str(model), target) == fingerprint(model) != fingerprint(tiny_llama)
    monkeypatch.setattr(builtin, "builtin_draft", lambda name, tokenizer: model)
    assert of_draft("default", target) == fingerprint(model)
    assert of_draft("default", target, load_tokenizer(target)) == fingerprint(model)


def test_the_shipped_draft_has_one(smollm2: Path) -> None:
    assert of_draft("default", "smollm2") == fingerprint(builtin.ROOT / "smollm2")


def test_our_own_drafts_are_checkpoints_too(tmp_path: Path) -> None:
    shutil.copytree(builtin.ROOT / "smollm2", tmp_path / "draft")
    before = fingerprint(tmp_path / "draft")
    tensors = load_file(tmp_path / "draft" / WEIGHTS)
    scale = next(name for name in tensors if name.endswith("norm.weight"))
    tensors[scale] = tensors[scale] + torch.ones(1, dtype=tensors[scale].dtype)
    save_file(tensors, tmp_path / "draft" / WEIGHTS)
    assert before == fingerprint(builtin.ROOT / "smollm2") != fingerprint(tmp_path / "draft")
