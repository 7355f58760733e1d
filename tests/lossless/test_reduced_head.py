"""A draft whose head knows a part of the vocabulary: q is 0 elsewhere, and the text stays the target's."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from lossless.branches import Case, check
from lossless.coupled import check_identity, requests, spec
from lossless.toys import Context, Pair, different, run, tokens_of, toy_engine
from torch import Tensor
from transformers import LlamaForCausalLM

from engine.config import EngineConfig
from engine.core import Engine
from engine.models.draft import DraftConfig, DraftForCausalLM, ReducedHead, Weights, save_draft
from engine.models.load import load_tokenizer, tokenizer_sha256
from engine.sequence import Sequence
from engine.speculation import verifier
from engine.speculation.control import PolicyTable
from engine.speculation.drafters.base import Drafted, RowDraft
from engine.speculation.drafters.model import ModelDrafter
from engine.types import GenerateRequest, SamplingParams, SpeculationParams, TokenEvent

PENALTIES = {"presence_penalty": 0.5, "frequency_penalty": 0.25, "repetition_penalty": 1.3}
Patch = pytest.MonkeyPatch


def reduced(vocab: int, *ids: int) -> Pair:
    """`different`'s draft behind a real ReducedHead that knows `ids`; its hidden state is their logits."""
    whole = different(vocab)
    assert whole.draft is not None
    own = whole.draft
    head = ReducedHead(len(ids), len(ids), vocab).double()
    with torch.no_grad():
        head.linear.weight.copy_(torch.eye(len(ids)))
        head.ids.copy_(torch.tensor(ids))

    def draft(context: Context) -> list[float]:
        with torch.no_grad():
            hidden = torch.tensor([own(context)[i] for i in ids], dtype=torch.float64)
            return head(hidden).tolist()

    return Pair(vocab, whole.target, cache(draft))


SOME = reduced(3, 2, 0)
ONE = reduced(3, 1)
STATIC = Case(SOME, SamplingParams(max_tokens=4), spec(sl=2))


def ask(
    name: str, prompt: tuple[int, ...], params: SamplingParams, asked: SpeculationParams
) -> GenerateRequest:
    return GenerateRequest(id=name, prompt_ids=prompt, params=params, speculation=asked)


# ---- rejection sampling, by exact enumeration


@pytest.mark.parametrize("sl", [1, 2, 3])
@pytest.mark.parametrize("pair", [SOME, ONE], ids=["two known", "one known"])
def test_rejection_is_exact(pair: Pair, sl: int):
    check(Case(pair, SamplingParams(max_tokens=4), spec(sl=sl)))


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0.6},
        {"temperature": 1e-4},
        {"top_k": 3},  # more than the head knows
        {"top_k": 1},
        {"top_p": 0.8},
        {"min_p": 0.4},
        {"logit_bias": {1: 3.0, 0: -2.0}},
        {"logit_bias": {0: -100.0, 2: -100.0}},
        PENALTIES,
        {"repetition_penalty": 0.7, "temperature": 1.4},
        {"min_tokens": 2, "stop_token_ids": (2,)},
    ],
    ids=lambda params: "-".join(f"{name}={value}" for name, value in params.items()),
)
def test_rejection_is_exact_under_every_setting(params: dict[str, Any]):
    check(Case(SOME, SamplingParams(max_tokens=4, **params), spec(sl=2), eos=(1,)))


@pytest.mark.parametrize("signal", ["token", "top", "joint"])
def test_rejection_is_exact_under_a_policy(signal: str):
    asked = spec(policy="confidence", signal=signal, threshold=0.5)
    check(Case(SOME, SamplingParams(max_tokens=4), asked))


# ---- coupled sampling


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("params", [{}, {"top_k": 3}, PENALTIES, {"min_tokens": 4}], ids=str)
def test_coupled_is_the_same_text(params: dict[str, Any], temperature: float):
    pair = reduced(4, 3, 1)
    asked = requests(SamplingParams(temperature=temperature, max_tokens=8, **params))
    check_identity(toy_engine(pair, blocks=1024, rows=len(asked), eos=[3]), pair, asked, [3])


# ---- a request that leaves the draft no token

EOS_ONLY = reduced(3, 1)
NONE_LEFT = Case(EOS_ONLY, SamplingParams(max_tokens=5, min_tokens=3), spec(sl=2), eos=(1,))


def test_a_draft_without_a_token_stops_and_the_law_is_kept():
    seen: list[TokenEvent] = []
    check(NONE_LEFT, seen.extend)
    early = [event for event in seen if event.stop_reason == "drafter"]
    assert early and all(event.drafted == 0 for event in early)
    assert any(event.drafted > 0 for event in seen)  # the end of sequence, once it may come


@pytest.mark.parametrize("method", ["coupled", "rejection"])
def test_a_draft_goes_on_where_its_neighbour_has_no_token(method: Any):
    params = SamplingParams(max_tokens=6, seed=3, sampling_method=method)
    free = ask("free", (0, 1, 2), params, spec(sl=3))
    bound = ask("bound", (0, 1, 2), msgspec.structs.replace(params, min_tokens=6), spec(sl=3))
    alone = run(toy_engine(EOS_ONLY, eos=(1,)), [free])["free"]
    both = run(toy_engine(EOS_ONLY, eos=(1,)), [bound, free])
    assert [(e.drafted, e.accepted, e.token_ids) for e in both["free"]] == [
        (e.drafted, e.accepted, e.token_ids) for e in alone
    ]
    assert sum(e.drafted for e in alone) > 0
    iterations = both["bound"][1:-1]  # the first draws no draft; the last has no room for one
    assert len(both["bound"]) == 6
    assert {(e.drafted, e.stop_reason) for e in iterations} == {(0, "drafter")}


# ---- faults


def must_fail(case: Case) -> None:
    with pytest.raises(AssertionError):
        check(case)


def test_a_verifier_whose_q_reaches_beyond_the_head(monkeypatch: Patch):
    """The token comes from the reduced law; the verifier reads one that fills the rest with logit 0."""
    shipped = ModelDrafter._choose

    def choose(self: ModelDrafter, logits: Tensor, rows: list[Sequence], drafts: list[RowDraft]) -> Any:
        chosen = shipped(self, logits, rows, drafts)
        for one, filled in zip(drafts, logits.masked_fill(logits.isinf(), 0.0).softmax(-1), strict=True):
            one.laws[-1] = filled
        return chosen

    monkeypatch.setattr(ModelDrafter, "_choose", choose)
    must_fail(STATIC)


def test_a_residual_that_leaves_out_what_the_head_does_not_know(monkeypatch: Patch):
    shipped = verifier.residual

    def residual(p: Tensor, q: Tensor | None, token: int) -> Tensor:
        assert q is not None
        rest = shipped(p, q, token)
        kept = rest * (q > 0)
        return kept / kept.sum() if kept.sum() > 0 else rest

    monkeypatch.setattr(verifier, "residual", residual)
    must_fail(STATIC)


def test_a_draft_that_goes_on_without_a_law(monkeypatch: Patch, caplog: pytest.LogCaptureFixture):
    """It is a fault of the drafter, which ends there: the law is kept without it."""
    check(NONE_LEFT)
    assert "is off" not in caplog.text
    monkeypatch.setattr(Tensor, "isfinite", lambda self: torch.ones_like(self, dtype=torch.bool))
    check(NONE_LEFT)
    assert "drafter 'model' is off" in caplog.text


def proposed(monkeypatch: Patch, pair: Pair, request: GenerateRequest) -> set[int]:
    """Every token that the draft proposes while the request runs."""
    shipped, seen = ModelDrafter.draft, set[int]()

    def draft(self: ModelDrafter, rows: Seq[Sequence], limits: Seq[int], table: PolicyTable) -> Drafted:
        drafts = shipped(self, rows, limits, table)
        seen.update(token for one in drafts.rows for token in one.tokens)
        return drafts

    monkeypatch.setattr(ModelDrafter, "draft", draft)
    run(toy_engine(pair), [request])
    monkeypatch.setattr(ModelDrafter, "draft", shipped)
    return seen


@pytest.mark.parametrize("method", ["coupled", "rejection"])
def test_only_known_tokens_are_proposed(monkeypatch: Patch, method: Any):
    """A head that fills with 0 is lossless too, since q is then what it says: this is what finds it."""
    params = SamplingParams(max_tokens=60, seed=1, sampling_method=method, logit_bias={0: 2.0})
    asked = ask("0", (0, 1, 2), params, spec(sl=4))
    assert proposed(monkeypatch, reduced(6, 5, 1, 4), asked) == {1, 4, 5}

    def forward(self: ReducedHead, hidden: Tensor) -> Tensor:
        known = self.linear(hidden)
        return known.new_zeros(*known.shape[:-1], self.vocab).index_copy_(-1, self.ids, known)

    monkeypatch.setattr(ReducedHead, "forward", forward)
    assert proposed(monkeypatch, reduced(6, 5, 1, 4), asked) - {1, 4, 5}


# ---- real models


def small_draft(target: Path, weights: Weights, *, like_target: bool) -> DraftForCausalLM:
    """Factored and reduced; random, or the target's own layers behind half of its head."""
    source = LlamaForCausalLM.from_pretrained(target)
    shape = {name: value for name, value in source.config.to_dict().items() if name != "model_type"}
    config = DraftConfig(
        **{**shape, "architectures": None},
        embed_rank=32 if like_target else 8,
        draft_vocab_size=130,
        tokenizer_sha256=tokenizer_sha256(load_tokenizer(str(target))),
        weights=weights,
    )
    torch.manual_seed(1)
    draft = DraftForCausalLM(config)
    if like_target:
        state = source.state_dict()
        state["model.embed_tokens.tokens.weight"] = state.pop("model.embed_tokens.weight")
        state["model.embed_tokens.project.weight"] = torch.eye(32)
        ids = torch.arange(0, 260, 2)
        state["lm_head.ids"], state["lm_head.linear.weight"] = ids, state.pop("lm_head.weight")[ids]
        draft.load_state_dict(state)
    return draft


def texts(target: Path, draft: str, speculation: SpeculationParams) -> tuple[dict[str, Any], int, int]:
    """By request, with drafted and accepted tokens in all: greedy, coupled, penalised and short ones."""
    config = EngineConfig(target=str(target), draft=draft, device="cpu", kv_blocks=64, policy="static")
    kinds = {
        "greedy": {"temperature": 0.0},
        "seeded": {"temperature": 0.8, "seed": 5},
        "filtered": {"temperature": 1.0, "seed": 6, "top_k": 200, "top_p": 0.95},
        "penalised": {"temperature": 0.7, "seed": 7, **PENALTIES},
        "long": {"temperature": 0.7, "seed": 8, "min_tokens": 20},
    }
    asked = [
        ask(name, (5, 40, 9, 77, 5, 40), SamplingParams(max_tokens=24, **kind), speculation)
        for name, kind in kinds.items()
    ]
    events = run(Engine(config), asked)
    flat = [event for own in events.values() for event in own]
    counts = sum(e.drafted for e in flat), sum(e.accepted for e in flat)
    return {name: tokens_of(own) for name, own in events.items()}, *counts


@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("like_target", [False, True], ids=["random", "like the target"])
def test_texts_are_the_targets_own(tiny_llama: Path, tmp_path: Path, weights: Weights, like_target: bool):
    save_draft(small_draft(tiny_llama, weights, like_target=like_target), tmp_path, weights)
    alone, none, _ = texts(tiny_llama, "none", SpeculationParams(drafter="none"))
    assert none == 0
    for speculation in (spec(sl=1), spec(sl=4), spec(policy="confidence", threshold=0.02)):
        found, drafted, accepted = texts(tiny_llama, str(tmp_path), speculation)
        assert found == alone
        assert drafted > 0
        assert accepted > 0 or not like_target


def test_a_head_that_knows_the_right_tokens_is_accepted(tiny_llama: Path, tmp_path: Path):
    """Greedy, float32: a draft of the target's own layers is wrong only where the head lacks the token."""
    save_draft(small_draft(tiny_llama, "float32", like_target=True), tmp_path, "float32")
    config = EngineConfig(target=str(tiny_llama), draft=str(tmp_path), device="cpu", kv_blocks=64)
    asked = ask("0", (5, 40, 9), SamplingParams(temperature=0, max_tokens=40), spec(sl=1))
    events = run(Engine(config), [asked])["0"]
    drafted = [event for event in events if event.drafted]
    assert len(drafted) > 10
    assert any(event.accepted == 1 for event in drafted)
    for event in drafted:
        assert (event.token_ids[0] % 2 == 0) == (event.accepted == 1)
