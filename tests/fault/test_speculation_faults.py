"""A failing draft or policy costs speed alone: the text is the target's, the engine lives and says so."""

import copy
import logging
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from engine import governing
from engine.config import EngineConfig
from engine.core import Engine
from engine.models.reference import ReferenceRunner
from engine.parts import assemble
from engine.speculation import faults
from engine.speculation.costs import EngineCosts
from engine.speculation.policies.goodput import Goodput
from engine.speculation.policies.static import Static
from engine.types import GenerateRequest, SamplingParams, SpeculationParams, StepStats, TokenEvent

VOCAB, BLOCK, BLOCKS = 64, 4, 200
Fault = Callable[..., Any]


@cache
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.4, eos_token_id=2,
    )  # fmt: skip
    config._attn_implementation = "eager"
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def make_engine(draft: bool = True, policy: str = "static") -> Engine:
    """Target and draft are the same model: what is drafted is accepted."""
    config = EngineConfig(
        target="tiny", draft="tiny" if draft else "none", policy=policy, block_size=BLOCK, max_num_seqs=4
    )
    runners = [ReferenceRunner(copy.deepcopy(llama()), BLOCK) for _ in range(1 + draft)]
    for runner in runners:
        runner.allocate(BLOCKS)
    drafter = runners[1] if draft else None
    parts = assemble(config, runners[0], drafter, blocks=BLOCKS, max_model_len=128, vocab=VOCAB, eos_ids=())
    return Engine(config, parts)


def asked(drafter: str | None = None) -> list[GenerateRequest]:
    """Greedy, seeded and hot."""
    return [
        GenerateRequest(
            id=f"r{i}",
            prompt_ids=tuple(range(3 + i, 9 + 2 * i)) * 2,
            params=SamplingParams(max_tokens=24, temperature=heat, seed=i, top_k=20 * i),
            speculation=SpeculationParams(drafter=drafter),
        )
        for i, heat in enumerate((0.0, 0.7, 1.3))
    ]


def served(engine: Engine, requests: list[GenerateRequest]) -> tuple[dict[str, list[TokenEvent]], StepStats]:
    for request in requests:
        engine.add(request)
    events: dict[str, list[TokenEvent]] = {request.id: [] for request in requests}
    stats = StepStats()
    while engine.has_work():
        told, stats = engine.step()
        for event in told:
            events[event.id].append(event)
    return events, stats


def texts(events: dict[str, list[TokenEvent]]) -> dict[str, list[int]]:
    return {name: [token for event in told for token in event.token_ids] for name, told in events.items()}


def drafted(events: dict[str, list[TokenEvent]]) -> int:
    return sum(event.drafted for told in events.values() for event in told)


@cache
def alone() -> dict[str, list[int]]:
    """What the target says without a draft."""
    return texts(served(make_engine(draft=False), asked("none"))[0])


def raising(at: int, error: Exception) -> Fault:
    """For what a method is to be replaced by: raises at its call number `at`, else does what it did."""

    def wrap(right: Fault) -> Fault:
        calls = 0

        def broken(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls >= at:
                raise error
            return right(*args, **kwargs)

        return broken

    return wrap


def nan(right: Fault) -> Fault:
    """The third pass on gives NaN for its first row, as a draft with a broken weight would."""
    calls = 0

    def broken(batch: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        logits = right(batch)
        if calls > 2 and len(logits):
            logits = logits.clone()
            logits[0, 5] = float("nan")
        return logits

    return broken


BROKEN = ValueError("the draft is broken")
DRAFTER_FAULTS = {
    "the draft's first pass raises": ("runner.forward", raising(1, BROKEN)),
    "a later pass raises, within a draft": ("runner.forward", raising(9, BROKEN)),
    "the draft gives NaN": ("runner.forward", nan),
    "begin raises": ("begin", raising(3, BROKEN)),
    "read raises": ("read", raising(1, BROKEN)),
    "choosing raises": ("_choose", raising(4, IndexError("of a sampled token"))),
}


@pytest.mark.parametrize("fault", DRAFTER_FAULTS)
def test_a_drafter_that_fails(fault: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    path, wrap = DRAFTER_FAULTS[fault]
    engine = make_engine()
    owner: Any = engine._parts.drafters["model"]
    *way, name = path.split(".")
    for each in way:
        owner = getattr(owner, each)
    monkeypatch.setattr(owner, name, wrap(getattr(owner, name)))
    with caplog.at_level(logging.ERROR):
        events, stats = served(engine, asked())
    assert texts(events) == alone()
    assert all(told[-1].finish_reason == "length" for told in events.values())
    assert stats.speculation_faults == {"model": 1}
    (line,) = caplog.records
    assert "drafter 'model' is off for 30 s" in line.getMessage()
    later, stats = served(engine, asked())  # and so do those that come later
    assert texts(later) == alone() and drafted(later) == 0
    assert {event.stop_reason for told in later.values() for event in told if event.iterations} == {"drafter"}
    assert stats.speculation_faults == {"model": 1} and len(caplog.records) == 1
    other, _ = served(engine, asked("ngram"))  # another drafter is no part of it
    assert texts(other) == alone() and drafted(other) > 0


def test_a_drafter_is_tried_again_and_trusted_less_each_time(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    now = 1000.0
    monkeypatch.setattr(faults.time, "monotonic", lambda: now)
    engine = make_engine()
    drafter: Any = engine._parts.drafters["model"]
    right = drafter.begin
    monkeypatch.setattr(drafter, "begin", raising(1, BROKEN)(right))
    for seconds in (30, 60, 120):
        events, _ = served(engine, asked())
        assert texts(events) == alone()
        assert f"off for {seconds} s" in caplog.records[-1].getMessage()
        now += seconds + 1
    monkeypatch.setattr(drafter, "begin", right)
    events, stats = served(engine, asked())
    assert texts(events) == alone() and drafted(events) > 0
    assert stats.speculation_faults == {"model": 3}


POLICY_FAULTS: dict[str, Callable[[Fault], Fault]] = {
    "limit": raising(3, KeyError("state")),
    "keep_drafting": raising(2, ArithmeticError("of a policy")),
    "observe": raising(1, RuntimeError("shape mismatch")),
    "reset": raising(1, TypeError("options")),
    "NaN of a limit": lambda right: lambda state: torch.full((len(state.rows),), float("nan")).long(),
}


@pytest.mark.parametrize("fault", POLICY_FAULTS)
def test_a_policy_that_fails(fault: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    name = "limit" if fault.startswith("NaN") else fault
    engine = make_engine(policy="goodput")
    monkeypatch.setattr(Goodput, name, staticmethod(POLICY_FAULTS[fault](getattr(Goodput(), name))))
    events, stats = served(engine, asked())
    assert texts(events) == alone()
    assert stats.speculation_faults == {"model": 1}
    (line,) = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert "policy 'goodput' of drafter 'model' is off" in line.getMessage()
    later, _ = served(engine, asked())
    assert texts(later) == alone() and drafted(later) == 0
    others = [
        GenerateRequest(id=r.id, prompt_ids=r.prompt_ids, params=r.params,
                        speculation=SpeculationParams(policy="static"))
        for r in asked()
    ]  # fmt: skip
    found, _ = served(engine, others)  # the drafter is sound
    assert texts(found) == alone() and drafted(found) > 0


def test_what_was_sampled_before_a_fault_is_verified(monkeypatch: pytest.MonkeyPatch):
    """Dropped, it would bias what rejection sampling gives."""
    engine = make_engine()
    monkeypatch.setattr(Static, "needs", frozenset({"prob"}))
    monkeypatch.setattr(
        Static, "keep_drafting", staticmethod(raising(3, BROKEN)(lambda *_: torch.ones(1) > 0))
    )
    request = GenerateRequest(
        id="r", prompt_ids=(3, 4, 5), params=SamplingParams(max_tokens=12, temperature=1.0)
    )
    events, _ = served(engine, [request])
    assert [event.drafted for event in events["r"] if event.drafted] == [3]
    assert sum(event.accepted for event in events["r"]) == 3  # the draft is the target


def test_a_policy_that_has_learned_nan_forgets_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(governing, "_LOOK", -1.0)
    engine = make_engine(policy="goodput")
    learned = engine._tables["model"].shared()["goodput"]["first"]
    fresh = learned.clone()
    learned.fill_(float("nan"))
    events, stats = served(engine, asked())
    assert texts(events) == alone() and stats.speculation_faults == {"model": 1}
    assert torch.equal(learned, fresh)


def test_when_acceptance_collapses_the_default_policy_stops_drafting():
    """No fault at all: the draft means well, and is always wrong."""
    engine = make_engine(policy="goodput")
    fixed = engine._governing.costs = EngineCosts()
    fixed.drafts["model"].know(1, 1, 0.001)
    for tokens in (1, 8, 32):
        fixed.verify.know(1, tokens, 0.01)
    for costs in (fixed.verify, fixed.drafts["model"]):
        costs.observe = lambda rows, tokens, seconds: None  # type: ignore[method-assign]

    def drafted_share(name: str) -> float:
        """Draft tokens an iteration, of the last 30."""
        params = SamplingParams(max_tokens=80, temperature=0.0)
        events, stats = served(engine, [GenerateRequest(id=name, prompt_ids=(3, 9, 4), params=params)])
        assert stats.speculation_faults == {}
        return sum(event.drafted for event in events[name][-30:]) / 30

    assert drafted_share("right") > 0.5
    drafter: Any = engine._parts.drafters["model"]
    right = drafter.runner.forward
    drafter.runner.forward = lambda batch: -right(batch)
    for number in range(3):
        share = drafted_share(f"wrong {number}")
    assert share < 0.2
    drafter.runner.forward = right
    assert any(drafted_share(f"right {number}") > 0.5 for number in range(20))


@pytest.mark.parametrize("message", ["CUDA error: an illegal memory access was encountered\nadvice"])
def test_a_lost_device_is_not_survived(monkeypatch: pytest.MonkeyPatch, message: str):
    engine = make_engine()
    drafter: Any = engine._parts.drafters["model"]
    lost = raising(1, torch.AcceleratorError(message))
    monkeypatch.setattr(drafter.runner, "forward", lost(drafter.runner.forward))
    with pytest.raises(torch.AcceleratorError):
        served(engine, asked())
