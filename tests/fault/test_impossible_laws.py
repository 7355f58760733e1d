"""What no token can have been drawn from is its drafter's fault, and the text is the target's."""

from functools import cache
from typing import Any

import pytest
import torch
from test_impossible_drafts import giving
from test_speculation_faults import VOCAB, drafted, make_engine, served, texts

from engine.speculation.drafters.base import RowDraft
from engine.types import GenerateRequest, SamplingParams


def rejecting() -> list[GenerateRequest]:
    params = SamplingParams(max_tokens=12, temperature=1.0, seed=4, sampling_method="rejection")
    return [GenerateRequest(id="r", prompt_ids=(3, 4, 5), params=params)]


@cache
def rejecting_alone() -> dict[str, list[int]]:
    engine = make_engine(draft=False)
    return texts(served(engine, rejecting())[0])


def law(**at: float) -> torch.Tensor:
    """Of tokens by their names, the rest of which share what is left."""
    known = {int(name[1:]): share for name, share in at.items()}
    rest = (1 - sum(known.values())) / (VOCAB - len(known))
    return torch.tensor([known.get(token, rest) for token in range(VOCAB)])


def kept(lines: int = 4, first: int = 0, heat: Any = 1.0, vocab: int = VOCAB) -> Any:
    return torch.zeros(lines, vocab, dtype=torch.bfloat16), first, heat


KEPT: dict[str, Any] = {
    "beyond its lines": kept(1, 5),
    "before its lines": kept(first=-1),
    "at no temperature": kept(heat=0.0),
    "at a word of temperature": kept(heat="hot"),
    "of another vocabulary": kept(vocab=VOCAB + 1),
    "NaN": (torch.full((4, VOCAB), float("nan"), dtype=torch.bfloat16), 0, 1.0),
    "a word": "x",
    "elsewhere": (torch.zeros(4, VOCAB, dtype=torch.bfloat16, device="meta"), 0, 1.0),
}


@pytest.mark.parametrize("kind", KEPT)
def test_kept_logits_that_are_none(kind: str, monkeypatch: pytest.MonkeyPatch):
    engine = make_engine()
    wrong = giving(lambda _: RowDraft([5], kept=KEPT[kind]))
    monkeypatch.setattr(engine._parts.drafters["model"], "begin", wrong)
    events, stats = served(engine, rejecting())
    assert texts(events) == rejecting_alone() and drafted(events) == 0
    assert stats.speculation_faults == {"model": 1}


LAWS: dict[str, list[torch.Tensor]] = {
    "in eight bits": [law().to(torch.float8_e4m3fn)],
    "elsewhere": [law().to("meta")],
    "sparse": [law().to_sparse()],
    "of integers": [torch.zeros(VOCAB, dtype=torch.int64)],
    "of another vocabulary": [torch.full((VOCAB + 1,), 1 / (VOCAB + 1))],
    "one too many": [law(), law()],
    "of nothing": [torch.zeros(VOCAB)],
    "of too little": [torch.full((VOCAB,), 0.01 / VOCAB)],
    "of too much": [torch.full((VOCAB,), 1.01 / VOCAB)],
    "negative": [-torch.ones(VOCAB)],
    "negative, in one token": [law(t9=-0.25)],
    "NaN": [torch.full((VOCAB,), float("nan"))],
    "NaN, in one token": [law(t9=float("nan"))],
    "infinite": [torch.full((VOCAB,), float("inf"))],
    "without its token": [law(t5=0.0)],
    "no tensor": [None],  # type: ignore[list-item]
}


@pytest.mark.parametrize("kind", LAWS)
def test_a_law_that_is_none(kind: str, monkeypatch: pytest.MonkeyPatch):
    """What is not drawn from it cannot be judged by it. Nothing was drawn: the text is the target's."""
    engine = make_engine()
    monkeypatch.setattr(engine._parts.drafters["model"], "begin", giving(lambda _: RowDraft([5], LAWS[kind])))
    events, stats = served(engine, rejecting())
    assert texts(events) == rejecting_alone() and drafted(events) == 0
    assert stats.speculation_faults == {"model": 1}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_a_law_that_is_one(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    engine = make_engine()
    sound = giving(lambda _: RowDraft([5], [law(t5=0.5).to(dtype)]))
    monkeypatch.setattr(engine._parts.drafters["model"], "begin", sound)
    events, stats = served(engine, rejecting())
    assert len(texts(events)["r"]) == 12 and drafted(events) > 0 and stats.speculation_faults == {}
