"""Admission after a preemption: a row that fits again is taken again."""

import pytest

from engine.kv.blocks import BlockManager
from engine.scheduler import Scheduler
from engine.sequence import Sequence
from engine.types import GenerateRequest, SamplingParams


def sequence(number: int, prompt: int, tokens: int) -> Sequence:
    request = GenerateRequest(
        id=f"r{number}",
        prompt_ids=tuple(range(number * 1000, number * 1000 + prompt)),
        params=SamplingParams(max_tokens=tokens),
    )
    return Sequence(request, 0, True, "none", "static", None, 0, order=number)


def test_a_preempted_row_comes_back_as_soon_as_its_blocks_are_free() -> None:
    blocks = BlockManager(100, 16, False)
    scheduler = Scheduler(blocks, 8, 100_000, on_preempt=lambda seq: None)
    rows = [sequence(0, 160, 500), sequence(1, 160, 500), sequence(2, 160, 260), sequence(3, 100, 400)]
    for row in rows:
        scheduler.add(row)
    last, steps = rows[-1], 0
    while scheduler.running or scheduler.waiting:
        steps += 1
        assert steps < 1000
        for planned in scheduler.plan(lambda decoding: [(0, None)] * len(decoding)):
            planned.seq.kv_len += planned.tokens
            if planned.samples:
                planned.seq.tokens.append(1)
        for row in list(scheduler.running):
            if row.generated >= row.params.max_tokens:
                scheduler.remove(row)
        if last.status == "waiting" and blocks.free_blocks > (len(last.tokens) + 1) // 16 + 3:
            scheduler.plan(lambda decoding: [(0, None)] * len(decoding))
            assert last.status == "running", f"step {steps}: {blocks.free_blocks} blocks are free"
    assert scheduler.preemptions > 0


@pytest.mark.parametrize(
    ("budget", "wishes", "given"),
    [
        (20, [4, 8, 5], [4, 8, 5]),
        (19, [4, 8, 5], [4, 7, 5]),
        (14, [4, 8, 5], [3, 3, 3]),
        (14, [1, 64, 64], [1, 5, 5]),
        (5, [0, 64, 64], [0, 1, 1]),
        (2, [4, 8, 5], [0, 0, 0]),
    ],
)
def test_drafts_are_cut_to_what_a_pass_may_have(budget: int, wishes: list[int], given: list[int]) -> None:
    scheduler = Scheduler(BlockManager(100, 16, False), 8, budget, on_preempt=lambda seq: None)
    for number in range(3):
        scheduler.add(sequence(number, 1, 100))
    for planned in scheduler.plan(lambda decoding: []):
        planned.seq.kv_len += planned.tokens
        planned.seq.tokens.append(1)
    rows = scheduler.plan(lambda decoding: [(wish, "policy") for wish in wishes])
    assert [row.sl for row in rows] == given
    cut = [a < b for a, b in zip(given, wishes, strict=True)]
    assert [row.sl_reason for row in rows] == ["room" if short else "policy" for short in cut]
