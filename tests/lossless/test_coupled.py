"""Coupled sampling: one text per seed, whatever drafts, stops, batches, preempts or caches."""

from __future__ import annotations

import msgspec
import pytest
from lossless.coupled import EVERY_SPECULATION, alone, check_identity, requests, spec
from lossless.toys import Pair, broken, different, disjoint, run, tokens_of, toy_engine, twins

from engine.types import GenerateRequest, SamplingParams

PAIR = different(4)
PENALTIES = {"presence_penalty": 0.5, "frequency_penalty": 0.25, "repetition_penalty": 1.3}


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
@pytest.mark.parametrize(
    "pair",
    [PAIR, twins(4), disjoint(4), broken(4)],
    ids=["different", "twins", "disjoint", "broken"],
)
def test_every_drafter_policy_and_lookahead_in_one_batch(pair: Pair, temperature: float):
    asked = requests(SamplingParams(temperature=temperature, max_tokens=12))
    check_identity(toy_engine(pair, blocks=1024, rows=len(asked)), pair, asked)


@pytest.mark.parametrize(
    "speculation", EVERY_SPECULATION, ids=lambda s: f"{s.drafter}-{s.policy}-{s.options}"
)
def test_alone_in_the_batch(speculation):
    asked = requests(SamplingParams(max_tokens=12), [speculation], seeds=[7])
    check_identity(toy_engine(PAIR, rows=1), PAIR, asked)


@pytest.mark.parametrize(
    "params",
    [
        {"top_k": 2},
        {"top_p": 0.8},
        {"min_p": 0.2},
        PENALTIES,
        {"logit_bias": {0: 1.0, 3: -2.0}},
        {"min_tokens": 4},
        {"stop_token_ids": (0,), "min_tokens": 2, **PENALTIES},
    ],
    ids=lambda params: "-".join(params),
)
def test_sampling_parameters_and_ends(params):
    asked = requests(SamplingParams(temperature=0.7, max_tokens=10, **params), seeds=range(3))
    check_identity(toy_engine(PAIR, blocks=1024, rows=len(asked), eos=[3]), PAIR, asked, [3])


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_neighbours_do_not_matter(temperature: float):
    """Unseeded, rejection-sampled and aborted rows in the batch, and rows that come later."""
    seeded = requests(SamplingParams(temperature=temperature, max_tokens=12), seeds=[5])
    others = [
        GenerateRequest(
            id=f"other-{i}",
            prompt_ids=(i % 4, 1, i % 3, 1),
            params=SamplingParams(max_tokens=3 + i, seed=i, sampling_method="rejection"),
            speculation=speculation,
        )
        for i, speculation in enumerate(EVERY_SPECULATION)
    ]
    engine = toy_engine(PAIR, blocks=1024, rows=24)
    found: dict[str, tuple[int, ...]] = {}
    queue = [request for pair in zip(others, seeded, strict=True) for request in pair]
    aborted = 0
    for step in range(1000):
        if queue:
            engine.add(queue.pop(0))
        elif not engine.has_work():
            break
        if step % 7 == 6 and (open_now := [r.id for r in others if r.id in engine._sequences]):
            engine.abort(open_now[0])
            aborted += 1
        for event in engine.step()[0]:
            found[event.id] = found.get(event.id, ()) + event.token_ids
    assert not engine.has_work() and not queue and aborted > 2
    for request in seeded:
        assert found[request.id] == alone(PAIR, request)


@pytest.mark.parametrize("prefix_cache", [True, False])
@pytest.mark.parametrize("blocks", [21, 24, 32])
def test_preemption(blocks: int, prefix_cache: bool):
    """The pool holds a row or two of twenty tokens: rows are recomputed again and again."""
    asked = requests(SamplingParams(max_tokens=12), seeds=[3])
    asked = [
        msgspec.structs.replace(request, prompt_ids=(i % 4, *request.prompt_ids[1:]))
        for i, request in enumerate(asked)
    ]
    engine = toy_engine(PAIR, blocks=blocks, rows=6, prefix_cache=prefix_cache)
    check_identity(engine, PAIR, asked)
    assert engine._scheduler.preemptions > 0
    assert engine._blocks.used_blocks == 0


@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_chunked_prefill(block_size: int):
    prompt = tuple((i * i + i // 3) % 4 for i in range(50))
    asked = requests(SamplingParams(max_tokens=8), prompt=prompt, seeds=[9])
    engine = toy_engine(PAIR, blocks=2048, block_size=block_size, rows=4, token_budget=16)
    check_identity(engine, PAIR, asked)


def test_a_warm_prefix_cache_changes_neither_text_nor_acceptance():
    """Blocks left without their draft half are caught up: the second run drafts as the first did."""
    asked = requests(SamplingParams(max_tokens=12), [spec(sl=3)], seeds=range(4))
    for before in (spec("none"), spec("ngram", sl=2), spec(sl=3)):
        cold, warm = toy_engine(PAIR), toy_engine(PAIR)
        run(warm, requests(SamplingParams(max_tokens=12), [before], seeds=range(4)))
        for request in asked:
            first, second = (run(engine, [request])[request.id] for engine in (cold, warm))
            assert second[0].cached_tokens > 0
            assert tokens_of(first) == tokens_of(second) == alone(PAIR, request)
            counts = [[(e.drafted, e.accepted) for e in events] for events in (first, second)]
            assert counts[0] == counts[1]


def test_twins_accept_every_draft_token():
    asked = requests(SamplingParams(max_tokens=20), [spec(sl=4), spec(policy="heuristic")], seeds=range(5))
    events = run(toy_engine(twins(4), blocks=512, rows=10), asked)
    assert all(e.accepted == e.drafted for own in events.values() for e in own)
    assert sum(e.drafted for own in events.values() for e in own) > 100
