"""The table of costs: measured, kept current, and read between its sizes."""

import pytest

from engine.speculation.costs import Costs


def made(sizes: dict[tuple[int, int], float]) -> Costs:
    costs = Costs()
    for (rows, tokens), seconds in sizes.items():
        costs.know(rows, tokens, seconds)
    return costs


def test_nothing_is_known_at_first() -> None:
    assert Costs().cost(1, 1) is None


def test_sizes_that_were_seen_cost_what_was_seen() -> None:
    assert made({(1, 1): 5.0, (1, 8): 6.0}).cost(1, 8) == 6.0


@pytest.mark.parametrize("tokens, seconds", [(1, 5.0), (2, 6.0), (4, 8.0), (9, 13.0)])
def test_other_sizes_lie_on_a_line(tokens: int, seconds: float) -> None:
    assert made({(1, 1): 5.0, (1, 5): 9.0}).cost(1, tokens) == pytest.approx(seconds)


def test_more_tokens_never_cost_less() -> None:
    costs = made({(1, 1): 5.0, (1, 4): 4.0})
    assert costs.cost(1, 1) == costs.cost(1, 3) == costs.cost(1, 9) == 4.0


def test_rows_that_were_not_seen_take_the_nearest() -> None:
    costs = made({(1, 1): 5.0, (8, 8): 7.0})
    assert costs.cost(2, 2) == 5.0 and costs.cost(6, 8) == 7.0


def test_a_cost_follows_what_is_seen_and_not_an_outlier() -> None:
    costs = made({(1, 1): 5.0})
    costs.observe(1, 1, 500.0)
    assert costs.cost(1, 1) == 5.0
    for _ in range(200):
        costs.observe(1, 1, 6.0)
    assert costs.cost(1, 1) == pytest.approx(6.0, abs=1e-3)


def test_the_first_pass_of_a_size_is_no_cost() -> None:
    """It compiles and captures."""
    costs = made({(1, 1): 5.0})
    costs.observe(1, 8, 400.0)
    assert costs.cost(1, 8) == 5.0
    costs.observe(1, 8, 6.0)
    assert costs.cost(1, 8) == 6.0


def test_a_first_cost_far_too_high_is_dropped_for_the_next() -> None:
    costs = made({(1, 1): 5.0})
    for seconds in (400.0, 400.0, 6.0):
        costs.observe(1, 8, seconds)
    assert costs.cost(1, 8) == 6.0


def test_sizes_share_a_bucket() -> None:
    costs = Costs()
    for tokens in (70, 80, 90):
        costs.observe(33, tokens, 7.0)
    assert costs.table() == {(64, 96): 7.0}
    assert costs.cost(40, 71) == 7.0


def test_measuring_warms_up_and_takes_the_median() -> None:
    calls: list[tuple[int, int]] = []

    def run(rows: int, tokens: int) -> float:
        calls.append((rows, tokens))
        return 100.0 if len(calls) in (1, 3) else 2.0

    costs = Costs()
    costs.measure(run, [(1, 4)])
    assert len(calls) == 6 and costs.table() == {(1, 4): 2.0}


def test_an_engine_learns_what_its_passes_cost() -> None:
    from lossless.toys import different, run, toy_engine

    from engine.types import GenerateRequest, SamplingParams, SpeculationParams

    engine = toy_engine(different(5))
    request = GenerateRequest(
        id="a",
        prompt_ids=(1, 2, 3),
        params=SamplingParams(temperature=0, max_tokens=20),
        speculation=SpeculationParams(policy="static", options={"sl": 2}),
    )
    run(engine, [request])
    assert (1, 3) in engine.costs.verify.table() and (1, 1) in engine.costs.drafts["model"].table()


def test_measuring_an_engines_passes_leaves_it_as_it_was() -> None:
    from lossless.toys import different, run, tokens_of, toy_engine

    from engine.measure import measured
    from engine.types import GenerateRequest, SamplingParams

    engine, other = toy_engine(different(5)), toy_engine(different(5))
    found = measured(engine._parts, 4)
    assert found.verify.cost(1, 8) is not None and found.drafts["model"].cost(4, 4) is not None
    request = GenerateRequest(
        id="a", prompt_ids=(1, 2, 3), params=SamplingParams(temperature=0, max_tokens=9)
    )
    assert tokens_of(run(engine, [request])["a"]) == tokens_of(run(other, [request])["a"])


def test_what_stays_high_has_become_the_cost() -> None:
    costs = made({(1, 1): 4.0})
    for _ in range(7):
        costs.observe(1, 1, 17.0)
    assert costs.cost(1, 1) == 4.0
    costs.observe(1, 1, 17.0)
    assert costs.cost(1, 1) == 17.0
