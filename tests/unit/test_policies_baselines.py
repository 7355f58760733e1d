"""static, heuristic and confidence: each one's rule."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from lossless.contract import equipped, iterate, sequence, signals

from engine.speculation.control import PolicyTable


def taken(policy: str, **options: Any) -> tuple[PolicyTable, Any]:
    table, row = equipped(1), sequence(policy, options)
    table.take(row)
    return table, row


@pytest.mark.parametrize("sl", [0, 1, 7, 64])
def test_static_never_changes(sl: int):
    table, row = taken("static", sl=sl)
    for p, accepted in ((0.3, False), (0.9, True), (0.9, True), (0.1, False)):
        assert iterate(table, [row], [p], [accepted]) == [[sl, *[True] * sl]]


def test_static_by_default_drafts_five():
    table, row = taken("static")
    assert table.limits([row]) == [5]


def test_heuristic_grows_by_two_and_shrinks_by_one():
    table, row = taken("heuristic")
    limits = []
    for accepted in (5, 7, 3, 0, 7):  # of 5, 7, 9, 8, 7
        limits += table.limits([row])
        table.observe([row], [limits[-1]], [accepted])
    assert limits == [5, 7, 9, 8, 7]
    assert table.limits([row]) == [9]


def test_heuristic_counts_what_was_drafted_and_not_what_it_wished():
    """Clamped to 2 tokens that both stand: all were accepted."""
    table, row = taken("heuristic", start=5)
    table.observe([row], [2], [2])
    assert table.limits([row]) == [7]


def test_heuristic_keeps_between_one_and_its_cap():
    table, row = taken("heuristic", start=2, max_sl=5)
    found = []
    for _ in range(4):
        found += table.limits([row])
        table.observe([row], [found[-1]], [0])
    assert found == [2, 1, 1, 1]
    for _ in range(4):
        found += table.limits([row])
        table.observe([row], [found[-1]], [found[-1]])
    assert found[4:] == [1, 3, 5, 5]


def test_heuristic_starts_within_its_cap():
    table, row = taken("heuristic", start=9, max_sl=4)
    assert table.limits([row]) == [4]


@pytest.mark.parametrize("max_sl", [0, 3, 64])
def test_confidence_wants_at_most_its_cap(max_sl: int):
    table, row = taken("confidence", max_sl=max_sl)
    assert table.limits([row]) == [max_sl]


@pytest.mark.parametrize("signal", ["token", "top", "joint"])
def test_confidence_stops_below_the_threshold_of_its_own_signal(signal: Literal["token", "top", "joint"]):
    table, row = taken("confidence", signal=signal, threshold=0.5)
    below = torch.nextafter(torch.tensor(0.5), torch.tensor(0.0))
    for value, keeps in ((0.75, True), (0.5, True), (below, False), (0.1, False)):
        found = signals(1, [0.5])
        # The two other signals say the opposite: they must not be read.
        for name in ("token", "top", "joint"):
            given = value if name == signal else (0.0 if keeps else 1.0)
            field = {"token": "prob", "top": "largest", "joint": "joint"}[name]
            setattr(found, field, torch.tensor([float(given)]))
        assert table.keep_drafting([row], found) == [keeps]


def test_confidence_thresholds_are_of_the_row():
    table = equipped(2)
    rows = [sequence("confidence", {"threshold": t}, str(t)) for t in (0.2, 0.8)]
    for row in rows:
        table.take(row)
    assert table.keep_drafting(rows, signals(1, [0.5, 0.5])) == [True, False]
    assert table.keep_drafting(rows[::-1], signals(1, [0.5, 0.5])) == [False, True]


@pytest.mark.parametrize(("threshold", "keeps"), [(0.0, True), (1.0, False)])
def test_confidence_at_its_extremes(threshold: float, keeps: bool):
    table, row = taken("confidence", threshold=threshold)
    assert table.keep_drafting([row], signals(1, [0.999])) == [keeps]
