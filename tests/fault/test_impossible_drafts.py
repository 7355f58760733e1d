"""What a drafter, a policy or a tree's table cannot mean is its fault, and the rows go on without a draft."""

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_speculation_faults import BROKEN, VOCAB, alone, asked, drafted, make_engine, raising, served, texts

from engine.core import Engine
from engine.speculation.drafters.base import Drafted, RowDraft
from engine.speculation.policies.goodput import Goodput
from engine.types import TokenEvent

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
    "a reason that is a list": lambda most: RowDraft([5], stop_reason=["policy"]),  # type: ignore[arg-type]
    "a tuple of tokens": lambda most: RowDraft((5,)),  # type: ignore[arg-type]
    "a tensor of tokens": lambda most: RowDraft(torch.tensor([5])),  # type: ignore[arg-type]
    "laws that are nothing": lambda most: RowDraft([5], laws=None),  # type: ignore[arg-type]
    "a tensor of doubts": lambda most: RowDraft([5], unsound=torch.ones(2)),  # type: ignore[arg-type]
    "a word of doubt": lambda most: RowDraft([5], unsound="yes"),  # type: ignore[arg-type]
    "fewer tokens than none": lambda most: RowDraft([5], trimmed=-50),
    "kept logits that are none": lambda most: RowDraft([5], kept="x"),  # type: ignore[arg-type]
}
TREES: dict[str, Callable[[int], RowDraft]] = DRAFTS | {
    "more nodes than its budget": lambda most: tree(list(range(most + 1)), [-1] * (most + 1)),
    "too few parents": lambda most: tree([5, 6], [-1]),
    "a parent behind its child": lambda most: tree([5, 6], [1, -1]),
    "a node that is its own parent": lambda most: tree([5], [0]),
    "a parent before the row's end": lambda most: tree([5], [-2]),
    "a parent that is no integer": lambda most: tree([5], [-1.0]),  # type: ignore[list-item]
    "two siblings of one token": lambda most: tree([5, 6, 5], [-1, -1, -1]),
    "nodes read elsewhere": lambda most: RowDraft([5], parents=[-1], read=[99]),
    "nodes read nowhere": lambda most: RowDraft([5], parents=[-1]),
    "chances that are none": lambda most: RowDraft([5], parents=[-1], read=[-1], joint=[float("nan")]),
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


def telling(length: Any) -> Callable[..., Any]:
    """A `begin` whose rows say that so much of them was read."""

    def begin(rows: Any, limits: Any, table: Any) -> Any:
        def wait() -> Drafted:
            for row in rows:
                row.draft_kv_len = length
            return Drafted([RowDraft() for _ in rows])

        return wait

    return begin


def read_wrongly(rows: Any, budget: int) -> None:
    for row, _ in rows:
        row.draft_kv_len = -3


def once(rows: list[Any]) -> Drafted:
    return Drafted([RowDraft([5])] * len(rows))


DRAFTER_ANSWERS: dict[str, tuple[str, Callable[..., Any]]] = {
    "a draft too few": ("begin", lambda rows, limits, table: lambda: Drafted([RowDraft() for _ in rows[1:]])),
    "nothing": ("begin", lambda rows, limits, table: lambda: None),
    "steps of no time": ("begin", lambda rows, limits, table: lambda: timed(len(rows), float("nan"))),
    "steps of less": ("begin", lambda rows, limits, table: lambda: timed(len(rows), -1.0)),
    "steps of no rows": ("begin", lambda rows, *_: lambda: Drafted([RowDraft() for _ in rows], [(0.5, 0.1)])),
    "a tuple of wrong drafts": (
        "begin",
        lambda rows, *_: lambda: Drafted(tuple(RowDraft([10**6]) for _ in rows)),
    ),
    "one draft for all": ("begin", lambda rows, *_: lambda: once(rows)),
    "a word for a fault": ("begin", lambda rows, *_: lambda: Drafted([RowDraft() for _ in rows], fault="x")),
    "less read than nothing": ("begin", telling(-5)),
    "more read than there is": ("begin", telling(10**6)),
    "half a token read": ("begin", telling(1.5)),
    "a prompt read backwards": ("read", read_wrongly),
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


@pytest.mark.parametrize("method", ["give_back", "put_aside"])
def test_a_table_that_raises_where_rows_leave_it(method: str, monkeypatch: pytest.MonkeyPatch):
    engine = make_engine()
    table = engine._tables["dyspec"]
    monkeypatch.setattr(table, method, raising(1, BROKEN)(getattr(table, method)))
    for request in asked("dyspec"):
        engine.add(request)
    events: dict[str, list[TokenEvent]] = {f"r{i}": [] for i in range(3)}
    for number in range(200):
        told, stats = engine.step()
        for event in told:
            events[event.id].append(event)
        if number == 2:
            engine._scheduler._preempt(engine._scheduler.running[-1])
        if not engine.has_work():
            break
    assert texts(events) == alone() and all(told[-1].finish_reason == "length" for told in events.values())
    assert stats.speculation_faults["dyspec"] >= 1 and stats.kv_blocks_used == 0


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


@pytest.mark.parametrize("drafter", ["model", "ngram", "dyspec", "opt_tree", "goodput_tree"])
def test_our_own_drafters_are_not_blamed(drafter: str):
    events, stats = served(make_engine(), asked(drafter))
    assert texts(events) == alone() and drafted(events) > 0 and stats.speculation_faults == {}
