"""The two policies that a head decides for: `disco` and `specdec_pp`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from head_support import CPU, HIDDEN, plain_score, shown
from lossless.toy_heads import toy_head, toy_heads

from engine.speculation.heads import Calibration, Head, HeadOptions, Kind, missing_head
from engine.speculation.load import Load
from engine.speculation.policy import Equipment, State, options_of, policies
from engine.speculation.scoring import inputs_of


def equipped(kind: Kind, head: Head | None = None, hidden: int | None = HIDDEN) -> Equipment:
    heads = {} if head is None else {kind: head}
    return Equipment(Load(CPU), heads, hidden)


def state_of(kind: Kind, head: Head, rows: int, **options: Any) -> State:
    policy = policies()[kind]
    state = policy.allocate(rows, CPU, equipped(kind, head))
    state.rows, state.mine = torch.arange(rows), torch.ones(rows, dtype=torch.bool)
    for slot in range(rows):
        policy.reset(state, slot, options_of(kind, options))
    return state


@pytest.mark.parametrize("kind", ["disco", "specdec_pp"])
def test_without_a_head_the_policy_says_what_it_lacks(kind: Kind):
    policy = policies()[kind]
    told = policy.missing(equipped(kind))
    assert told is not None and "--head" in told and kind in told
    assert policy.missing(equipped(kind, toy_heads(HIDDEN)[kind])) is None


def test_a_head_of_another_width_is_missing():
    head = toy_head("specdec_pp", HIDDEN)
    assert "width 4" in str(missing_head(equipped("specdec_pp", head, hidden=8), "specdec_pp"))
    assert "does not tell" in str(missing_head(equipped("specdec_pp", head, hidden=None), "specdec_pp"))


def test_disco_stops_where_the_ffn_falls_below_tau():
    head = toy_head("disco")
    signals = shown(64)
    likely = plain_score(head, inputs_of(signals, head.inputs)).sigmoid()
    middle = float(likely.median()) + 1e-6
    for tau in (0.2, middle, 0.95):
        state = state_of("disco", head, 64, tau=tau)
        keep = policies()["disco"].keep_drafting(signals, state)
        assert keep.tolist() == (likely >= tau).tolist()
        assert tau != middle or 0 < int(keep.sum()) < 64


def test_disco_takes_what_is_not_given_from_the_head():
    head = toy_head("disco", options=HeadOptions(threshold=0.83, max_sl=7))
    state = state_of("disco", head, 2)
    assert policies()["disco"].limit(state).tolist() == [7, 7]
    torch.testing.assert_close(state["least"].sigmoid(), torch.tensor([0.83, 0.83]))
    state = state_of("disco", head, 1, max_sl=3, tau=0.5)
    assert policies()["disco"].limit(state).tolist() == [3] and state["least"].tolist() == [0.0]


@pytest.mark.parametrize("tau", [1.0, 1e-300])
def test_disco_at_its_extremes(tau: float):
    state = state_of("disco", toy_head("disco"), 3, tau=tau)
    assert policies()["disco"].keep_drafting(shown(3), state).tolist() == [tau < 0.5] * 3


def drive(head: Head, probabilities: list[float], **options: Any) -> list[bool]:
    """What SpecDec++ says after each token, where its head gives these probabilities."""
    state = state_of("specdec_pp", head, 1, **options)
    found = []
    for step, p in enumerate(probabilities, 1):
        hidden = torch.zeros(1, HIDDEN)
        hidden[0, 0] = torch.logit(torch.tensor(p))
        signals = shown(1, step=step, hidden=hidden)
        found += policies()["specdec_pp"].keep_drafting(signals, state).tolist()
    return found


def transparent(judges: str) -> Head:
    """A head that gives its first input as log-odds."""
    weights = {
        "mean": torch.zeros(HIDDEN),
        "std": torch.ones(HIDDEN),
        "low": torch.full((HIDDEN,), -50.0),
        "high": torch.full((HIDDEN,), 50.0),
        "block": torch.zeros(HIDDEN, HIDDEN),
        "bias": torch.zeros(HIDDEN),
        "w2": torch.eye(HIDDEN)[0],
        "b2": torch.zeros(1),
    }
    return toy_head("specdec_pp", HIDDEN, weights=weights, judges=judges, calibration=Calibration("none"))


def test_specdec_pp_stops_when_a_rejection_is_likelier_than_h():
    # Risks after each token: .1, .28, .496: the last is over h.
    assert drive(transparent("drafted"), [0.9, 0.8, 0.7], h=0.4, min_sl=1) == [True, True, False]
    assert drive(transparent("drafted"), [0.9, 0.8, 0.7], h=0.5, min_sl=1) == [True, True, True]


def test_specdec_pp_that_judges_what_was_fed_sees_nothing_in_the_first_state():
    """The first state comes of an accepted token: it judges no draft."""
    assert drive(transparent("fed"), [0.01, 0.9, 0.5], h=0.4, min_sl=1) == [True, True, False]
    assert drive(transparent("drafted"), [0.01, 0.9, 0.5], h=0.4, min_sl=1) == [False, False, False]


def test_specdec_pp_drafts_at_least_its_lower_bound():
    assert drive(transparent("drafted"), [0.1, 0.1, 0.1], h=0.4, min_sl=3) == [True, True, False]
    assert drive(transparent("drafted"), [0.1, 0.1, 0.1], h=0.4) == [True, False, False]  # the head's: 2
    state = state_of("specdec_pp", transparent("drafted"), 1, min_sl=9, max_sl=4)
    assert policies()["specdec_pp"].limit(state).tolist() == [4] and state["min_sl"].tolist() == [4]


def test_specdec_pp_forgets_the_product_with_the_draft():
    head = transparent("drafted")
    state = state_of("specdec_pp", head, 1, h=0.4, min_sl=1)
    low, high = torch.full((1, HIDDEN), -3.0), torch.full((1, HIDDEN), 3.0)
    policy = policies()["specdec_pp"]
    assert policy.keep_drafting(shown(1, step=1, hidden=low), state).tolist() == [False]
    assert policy.keep_drafting(shown(1, step=1, hidden=high), state).tolist() == [True]


def test_specdec_pp_reads_nothing_of_rows_that_do_not_draft():
    state = state_of("specdec_pp", transparent("drafted"), 2, h=0.4, min_sl=1)
    hidden = torch.tensor([[3.0] * HIDDEN, [float("nan")] * HIDDEN])
    alive = torch.tensor([True, False])
    policies()["specdec_pp"].keep_drafting(shown(2, step=1, hidden=hidden, alive=alive), state)
    assert state["product"].isfinite().all()


def test_weights_are_fixed_and_the_policies_share_nothing():
    """Else the simulation could not play requests side by side."""
    for kind in ("disco", "specdec_pp"):
        state = state_of(kind, toy_head(kind, HIDDEN), 2)
        assert state.shared == {} and policies()[kind].shares is False
