"""The goodput tree's economics: a node and a layer are drafted while they pay, and only then."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from engine.sequence import Sequence
from engine.speculation.control import PolicyTable
from engine.speculation.costs import Costs
from engine.speculation.drafters.base import RowDraft
from engine.speculation.goodput_growth import Chances, Economy, GoodputGrowth
from engine.speculation.goodput_tree import GoodputTable, Rest
from engine.speculation.tree import Followers, TreeOptions, tree_options
from engine.types import GenerateRequest, SamplingParams


class Sure(Chances):
    """Every product is the chance itself."""

    def read(self, joint: float, kind: int) -> float:
        return joint


def economy(node: float, layer: float) -> Economy:
    """Of one row, in tokens: a node more, a draft pass."""
    return Economy(1.0, 1, node * np.arange(100), np.full(65, layer))


def grown(laws: list[list[float]], costs: Economy, drawn: bool = False, budget: int = 16) -> GoodputGrowth:
    """Every node of depth d has the followers of laws[d], the likeliest first, or drawn in that order."""
    growth = GoodputGrowth(TreeOptions(budget=budget), budget, len(laws), chances=Sure(), economy=costs)
    while nodes := growth.wants():
        found = {}
        for node in nodes:
            law = laws[growth.depth(node)]
            squares = sum(p * p for p in law) if drawn else None
            found[node] = Followers(iter(list(enumerate(law))), squares)
        growth.grow(found)
    return growth


WIDE = [[0.5, 0.3, 0.2], [0.6, 0.4], [0.9, 0.1]]


def test_what_is_free_is_drafted_while_it_is_worth_its_share_of_the_budget() -> None:
    growth = grown(WIDE, economy(0.0, 0.0))
    assert len(growth.tokens) == 15 and max(growth.depths) == 3  # 3, 6 and the 6 of 12 above 1/32
    assert len(grown(WIDE, economy(0.0, 0.0), budget=4).tokens) == 4


def test_nodes_that_do_not_pay_for_their_place_are_left_out() -> None:
    growth = grown(WIDE, economy(0.25, 0.0))
    assert growth.parents == [-1, -1, 0] and growth.tokens == [0, 1, 0]  # .5, .3, then .3 of .5


def test_a_tree_shrinks_to_a_chain_and_to_its_root_layer() -> None:
    assert grown(WIDE, economy(0.21, 0.1)).parents == [-1, -1, 0]
    assert grown(WIDE, economy(0.21, 0.2)).parents == [-1, -1]  # .7 of .5 are hoped for: less than .41
    chain = grown([[0.9, 0.1]] * 5, economy(0.15, 0.3))
    assert chain.parents == [-1, 0, 1, 2, 3]
    assert grown([[0.9, 0.1]] * 5, economy(0.15, 0.45)).parents == [-1, 0]


def test_a_chain_of_cheap_steps_is_set_against_the_tree() -> None:
    law = [[0.9, 0.1]] * 4

    def lead(step: float, longest: int = 16) -> float:
        costs = economy(0.15, 0.3)
        costs.chain = step
        return grown(law, costs).lead(longest)

    tree = 0.9 + 0.81 + 0.729 + 0.6561 - 4 * 0.3 - 4 * 0.15
    assert lead(math.inf) == pytest.approx(tree)  # there are no chains

    def chain(step: float, length: int) -> float:
        return sum(0.9**k - step - 0.15 for k in range(1, length + 1))

    assert lead(0.3, 4) == pytest.approx(0.0)  # the tree is a chain, and costs as much
    assert lead(0.3) == pytest.approx(tree - chain(0.3, 7))  # which the depth ended
    assert lead(0.5) == pytest.approx(tree - chain(0.5, 4))
    assert lead(0.1) == pytest.approx(tree - chain(0.1, 13))
    assert lead(0.1, 5) == pytest.approx(tree - chain(0.1, 5))


def test_trees_that_do_not_pay_are_tried_ever_less_often() -> None:
    rest = Rest()
    assert not any(rest.rests(True) for _ in range(5))
    turns = "".join("-T"[not rest.rests(False)] for _ in range(200))
    gaps = [len(gap) for gap in turns.split("T")]
    assert gaps[:7] == [0, 1, 2, 4, 8, 16, 32] and set(gaps[7:-1]) == {32}
    while rest.rests(True):
        pass
    assert "".join("-T"[not rest.rests(False)] for _ in range(5)) == "T-T--"


def test_of_what_is_drawn_only_the_expected_probability_decides() -> None:
    """The unlikely one was drawn first: it stays, and the next one is asked for as what is left deserves."""
    law = [[0.1, 0.9]]
    assert grown(law, economy(0.5, 0.0), drawn=True).tokens == [0, 1]
    assert grown([[0.9, 0.1]], economy(0.2, 0.0), drawn=True).tokens == [0]
    assert grown(law, economy(0.83, 0.0), drawn=True).tokens == []  # .82 is expected


def test_chances_are_learned_where_nodes_were_judged() -> None:
    chances = Chances()
    before = chances.read(0.5, 0)
    for _ in range(300):
        chances.learn([0.5, 0.02], [False, True], 0)
    assert chances.read(0.5, 0) < 0.1 < before and chances.read(0.02, 0) > 0.8
    assert chances.read(0.5, 1) == pytest.approx(Chances().read(0.5, 1))  # another class of temperature
    assert all(math.isfinite(chances.read(p, 0)) for p in (0.0, 1e-12, 1.0))


def row(name: str = "a") -> Sequence:
    request = GenerateRequest(id=name, prompt_ids=(1,), params=SamplingParams(temperature=0))
    return Sequence(request, 0, True, "goodput_tree", "none", tree_options("goodput_tree", {}), 16)


def table(layer_seconds: float) -> GoodputTable:
    """Of an engine that gives ten tokens a second at 0.1 s a pass of the target."""
    draft, verify, made = Costs(), Costs(), GoodputTable()
    for n in (1, 64):
        draft.know(n, n, layer_seconds)
        verify.know(1, n, 0.1 + 0.0001 * n)
    made.load.observe(1, 10, 1.0)
    made.load.refresh(draft, verify, 1)
    return made


def iterate(made: GoodputTable, seq: Sequence, times: int) -> list[bool]:
    """Whether the row grew a tree, in so many iterations of a draft that is sure of nothing."""
    found = []
    for _ in range(times):
        found.append(made.limits([seq])[0] > 0)
        if found[-1]:
            growth = GoodputGrowth(seq.options, 32, 8)
            made.begin([(seq, growth)])
            while nodes := growth.wants():
                growth.grow({node: Followers(iter([(7, 0.02), (8, 0.01)])) for node in nodes})
            made.grown([(seq, growth)])
            made.judged(seq, RowDraft(growth.tokens, parents=growth.parents, joint=growth.products), ())
    return found


def test_a_row_whose_trees_do_not_pay_rests_and_tries_now_and_then() -> None:
    dear = iterate(table(0.5), row(), 200)
    assert dear[0] and sum(dear) < 30 and any(dear[100:])
    assert sum(iterate(table(0.0), row(), 50)) > sum(dear[:50])


def test_rows_that_never_grow_a_tree_have_no_vote() -> None:
    def trees(beside: int) -> int:
        made = GoodputTable()
        made._pooled, made._leads["a"] = [0.1] * len(made._pooled), -1.0
        others = [row(str(i)) for i in range(beside)]
        for each in others:
            each.max_sl = 0
        return sum(made.limits([row("a"), *others])[0] > 0 for _ in range(100))

    assert trees(11) == trees(0) < 20


def test_what_is_learned_is_shared_and_a_row_is_forgotten() -> None:
    made, seq = table(0.01), row()
    iterate(made, seq, 3)
    assert seq.id in made._leads and made.shared()["goodput_tree"]["seen"].sum() > 0
    made.give_back(seq)
    assert not made._leads
    assert made.shared()["goodput_tree"]["seen"].dtype == torch.float32


@pytest.mark.parametrize(("budget", "deepest", "max_sl"), [(1, 5, 16), (6, 2, 16), (6, 5, 3), (64, 64, 64)])
def test_a_chain_keeps_the_bounds_of_the_tree(budget: int, deepest: int, max_sl: int) -> None:
    chains = PolicyTable(1, torch.device("cpu"))
    chained = table(layer_seconds=10.0)
    chained.join(chains)
    asked = row()
    asked.policy = "goodput"
    asked.options = tree_options("goodput_tree", {"budget": budget, "max_depth": deepest})
    asked.max_sl = max_sl
    chained.take(asked)
    assert chains.limits([asked]) == [min(budget, deepest, max_sl)]
