"""TETRIS: the rule restated in plain Python, its pot, and that it biases nothing."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from lossless.branches import Case, assert_same_law, output_law
from lossless.contract import CPU, sequence, signals
from lossless.coupled import spec
from lossless.toys import different

from engine.sequence import Sequence
from engine.speculation.control import PolicyTable
from engine.types import GenerateRequest, SamplingParams

NAN = float("nan")


def taken(policy: str, *options: dict[str, Any]) -> tuple[PolicyTable, list[Sequence]]:
    """A row for each of the options."""
    table = PolicyTable(max(len(options), 1), CPU)
    rows = [sequence(policy, own, str(i)) for i, own in enumerate(options)]
    for row in rows:
        table.take(row)
    return table, rows


def draft(
    table: PolicyTable, rows: list[Sequence], laws: list[list[float]], on_device: bool = False
) -> list[int]:
    """Lengths of one iteration's drafts; `laws`: the largest probability by row and step.

    As the host drafts, with the rows that still do; or as a captured graph, with all of them.
    """
    limits = table.limits(rows)
    lengths = [0] * len(rows)
    alive = [i for i, limit in enumerate(limits) if limit > 0]
    slots = torch.tensor([row.slot for row in rows])
    numbers = torch.tensor([table.number(row.policy) for row in rows])
    step = 0
    while alive:
        step += 1
        if on_device:
            largest = [laws[i][step - 1] if i in alive else NAN for i in range(len(rows))]
            given = replace(
                signals(step, largest), alive=torch.tensor([i in alive for i in range(len(rows))])
            )
            answers = table.decide([rows[0].policy], slots, numbers, given).tolist()
            keep = [answers[i] for i in alive]
        else:
            keep = table.keep_drafting(
                [rows[i] for i in alive], signals(step, [laws[i][step - 1] for i in alive])
            )
        for i in alive:
            lengths[i] = step
        alive = [i for i, more in zip(alive, keep, strict=True) if more and step < limits[i]]
    return lengths


def chosen(laws: list[list[float]], shares: list[int], most: list[int]) -> list[int]:
    """Lengths under the rule, token by token: all predicted tokens in a list, the first `left` of it."""
    lengths, left = [0] * len(laws), sum(shares)
    alive = [i for i, limit in enumerate(most) if limit > 0]
    score = [0.0] * len(laws)
    step = 0
    while alive:
        step += 1
        left -= len(alive)
        coming = []
        for i in alive:
            lengths[i] = step
            score[i] += math.log(laws[i][step - 1])
            loss = (score[i] + 2 * math.log(0.8)) / (step + 2)
            coming += [(-(score[i] + d * loss), i, d) for d in range(1, max(most[i] - step, 1) + 1)]
        first = {(i, d) for _, i, d in sorted(coming)[: max(left, 0)]}
        alive = [i for i in alive if (i, 1) in first and step < most[i]]
    return lengths


def random_laws(source: random.Random, rows: int) -> list[list[float]]:
    kinds = [source.choice((0.3, 1.0, 4.0)) for _ in range(rows)]  # sure rows and doubtful ones
    return [[math.exp(-source.expovariate(kind)) for _ in range(64)] for kind in kinds]


def test_tetris_alone_is_a_fixed_lookahead():
    table, rows = taken("tetris", {"share": 6})
    for p in (0.99, 0.5, 0.01):
        assert draft(table, rows, [[p] * 64]) == [6]


def test_tetris_gives_the_sure_row_what_the_doubtful_one_brought():
    """After one token each 12 are left, and the doubtful row's second is the 11th of those to come:

    log .4 and a loss of (log .4 + 2 log .8)/3 put it at -1.37; the sure row's next eight, at
    -.010 - .152 d, stand before it, and the third row's two, at -.511 - .319 d. Then 9 are left, and
    at least eleven of the sure row's stand before either doubtful row's third.
    """
    table, rows = taken("tetris", {"share": 5}, {"share": 5}, {"share": 5})
    assert draft(table, rows, [[0.4] * 64, [0.99] * 64, [0.6] * 64]) == [2, 11, 2]


def test_tetris_of_equals_serves_the_earlier_row_first():
    table, rows = taken("tetris", {"share": 2}, {"share": 2}, {"share": 1})
    assert draft(table, rows, [[0.9] * 64] * 3) == [2, 2, 1]


@pytest.mark.parametrize("on_device", [False, True])
def test_tetris_restated(on_device: bool):
    source = random.Random(4)
    for _ in range(60):
        n = source.randint(1, 9)
        options = [{"share": source.randint(1, 8), "max_sl": source.randint(0, 30)} for _ in range(n)]
        table, rows = taken("tetris", *options)
        for _ in range(2):  # a second iteration begins anew
            laws = random_laws(source, n)
            able = [i for i, o in enumerate(options) if o["max_sl"]]  # the others do not draft: no share
            expected = chosen(
                laws,
                [options[i]["share"] if i in able else 0 for i in range(n)],
                [o["max_sl"] for o in options],
            )
            assert draft(table, rows, laws, on_device) == expected


@pytest.mark.parametrize("on_device", [False, True])
def test_tetris_keeps_to_the_pot(on_device: bool):
    """Also where rows tie, all or some, and where probabilities are extreme."""
    source = random.Random(5)
    for _ in range(60):
        n = source.randint(2, 40)
        shares = [source.randint(1, 4) for _ in range(n)]
        table, rows = taken("tetris", *[{"share": share, "max_sl": 64} for share in shares])
        few = [[source.choice((1.0, 1 - 1e-7, 0.7, 1e-30)) for _ in range(64)] for _ in range(3)]
        laws = source.choice(([few[0]] * n, [source.choice(few) for _ in range(n)], random_laws(source, n)))
        assert sum(draft(table, rows, laws, on_device)) <= sum(shares)


def test_a_row_with_a_broken_law_stops_no_other():
    table, rows = taken("tetris", {}, {}, {})
    assert table.keep_drafting(rows, signals(1, [0.9, NAN, 0.8])) == [True, False, True]
    assert sum(draft(table, rows, [[0.9] * 64, [NAN] * 64, [0.9] * 64])) == 15


def test_tetris_looks_at_no_drawn_tokens_probability():
    source = random.Random(6)
    laws = random_laws(source, 6)
    lengths = []
    for _ in range(3):
        table, rows = taken("tetris", *[{}] * 6)
        slots = torch.tensor([row.slot for row in rows])
        numbers = torch.full((6,), table.number("tetris"))
        alive, found = torch.ones(6, dtype=torch.bool), [0] * 6
        for step in range(1, 21):
            given = signals(step, [law[step - 1] for law in laws])
            noise = torch.tensor([source.random() for _ in laws])
            given = replace(given, alive=alive, prob=noise, joint=noise, token=(noise * 9).long())
            found = [n + int(a) for n, a in zip(found, alive.tolist(), strict=True)]
            alive = alive & table.decide(["tetris"], slots, numbers, given)
        lengths.append(found)
    assert lengths[0] == lengths[1] == lengths[2] and len(set(lengths[0])) > 2


def test_tetris_rows_that_share_a_pot_keep_their_laws():
    """Two rows sampled by rejection, each one's tokens decide the other's draft: enumerated, exact."""
    pair = different(2)
    case = Case(pair, SamplingParams(max_tokens=3), spec("model", "tetris", share=1), (0, 1), width=1)
    prompts = [(0, 1, 0), (1, 1)]
    requests = [
        GenerateRequest(id="", prompt_ids=prompt, params=case.params, speculation=case.speculation)
        for prompt in prompts
    ]
    own = [replace(case, prompt=prompt).target_law() for prompt in prompts]
    expected = {(a, b): p * q for a, p in own[0].items() for b, q in own[1].items()}
    lengths: set[int] = set()

    def watch(events: list[Any]) -> None:
        lengths.update(event.drafted for event in events)

    assert_same_law(output_law(case.engine, requests, width=1, watch=watch), expected)
    assert {0, 1}.issubset(lengths)
