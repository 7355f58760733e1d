"""Many requests at once: nothing is left behind, and the statistics add up."""

import random

import pytest
from tiny_engine import MIN_BLOCKS, ask, make_engine, mixed, nothing_is_held, prompt, run, static

from engine.types import GenerateRequest, SamplingParams, SpeculationParams, StepStats


def random_request(name: str, source: random.Random) -> GenerateRequest:
    methods = [
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 0.7, "seed": source.randrange(99), "top_p": 0.9},
        {"temperature": 1.0, "seed": source.randrange(99), "sampling_method": "rejection", "top_k": 9},
        {"temperature": 0.0, "frequency_penalty": 0.5, "min_tokens": 1},
    ]
    options = SpeculationParams(
        drafter=source.choice([None, "model", "ngram", "none"]),
        policy=source.choice([None, "static", "heuristic", "confidence"]),
        max_sl=source.choice([None, 0, 1, 5]),
    )
    start = prompt(source.choice((4, 8, 12, 12, 16)), source.randrange(3))
    extra = prompt(source.randrange(12), source.randrange(99))
    return GenerateRequest(
        id=name,
        prompt_ids=(*start, *extra),
        params=SamplingParams(
            max_tokens=source.randrange(1, 13),
            logprobs=source.choice([None, None, 2]),
            prompt_logprobs=source.choice([None, None, None, 1]),
            ignore_eos=source.random() < 0.3,
            stop_token_ids=source.choice([(), (7, 8)]),
            **source.choice(methods),  # type: ignore[arg-type]
        ),
        speculation=options,
        priority=source.choice((0, 0, 0, 1, -1)),
        cache_salt=source.choice(("", "", "a")),
    )


def test_a_thousand_requests_leave_nothing_behind():
    """Random parameters, drafters, policies, priorities and cancellations on a tiny pool."""
    source = random.Random(3)
    context, blocks = 44, 16
    engine = make_engine("near", blocks=blocks, context=context, eos=(2, 40), token_budget=24, max_num_seqs=3)
    open_ids: set[str] = set()
    ended: dict[str, str] = {}
    made = 0
    while made < 1000 or engine.has_work():
        while made < 1000 and len(open_ids) < 12 and source.random() < 0.7:
            request = random_request(f"{made}", source)
            engine.add(request)
            open_ids.add(request.id)
            made += 1
        if open_ids and source.random() < 0.15:
            gone = source.choice(sorted(open_ids))
            engine.abort(gone)
            open_ids.remove(gone)
            ended[gone] = "abort"
        if not engine.has_work():
            continue
        events, stats = engine.step()
        assert stats.kv_blocks_used <= blocks
        assert stats.running == len(engine._scheduler.running) <= 3
        for event in events:
            assert event.id in open_ids, f"{event.id} has already ended: {ended.get(event.id)}"
            if event.finish_reason is not None:
                assert event.finish_reason in ("stop", "length")
                open_ids.remove(event.id)
                ended[event.id] = event.finish_reason
    assert not open_ids and len(ended) == 1000
    assert {"abort", "stop", "length"} == set(ended.values())
    assert engine._scheduler.preemptions > 0
    nothing_is_held(engine)


@pytest.mark.parametrize("budget", [16, 4096])
@pytest.mark.parametrize("draft", [None, "near"])
def test_sixteen_requests_interleave(draft: str | None, budget: int):
    engine = make_engine(draft, blocks=16 * 12, max_num_seqs=16, token_budget=budget)
    for i in range(16):
        engine.add(ask(f"{i}", prompt(12, i), static(2), max_tokens=24))
    order: list[tuple[str, bool]] = []
    while engine.has_work():
        order += [(event.id, event.finish_reason is not None) for event in engine.step()[0]]
    first_end = next(i for i, (_, last) in enumerate(order) if last)
    assert {name for name, _ in order[:first_end]} == {f"{i}" for i in range(16)}
    assert sum(last for _, last in order) == 16


@pytest.mark.parametrize("draft", [None, "near"])
def test_step_statistics_add_up(draft: str | None):
    engine = make_engine(draft, blocks=2 * MIN_BLOCKS, token_budget=32)
    requests = [r for r in mixed(speculate=True)]
    stats: list[StepStats] = []
    results = run(engine, requests, stats)
    for name in ("drafted", "accepted"):
        assert sum(getattr(step, name) for step in stats) == sum(r.total(name) for r in results.values())
    assert sum(step.emitted for step in stats) == sum(len(r.tokens) for r in results.values()) == 200
    assert sum(step.prefill_tokens for step in stats) > 0
    for step in stats:
        assert step.rows <= 8 and step.running + step.waiting <= len(requests)
        assert 0 <= step.accepted <= step.drafted
        assert 0 < step.draft_seconds + step.verify_seconds <= step.step_seconds
        assert 0 <= step.kv_blocks_used <= step.kv_blocks_total == 2 * MIN_BLOCKS
        assert step.prefix_hits <= step.prefix_queries
    assert (stats[-1].running, stats[-1].waiting, stats[-1].kv_blocks_used) == (0, 0, 0)
    for result in results.values():
        first, *others = result.events
        assert (first.iterations, first.drafted, len(first.token_ids)) == (0, 0, 1)
        assert all(event.iterations == 1 for event in others)
        # a draft token that is the last one wanted has no token after it
        assert all(len(e.token_ids) - e.accepted == 1 for e in others[:-1])


def test_the_pass_of_the_first_token_is_prefill_even_if_one_token_is_left_of_the_prompt():
    engine = make_engine("near", token_budget=16)
    stats: list[StepStats] = []
    result = run(engine, [ask("r", prompt(33), static(3), max_tokens=9)], stats)["r"]
    assert [event.iterations for event in result.events] == [0] + [1] * (len(result.events) - 1)
    assert sum(step.prefill_tokens for step in stats) == 33


def test_passes_after_a_preemption_count_as_iterations():
    """Else the mean of emitted tokens per iteration would grow with every preemption."""
    engine = make_engine(blocks=MIN_BLOCKS)
    results = run(engine, mixed(speculate=False))
    assert engine._scheduler.preemptions > 0
    assert {result.total("iterations") for result in results.values()} == {19}
