"""Times of stop rules, worked out for many thresholds at once: they are those of the simulator."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toy_traces import COSTS, taught, toy_trace

from classifiers import stop_time, traces
from classifiers.chains import Chains
from classifiers.simulate import Player, Rules
from classifiers.step_costs import StepCosts
from classifiers.stop_time import LONGEST, Starts
from classifiers.time_table import served
from classifiers.train import predictions
from engine.speculation.heads import Kind, load_head
from engine.speculation.policy import options_of


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trace")
    traces.save(path, toy_trace(48))
    return path


@pytest.mark.parametrize("kind", ["disco", "specdec_pp"])
def test_times_are_those_of_the_simulator(kind: Kind, recorded: Path, tmp_path: Path):
    """The policy object, asked token by token, drafts what the vectorised rule says."""
    head = load_head(taught(recorded, tmp_path, kind))
    trace = toy_trace(8, seed=5)
    player = Player(Chains.of(trace), Rules(trace.manifest.tokens), COSTS, {kind: head})
    starts = Starts(trace)
    mine = starts.times(served(head).drafted(starts, predictions(head, starts)), COSTS, kind)
    theirs = player.play(kind, options_of(kind, {}), range(8))
    assert mine.sl.tolist() == theirs.of(range(8)).drafted[np.argsort(theirs.prompt, kind="stable")].tolist()
    np.testing.assert_allclose(mine.seconds.sum(), theirs.seconds.sum())


@pytest.mark.parametrize("sl", [0, 1, 5, 24])
def test_fixed_lookaheads_and_the_oracle_too(sl: int):
    trace = toy_trace(6, seed=6)
    player, starts = Player(Chains.of(trace), Rules(trace.manifest.tokens), COSTS), Starts(trace)
    theirs = player.play("static", options_of("static", {"sl": sl}), range(6))
    mine = stop_time.static_times(starts, COSTS)[sl]
    assert (int(mine.drafted.sum()), int(mine.accepted.sum()), int(mine.tokens.sum())) == (
        int(theirs.drafted.sum()),
        int(theirs.accepted.sum()),
        int(theirs.emitted.sum()),
    )
    np.testing.assert_allclose(mine.seconds.sum(), theirs.seconds.sum())
    oracle = starts.times(starts.oracle(), COSTS)
    np.testing.assert_allclose(oracle.seconds.sum(), player.oracle(range(6)).seconds.sum())
    assert oracle.ms_per_token <= mine.ms_per_token


def test_tuning_finds_a_rule_that_others_hardly_beat():
    starts = Starts(toy_trace(8, seed=7))
    table = stop_time.along(starts, starts.chains.nodes["largest"])
    rule, ms = stop_time.tune(starts, table, COSTS, "disco")
    assert np.isclose(starts.times(rule.drafted(starts, table), COSTS, "disco").ms_per_token, ms)
    for least in (0.1, 0.3, 0.5, 0.7, 0.9):
        for cap in (4, 8, LONGEST):
            other = replace(rule, least=least, max_sl=cap)
            assert starts.times(other.drafted(starts, table), COSTS, "disco").ms_per_token >= 0.97 * ms


def test_tuning_is_not_taken_in_by_a_lucky_threshold(monkeypatch: pytest.MonkeyPatch):
    """One threshold of the grid is a little quicker than a whole valley elsewhere: it is luck."""
    starts = Starts(toy_trace(8, seed=7))
    table = stop_time.along(starts, starts.chains.nodes["largest"])
    grid = stop_time.GRID.tolist()
    timed: list[float] = []
    rule_of = stop_time.Rule.keep

    def keep(self: stop_time.Rule, judgement: np.ndarray) -> np.ndarray:
        timed.append(self.least)
        return rule_of(self, judgement)

    def times(self: Starts, drafted: np.ndarray, costs: StepCosts, policy: str) -> Any:
        at = grid.index(timed[-1])
        return type("T", (), {"ms_per_token": {40: 4.9}.get(at, 5.0 if 18 <= at <= 24 else 6.0)})

    monkeypatch.setattr(stop_time.Rule, "keep", keep)
    monkeypatch.setattr(Starts, "times", times)
    rule, ms = stop_time.tune(starts, table, COSTS, "disco", caps=(8,))
    assert 18 <= grid.index(rule.least) <= 24 and ms == 5.0
