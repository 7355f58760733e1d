"""The figures of `disco-serve bench`: percentiles, rates, failures, speculation, and its own busyness."""

from __future__ import annotations

from dataclasses import astuple
from typing import Any

import numpy as np
import pytest

from server.bench.exchange import Record
from server.bench.figures import level_of, spread
from server.bench.load import Load, Outcome

PROMPTS = ("x",)


def test_spreads_are_numpys() -> None:
    seconds = list(np.random.default_rng(0).lognormal(size=317))
    found = spread(seconds)
    assert found is not None
    wanted = [np.mean(seconds), *np.percentile(seconds, [50, 90, 99])]
    assert astuple(found) == pytest.approx([1e3 * each for each in wanted])
    assert spread([None, 2.0]) == spread([2.0]) and spread([None]) is None


def test_percentiles_of_known_ranks() -> None:
    found = spread(each / 1e3 for each in range(101))
    assert found is not None
    assert astuple(found) == pytest.approx((50, 50, 90, 99))


def answer(number: int, sent: float, first: float, last: float, **more: Any) -> Record:
    given = {"ended": last, "chunks": 3, "tokens": 5, "prompt_tokens": 7, "gaps": [(last - first) / 2] * 2}
    return Record(number, sent=sent, first=first, last=last, **{**given, **more})


def test_figures_of_known_times() -> None:
    told = {
        "policy": "disco",
        "drafter": "model",
        "iterations": 4,
        "drafted": 10,
        "accepted": 6,
        "mean_emitted": 2.0,
    }
    records = [
        answer(0, 10.0, 10.1, 10.5, speculation=[told]),
        answer(1, 10.0, 10.3, 11.1, speculation=[{**told, "drafted": 2, "accepted": 0}]),
        Record(2, sent=10.2, ended=12.0, error="HTTP 500", message="on fire"),
        Record(3, sent=10.2, ended=10.3, error="HTTP 500", message="still on fire"),
    ]
    warmup = [Record(9, sent=1.0, ended=1.1, error="timeout", message="late")]
    given = Load("http://x", "completions", PROMPTS, {}, streams=2, requests=4)

    found = level_of(given, Outcome(records, warmup, cpu=0.5, lags=[0.001] * 100), processes=1)

    assert (found.requests, found.good, found.failed) == (4, 2, 3)
    assert (found.errors, found.warmup_errors) == ({"HTTP 500": 2}, {"timeout": 1})
    assert found.error_examples["HTTP 500"] and found.error_examples["timeout"] == "late"
    assert found.seconds == pytest.approx(2.0)
    assert found.output_tokens_per_second == pytest.approx(10 / 2)  # of good requests alone
    assert found.requests_per_second == pytest.approx(1.0)
    assert (found.input_tokens, found.output_tokens, found.chunks) == (14, 10, 6)
    assert found.ttft_ms is not None and found.ttft_ms.mean == pytest.approx(200)
    assert found.tpot_ms is not None and found.tpot_ms.p50 == pytest.approx(150)  # 100 and 200
    assert found.itl_ms is not None and found.itl_ms.mean == pytest.approx(300)
    assert found.e2e_ms is not None and found.e2e_ms.p50 == pytest.approx(800)
    assert not found.held_up
    spoken = found.speculation
    assert spoken is not None and (spoken.policies, spoken.drafters) == (["disco"], ["model"])
    assert (spoken.acceptance_rate, spoken.mean_sl, spoken.mean_emitted) == (0.5, 1.5, 2.0)


@pytest.mark.parametrize(
    ("outcome", "held"),
    [
        (Outcome(cpu=0.9), True),
        (Outcome(lags=[0.05] * 10), True),
        (Outcome([Record(0, sent=1.05, due=1.0, ended=2.0)]), True),
        (Outcome([Record(0, sent=1.001, due=1.0, ended=2.0)], cpu=0.5, lags=[0.002]), False),
    ],
)
def test_a_generator_that_was_held_up_is_told(outcome: Outcome, held: bool) -> None:
    given = Load("http://x", "completions", PROMPTS, {}, rate=1.0, requests=4)
    assert level_of(given, outcome, processes=1).held_up is held


def test_nothing_measured_is_no_figure() -> None:
    given = Load("http://x", "completions", PROMPTS, {}, streams=1, requests=4)
    found = level_of(given, Outcome(interrupted=True), processes=1)
    assert (found.seconds, found.output_tokens_per_second, found.ttft_ms) == (0.0, 0.0, None)
