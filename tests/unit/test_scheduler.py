"""Admission after a preemption: a row that fits again is taken again."""

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
