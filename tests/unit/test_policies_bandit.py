"""The bandit in made-up worlds: it finds the best arm, gives drafting up, and comes back."""

from __future__ import annotations

import random
from collections import Counter
from itertools import pairwise

import pytest
import torch
from lossless.contract import CPU, sequence

from engine.sequence import Sequence
from engine.speculation.control import PolicyTable
from engine.speculation.load import ROWS, TOKENS, Load
from engine.speculation.policies.bandit import ARMS, BINS
from engine.speculation.policy import Equipment

STEPS = 500


class World:
    """Drafts of `rows` rows stand with probability `rate` a token; costs in target passes."""

    def __init__(self, rows: int, rate: float, draft: float, token: float = 0.001, seed: int = 0) -> None:
        self.rate, self.cap, self._source = rate, 64, random.Random(seed)
        self.load = Load(CPU)
        self.costs(rows, draft, token)
        self.table = PolicyTable(ROWS, CPU, Equipment(self.load))
        self.rows = self.enter(rows)

    def costs(self, rows: int, draft: float, token: float) -> None:
        self.count, self.draft, self.token = rows, draft, token
        self.load.rows.fill_(rows)
        self.load.draft.copy_(torch.full((ROWS + 1,), draft))
        self.load.verify.copy_(1 + token * torch.arange(TOKENS + 1))

    def enter(self, rows: int, **options: float) -> list[Sequence]:
        entered = [sequence("bandit", options, str(i)) for i in range(rows)]
        for row in entered:
            self.table.take(row)
        return entered

    def known(self) -> torch.Tensor:
        return self.table.shared()["bandit"]["known"]

    def goodput(self, sl: int) -> float:
        emitted = sum(self.rate**k for k in range(sl + 1))
        return emitted / (1 + sl * self.draft + self.token * self.count * (1 + sl))

    def run(self, steps: int = STEPS) -> list[int]:
        """The first row's SL by iteration. Rows are told what became of their drafts, in another order."""
        chosen = []
        for _ in range(steps):
            limits = [min(limit, self.cap) for limit in self.table.limits(self.rows)]
            chosen.append(limits[0])
            told = [(row, sl) for row, sl in zip(self.rows, limits, strict=True) if sl]
            self._source.shuffle(told)
            if told:
                accepted = [self._stands(sl) for _, sl in told]
                self.table.observe([row for row, _ in told], [sl for _, sl in told], accepted)
        return chosen

    def _stands(self, sl: int) -> int:
        return next((k for k in range(sl) if self._source.random() >= self.rate), sl)

    def regret(self, chosen: list[int]) -> float:
        """Share of the best fixed arm's goodput that is lost on average."""
        best = max(self.goodput(arm) for arm in ARMS)
        return 1 - sum(map(self.goodput, chosen)) / len(chosen) / best


@pytest.mark.parametrize(
    ("rate", "draft"), [(0.95, 0.05), (0.9, 0.1), (0.8, 0.1), (0.6, 0.1), (0.6, 0.3), (0.5, 0.6), (0.1, 0.05)]
)
@pytest.mark.parametrize("rows", [1, 8])
def test_the_bandit_finds_the_best_arm(rows: int, rate: float, draft: float):
    world = World(rows, rate, draft)
    world.run(300)
    assert world.regret(world.run()) < 0.05


def test_it_does_not_draft_where_that_never_pays():
    world = World(1, rate=0.3, draft=1.0)
    world.run(100)
    assert Counter(world.run())[0] > 0.95 * STEPS


def test_it_drafts_again_when_that_pays():
    world = World(2, rate=0.1, draft=0.5)
    assert Counter(world.run())[0] > 0.9 * STEPS
    world.rate = 0.95
    world.run(2000)
    assert world.regret(world.run()) < 0.1


def test_it_follows_costs_at_once():
    """What it knows is of acceptance; costs are looked up."""
    world = World(1, rate=0.9, draft=0.05)
    world.run()
    assert min(world.run(20)) >= 6
    world.costs(1, draft=2.0, token=0.001)
    assert world.run(2)[-1] == 0


def test_batch_sizes_learn_apart():
    world = World(1, rate=0.95, draft=0.05)
    world.run()
    alone = world.run(1)[0]
    known = world.known().clone()
    world.costs(32, draft=0.05, token=0.001)
    world.rows += world.enter(31)
    world.rate = 0.2
    world.run()
    assert torch.equal(world.known()[0], known[0]) and not torch.equal(world.known(), known)
    assert world.run(1)[0] < alone
    world.costs(1, draft=0.05, token=0.001)
    world.rows = world.rows[:1]
    assert world.run(1)[0] >= 8


def test_every_number_of_rows_has_its_bin():
    world = World(1, rate=0.5, draft=0.1)
    found = []
    for rows in range(1, 100):
        world.load.rows.fill_(rows)
        world.table.limits(world.rows)
        found.append(int(world.table._states["bandit"].tensors["bin"][world.rows[0].slot]))
    assert found == [next((i for i, most in enumerate(BINS) if rows <= most), 6) for rows in range(1, 100)]


def test_a_pull_teaches_the_shorter_arms_and_no_longer_one():
    world = World(1, rate=1.0, draft=0.1)
    (row,) = world.rows
    slot = row.slot
    assert world.table.limits([row]) == [24]
    world.table._states["bandit"].tensors["last"][slot] = ARMS.index(6)
    world.table.observe([row], [6], [2])
    pulls, emitted, squares, drafted, decisions = world.known()[0]
    pulled = len([arm for arm in ARMS if arm <= 6])
    assert pulls.tolist() == [1.0] * pulled + [0.0] * (len(ARMS) - pulled)
    assert emitted[:pulled].tolist() == [1, 2, 3, 3, 3, 3, 3]
    assert squares[:pulled].tolist() == [1, 4, 9, 9, 9, 9, 9]
    assert drafted[:pulled].tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert decisions.tolist() == [1.0] * len(ARMS) and not world.known()[1:].any()


def test_a_cap_does_not_hide_that_longer_arms_are_in_vain():
    """The server allows 4: all longer arms do as that one, which stands for them; it is not stuck."""
    world = World(1, rate=0.3, draft=0.4)
    world.cap = 4
    world.run(100)
    assert world.regret(world.run()) < 0.06


def test_a_draft_that_was_cut_is_charged_what_it_took():
    """Eight that end at seven pay, eight would not: six are next."""
    world = World(1, rate=0.99, draft=0.2)
    world.cap = 7
    assert world.goodput(7) > world.goodput(6) > world.goodput(7) * (1 + 7 * 0.2) / (1 + 8 * 0.2)
    world.run(100)
    assert Counter(world.run(200))[7] > 150


def test_a_request_bounds_its_own_arms():
    world = World(1, rate=0.99, draft=0.01)
    world.rows += world.enter(1, max_sl=3) + world.enter(1, max_sl=0)
    for _ in range(50):
        limits = world.table.limits(world.rows)
        assert limits[1] <= 3 and limits[2] == 0
        world.table.observe(world.rows[:2], limits[:2], limits[:2])
    assert limits[:2] == [24, 3]


def test_leaving_no_drafting_is_charged():
    """Between arms that are nearly as good, 0 and 1, it flaps less, and loses little by that."""
    changes = []
    for charge in (0.0, 1.0):
        world = World(1, rate=0.35, draft=0.33)
        world.rows = world.enter(1, switching=charge)
        world.run(100)
        chosen = world.run()
        changes.append(sum((a == 0) != (b == 0) for a, b in pairwise(chosen)))
        assert world.regret(chosen) < 0.06
    assert changes[1] < changes[0] / 2


def test_what_it_knows_stays_with_the_engine_and_is_bounded():
    world = World(1, rate=0.8, draft=0.1)
    world.run(3000)
    pulls, *_, decisions = world.known()[0]
    assert 900 < decisions[0] < 1001 and 500 < pulls.max() < 1001
    first = world.rows[0]
    world.table.give_back(first)
    world.rows = world.enter(1)
    assert world.regret(world.run(10)) < 0.1  # a new request starts with it


def test_without_costs_it_learns_and_drafts_what_it_may():
    table, row = PolicyTable(1, CPU), sequence("bandit", {"max_sl": 8})
    table.take(row)
    for _ in range(20):
        assert table.limits([row]) == [8]
        table.observe([row], [8], [8])
    assert table.shared()["bandit"]["known"][0, 0, 1] > 19
