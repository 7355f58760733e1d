"""What the engine tells of its work: times, tokens since start, costs without a draft."""

from __future__ import annotations

import time

import pytest
from fixed_costs import fix_costs
from lossless.toys import different, toy_engine

from engine.core import Engine
from engine.types import GenerateRequest, SamplingParams, SpeculationParams, StepStats, TokenEvent

VOCAB = 8


def ask(name: str, tokens: int = 12, drafter: str = "model") -> GenerateRequest:
    return GenerateRequest(
        id=name,
        prompt_ids=(1, 2, 3),
        params=SamplingParams(max_tokens=tokens, temperature=0.0),
        speculation=SpeculationParams(drafter=drafter),
    )


def work_off(engine: Engine) -> list[tuple[list[TokenEvent], StepStats]]:
    steps = []
    while engine.has_work():
        steps.append(engine.step())
    return steps


def of(steps: list[tuple[list[TokenEvent], StepStats]], name: str) -> list[TokenEvent]:
    return [event for events, _ in steps for event in events if event.id == name]


def test_steps_and_events_agree() -> None:
    engine = toy_engine(different(VOCAB))
    for name, drafter in (("a", "model"), ("b", "none"), ("c", "ngram")):
        engine.add(ask(name, drafter=drafter))
    steps = work_off(engine)
    for events, stats in steps:
        assert stats.emitted == sum(len(event.token_ids) for event in events)
        assert stats.drafted == sum(event.drafted for event in events)
        assert stats.accepted == sum(event.accepted for event in events)
    assert steps[-1][1].generated == 36 and steps[-1][1].uncounted == 0


def test_phases_are_parts_of_the_step() -> None:
    engine = toy_engine(different(VOCAB))
    engine.add(ask("a"))
    steps = [stats for _, stats in work_off(engine)]
    for stats in steps:
        parts = (stats.draft_seconds, stats.decide_seconds, stats.verify_seconds)
        assert min(parts) >= 0 and sum(parts) <= stats.step_seconds
    drafted = [stats for stats in steps if stats.drafted]
    assert drafted and all(stats.draft_seconds > 0 and stats.decide_seconds > 0 for stats in drafted)


def test_aborted_and_cut_tokens_do_not_count() -> None:
    engine = toy_engine(different(VOCAB))
    for name in ("a", "b", "c"):
        engine.add(ask(name, tokens=40))
    steps = [engine.step() for _ in range(4)]
    made = {name: sum(len(event.token_ids) for event in of(steps, name)) for name in "abc"}
    engine.cut("a", made["a"] - 2)
    engine.abort("b")
    engine.cut("b", 1)  # unknown by now
    stats = engine.step()[1]
    assert stats.uncounted == 2 + made["b"]
    rest = work_off(engine)
    assert not of(rest, "a") and not of(rest, "b")
    assert rest[-1][1].generated == made["a"] + made["b"] + 40


def test_when_a_sequence_first_ran_and_when_its_tokens_came() -> None:
    engine = toy_engine(different(VOCAB), rows=1)
    before = time.monotonic()
    engine.add(ask("first"))
    engine.add(ask("second"))
    steps = work_off(engine)
    first, second = of(steps, "first"), of(steps, "second")
    for events in (first, second):
        assert [event.scheduled is None for event in events] == [False] + [True] * (len(events) - 1)
        times = [event.at for event in events if event.at is not None]
        assert len(times) == len(events) and times == sorted(times)
        assert events[0].scheduled is not None and events[0].scheduled <= times[0]
    assert before <= first[0].scheduled  # type: ignore[operator]
    assert first[-1].at <= second[0].scheduled <= time.monotonic()  # type: ignore[operator]


def test_a_preempted_sequence_was_scheduled_when_it_first_ran() -> None:
    engine = toy_engine(different(VOCAB), blocks=20)
    for name in ("a", "b"):
        engine.add(ask(name, tokens=25))
    steps = work_off(engine)
    assert steps[-1][1].preemptions > 0 and steps[-1][1].generated == 50
    for name in ("a", "b"):
        assert [event.scheduled is None for event in of(steps, name)].count(False) == 1


@pytest.mark.parametrize("rows", [1, 3])
def test_what_tokens_would_have_cost_without_a_draft(rows: int) -> None:
    engine = toy_engine(different(VOCAB))
    fix_costs(engine)
    for row in range(rows):
        engine.add(ask(f"{row}"))
    plain = engine.costs.verify.cost(rows, rows)
    assert plain is not None
    for events, stats in work_off(engine):
        rest = stats.step_seconds - stats.draft_seconds - stats.decide_seconds - stats.verify_seconds
        for event in events:
            decoding = sum(other.iterations for other in events)
            if not event.iterations:
                assert event.baseline_seconds == 0
            elif decoding == rows:
                each = (plain + rest) / rows
                assert event.baseline_seconds == pytest.approx(len(event.token_ids) * each)
