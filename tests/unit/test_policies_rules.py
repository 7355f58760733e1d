"""AdaEDL, SVIP and DDD: each rule against numbers by hand, and restated in plain Python."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from lossless.contract import CPU, sequence, signals
from torch import Tensor

from engine.sequence import Sequence
from engine.speculation.control import PolicyTable
from engine.speculation.policy import Signals, options_of
from engine.types import InvalidRequest

NAN = float("nan")


def taken(policy: str, *options: dict[str, Any]) -> tuple[PolicyTable, list[Sequence]]:
    """A row for each of the options."""
    table = PolicyTable(max(len(options), 1), CPU)
    rows = [sequence(policy, own, str(i)) for i, own in enumerate(options)]
    for row in rows:
        table.take(row)
    return table, rows


def with_entropy(entropy: list[float]) -> Signals:
    return replace(signals(1, [0.5] * len(entropy)), entropy=torch.tensor(entropy))


def with_joint(step: int, joint: list[float]) -> Signals:
    return replace(signals(step, [0.5] * len(joint)), joint=torch.tensor(joint))


# ---- SVIP


def test_svip_by_hand():
    """sqrt(.15 H) > .3 where H > .6."""
    table, (row,) = taken("svip", {})
    answers = [
        table.keep_drafting([row], with_entropy([h]))[0] for h in (0.0, -1e-7, 0.59, 0.61, 12.0, math.inf)
    ]
    assert answers == [True, True, True, False, False, False]
    assert table.limits([row]) == [40]


def test_svip_restated():
    source = random.Random(1)
    options = [{"scale": source.uniform(0.01, 2), "threshold": source.uniform(0, 1.5)} for _ in range(16)]
    table, rows = taken("svip", *options)
    for _ in range(50):
        entropy = [source.expovariate(1.0) for _ in rows]
        expected = [
            not math.sqrt(o["scale"] * h) > o["threshold"] for o, h in zip(options, entropy, strict=True)
        ]
        assert table.keep_drafting(rows, with_entropy(entropy)) == expected


# ---- AdaEDL


def threshold(table: PolicyTable, row: Sequence) -> float:
    return float(table._states["adaedl"].tensors["own"][row.slot, 1])


def test_adaedl_by_hand():
    """1 - sqrt(.2 H) < .4 where H > 1.8."""
    table, (row,) = taken("adaedl", {"threshold": 0.4})
    answers = [table.keep_drafting([row], with_entropy([h]))[0] for h in (0.0, -1e-7, 1.79, 1.81, math.inf)]
    assert answers == [True, True, True, False, False]


def test_adaedl_moves_its_threshold_by_hand():
    table, (row,) = taken("adaedl", {"threshold": 0.4})
    found = []
    # The acceptance rate: .5, .75, .875, .9375, .91875 and then .459
    for drafted, accepted in ((4, 4), (3, 3), (1, 1), (2, 2), (10, 9), (8, 0)):
        table.observe([row], [drafted], [accepted])
        found.append(threshold(table, row))
    assert found == pytest.approx([0.401, 0.402, 0.403, 0.403, 0.402, 0.403], abs=1e-6)
    allowed = (1 - 0.403) ** 2 / 0.2
    entropies = (allowed - 0.001, allowed + 0.001)
    assert [table.keep_drafting([row], with_entropy([h]))[0] for h in entropies] == [True, False]


def test_adaedl_restated():
    """Many rows in one batch, none reads another's memory; a row that drafted nothing learns nothing."""
    source = random.Random(2)
    options = [{"gamma": source.uniform(0.05, 1), "threshold": source.random()} for _ in range(12)]
    table, rows = taken("adaedl", *options)
    limit, rate = [o["threshold"] for o in options], [0.0] * len(rows)
    for _ in range(80):
        drafted = [source.choice((0, 1, 4, 9)) for _ in rows]
        accepted = [source.choice((n, n, source.randint(0, n))) for n in drafted]
        table.observe(rows, drafted, accepted)
        for i, (n, a) in enumerate(zip(drafted, accepted, strict=True)):
            if n:
                rate[i] = 0.5 * rate[i] + 0.5 * a / n
                step = 0.01 if rate[i] < 0.9 else -0.01 if a < n else 0.0
                limit[i] = min(max(0.9 * limit[i] + 0.1 * (limit[i] + step), 0.0), 1.0)
        entropy = [source.expovariate(1.0) for _ in rows]
        bounds = [
            1 - math.sqrt(o["gamma"] * h) - at for o, h, at in zip(options, entropy, limit, strict=True)
        ]
        answers = table.keep_drafting(rows, with_entropy(entropy))
        clear = [i for i, bound in enumerate(bounds) if abs(bound) > 1e-4]  # float32 may differ nearer by
        assert [answers[i] for i in clear] == [bounds[i] >= 0 for i in clear] and len(clear) > 6
    assert [threshold(table, row) for row in rows] == pytest.approx(limit, abs=1e-4)


@pytest.mark.parametrize(("start", "end"), [(0.0, 0.0), (1.0, 1.0)])
def test_adaedl_keeps_its_threshold_a_probability(start: float, end: float):
    table, (row,) = taken("adaedl", {"threshold": start})
    if start == 0:  # nine of ten, so that it only wants down
        table._states["adaedl"].tensors["own"][row.slot, 2] = 1.0
    for _ in range(20):
        table.observe([row], [100], [99 if start == 0 else 0])
    assert threshold(table, row) == end


# ---- DDD


def test_ddd_by_hand():
    """exp(-.3) = .7408: asked after steps 5, 7 and 9, and after no other."""
    table, (row,) = taken("ddd", {})
    for step in range(1, 12):
        checked = step in (5, 7, 9)
        assert table.keep_drafting([row], with_joint(step, [0.7409])) == [True]
        assert table.keep_drafting([row], with_joint(step, [0.7407])) == [not checked]
        assert table.keep_drafting([row], with_joint(step, [0.0])) == [not checked]
    assert table.limits([row]) == [11]


def test_ddd_restated():
    source = random.Random(3)
    options = []
    for _ in range(16):
        first = source.randint(1, 12)
        own = {"first": first, "every": source.randint(1, 4), "last": source.randint(first, 64)}
        options.append({**own, "threshold": source.uniform(-3, 0)})
    table, rows = taken("ddd", *options)
    for step in range(1, 65):
        joint = [math.exp(source.uniform(-4, 0)) for _ in rows]
        expected = [
            step not in range(o["first"], o["last"] + 1, o["every"]) or math.log(j) >= o["threshold"]
            for o, j in zip(options, joint, strict=True)
        ]
        assert table.keep_drafting(rows, with_joint(step, joint)) == expected


def test_ddd_that_never_checks_is_refused():
    with pytest.raises(InvalidRequest, match="nothing is checked"):
        options_of("ddd", {"first": 6, "last": 5})


# ---- rows that have stopped


@pytest.mark.parametrize("policy", ["svip", "adaedl", "ddd", "confidence", "tetris"])
def test_dead_rows_with_nan_change_nothing(policy: str):
    """As in a captured graph: dead rows are asked with the others, and their values mean nothing."""
    source = random.Random(7)
    options: dict[str, Any] = {"share": 64} if policy == "tetris" else {}
    alone, rows = taken(policy, *[options] * 3)
    among, all_rows = taken(policy, *[options] * 6)
    living = [0, 2, 3]
    alive = torch.tensor([i in living for i in range(6)])
    numbers = torch.full((6,), among.number(policy))
    slots = torch.tensor([row.slot for row in all_rows])
    for step in range(1, 10):
        probs = [source.uniform(0.6, 1) for _ in range(3)]
        given = signals(step, [0.5] * 6)
        expected = signals(step, probs)
        for name in ("prob", "largest", "top", "entropy", "joint"):
            full: Tensor = torch.full_like(getattr(given, name), NAN)
            full[alive] = getattr(expected, name)
            given = replace(given, **{name: full})
        answers = among.decide([policy], slots, numbers, replace(given, alive=alive))
        assert answers[alive].tolist() == alone.keep_drafting(rows, expected)
    told = [all_rows[i] for i in living]
    if among.learns(told[0]):
        among.observe(told, [9, 9, 9], [9, 4, 0])
        alone.observe(rows, [9, 9, 9], [9, 4, 0])
    assert among.limits(told) == alone.limits(rows)
    for i, row in zip(living, rows, strict=True):
        for name, values in alone._states[policy].tensors.items():
            mine = among._states[policy].tensors[name][all_rows[i].slot]
            assert torch.equal(mine, values[row.slot]), name
