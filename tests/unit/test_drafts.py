"""Tiny drafts: their files, their parts in the engine, and the ones that ship."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from engine.config import EngineConfig
from engine.core import Engine
from engine.models import builtin
from engine.models.draft import (
    DraftConfig,
    DraftForCausalLM,
    FactoredEmbedding,
    ReducedHead,
    Weights,
    load_draft,
    quantize,
    save_draft,
)
from engine.models.load import ModelError, load_model, load_tokenizer, same_tokenizer, tokenizer_sha256
from engine.models.packed import PackedLinear, can_pack
from engine.models.reference import ReferenceRunner, UnsupportedModel
from engine.models.references import ALIASES
from engine.parts import ConfigError, build
from engine.speculation.features import signals
from engine.types import GenerateRequest, SamplingParams, SpeculationParams
from server.prepare import prepare
from server.settings import Settings

CPU = torch.device("cpu")
IDS = torch.tensor([[5, 9, 2, 7, 7, 1, 30, 12, 3, 8]])
KNOWN = torch.arange(1, 272, 3)  # 91 of 272 ids


def new_draft(
    tokenizer: str = "0" * 64, rank: int | None = 8, known: int | None = len(KNOWN)
) -> DraftForCausalLM:
    """A random draft over the tiny target's vocabulary."""
    torch.manual_seed(0)
    config = DraftConfig(
        vocab_size=272,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        max_position_embeddings=128,
        initializer_range=0.4,
        embed_rank=rank,
        draft_vocab_size=known,
        tokenizer_sha256=tokenizer,
    )
    draft = DraftForCausalLM(config).eval()
    if known is not None:
        draft.lm_head.ids.copy_(KNOWN[:known])
    return draft


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS, use_cache=False).logits


@pytest.fixture(scope="module")
def digest(tiny_llama: Path) -> str:
    return tokenizer_sha256(load_tokenizer(str(tiny_llama)))


# ---- the parts


def test_a_factored_embedding_is_the_product_of_its_factors():
    embedding = FactoredEmbedding(10, 3, 6)
    product = embedding.tokens.weight @ embedding.project.weight.T
    torch.testing.assert_close(embedding(torch.tensor([[4, 9]])), product[[4, 9]][None])


def test_a_reduced_head_is_minus_infinity_but_at_its_ids():
    head = ReducedHead(6, 3, 10)
    head.ids.copy_(torch.tensor([7, 0, 4]))
    hidden = torch.randn(2, 5, 6)
    out = head(hidden)
    assert out.shape == (2, 5, 10)
    torch.testing.assert_close(out[..., [7, 0, 4]], head.linear(hidden))
    assert (out[..., [1, 2, 3, 5, 6, 8, 9]] == float("-inf")).all()


def test_a_shared_embedding_cannot_be_reduced():
    config = DraftConfig(vocab_size=64, hidden_size=16, num_attention_heads=2, embed_rank=4)
    config.tie_word_embeddings = True
    with pytest.raises(ValueError, match="tie_word_embeddings"):
        DraftForCausalLM(config)


# ---- files


@pytest.mark.parametrize(("rank", "known"), [(8, 91), (None, 91), (8, None), (None, None)])
@pytest.mark.parametrize("weights", ["float32", "bfloat16"])
def test_comes_back_as_it_was_saved(tmp_path: Path, weights: Weights, rank: int | None, known: int | None):
    draft = new_draft(rank=rank, known=known)
    save_draft(draft, tmp_path, weights)
    if weights == "bfloat16":
        for parameter in draft.parameters():
            parameter.data = parameter.bfloat16().float()
    loaded = load_model(str(tmp_path), dtype="float32", device="cpu")
    assert isinstance(loaded, DraftForCausalLM)
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    assert torch.equal(logits(loaded), logits(draft))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_rotary_frequencies_stay_float32(tmp_path: Path):
    """In bfloat16 the angle of position 1000 would be off by a turn."""
    save_draft(new_draft(), tmp_path)
    loaded = load_draft(tmp_path, torch.bfloat16, CPU)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert torch.equal(loaded.model.rotary_emb.inv_freq, new_draft().model.rotary_emb.inv_freq)


def test_int8_is_computed_as_its_dequantised_matrices(tmp_path: Path):
    draft = new_draft()
    save_draft(draft, tmp_path, "int8")
    stored = load_file(tmp_path / "model.safetensors")
    names = [name for name, tensor in draft.state_dict().items() if tensor.ndim == 2]
    assert len(names) > 10
    for name in names:
        assert stored[name].dtype == torch.int8
        assert stored[f"{name}.scale"].shape == stored[name].shape[:1]
    before = {name: tensor.clone() for name, tensor in draft.state_dict().items()}
    with torch.no_grad():
        for name, tensor in draft.state_dict().items():
            if name in names:
                tensor.copy_(stored[name].float() * stored[f"{name}.scale"][:, None])
                half = stored[f"{name}.scale"][:, None] / 2
                assert ((tensor - before[name]).abs() <= half * 1.0001).all()
    assert torch.equal(logits(load_draft(tmp_path, torch.float32, CPU)), logits(draft))


def test_a_row_of_zeros_is_quantised_to_zeros():
    matrix, scale = quantize(torch.tensor([[0.0, 0.0], [1.0, -2.0]]))
    assert matrix.tolist() == [[0, 0], [64, -127]] and scale.isfinite().all()


def test_saving_changes_nothing_of_the_model(tmp_path: Path):
    plain = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=16, num_attention_heads=2)).eval()
    for i, model in enumerate((new_draft(), plain)):
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        save_draft(model, tmp_path / str(i))
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_plain_draft_is_saved_as_transformers_does(tiny_llama: Path, tmp_path: Path):
    model = LlamaForCausalLM.from_pretrained(tiny_llama)
    tokenizer = load_tokenizer(str(tiny_llama))
    save_draft(model, tmp_path, "float32", tokenizer)
    assert torch.equal(logits(LlamaForCausalLM.from_pretrained(tmp_path)), logits(model))
    assert same_tokenizer(load_tokenizer(str(tmp_path)), tokenizer) is None
    with pytest.raises(ModelError, match="LlamaForCausalLM cannot be saved as int8"):
        save_draft(model, tmp_path, "int8")


def _edit(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        stored = load_file(directory / "model.safetensors")
        change(stored)
        save_file(stored, directory / "model.safetensors")

    return edit


def _config(**changes: Any) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        path = directory / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return edit


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing tensor": (_edit(lambda s: s.pop("model.norm.weight")), "model.norm.weight is missing"),
    "missing scale": (
        _edit(lambda s: s.pop("lm_head.linear.weight.scale")),
        r"lm_head\.linear\.weight is int8 and has no scale",
    ),
    "short scale": (
        _edit(lambda s: s.update({"lm_head.linear.weight.scale": torch.ones(3)})),
        "has no scale for each row",
    ),
    "wrong shape": (
        _edit(lambda s: s.update({"model.norm.weight": torch.ones(5)})),
        r"model\.norm\.weight has shape \(5,\), wanted is \(24,\)",
    ),
    "one tensor too many": (_edit(lambda s: s.update(extra=torch.ones(1))), "extra belongs to no part"),
    "an id too large": (_edit(lambda s: s["lm_head.ids"][-1].fill_(272)), "not different ids below 272"),
    "a negative id": (_edit(lambda s: s["lm_head.ids"][0].fill_(-1)), "not different ids below 272"),
    "an id twice": (_edit(lambda s: s["lm_head.ids"][0].fill_(4)), "not different ids below 272"),
    "ids that are no integers": (
        _edit(lambda s: s.update({"lm_head.ids": s["lm_head.ids"].float()})),
        r"lm_head\.ids is float32",
    ),
    "unknown weights": (_config(weights="int4"), "weights 'int4': known are int8, bfloat16, float32"),
    "another rank": (_config(embed_rank=9), r"tokens\.weight has shape \(272, 8\), wanted is \(272, 9\)"),
    "no head size": (_config(draft_vocab_size=None), r"lm_head\.weight is missing"),
    "a shape that cannot be": (_config(embed_rank=-1), "config.json"),
    "heads of no width": (_config(num_attention_heads=0), "config.json"),
    "a word for a number": (_config(hidden_size="wide"), "config.json"),
    "tied": (_config(tie_word_embeddings=True), "tie_word_embeddings"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), r"\.safetensors"),
    "no safetensors": (lambda d: (d / "model.safetensors").write_bytes(b"x" * 64), r"model\.safetensors"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_draft_is_refused_by_name(tmp_path: Path, case: str):
    save_draft(new_draft(), tmp_path, "int8")
    breaks, message = BROKEN[case]
    breaks(tmp_path)
    with pytest.raises(ModelError, match=message) as error:
        load_model(str(tmp_path), device="cpu")
    assert str(tmp_path) in str(error.value)


# ---- the digest of a tokenizer


def test_the_digest_tells_what_same_tokenizer_tells(tiny_llama: Path, make_tokenizer: Any, digest: str):
    merges = (("a", "b"), ("b", "c"))
    assert tokenizer_sha256(make_tokenizer()) == digest == tokenizer_sha256(load_tokenizer(str(tiny_llama)))
    others = [make_tokenizer(merges), make_tokenizer(merges[::-1]), make_tokenizer((), ("<x>",))]
    assert len({digest, *map(tokenizer_sha256, others)}) == 4


# ---- in the engine


@pytest.mark.skipif(not can_pack(), reason="this torch has no packed linears")
def test_head_and_projection_are_packed():
    draft = new_draft()
    expected = logits(draft)
    ReferenceRunner(draft, 16, {})
    assert isinstance(draft.lm_head.linear, PackedLinear)
    assert isinstance(draft.model.embed_tokens.project, PackedLinear)
    assert not any(type(module) is torch.nn.Linear for module in draft.modules())
    hidden = torch.randn(1, 3, 24)
    known = F.linear(hidden, new_draft().lm_head.linear.weight)
    torch.testing.assert_close(draft.lm_head(hidden)[..., KNOWN], known, rtol=1e-4, atol=1e-4)
    assert expected.isinf().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_runner_proves_a_reduced_head(dtype: torch.dtype):
    ReferenceRunner(new_draft().to(dtype), 16)


@pytest.mark.parametrize("fill", [0.0, float("nan")])
def test_the_runner_refuses_a_head_that_forgets_its_minus_infinity(
    monkeypatch: pytest.MonkeyPatch, fill: float
):
    shipped, calls = ReducedHead.forward, []

    def forward(self: ReducedHead, hidden: torch.Tensor) -> torch.Tensor:
        calls.append(0)  # the first call is the model's own
        out = shipped(self, hidden)
        return out if len(calls) == 1 else out.masked_fill(out.isinf(), fill)

    monkeypatch.setattr(ReducedHead, "forward", forward)
    with pytest.raises(UnsupportedModel, match="DraftForCausalLM"):
        ReferenceRunner(new_draft(), 16)


def test_signals_of_a_law_with_zeros():
    known = torch.tensor([[1.0, 2.0, 0.5]])
    raw = torch.full((1, 50), float("-inf")).index_copy(1, torch.tensor([3, 40, 9]), known)
    found = signals(raw, torch.tensor([40]), frozenset({"prob", "top", "entropy", "joint"}))
    law = known.softmax(-1)[0]
    torch.testing.assert_close(found["entropy"], -(law * law.log()).sum()[None])
    torch.testing.assert_close(found["prob"], law[1:2])
    torch.testing.assert_close(found["top"][0, :3], law.sort(descending=True).values)
    assert (found["top"][0, 3:] == 0).all()


def config(target: Path, draft: Path | str) -> EngineConfig:
    return EngineConfig(target=str(target), draft=str(draft), device="cpu", kv_blocks=24)


def test_a_draft_of_another_tokenizer_is_refused(tiny_llama: Path, tmp_path: Path, digest: str):
    save_draft(new_draft("f" * 64), tmp_path)
    with pytest.raises(ConfigError, match=f"SHA-256 {'f' * 64}, the target's is {digest}"):
        build(config(tiny_llama, tmp_path))
    save_draft(new_draft(""), tmp_path)
    with pytest.raises(ConfigError, match="of nothing"):
        build(config(tiny_llama, tmp_path))


def test_a_draft_over_fewer_ids_than_the_target_is_refused(tiny_llama: Path, tmp_path: Path, digest: str):
    draft = DraftForCausalLM(
        DraftConfig(
            vocab_size=64, hidden_size=16, num_attention_heads=2, embed_rank=4, tokenizer_sha256=digest
        )
    )
    save_draft(draft, tmp_path)
    with pytest.raises(ConfigError, match="has 64 ids, the target's 259"):
        build(config(tiny_llama, tmp_path))


# ---- the drafts that ship


@pytest.fixture
def shipped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, digest: str) -> Path:
    """An installation whose draft for smollm2 reads the tiny target's tokenizer."""
    save_draft(new_draft(digest), tmp_path / "smollm2", "int8")
    monkeypatch.setattr(builtin, "ROOT", tmp_path)
    return tmp_path / "smollm2"


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An installation without drafts."""
    monkeypatch.setattr(builtin, "ROOT", tmp_path)


def test_default_is_the_shipped_draft(shipped: Path, tiny_llama: Path):
    engine = Engine(config(tiny_llama, "default"))
    assert (engine.info.draft, engine.info.default_drafter) == ("default", "model")
    assert prepare(config(tiny_llama, "default")).vocab_size == 259


def test_default_is_the_draft_of_its_target_alone(shipped: Path, tiny_llama: Path):
    assert builtin.default_draft("smollm2") == "default"
    assert builtin.default_draft(ALIASES["smollm2"].hub_id) == "default"
    assert builtin.default_draft(str(tiny_llama)) == "ngram"
    assert Settings().engine_config().draft == "default"
    assert Settings(draft="none").engine_config().draft == "none"
    assert Settings(target=str(tiny_llama)).engine_config().draft == "ngram"


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_without_its_files_there_is_no_default(shipped: Path, tiny_llama: Path, missing: str):
    (shipped / missing).unlink()
    assert builtin.default_draft("smollm2") == "ngram"
    with pytest.raises(ConfigError, match="ships none"):
        build(config(tiny_llama, "default"))


@pytest.mark.usefixtures("bare")
def test_an_absent_default_is_told(tiny_llama: Path):
    assert Settings().engine_config().draft == "ngram"
    message = f"draft 'default' does not fit target '{tiny_llama}': .* this installation ships none"
    with pytest.raises(ConfigError, match=message):
        build(config(tiny_llama, "default"))
    with pytest.raises(ModelError, match="ships none"):
        prepare(config(tiny_llama, "default"))


def test_default_is_refused_where_the_tokenizer_is_another(shipped: Path, tiny_llama: Path):
    save_draft(new_draft("f" * 64), shipped)
    with pytest.raises(ConfigError, match="those with the tokenizer of smollm2"):
        build(config(tiny_llama, "default"))
    with pytest.raises(ModelError, match="those with the tokenizer of smollm2"):
        prepare(config(tiny_llama, "default"))


def test_what_ships_is_whole():
    """Of every draft in the package: its files, its size, and a target of its name."""
    for directory in builtin.ROOT.iterdir() if builtin.ROOT.is_dir() else ():
        if directory.name.startswith("__"):
            continue
        assert directory.name in ALIASES
        assert {"config.json", "model.safetensors", "README.md"} <= {p.name for p in directory.iterdir()}
        assert sum(path.stat().st_size for path in directory.iterdir()) <= 16 * 2**20
        load_draft(directory, torch.float32, CPU)


def test_requests_can_do_without_the_draft(shipped: Path, tiny_llama: Path):
    engine = Engine(config(tiny_llama, "default"))
    params = SamplingParams(temperature=0, max_tokens=8)
    for drafter in ("model", "none"):
        asked = SpeculationParams(drafter=drafter)
        engine.add(GenerateRequest(id=drafter, prompt_ids=(5, 6), params=params, speculation=asked))
    found: dict[str, tuple[int, ...]] = {"model": (), "none": ()}
    while engine.has_work():
        for event in engine.step()[0]:
            found[event.id] += event.token_ids
    assert found["model"] == found["none"] and len(found["none"]) == 8
