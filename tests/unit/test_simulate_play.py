"""Plays by hand, on traces made of random numbers or letter by letter."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
from lossless.toy_heads import toy_heads
from toy_traces import toy_trace

from classifiers import simulate, traces
from classifiers.chains import Chains
from classifiers.simulate import Player, Rules, SimulateError
from classifiers.step_costs import StepCosts
from engine.speculation.policy import options_of, policies

COSTS = StepCosts(0.1, ((1, 1.0), (9, 1.2)))


def made_player(trace: traces.Trace, costs: StepCosts = COSTS, **rules: Any) -> Player:
    given = {"max_tokens": trace.manifest.tokens, "max_sl": 12, **rules}
    return Player(Chains.of(trace), Rules(**given), costs, toy_heads(trace.manifest.hidden))


@pytest.mark.parametrize("policy", [name for name in sorted(policies()) if not policies()[name].shares])
def test_who_shares_nothing_plays_abreast_as_alone(policy: str) -> None:
    made = made_player(toy_trace(prompts=6))
    options = options_of(policy, {})
    alone, abreast = (made.play(policy, options, range(6), abreast=each) for each in (False, True))
    for prompt in range(6):
        one, other = alone.of([prompt]), abreast.of([prompt])
        for column in fields(one):
            assert np.array_equal(getattr(one, column.name), getattr(other, column.name)), column.name
    order = alone.prompt.tolist(), abreast.prompt.tolist()
    assert order[0] == sorted(order[0]) and order[1] != sorted(order[1])
    assert np.array_equal(made.play(policy, options, range(6)).prompt, abreast.prompt)


def test_who_shares_plays_one_after_another() -> None:
    """What bandit learned of the first prompts changes the later ones, and the order matters."""
    made = made_player(toy_trace(prompts=8))
    options = options_of("bandit", {})
    whole = made.play("bandit", options, range(8))
    assert whole.prompt.tolist() == sorted(whole.prompt.tolist())
    alone = made.play("bandit", options, [7])
    assert whole.of([7]).drafted.tolist() != alone.drafted.tolist()


def test_an_iteration_by_hand() -> None:
    """One text of 8 tokens: matches at 1, 2, a miss at 3, matches at 4 to 7."""
    trace = hand_made("+++-++++", branch=3)
    made = made_player(trace, StepCosts(0.1, ((1, 1.0), (5, 1.4)), decide=0.05, iteration=0.01))
    its = made.play("static", options_of("static", {"sl": 4}), [0])
    # 4 drafted from position 1 on: 1, 2 stand, the target's own at 3; then 3 drafted: room 8 - 4 - 1
    assert [its.drafted.tolist(), its.accepted.tolist(), its.emitted.tolist()] == [[4, 3], [2, 3], [3, 4]]
    # a static policy is not asked: it costs no deciding
    assert its.seconds == pytest.approx([0.01 + 4 * 0.1 + 1.4, 0.01 + 3 * 0.1 + 1.3])
    asked = made.play("confidence", options_of("confidence", {"threshold": 0}), [0])
    assert asked.seconds[0] == pytest.approx(0.01 + 6 * 0.15 + 1.6) and asked.drafted[0] == 6
    best = made.oracle([0])
    assert [best.drafted.tolist(), best.accepted.tolist()] == [[2, 3], [2, 3]]
    assert best.seconds == pytest.approx([0.01 + 2 * 0.1 + 1.2, 0.01 + 3 * 0.1 + 1.3])


def test_where_the_trace_ends_a_chain_is_cut_and_counted() -> None:
    made = made_player(hand_made("+-++++++", branch=1))
    its = made.play("static", options_of("static", {"sl": 5}), [0])
    # of the first chain the trace knows the miss at 1 and one more; the second is whole
    assert its.drafted.tolist() == [2, 5] and its.truncated.tolist() == [1, 0]


def rested(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafting did not pay before these requests came."""
    begin = simulate._Game.__init__

    def begun(game: simulate._Game, *args: Any) -> None:
        begin(game, *args)
        game._drafting = False

    monkeypatch.setattr(simulate._Game, "__init__", begun)


def test_a_draft_that_has_not_read_the_prompt_catches_up_first(monkeypatch: pytest.MonkeyPatch) -> None:
    trace = hand_made("+++++++++", branch=2, prompt=300)
    costs = StepCosts(0.1, ((1, 1.0),), catch_up=0.001)
    read = made_player(trace, costs).play("static", options_of("static", {"sl": 2}), [0])
    assert not read.caught_up.any() and read.drafted.tolist() == [2, 2, 1]  # beside the target
    rested(monkeypatch)
    its = made_player(trace, costs).play("static", options_of("static", {"sl": 2}), [0])
    assert its.caught_up.tolist() == [256, 45, 0, 0] and its.drafted.tolist() == [0, 0, 2, 2]
    assert its.seconds[:2] == pytest.approx([1.256, 1.045])
    cached = made_player(trace, costs, cached=True).play("static", options_of("static", {"sl": 2}), [0])
    assert cached.caught_up.tolist() == [0, 0, 0] and cached.drafted.tolist() == [2, 2, 1]
    never = made_player(trace, costs).play("static", options_of("static", {"sl": 0}), [0])
    assert not never.caught_up.any()  # who does not draft does not read


def test_the_oracle_is_fastest_and_no_speculation_is_the_target_alone() -> None:
    made = made_player(toy_trace(prompts=10))
    every = range(10)
    best = made.oracle(every, 12).seconds.sum()
    for name in policies():
        assert made.play(name, options_of(name, {}), every).seconds.sum() > best, name
    none = made.play("static", options_of("static", {"sl": 0}), every)
    assert none.seconds.sum() == pytest.approx(10 * 39 * 1.0) and (none.emitted == 1).all()


def test_a_text_of_one_token_has_no_iteration() -> None:
    trace = hand_made("+", branch=1)
    with pytest.raises(SimulateError, match="no text has a second token"):
        made_player(trace, max_tokens=8).play("static", options_of("static", {}), [0])


def test_a_policy_that_lacks_something_is_not_played() -> None:
    trace = toy_trace(prompts=3, branch_hidden=False)
    made = made_player(trace)
    made.heads = {}
    assert "head" in str(made.missing("disco"))
    with pytest.raises(SimulateError, match="specdec_pp"):
        made.play("specdec_pp", options_of("specdec_pp", {}), [0])


def hand_made(match: str, branch: int, prompt: int = 2) -> traces.Trace:
    """One text, "+" where the draft is right, with branches of this length."""
    right = np.array([each == "+" for each in match])
    whole = toy_trace(prompts=1, tokens=len(right))
    step = np.flatnonzero(~right & (np.arange(len(right)) > 0)).astype(np.int32)
    away = {
        each.name: np.zeros(
            (len(step), branch, *np.shape(getattr(whole.branches, each.name))[2:]), np.float32
        )
        for each in fields(whole.branches)
        if each.name not in ("step", "length", "hidden")
    }
    known = np.minimum(branch, len(right) - 2 - step).astype(np.int32)
    return replace(
        whole,
        prompts=replace(whole.prompts, tokens=np.array([prompt], np.int32)),
        steps=replace(whole.steps, match=right),
        branches=traces.Branches(step=step, length=known, **away),
    )
