"""What is counted of speculation: decisions, positions, shares of time, and the last minute."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from engine.types import StepStats, TokenEvent
from server.metrics_speculation import Speculation, decisions
from server.metrics_window import SECONDS, Window


def event(drafted: int, accepted: int, reason: str | None = "policy", **more: Any) -> TokenEvent:
    told: dict[str, Any] = {"token_ids": tuple(range(accepted + 1)), "policy": "static", "drafter": "model"}
    told |= {"iterations": 1, "drafted": drafted, "lookahead": drafted, "accepted": accepted}
    told |= {"stop_reason": reason}
    return TokenEvent(id="r", **told | more)


CASES: list[tuple[TokenEvent, dict[tuple[str, str], int]]] = [
    (event(3, 3), {("continue", "accepted"): 2, ("stop", "accepted"): 1}),
    (event(3, 2), {("continue", "accepted"): 2, ("stop", "rejected"): 1}),
    (event(3, 1), {("continue", "accepted"): 1, ("continue", "rejected"): 1}),
    (event(3, 0), {("continue", "rejected"): 1}),
    (event(1, 0), {("stop", "rejected"): 1}),
    (event(0, 0), {}),
    (event(0, 0, None), {}),
    # behind the last token it was not the policy that decided
    (event(3, 3, "cap"), {("continue", "accepted"): 2}),
    (event(3, 2, "room"), {("continue", "accepted"): 2}),
    (event(3, 1, "drafter"), {("continue", "accepted"): 1, ("continue", "rejected"): 1}),
    # the output ended within the draft: the token behind its end has no verdict
    (event(3, 1, token_ids=(5,), finish_reason="stop"), {("continue", "accepted"): 1}),
    (event(3, 3, token_ids=(5, 6, 7)), {("continue", "accepted"): 2, ("stop", "accepted"): 1}),
    (event(2, 0, token_ids=(), finish_reason="error"), {}),
    # of a tree nobody decides token by token
    (event(9, 2, lookahead=3, policy="none", drafter="dyspec"), {}),
]


@pytest.mark.parametrize(("told", "expected"), CASES)
def test_decisions(told: TokenEvent, expected: dict[tuple[str, str], int]) -> None:
    assert Counter(decisions(told)) == Counter(expected)


def values(registry: CollectorRegistry) -> dict[tuple[str, ...], float]:
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in registry.collect()
        for sample in family.samples
    }


def test_a_step_is_counted_by_policy_and_position() -> None:
    registry = CollectorRegistry()
    speculation = Speculation(registry)
    events = [event(4, 2), event(2, 2, "cap"), event(0, 0, None, drafter="none", policy="none")]
    events.append(TokenEvent(id="first", token_ids=(1,), policy="static", drafter="model"))  # prefill's
    speculation.on_step(StepStats(rows=4), events)
    speculation.on_step(StepStats(rows=1), [event(1, 1)])
    found, by = values(registry), ("model", "static")
    assert found["disco_iterations_total", *by] == 3
    assert found["disco_draft_tokens_total", *by] == found["disco_lookahead_sum", *by] == 7
    assert found["disco_accepted_tokens_total", *by] == 5
    assert found["disco_emitted_tokens_total", *by] == 3 + 3 + 2
    for position, drafted, accepted in (("1", 3, 3), ("2", 2, 2), ("3", 1, 0), ("4", 1, 0)):
        assert found["disco_position_drafted_total", "model", "static", position] == drafted
        key = ("disco_position_accepted_total", "model", "static", position)
        assert found[key] == accepted
    assert found["disco_stop_reason_total", *by, "policy"] == 2
    assert found["disco_stop_reason_total", *by, "cap"] == 1
    assert found["disco_emitted_tokens_total", "none", "none"] == 1
    assert found["disco_lookahead_bucket", "model", "0.0", "static"] == 0
    assert found["disco_lookahead_bucket", "none", "0.0", "none"] == 1


def test_a_tree_is_as_long_as_its_longest_way() -> None:
    registry = CollectorRegistry()
    speculation = Speculation(registry)
    tree = {"policy": "none", "drafter": "dyspec"}
    speculation.on_step(
        StepStats(rows=2), [event(9, 2, lookahead=3, **tree), event(4, 0, lookahead=2, **tree)]
    )
    found, by = values(registry), ("dyspec", "none")
    assert found["disco_draft_tokens_total", *by] == 13
    assert found["disco_lookahead_sum", *by] == 5
    assert found["disco_accepted_tokens_total", *by] == 2
    for what, counts in (("drafted", [2, 2, 1]), ("accepted", [1, 1, 0])):
        assert [found[f"disco_position_{what}_total", *by, at] for at in "123"] == counts
    assert ("disco_position_drafted_total", *by, "4") not in found
    assert found["disco_acceptance_rate", *by] == 2 / 13
    assert found["disco_average_lookahead", *by] == 2.5


def test_the_shares_of_a_step_are_its_time() -> None:
    registry = CollectorRegistry()
    speculation = Speculation(registry)
    stats = StepStats(step_seconds=1.0, draft_seconds=0.25, decide_seconds=0.125, verify_seconds=0.5)
    none = event(0, 0, None, policy="none", drafter="none")
    speculation.on_step(stats, [event(2, 1), event(0, 0, policy="goodput"), none, none])
    found = {key[1:]: value for key, value in values(registry).items() if "iteration_seconds_total" in key[0]}
    assert sum(found.values()) == 1.0
    assert found["model", "draft", "static"] == 0.25  # the only one that drafted
    assert found["model", "draft", "goodput"] == found["none", "draft", "none"] == 0
    assert found["model", "decide", "static"] == found["model", "decide", "goodput"] == 0.0625
    assert found["none", "verify", "none"] == 0.25 and found["model", "verify", "static"] == 0.125
    assert found["none", "wait", "none"] == 0.0625
    prefill = StepStats(step_seconds=9.0, verify_seconds=9.0)
    speculation.on_step(prefill, [TokenEvent(id="first", token_ids=(1,))])  # no row decoded
    assert sum(v for k, v in values(registry).items() if "iteration_seconds_total" in k[0]) == 1.0


def test_the_window_forgets() -> None:
    now = 1000.0
    window = Window(lambda: now)

    def told() -> dict[str, float]:
        return {family.name: s.value for family in window.collect() for s in family.samples}

    assert told() == {}
    window.add(
        ("static", "model"), drafted=10, accepted=2, lookaheads=8, iterations=4, baseline=3.0, spent=2.0
    )
    assert told() == {
        "disco_acceptance_rate": 0.2,
        "disco_average_lookahead": 2.0,
        "disco_speedup_ratio": 1.5,
    }
    now += SECONDS - 1
    window.add(
        ("static", "model"), drafted=0, accepted=0, lookaheads=0, iterations=4, baseline=0.0, spent=2.0
    )
    assert told() == {
        "disco_acceptance_rate": 0.2,
        "disco_average_lookahead": 1.0,
        "disco_speedup_ratio": 0.75,
    }
    now += 1  # the first second is past
    assert told() == {"disco_average_lookahead": 0.0}
    now += 10 * SECONDS
    assert told() == {}


def test_the_window_is_bounded() -> None:
    now = 0.0
    window = Window(lambda: now)
    for second in range(10 * SECONDS):
        now = float(second)
        window.add(("static", "model"), 1, 1, 1, 1, 1.0, 1.0)
    assert len(window._seconds) <= SECONDS
