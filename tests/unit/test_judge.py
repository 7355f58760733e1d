"""Verdicts and limits by one graph replay, with the graph played by calling what it would have captured."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from lossless.contract import equipped, sequence
from torch import Tensor

from engine.speculation import judge
from engine.speculation.control import PolicyTable

LEARNING = ["heuristic", "adaedl", "bandit", "goodput"]


class Event:
    def record(self) -> None: ...

    def synchronize(self) -> None: ...


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def captured(run: Callable[[], object], device: torch.device) -> Callable[[], None]:
        return lambda: (run(), None)[1]

    monkeypatch.setattr(judge, "captured", captured)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: self)
    yield


def tables(rows: int) -> tuple[PolicyTable, PolicyTable]:
    """One that captures, one that does not."""
    capturing, plain = equipped(rows), equipped(rows)
    capturing._captures = True
    return capturing, plain


@pytest.mark.parametrize("policies", [*([name] for name in LEARNING), ["heuristic", "adaedl"]], ids=str)
def test_limits_are_those_of_telling_and_asking(policies: list[str]) -> None:
    """Iterations of three rows of which one drafts nothing now and then."""
    found = []
    for table in tables(4):
        rows = [sequence(policies[i % len(policies)], name=str(i)) for i in range(3)]
        for row in rows:
            table.take(row)
        seen = [table.limits(rows)]
        for drafted, accepted in (([4, 2, 0], [4, 0, 0]), ([1, 6, 3], [1, 6, 1]), ([0, 2, 2], [0, 2, 0])):
            table.observe(rows, drafted, accepted)
            seen.append(table.limits(rows))
        found.append(seen)
    assert found[0] == found[1]


def test_a_row_that_takes_a_told_slot_is_asked_for_itself() -> None:
    table, plain = tables(1)
    first, second = sequence("heuristic", {"start": 9}), sequence("heuristic", {"start": 3})
    for each, row in ((table, first), (plain, second)):
        each.take(row)
    table.limits([first])
    table.observe([first], [9], [9])
    table.give_back(first)
    third = sequence("heuristic", {"start": 3})
    table.take(third)
    assert third.slot == second.slot and table.limits([third]) == plain.limits([second]) == [3]


def test_rows_that_were_not_told_of_are_asked_beside_those_that_were() -> None:
    table, _ = tables(2)
    old, new = sequence("heuristic", {"start": 4}, "old"), sequence("heuristic", {"start": 2}, "new")
    table.take(old)
    assert table.limits([old]) == [4]
    table.observe([old], [4], [4])
    table.take(new)
    assert table.limits([old, new]) == [6, 2]
    assert table.limits([old, new]) == [6, 2]  # nothing was begun: both are asked


def test_what_a_preempted_row_was_told_goes_with_it() -> None:
    table, _ = tables(2)
    row = sequence("heuristic", {"start": 4})
    table.take(row)
    table.observe([row], [4], [4])
    table.put_aside(row)
    table.take(row)
    assert table.limits([row]) == [6]
