"""What policies are told of the engine: costs by size as tables, and the rate of emission."""

import pytest
import torch

from engine.speculation.costs import Costs
from engine.speculation.load import ROWS, TOKENS, Load

CPU = torch.device("cpu")


def made(table: dict[tuple[int, int], float]) -> Costs:
    costs = Costs()
    for (rows, tokens), seconds in table.items():
        costs.know(rows, tokens, seconds)
    return costs


def test_tables_say_what_cost_says() -> None:
    draft = made({(1, 1): 1.0, (4, 4): 2.0})
    verify = made({(1, 1): 10.0, (1, 9): 12.0, (1, 17): 20.0, (4, 8): 30.0, (4, 16): 40.0})
    load = Load(CPU)
    load.refresh(draft, verify, 1)
    assert load.rows == 1 and load.draft[0] == 0 and load.draft[1] == 1 and load.draft[4] == 2
    for tokens in (1, 2, 5, 9, 13, 17, 40, TOKENS):
        assert float(load.verify[tokens]) == pytest.approx(verify.cost(1, tokens), rel=1e-5)
    load.refresh(draft, verify, 3)
    assert float(load.verify[8]) == 30.0 and load.rows == 3
    assert load.draft.shape == (ROWS + 1,) and load.verify.shape == (TOKENS + 1,)


def test_one_size_alone_prices_no_other() -> None:
    """A full tree, say, is all that two rows have met: what less costs is read off other numbers of rows."""
    load = Load(CPU)
    load.refresh(Costs(), made({(1, 1): 10.0, (1, 16): 20.0, (2, 32): 50.0}), 2)
    assert float(load.verify[2]) < float(load.verify[9]) < float(load.verify[16]) == 20.0


def test_more_tokens_never_cost_less() -> None:
    load = Load(CPU)
    load.refresh(Costs(), made({(1, 1): 10.0, (1, 4): 9.0, (1, 8): 11.0}), 1)
    assert bool((load.verify.diff() >= 0).all()) and float(load.verify[1]) == float(load.verify[4]) == 9.0


def test_nothing_known_is_nothing_told() -> None:
    load = Load(CPU)
    load.refresh(Costs(), Costs(), 2)
    assert not load.verify.any() and not load.draft.any() and load.rate == 0 and load.rows == 2


def test_the_rate_follows_what_is_emitted_by_rows() -> None:
    load = Load(CPU)
    for _ in range(300):
        load.observe(1, 3, 0.01)
    load.observe(4, 10, 0.02)
    load.refresh(Costs(), Costs(), 1)
    assert float(load.rate) == pytest.approx(300.0)
    load.refresh(Costs(), Costs(), 4)
    assert float(load.rate) == pytest.approx(500.0)
    load.refresh(Costs(), Costs(), 8)
    assert float(load.rate) == pytest.approx(1000.0)  # in proportion to the nearest that was seen


def test_captured_readers_see_it_change_in_place() -> None:
    load = Load(CPU)
    seen = load.verify, load.rate, load.draft
    load.observe(1, 1, 0.5)
    load.refresh(made({(1, 1): 1.0}), made({(1, 1): 7.0}), 1)
    assert float(seen[0][1]) == 7.0 and float(seen[1]) == 2.0 and float(seen[2][1]) == 1.0


def test_each_mix_of_policies_has_a_rate_of_its_own() -> None:
    load = Load(CPU)
    fast, slow = frozenset(["goodput"]), frozenset(["none"])
    load.observe(2, 10, 0.01, fast)
    load.observe(2, 2, 0.01, slow)
    for mix, rate in ((fast, 1000.0), (slow, 200.0), (fast | slow, 0.0), (fast, 1000.0)):
        load.refresh(Costs(), Costs(), 2, mix)
        assert float(load.rate) == pytest.approx(rate)
    for i in range(200):  # bounded: those not seen lately are forgotten
        load.observe(1, 1, 0.5, frozenset([str(i)]))
    load.refresh(Costs(), Costs(), 3, fast)
    assert float(load.rate) == 0.0
