"""Confidence with `online`: its threshold against a search, and its memory restated in plain Python."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from lossless.contract import CPU, sequence, signals

from engine.sequence import Sequence
from engine.speculation.control import PolicyTable
from engine.speculation.policies.confidence import best_threshold


def cost(pairs: list[tuple[float, bool]], threshold: float) -> float:
    """FPR + 3 FNR of drafting on at or above the threshold."""
    fell = [p >= threshold for p, stood in pairs if not stood]
    kept = [p >= threshold for p, stood in pairs if stood]
    return sum(fell) / len(fell) + 3 * (1 - sum(kept) / len(kept))


def by_search(pairs: list[tuple[float, bool]]) -> float | None:
    """The greatest of the confidences seen that costs least, or None while nothing can be said."""
    if len(pairs) < 6 or len({stood for _, stood in pairs}) < 2:
        return None
    least = min(cost(pairs, p) for p, _ in pairs)
    return max(p for p, _ in pairs if cost(pairs, p) < least + 1e-9)


def padded(pairs: list[tuple[float, bool]], width: int = 20) -> tuple[torch.Tensor, torch.Tensor]:
    scores, labels = torch.full((1, width), -1.0), torch.zeros(1, width, dtype=torch.bool)
    for i, (p, stood) in enumerate(pairs):
        scores[0, i], labels[0, i] = p, stood
    return scores, labels


def test_the_best_threshold_by_hand():
    """Of four that stood and two that fell: .6 misses one of four (.75), .3 passes half that fell (.5)."""
    pairs = [(0.9, True), (0.8, True), (0.6, True), (0.5, False), (0.3, True), (0.2, False)]
    assert cost(pairs, 0.6) == 0.75 and cost(pairs, 0.3) == 0.5
    best, known = best_threshold(*padded(pairs))
    assert known.tolist() == [True] and best[0] == torch.tensor(0.3)


@pytest.mark.parametrize(
    "pairs",
    [
        [],
        [(0.9, True)] * 3 + [(0.1, False)] * 2,  # five are too few
        [(0.9, True)] * 9,
        [(0.2, False)] * 9,
    ],
    ids=["none", "five", "all stood", "all fell"],
)
def test_no_threshold_is_better_while_nothing_is_known(pairs: list[tuple[float, bool]]):
    assert best_threshold(*padded(pairs))[1].tolist() == [False]
    assert by_search(pairs) is None


def test_the_best_threshold_is_what_a_search_finds():
    source = random.Random(1)
    found = 0
    for _ in range(300):
        # Few values, so that there are ties: of confidences and of costs.
        scores = [source.choice((0.0, 0.25, 0.5, 0.625, 1.0)) for _ in range(source.randint(0, 20))]
        pairs = [(p, source.random() < 0.2 + 0.6 * p) for p in scores]
        best, known = best_threshold(*padded(pairs))
        expected = by_search(pairs)
        assert known.tolist() == [expected is not None]
        if expected is not None:
            assert best.tolist() == [expected], pairs
            found += 1
    assert found > 150


def drafts(table: PolicyTable, rows: list[Sequence], confidences: list[list[float]]) -> None:
    """Rows draft these, whatever is answered."""
    for step in range(1, max(map(len, confidences), default=0) + 1):
        alive = [i for i, own in enumerate(confidences) if len(own) >= step]
        given = signals(step, [confidences[i][step - 1] for i in alive])
        table.keep_drafting([rows[i] for i in alive], given)


def thresholds(table: PolicyTable, rows: list[Sequence]) -> list[float]:
    return [float(table._states["confidence"].tensors["threshold"][row.slot]) for row in rows]


def on_grid(source: random.Random) -> float:
    """Of values that float32 holds."""
    return source.randrange(1, 257) / 256


def test_online_thresholds_restated():
    """Every row its own: 128 pairs at most, the first rejection the last of its draft."""
    source = random.Random(2)
    table = PolicyTable(4, CPU)
    rows = [sequence("confidence", {"online": i != 3, "threshold": 0.5}, str(i)) for i in range(4)]
    for row in rows:
        table.take(row)
    seen: list[list[tuple[float, bool]]] = [[] for _ in rows]
    expected = [0.5] * 4
    moved = 0
    for _ in range(100):
        confidences = [[on_grid(source) for _ in range(source.choice((0, 1, 3, 8)))] for _ in rows]
        accepted = [source.randint(0, len(own)) for own in confidences]
        drafts(table, rows, confidences)
        table.observe(rows, [len(own) for own in confidences], accepted)
        for i, (own, count) in enumerate(zip(confidences, accepted, strict=True)):
            seen[i] = (seen[i] + [(p, j < count) for j, p in enumerate(own[: count + 1])])[-128:]
            best = by_search(seen[i])
            if i != 3 and own and best is not None:
                moved += best != expected[i]
                expected[i] = best
        assert thresholds(table, rows) == expected
    assert moved > 10 and min(map(len, seen)) == 128


def test_the_threshold_that_was_learned_decides():
    table, row = PolicyTable(1, CPU), sequence("confidence", {"online": True, "threshold": 0.9})
    table.take(row)
    for _ in range(4):  # below .25 they fall, from .75 on they stand
        drafts(table, [row], [[0.75, 0.25]])
        table.observe([row], [2], [1])
    assert thresholds(table, [row]) == [0.75]
    assert table.keep_drafting([row], signals(1, [0.76])) == [True]
    assert table.keep_drafting([row], signals(1, [0.74])) == [False]


@pytest.mark.parametrize(("signal", "field"), [("token", "prob"), ("top", "largest"), ("joint", "joint")])
def test_it_learns_of_the_signal_that_it_compares(signal: str, field: str):
    table, row = PolicyTable(1, CPU), sequence("confidence", {"online": True, "signal": signal})
    table.take(row)
    for _ in range(4):
        for step, value in ((1, 0.75), (2, 0.25)):
            others = replace(signals(step, [0.5]), joint=torch.tensor([0.5]))
            table.keep_drafting([row], replace(others, **{field: torch.tensor([value])}))
        table.observe([row], [2], [1])
    assert thresholds(table, [row]) == [0.75]


def test_without_online_nothing_is_learned_or_asked():
    table, row = PolicyTable(1, CPU), sequence("confidence")
    table.take(row)
    assert not table.learns(row) and table.learns(sequence("confidence", {"online": True}))
    for _ in range(4):
        drafts(table, [row], [[0.75, 0.25]])
        table.observe([row], [2], [1])
    assert thresholds(table, [row]) == [pytest.approx(0.4)]
