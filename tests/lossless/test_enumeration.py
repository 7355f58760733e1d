"""Rejection sampling is exact: every branch of the shipped engine, against the target's own law."""

from __future__ import annotations

import pytest
from lossless.branches import Case, assert_same_law, check, output_law
from lossless.law import sequence_law
from lossless.peek import PEEK_PAIR, registered
from lossless.toys import different, disjoint, run, spoilt, toy_engine, twins
from lossless.tree_kinds import asks as grows
from torch import Tensor

from engine.core import Engine
from engine.models.runner import Batch
from engine.speculation.noise import RandomSource
from engine.speculation.policy import policies
from engine.types import GenerateRequest, SamplingParams, SpeculationParams, TokenEvent

PAIR = different(3)
# Halves and quarters: the engine keeps the product of a penalty and a count in float32.
PENALTIES = {"presence_penalty": 0.5, "frequency_penalty": 0.25, "repetition_penalty": 1.3}


def asks(drafter: str = "model", policy: str = "static", **options: object) -> SpeculationParams:
    return SpeculationParams(drafter=drafter, policy=policy, options=options)


@pytest.mark.parametrize("drafter", ["model", "ngram"])
@pytest.mark.parametrize("sl", [0, 1, 2])
def test_static(drafter: str, sl: int):
    check(Case(PAIR, SamplingParams(max_tokens=4), asks(drafter, sl=sl)))


@pytest.mark.parametrize(("drafter", "top_k"), [("model", 2), ("ngram", 0)])
def test_static_3(drafter: str, top_k: int):
    check(Case(PAIR, SamplingParams(max_tokens=5, top_k=top_k), asks(drafter, sl=3)))


def test_three_iterations_of_a_redrafting_row():
    check(Case(PAIR, SamplingParams(max_tokens=5, top_p=0.85), asks(sl=2)))


def test_one_row_at_a_time():
    check(Case(PAIR, SamplingParams(max_tokens=4), asks(sl=2), width=1))


def test_without_a_drafter():
    check(Case(PAIR, SamplingParams(max_tokens=4), SpeculationParams(drafter="none")))


@pytest.mark.parametrize("name", sorted(policies()))
def test_every_registered_policy(name: str):
    # Worlds in one engine would see each other through what a policy shares.
    width = 1 if policies()[name].shares else 128
    check(Case(PAIR, SamplingParams(max_tokens=4), asks(policy=name), width=width))


@pytest.mark.parametrize("drafter", ["model", "ngram"])
def test_heuristic(drafter: str):
    check(Case(PAIR, SamplingParams(max_tokens=5, top_p=0.8), asks(drafter, "heuristic", start=1, max_sl=3)))


def test_a_policy_that_looks_at_the_drafted_token():
    with registered():
        check(Case(PEEK_PAIR, SamplingParams(max_tokens=5), asks(policy="peek")))


@pytest.mark.parametrize(("signal", "threshold"), [("token", 0.4), ("top", 0.55), ("joint", 0.2)])
@pytest.mark.parametrize(("drafter", "tokens"), [("model", 4), ("ngram", 5)])
def test_confidence(signal: str, threshold: float, drafter: str, tokens: int):
    asked = asks(drafter, "confidence", signal=signal, threshold=threshold)
    reasons = set[str | None]()
    check(
        Case(PAIR, SamplingParams(max_tokens=tokens), asked),
        lambda events: reasons.update(e.stop_reason for e in events),
    )
    assert drafter == "ngram" or "policy" in reasons  # the policy did stop drafts


@pytest.mark.parametrize("drafter", ["model", "ngram"])
@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0.6},
        {"temperature": 1.7},
        {"temperature": 0.0},
        {"top_k": 2},
        {"top_p": 0.7},
        {"top_p": 0.0},
        {"min_p": 0.3},
        {"min_p": 1.0},
        {"top_k": 2, "top_p": 0.9, "min_p": 0.1, "temperature": 0.8},
        PENALTIES,
        {"repetition_penalty": 0.7, "presence_penalty": -1.0},
        {"logit_bias": {0: 1.5, 2: -100.0}},
        {**PENALTIES, "logit_bias": {1: 0.5}, "temperature": 0.7},
    ],
    ids=lambda params: "-".join(f"{name}={value}" for name, value in params.items()),
)
def test_sampling_parameters(params: dict[str, object], drafter: str):
    check(
        Case(PAIR, SamplingParams(max_tokens=4, sampling_method="rejection", **params), asks(drafter, sl=2))
    )


@pytest.mark.parametrize("drafter", ["model", "ngram"])
@pytest.mark.parametrize(
    "params",
    [
        {},
        {"min_tokens": 2},
        {"min_tokens": 3, **PENALTIES},
        {"min_tokens": 2, "stop_token_ids": (0,)},
        {"ignore_eos": True, "min_tokens": 2},
    ],
    ids=["eos", "min", "min-penalties", "min-stop-ids", "ignore"],
)
def test_ends(params: dict[str, object], drafter: str):
    check(Case(PAIR, SamplingParams(max_tokens=4, **params), asks(drafter, sl=2), eos=(1,)))


@pytest.mark.parametrize("sl", [1, 2])
def test_a_draft_of_the_target_is_always_accepted(sl: int):
    def all_stand(events: list[TokenEvent]) -> None:
        assert all(event.accepted == event.drafted for event in events)

    check(Case(twins(3), SamplingParams(max_tokens=5), asks(sl=sl)), all_stand)


@pytest.mark.parametrize("policy", [{"sl": 1}, {"sl": 2}, {"policy": "confidence"}])
def test_supports_that_do_not_meet(policy: dict[str, object]):
    check(Case(disjoint(4), SamplingParams(max_tokens=4), asks(**policy)))


SPOILT = {
    "chains": asks(sl=3),
    "ngram": asks("ngram", sl=2),
    "layers": grows("layers", 4),
    "opt_tree": grows("opt_tree", 4),
}


@pytest.mark.parametrize("spreads", [False, True], ids=["only there", "over the row"])
@pytest.mark.parametrize("heat", [0.0, 1.0])
@pytest.mark.parametrize("kind", SPOILT)
def test_nan_counts_where_the_text_gets_to_it(kind: str, heat: float, spreads: bool):
    """Outputs end there, each as often as without drafts; attention may carry NaN to positions before."""
    params = SamplingParams(max_tokens=4, temperature=heat, sampling_method="rejection")
    case = Case(spoilt(3), params, SPOILT[kind])

    def build(random: RandomSource) -> Engine:
        engine = case.engine(random)
        if spreads:
            right = engine._parts.target.forward
            engine._parts.target.forward = lambda batch: spread(batch, right(batch))  # type: ignore[method-assign]
        return engine

    found = output_law(build, [case.request()], case.width, errors=True)
    assert_same_law(found, {(output,): p for output, p in case.target_law().items()})
    assert heat == 0 or any(len(output) < 4 for (output,) in found)


def spread(batch: Batch, logits: Tensor) -> Tensor:
    """NaN in one position of a row, in all of its positions."""
    begin = 0
    for count in batch.query_lens:
        mine = [m for m, at in enumerate(batch.logits_at) if begin <= at < begin + count]
        if logits[mine].isnan().any():
            logits[mine] = float("nan")
        begin += count
    return logits


@pytest.mark.parametrize("block_size", [1, 3, 16])
def test_block_sizes(block_size: int):
    check(Case(PAIR, SamplingParams(max_tokens=4), asks(sl=2), block_size=block_size))


@pytest.mark.parametrize("before", ["none", "model"])
def test_a_warm_prefix_cache(before: str):
    """Blocks that an earlier request left, with and without their draft half."""
    case = Case(PAIR, SamplingParams(max_tokens=4), asks(sl=2), width=1)

    def warm(random: RandomSource) -> Engine:
        engine = case.engine(random)
        greedy = SamplingParams(temperature=0, max_tokens=4)
        run(
            engine, [GenerateRequest(id="w", prompt_ids=case.prompt, params=greedy, speculation=asks(before))]
        )
        return engine

    cached = set[int]()
    law = output_law(warm, [case.request()], watch=lambda events: cached.add(events[0].cached_tokens))
    assert_same_law(law, {(output,): p for output, p in case.target_law().items()})
    assert cached == {4}


def _two(tokens: int, first: SpeculationParams, second: SpeculationParams) -> list[GenerateRequest]:
    return [
        GenerateRequest(
            id="", prompt_ids=(0, 1, 2), params=SamplingParams(max_tokens=tokens), speculation=first
        ),
        GenerateRequest(
            id="",
            prompt_ids=(2, 1, 2, 1),
            params=SamplingParams(max_tokens=tokens, top_k=2, temperature=0.8),
            speculation=second,
        ),
    ]


def _product(requests: list[GenerateRequest]) -> dict[tuple[tuple[int, ...], ...], float]:
    first, second = (sequence_law(PAIR.target, r.prompt_ids, r.params) for r in requests)
    return {(a, b): p * q for a, p in first.items() for b, q in second.items()}


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (asks(sl=1), asks(policy="heuristic", start=1)),
        (asks(policy="confidence"), asks("ngram", sl=2)),
        (asks(policy="adaedl", threshold=0.6), asks(policy="svip", scale=1.0, threshold=0.9)),
        (asks(policy="disco"), asks(policy="specdec_pp")),
    ],
)
def test_two_rows_are_independent(first: SpeculationParams, second: SpeculationParams):
    requests = _two(3, first, second)

    def build(random: RandomSource) -> Engine:
        return toy_engine(PAIR, random=random, blocks=64 * 10, rows=128)

    assert_same_law(output_law(build, requests, width=64), _product(requests))


def test_preemption_changes_no_law():
    """Five blocks of two tokens cannot hold both rows to their end: the later one is recomputed."""
    requests = _two(3, asks(sl=1), asks(policy="heuristic", start=1))
    engines: list[Engine] = []
    preempted = 0

    def build(random: RandomSource) -> Engine:
        engines[:] = [toy_engine(PAIR, random=random, blocks=5, rows=2)]
        return engines[0]

    def count(events: list[TokenEvent]) -> None:
        nonlocal preempted
        preempted += engines[0]._scheduler.preemptions

    assert_same_law(output_law(build, requests, watch=count), _product(requests))
    assert preempted > 0
