"""goodput: the choice of rows, what it learns, and when it drafts nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations, pairwise

import msgspec
import pytest
import torch
from lossless.contract import CPU, among_dead, sequence, signals
from torch import Tensor

from engine.sequence import Sequence
from engine.speculation.control import PolicyTable
from engine.speculation.estimator import CLASSES, Curve, classes
from engine.speculation.load import Load
from engine.speculation.policies import goodput
from engine.speculation.policies.goodput import Goodput, GoodputState, best
from engine.speculation.policy import Equipment, Outcome, Signals, policies

PASS = 0.01  # seconds of a target pass
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # of the kernels


def loaded(
    rows: int = 1, draft: float = 0.1, token: float = 0.001, rate: float = 0.0, device: torch.device = CPU
) -> Load:
    """A draft step costs `draft` of a pass whatever the rows, a token to verify `token` of one."""
    load = Load(device)
    load.draft[1:] = draft * PASS
    load.verify.copy_(PASS * (1 + token * torch.arange(len(load.verify))))
    load.rows.fill_(rows)
    load.rate.fill_(rate / PASS)
    return load


def table_of(slots: int, load: Load) -> PolicyTable:
    return PolicyTable(slots, CPU, Equipment(load))


def state_of(table: PolicyTable) -> GoodputState:
    state = table._states["goodput"]
    assert isinstance(state, GoodputState)
    return state


def warm(row: Sequence, temperature: float) -> Sequence:
    """The same request, at this temperature."""
    params = msgspec.structs.replace(row.params, temperature=temperature)
    return replace(row, request=msgspec.structs.replace(row.request, params=params))


class Synthetic:
    """A draft whose every token is accepted with `chance`, and that says so with `says`."""

    def __init__(
        self, table: PolicyTable, says: float, chance: float, max_sl: int = 4, temperature: float = 0.0
    ) -> None:
        self.table, self.says, self.chance = table, says, chance
        self.row = warm(sequence("goodput", {"max_sl": max_sl}), temperature)
        table.take(self.row)
        self.source = torch.Generator().manual_seed(3)

    def iterate(self) -> int:
        """One iteration; the tokens drafted."""
        (limit,) = self.table.limits([self.row])
        drafted, go = 0, limit > 0
        while go and drafted < limit:
            drafted += 1
            go = self.table.keep_drafting([self.row], signals(drafted, [self.says]))[0]
        if drafted:
            lucky = (torch.rand(drafted, generator=self.source) < self.chance).long()
            self.table.observe([self.row], [drafted], [int(lucky.cumprod(0).sum())])
        return drafted


# ---- who drafts on


def dearest(worth: list[float], able: list[bool], price: list[float]) -> float:
    """The most that any set of rows gains, by trying all."""
    rows = [i for i, yes in enumerate(able) if yes]
    sets = [each for size in range(len(rows) + 1) for each in combinations(rows, size)]
    return max(sum(worth[i] for i in each) - (price[len(each)] if each else 0.0) for each in sets)


@pytest.mark.parametrize("seed", range(40))
def test_the_rows_chosen_gain_the_most(seed: int) -> None:
    """Prices that rise in steps, like graph buckets, so that the next row alone may not pay, but two do."""
    source = torch.Generator().manual_seed(seed)
    worth, able = torch.rand(6, generator=source), torch.rand(6, generator=source) < 0.8
    steps = torch.rand(7, generator=source) * (torch.rand(7, generator=source) < 0.5)
    price = steps.cumsum(0)
    chosen = best(worth.masked_fill(~able, float("nan")), able, price)
    assert not bool((chosen & ~able).any())
    count = int(chosen.sum())
    gain = float(worth[chosen].sum() - price[count]) if count else 0.0
    assert gain == pytest.approx(dearest(worth.tolist(), able.tolist(), price.tolist()), abs=1e-6)


def test_equal_rows_and_prices_beyond_the_table() -> None:
    every = torch.ones(5, dtype=torch.bool)
    assert best(torch.full((5,), 0.5), every, torch.tensor([0.0, 0.4, 0.8])).all()  # .8 for more than two
    assert not best(torch.full((5,), 0.5), every, torch.tensor([0.0, 3.0, 3.0, 3.0])).any()
    two = best(torch.tensor([0.5, 0.5, 0.5]), torch.ones(3, dtype=torch.bool), torch.tensor([0, 0.2, 0.4, 9]))
    assert two.tolist() == [True, True, False]


def test_a_step_that_others_pay_for_costs_a_row_only_its_margin() -> None:
    load = loaded(rows=2, draft=0.4, token=0.0)  # a step costs .8 tokens of two rows
    table = table_of(2, load)
    rows = [sequence("goodput", name=name) for name in "ab"]
    for row in rows:
        table.take(row)
    table.limits(rows)
    low = 0.55
    assert table.keep_drafting(rows, signals(1, [0.999, low])) == [True, True]
    table.limits(rows)
    assert table.keep_drafting([rows[1]], signals(1, [low])) == [False]


@pytest.mark.parametrize("flat", [False, True])
def test_where_a_step_costs_the_same_for_fewer_rows_the_last_ones_do_not_pay_for_it(flat: bool) -> None:
    load = loaded(rows=4, token=0.0)
    load.draft[1:5] = PASS * torch.tensor([0.05, 0.1, 0.2, 0.3])  # of four rows: 1.2 tokens
    load.flat = flat
    table = table_of(4, load)
    rows = [sequence("goodput", name=name) for name in "abcd"]
    for row in rows:
        table.take(row)
    table.limits(rows)
    some = signals(1, [0.999, 0.05, 0.05, 0.999])
    assert table.keep_drafting(rows, some) == [True, flat, flat, True]  # what is paid for anyway
    last = signals(2, [0.999, 0.05, 0.05, 0.999])
    last.alive = torch.tensor([True, False, False, False])
    assert table.keep_drafting(rows, last) == [not flat, False, False, False]


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize(("token", "expected"), [(0.0, True), (5.0, False)])
def test_verification_is_paid_for(count: int, token: float, expected: bool) -> None:
    table = table_of(2, loaded(rows=count, token=token))
    rows = [sequence("goodput", name=str(i)) for i in range(count)]
    for row in rows:
        table.take(row)
    table.limits(rows)
    assert table.keep_drafting(rows, signals(1, [0.6] * count)) == [expected] * count


def test_a_busier_engine_drafts_less() -> None:
    """The higher the rate at which tokens come, the dearer the time."""
    lengths = []
    for rate in (1.0, 4.0, 8.0):
        table = table_of(1, loaded(rate=rate))
        draft = Synthetic(table, says=0.85, chance=0.85, max_sl=16)
        lengths.append(draft.iterate())
    assert lengths[0] > lengths[1] > lengths[2] >= 1


def test_dead_rows_say_nothing_whatever_they_carry() -> None:
    load = loaded(rows=3, draft=0.2)
    graph, host = table_of(3, load), table_of(3, load)
    rows, twins = ([sequence("goodput", name=str(i)) for i in range(3)] for _ in range(2))
    for row, twin in zip(rows, twins, strict=True):
        graph.take(row)
        host.take(twin)
    graph.limits(rows)
    host.limits(twins)
    for step, alive in ((1, [0, 1, 2]), (2, [0, 2]), (3, [2])):
        given = signals(step, [0.9 - 0.1 * i for i in alive])
        expected = host.keep_drafting([twins[i] for i in alive], given)
        assert among_dead(graph, rows, given, alive) == expected
    assert bool(state_of(graph).tensors["logs"].isfinite().all())


def test_two_rows_do_not_read_each_others_memory() -> None:
    """What one row got from its drafts leaves the other's switch alone; the curve is what they share."""
    table = table_of(2, loaded(rows=2))
    rows = [sequence("goodput", name=name) for name in "ab"]
    for row in rows:
        table.take(row)
    table.limits(rows)
    before = state_of(table).tensors["own"][rows[1].slot].clone()
    table.keep_drafting([rows[0]], signals(1, [0.9]))
    table.observe([rows[0]], [4], [0])
    assert torch.equal(state_of(table).tensors["own"][rows[1].slot], before)
    assert not torch.equal(state_of(table).tensors["own"][rows[0].slot], before)


def test_a_used_slot_forgets() -> None:
    table = table_of(1, loaded())
    draft = Synthetic(table, says=0.9, chance=0.0)
    for _ in range(40):
        draft.iterate()
    assert table.limits([draft.row]) == [0]
    table.give_back(draft.row)
    assert Synthetic(table, says=0.9, chance=1.0).iterate() > 0


# ---- what it learns


GREEDY = torch.zeros(1, dtype=torch.int64)


@pytest.mark.parametrize(("says", "chance"), [(0.6, 0.9), (0.95, 0.7)])
def test_learns_what_a_drafts_word_is_worth(says: float, chance: float) -> None:
    """Two tokens drafted, that is 1 known to be good, and the next: chance squared."""
    table = table_of(1, loaded(draft=0.02))
    draft = Synthetic(table, says, chance)
    for _ in range(300):
        draft.iterate()
    found = float(state_of(table).curve.read(torch.tensor([says]).log(), GREEDY)[0])
    assert found == pytest.approx(chance**2, abs=0.08)


def test_only_drafts_that_went_on_teach() -> None:
    """A draft that stopped says nothing of the token that it did not draft, nor garbage beyond."""
    curve = Curve.new(CPU)
    logs = torch.tensor([[-0.1, float("nan"), 5.0]])
    before = curve.chance.clone()
    curve.learn(logs, torch.tensor([[True, True, True]]), torch.tensor([[False, False, False]]), GREEDY)
    assert torch.equal(curve.chance, before) and float(curve.seen.sum()) == 0
    curve.learn(logs, torch.tensor([[False, True, True]]), torch.tensor([[True, False, False]]), GREEDY)
    assert float(curve.seen.sum()) == pytest.approx(1) and float(curve.good.sum()) == 0
    assert bool(curve.chance.isfinite().all())


def test_a_rejected_single_token_says_nothing_of_a_second() -> None:
    table = table_of(1, loaded())
    draft = Synthetic(table, says=0.9, chance=0.0, max_sl=1)
    for _ in range(5):
        assert draft.iterate() == 1
    assert float(state_of(table).curve.seen.sum()) == 0


def test_the_curve_remembers_within_bounds_and_forgets_what_is_not_seen_again() -> None:
    curve = Curve.new(CPU)
    start = curve.chance.clone()
    source = torch.Generator().manual_seed(0)
    every, cool = torch.ones(64, 4, dtype=torch.bool), torch.ones(64, dtype=torch.int64)
    for _ in range(200):
        curve.learn(-torch.rand(64, 4, generator=source) * 8, torch.zeros_like(every), every, cool)
    assert float(curve.seen.sum()) <= 4 * (2000 + 64)
    assert float(curve.chance[1, : 8 * 8].max()) < 0.1
    for _ in range(200):  # drafts that all stand high
        curve.learn(torch.full((64, 4), -1e-4), torch.ones_like(every), every, cool)
    assert float(curve.chance[1, -1]) > 0.95
    torch.testing.assert_close(curve.chance[1, 8 * 6], start[1, 8 * 6], atol=0.1, rtol=0)
    assert torch.equal(curve.chance[[0, 2, 3]], start[[0, 2, 3]])


# ---- temperature


def test_classes_of_temperature() -> None:
    heat = torch.tensor([0.0, 1e-3, 0.5, 0.7, 1.0, 2.0])
    assert classes(heat).tolist() == [0, 1, 1, 2, 3, 3]
    assert len(Curve.new(CPU).seen) == CLASSES == 4


def test_sampled_rows_are_trusted_less_where_the_draft_is_sure() -> None:
    """From the first request on: the prior."""
    chance = Curve.new(CPU).chance
    assert bool((chance[:-1, 8 * 6 :] > chance[1:, 8 * 6 :]).all())
    assert bool((chance.diff(dim=1) >= 0).all())
    lengths = []
    for temperature in (0.0, 1.0):
        table = table_of(1, loaded(draft=0.2, rate=3.0))
        lengths.append(Synthetic(table, says=0.9, chance=1.0, max_sl=16, temperature=temperature).iterate())
    assert lengths[0] > lengths[1] >= 1


def test_rows_learn_by_temperature() -> None:
    """Sampled drafts that fail leave greedy rows as they were, in the same batch and after it."""
    table = table_of(1, loaded(draft=0.1))
    greedy = state_of(table).curve.chance[0].clone()
    hot = Synthetic(table, says=0.8, chance=0.2, temperature=1.0)
    for _ in range(200):
        hot.iterate()
    table.give_back(hot.row)
    state = state_of(table)
    assert torch.equal(state.curve.chance[0], greedy)
    assert state.curve.seen.sum(1).bool().tolist() == [False, False, False, True]
    first = state.shared["first"].tolist()
    assert first[:3] == pytest.approx([0.7] * 3) and first[3] < 0.5
    said = torch.full((CLASSES,), 0.8).log()
    kinds = torch.arange(CLASSES)
    assert float(state.curve.read(said, kinds)[3]) < 0.2 < float(state.curve.read(said, kinds)[:3].min())


def test_a_batch_of_several_temperatures_asks_each_rows_own_curve() -> None:
    table = table_of(3, loaded(rows=3, draft=0.2, token=0.02))
    rows = [warm(sequence("goodput", name=str(t)), t) for t in (0.0, 1.0, 0.0)]
    for row in rows:
        table.take(row)
    curve = state_of(table).curve
    curve.chance[0], curve.chance[3] = 0.01, 0.95
    table.limits(rows)
    assert table.keep_drafting(rows, signals(1, [0.9] * 3)) == [False, True, False]


def test_an_easy_token_is_worth_less_than_the_mean_one_to_a_sampled_row() -> None:
    table = table_of(2, loaded(draft=0.8, token=0.0))
    state = state_of(table)
    state.curve.chance.fill_(0.9)
    for temperature, goes_on in ((0.0, True), (1.0, False)):
        row = warm(sequence("goodput", name=str(temperature)), temperature)
        table.take(row)
        table.limits([row])
        assert table.keep_drafting([row], signals(1, [0.9])) == [goes_on]


def test_one_failure_says_less_of_a_sampled_row() -> None:
    left = []
    for temperature in (0.0, 1.0):
        table = table_of(1, loaded())
        row = warm(sequence("goodput"), temperature)
        table.take(row)
        own = state_of(table).tensors["own"][row.slot]
        own[2] = own[3] = 0.8
        table.observe([row], [3], [0])
        left.append(own[2:4].tolist())
    assert left[0] == pytest.approx([0.7, 0.7]) and left[1] == pytest.approx([0.75, 0.75])


# ---- nothing at all


def test_drafts_nothing_where_nothing_is_accepted_and_comes_back() -> None:
    table = table_of(1, loaded(draft=0.1))
    draft = Synthetic(table, says=0.9, chance=0.0)
    drafted = [draft.iterate() for _ in range(400)]
    assert sum(length > 0 for length in drafted[:20]) < 15
    late = drafted[100:]
    probes = sum(length > 0 for length in late)
    assert probes > 0
    assert 0.1 * sum(late) < 0.02 * len(late)  # of the time
    draft.chance = 1.0
    again = [draft.iterate() for _ in range(120)]
    first = next(i for i, length in enumerate(again) if length > 0)
    assert all(length > 0 for length in again[first + 25 * 3 :])


@pytest.mark.parametrize("chance", [0.0, 0.05, 0.15, 0.3, 0.9])
def test_does_not_flap_under_constant_input(chance: float) -> None:
    table = table_of(1, loaded(draft=0.1))
    draft = Synthetic(table, says=0.6, chance=chance)
    state = state_of(table)
    was = []
    for _ in range(400):
        draft.iterate()
        was.append(bool(state.tensors["own"][draft.row.slot, 5] > 0))
    switches = sum(a != b for a, b in pairwise(was[50:]))
    assert switches <= 12


def test_between_gain_and_loss_it_stays_as_it_is() -> None:
    """What drafting costs is .1 tokens; a row that gets a little more or less does as it did."""
    table = table_of(1, loaded(draft=0.1, token=0.0))
    row = sequence("goodput", {"probe": 0.0})
    table.take(row)
    own = state_of(table).tensors["own"][row.slot]
    for gets, drafts in ((0.09, True), (0.06, False), (0.12, False), (0.14, True), (0.08, True)):
        own[2] = gets
        assert (table.limits([row])[0] > 0) == drafts, gets


def test_where_costs_are_unknown_it_drafts_by_confidence_alone() -> None:
    table = table_of(1, Load(CPU))
    assert Synthetic(table, says=0.99, chance=1.0).iterate() == 4
    assert Synthetic(table_of(1, Load(CPU)), says=0.05, chance=0.0).iterate() == 1


def test_many_rows_for_which_drafting_costs_more_than_it_brings() -> None:
    """Verification that grows with every token, as in a full batch: no row drafts but to probe."""
    load = loaded(rows=8, draft=0.1, token=5.0)
    table = table_of(8, load)
    rows = [sequence("goodput", name=str(i)) for i in range(8)]
    for row in rows:
        table.take(row)
    limits = [table.limits(rows) for _ in range(300)]
    probes = [i for i, each in enumerate(limits) if any(each)]
    assert all(len(set(each)) == 1 for each in limits)  # all rows at once
    assert len(probes) <= 300 * 0.1


def test_probes_can_be_turned_off() -> None:
    table = table_of(1, loaded(draft=3.0))
    row = sequence("goodput", {"probe": 0.0})
    table.take(row)
    assert {limit for _ in range(200) for limit in table.limits([row])} == {0}


# ---- the kernels


class Twins:
    """Two states alike: one for the reference, one for the kernels."""

    heat = (0.0, 1.0, 0.7, 0.0, 0.3, 1.3)

    def __init__(self, rows: int, seed: int) -> None:
        self.source = torch.Generator().manual_seed(seed)
        found = policies()["goodput"]
        assert isinstance(found, Goodput)
        self.policy = found
        draft = 0.05 + 0.3 * float(self.random(1))
        self.load = loaded(rows=rows, draft=draft, token=0.005, rate=1.5 * rows, device=DEVICE)
        self.load.draft[3:] += 0.3 * PASS * float(self.random(1))
        self.load.flat = seed == 1
        slots = torch.randperm(9, generator=self.source)[:rows].to(DEVICE)
        self.states: list[GoodputState] = []
        for _ in range(2):
            state = found.allocate(9, DEVICE, Equipment(self.load))
            assert isinstance(state, GoodputState) and state.temperatures is not None
            for slot, temperature in zip(slots.tolist(), self.heat, strict=False):
                found.reset(state, slot, found.Options())
                state.temperatures[slot] = temperature
            if seed == 2:  # first tokens of little hope, by class
                state.shared["first"].copy_(0.02 * torch.arange(CLASSES))
            state.rows, state.mine = slots, torch.arange(rows, device=DEVICE) != 3
            self.states.append(state)

    def random(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.source).to(DEVICE)

    def signals(self, step: int, alive: Tensor) -> Signals:
        """Of these rows; the others' are NaN."""
        largest = torch.where(alive, self.random(len(alive)) ** 0.2, float("nan"))
        token = torch.zeros(len(alive), dtype=torch.int64, device=DEVICE)
        at = torch.tensor(step, device=DEVICE)
        return Signals(step=at, token=token, position=token, alive=alive, largest=largest)

    def alike(self) -> None:
        one, other = self.states
        for name, value in one.tensors.items():
            torch.testing.assert_close(other.tensors[name], value, rtol=1e-4, atol=1e-5, msg=name)
        for name, value in one.shared.items():
            torch.testing.assert_close(other.shared[name], value, rtol=1e-3, atol=1e-4, msg=name)
        for name in ("since", "draft_price", "verify_price"):
            torch.testing.assert_close(getattr(other, name), getattr(one, name), msg=name)


@pytest.mark.parametrize("rows", [1, 5])
def test_the_kernels_do_as_the_reference(rows: int) -> None:
    """Whole iterations, with NaN in the rows that have stopped, and rows that another policy governs."""
    pytest.importorskip("triton")
    rested, taught = 0, torch.zeros(CLASSES, device=DEVICE)
    for seed in range(3):
        twins = Twins(rows, seed)
        one, other = twins.states
        for iteration in range(4):
            for state in twins.states if iteration == 2 else ():
                state.tensors["own"][state.rows[0], 2:4] = 0.0  # one whose drafts got nothing
            limit = twins.policy.reference_limit(one)
            assert launched.limit(other).tolist() == limit.tolist(), (seed, iteration)
            twins.alike()
            rested += int((limit == 0).sum())
            alive, drafted = limit > 0, torch.zeros_like(limit)
            for step in range(1, 7):
                given = twins.signals(step, alive)
                keep = twins.policy.reference(given, one)
                assert launched.decide(given, other).tolist() == keep.tolist(), (seed, iteration, step)
                drafted += alive
                alive = alive & keep & (step < limit)
                twins.alike()
            accepted = (twins.random(rows) * (drafted + 1)).long()
            twins.policy.reference_observe(Outcome(drafted, accepted), one)
            launched.observe(Outcome(drafted, accepted), other)
            twins.alike()
        taught += one.shared["seen"].sum(1)
    assert rested > 0 and taught.bool().tolist() == [True, *[rows > 1] * 3]


@pytest.mark.parametrize("kernels", [False, True])
def test_what_is_captured_changes_in_place_and_rows_without_drafts_teach_nothing(kernels: bool) -> None:
    """As a graph asks: all rows; some drafted nothing, padding is nobody's and shares the spare slot."""
    if kernels:
        pytest.importorskip("triton")
    twins = Twins(5, 0)
    state = twins.states[0]
    spare = 8
    state.rows = torch.tensor([*range(5), *[spare] * 3], device=DEVICE)
    state.mine = state.rows != spare
    observe = launched.observe if kernels else twins.policy.reference_observe
    limit = launched.limit if kernels else twins.policy.reference_limit

    def held() -> Iterator[Tensor]:
        yield from (*state.tensors.values(), *state.shared.values())
        yield from (state.since, state.draft_price, state.verify_price)

    state.tensors["logs"].fill_(-0.5)
    limit(state)
    places, before = [each.data_ptr() for each in held()], [each.clone() for each in held()]
    garbage = state.rows.new_tensor([0, 0, 0, 0, 0, 7, 9, 1])
    observe(Outcome(garbage, garbage // 2), state)
    torch.testing.assert_close(list(held()), before, rtol=1e-5, atol=1e-6)
    observe(Outcome(garbage.index_fill(0, garbage.new_tensor([1]), 4), garbage * 0 + 2), state)
    assert not torch.equal(state.shared["seen"], before[2])
    assert torch.equal(state.tensors["own"][spare], before[0][spare])
    answer = limit(state)
    assert answer[5:].tolist() == [0, 0, 0] and [each.data_ptr() for each in held()] == places


class launched:
    """The kernels, in Triton's interpreter where there is no GPU."""

    limit = staticmethod(goodput._launch_limit)
    decide = staticmethod(goodput._launch_decide)
    observe = staticmethod(goodput._launch_observe)
