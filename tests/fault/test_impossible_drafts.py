"""What a drafter, a policy or a tree's table cannot mean is its fault, and the rows go on without a draft."""

import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from test_speculation_faults import VOCAB, alone, asked, drafted, make_engine, served, texts

from engine.core import Engine
from engine.speculation.drafters.base import Drafted, RowDraft
from engine.speculation.policies.goodput import Goodput
from engine.types import GenerateRequest, SamplingParams

Answer = Callable[[int], Any]
"""Of a number of rows."""

LIMITS: dict[str, Answer] = {
    "NaN": lambda n: torch.full((n,), float("nan")),
    "NaN, in one row": lambda n: torch.tensor([1.0] * (n - 1) + [float("nan")]),
    "infinite": lambda n: torch.full((n,), float("inf")),
    "no whole number": lambda n: torch.full((n,), 2.5),
    "negative": lambda n: torch.full((n,), -1),
    "of another shape": lambda n: torch.ones(n + 1, dtype=torch.int64),
    "of no shape": lambda n: torch.tensor(2),
    "a line each": lambda n: torch.ones(n, 1, dtype=torch.int64),
    "truth values": lambda n: torch.ones(n, dtype=torch.bool),
    "complex": lambda n: torch.ones(n, dtype=torch.complex64),
    "a list": lambda n: [2] * n,
    "nothing": lambda n: None,
}
KEEPS: dict[str, Answer] = {
    "NaN": lambda n: torch.full((n,), float("nan")),
    "numbers": lambda n: torch.ones(n),
    "of another shape": lambda n: torch.ones(n + 1, dtype=torch.bool),
    "of no shape": lambda n: torch.tensor(True),
    "a list": lambda n: [True] * n,
}


def blamed(engine: Engine, name: str, caplog: pytest.LogCaptureFixture, drafter: str | None = None) -> None:
    """All that is asked gets the target's text, and who failed is off after one fault."""
    with caplog.at_level(logging.ERROR):
        events, stats = served(engine, asked(drafter))
    assert texts(events) == alone()
    assert all(told[-1].finish_reason == "length" for told in events.values())
    assert stats.speculation_faults == {drafter or "model": 1}
    (line,) = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert f"{name} is off for 30 s" in line.getMessage()
    later, stats = served(engine, asked(drafter))
    assert texts(later) == alone() and drafted(later) == 0
    assert stats.speculation_faults == {drafter or "model": 1}


@pytest.mark.parametrize("kind", LIMITS)
def test_a_limit_that_cannot_be(kind: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    monkeypatch.setattr(Goodput, "limit", staticmethod(lambda state: LIMITS[kind](len(state.rows))))
    blamed(make_engine(policy="goodput"), "policy 'goodput' of drafter 'model'", caplog)


@pytest.mark.parametrize("kind", KEEPS)
def test_a_decision_that_cannot_be(
    kind: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    wrong = staticmethod(lambda signals, state: KEEPS[kind](len(signals.alive)))
    monkeypatch.setattr(Goodput, "keep_drafting", wrong)
    blamed(make_engine(policy="goodput"), "policy 'goodput' of drafter 'model'", caplog)


@pytest.mark.parametrize("limit", [2.0, 1e9, 1e30, 10**9], ids=str)
def test_a_limit_that_is_only_large_or_a_whole_float(limit: float, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Goodput, "limit", staticmethod(lambda state: torch.tensor([limit] * len(state.rows))))
    events, stats = served(make_engine(policy="goodput"), asked())
    assert texts(events) == alone() and drafted(events) > 0 and stats.speculation_faults == {}


def test_a_policy_whose_learns_raises_late(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    calls = 0

    def learns(options: object) -> bool:
        nonlocal calls
        calls += 1
        if calls > 20:
            raise ValueError("of learning")
        return True

    monkeypatch.setattr(Goodput, "learns", staticmethod(learns))
    blamed(make_engine(policy="goodput"), "policy 'goodput' of drafter 'model'", caplog)


def tree(tokens: list[int], parents: list[int]) -> RowDraft:
    """Of nodes that the draft has not read."""
    return RowDraft(tokens, parents=parents, read=[-1] * len(tokens))


DRAFTS: dict[str, Callable[[int], RowDraft]] = {
    "a token beyond the vocabulary": lambda most: RowDraft([10**6]),
    "the first token beyond the vocabulary": lambda most: RowDraft([VOCAB]),
    "a negative token": lambda most: RowDraft([-1]),
    "a token that is no integer": lambda most: RowDraft([3.0]),  # type: ignore[list-item]
    "more tokens than its limit": lambda most: RowDraft([5] * (most + 1)),
    "many more": lambda most: RowDraft([5] * 300),
    "no tokens": lambda most: RowDraft(None),  # type: ignore[arg-type]
    "no draft": lambda most: None,  # type: ignore[dict-item, return-value]
    "a reason that nobody knows": lambda most: RowDraft([5], stop_reason="whim"),
}
TREES: dict[str, Callable[[int], RowDraft]] = DRAFTS | {
    "more nodes than its budget": lambda most: tree(list(range(most + 1)), [-1] * (most + 1)),
    "too few parents": lambda most: tree([5, 6], [-1]),
    "a parent behind its child": lambda most: tree([5, 6], [1, -1]),
    "a node that is its own parent": lambda most: tree([5], [0]),
    "a parent before the row's end": lambda most: tree([5], [-2]),
    "a parent that is no integer": lambda most: tree([5], [-1.0]),  # type: ignore[list-item]
    "two siblings of one token": lambda most: tree([5, 6, 5], [-1, -1, -1]),
    "a way over the request's cap": lambda most: tree([5] * 20, list(range(-1, 19))),
    "a chain over it": lambda most: RowDraft([5] * 20),
}


def giving(draft: Callable[[int], RowDraft]) -> Callable[..., Any]:
    """A `begin` that gives every row such a draft for its limit."""
    return lambda rows, limits, table: lambda: Drafted([draft(most) for most in limits])


@pytest.mark.parametrize("kind", DRAFTS)
def test_a_draft_that_cannot_be(kind: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    engine = make_engine()
    monkeypatch.setattr(engine._parts.drafters["model"], "begin", giving(DRAFTS[kind]))
    blamed(engine, "drafter 'model'", caplog)


@pytest.mark.parametrize("kind", TREES)
def test_a_tree_that_cannot_be(kind: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    engine = make_engine()
    monkeypatch.setattr(engine._parts.drafters["dyspec"], "begin", giving(TREES[kind]))
    blamed(engine, "drafter 'dyspec'", caplog, "dyspec")


def timed(rows: int, seconds: float) -> Drafted:
    return Drafted([RowDraft() for _ in range(rows)], [(rows, seconds)])


DRAFTER_ANSWERS: dict[str, tuple[str, Callable[..., Any]]] = {
    "a draft too few": ("begin", lambda rows, limits, table: lambda: Drafted([RowDraft() for _ in rows[1:]])),
    "nothing": ("begin", lambda rows, limits, table: lambda: None),
    "steps of no time": ("begin", lambda rows, limits, table: lambda: timed(len(rows), float("nan"))),
    "steps of less": ("begin", lambda rows, limits, table: lambda: timed(len(rows), -1.0)),
    "room that is no number": ("room", lambda seq: float("nan")),
    "room that raises": ("room", lambda seq: {}[seq]),
    "lagging that raises": ("lags", lambda seq: {}[seq]),
}


@pytest.mark.parametrize("kind", DRAFTER_ANSWERS)
def test_a_drafter_that_answers_what_cannot_be(
    kind: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    engine = make_engine()
    monkeypatch.setattr(engine._parts.drafters["model"], *DRAFTER_ANSWERS[kind])
    blamed(engine, "drafter 'model'", caplog)


TREE_LIMITS: dict[str, Callable[[int], Any]] = {
    "negative": lambda n: [-1] * n,
    "a row too few": lambda n: [8] * (n - 1),
    "no whole number": lambda n: [2.0] * n,
    "nothing": lambda n: None,
}


@pytest.mark.parametrize("kind", TREE_LIMITS)
def test_a_budget_that_cannot_be(
    kind: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    engine = make_engine()
    monkeypatch.setattr(engine._tables["dyspec"], "limits", lambda rows: TREE_LIMITS[kind](len(rows)))
    blamed(engine, "drafter 'dyspec'", caplog, "dyspec")


def test_a_budget_is_at_most_the_requests(monkeypatch: pytest.MonkeyPatch):
    engine = make_engine()
    monkeypatch.setattr(engine._tables["dyspec"], "limits", lambda rows: [10**6] * len(rows))
    events, stats = served(engine, asked("dyspec"))
    assert texts(events) == alone() and stats.speculation_faults == {}
    assert 0 < max(event.drafted for told in events.values() for event in told) <= 32


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


LAWS: dict[str, list[torch.Tensor]] = {
    "of integers": [torch.zeros(VOCAB, dtype=torch.int64)],
    "of another vocabulary": [torch.full((VOCAB + 1,), 1 / (VOCAB + 1))],
    "one too many": [law(), law()],
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


def test_a_law_that_is_one(monkeypatch: pytest.MonkeyPatch):
    engine = make_engine()
    sound = giving(lambda _: RowDraft([5], [law(t5=0.5)]))
    monkeypatch.setattr(engine._parts.drafters["model"], "begin", sound)
    events, stats = served(engine, rejecting())
    assert len(texts(events)["r"]) == 12 and drafted(events) > 0 and stats.speculation_faults == {}


def test_a_sound_row_keeps_its_draft(monkeypatch: pytest.MonkeyPatch):
    """Dropped for another row's fault, what it sampled would bias what rejection sampling gives."""
    engine = make_engine()
    calls = 0

    def begin(rows: Any, limits: Any, table: Any) -> Any:
        nonlocal calls
        calls += 1
        return lambda: Drafted([RowDraft([5] if i else [-1]) for i in range(len(rows))])

    monkeypatch.setattr(engine._parts.drafters["model"], "begin", begin)
    events, stats = served(engine, asked())
    assert texts(events) == alone() and stats.speculation_faults == {"model": 1}
    assert calls == 1 and drafted(events) == 2
