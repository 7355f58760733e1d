"""Who gets the next place: priorities, ageing, and fairness between tenants."""

from __future__ import annotations

from collections import Counter
from itertools import count

from engine.kv.blocks import BlockManager
from engine.scheduler import Scheduler
from engine.sequence import Sequence
from engine.types import GenerateRequest, SamplingParams
from engine.waiting import TURN, Waiting

_numbers = count()


def sequence(tenant: str = "", *, priority: int = 0, prompt: int = 8, tokens: int = 8) -> Sequence:
    number = next(_numbers)
    request = GenerateRequest(
        id=f"r{number}",
        prompt_ids=(number,) * prompt,
        params=SamplingParams(max_tokens=tokens),
        priority=priority,
        arrival=float(number),
        tenant=tenant,
    )
    return Sequence(request, 0, True, "none", "static", None, 0, order=number)


def taken(waiting: Waiting, places: int) -> list[Sequence]:
    """Who gets so many places."""
    result = []
    for _ in range(places):
        seq = waiting.next()
        waiting.take(seq)
        result.append(seq)
    return result


def run(scheduler: Scheduler, steps: int, refill: dict[str, dict[str, int]], depth: int = 20) -> Counter[str]:
    """Tokens made for each tenant of `refill`, which always has `depth` sequences waiting or running."""
    done: Counter[str] = Counter()
    for tenant, kind in refill.items():
        for _ in range(depth):
            scheduler.add(sequence(tenant, **kind))
    for _ in range(steps):
        for row in scheduler.plan(lambda rows: [(0, None)] * len(rows)):
            row.seq.kv_len += row.tokens
            if row.samples:
                row.seq.tokens.append(1)
                row.seq.started = True
                done[row.seq.request.tenant] += 1
        for seq in list(scheduler.running):
            if seq.generated >= seq.params.max_tokens:
                scheduler.remove(seq)
                tenant = seq.request.tenant
                scheduler.add(sequence(tenant, **refill[tenant]))
    return done


def test_one_tenant_of_one_priority_is_served_as_it_came() -> None:
    waiting = Waiting()
    rows = [sequence() for _ in range(3 * TURN)]
    for row in reversed(rows):
        waiting.add(row)
    assert taken(waiting, len(rows)) == rows
    assert not waiting and not any(row.aged for row in rows)


def test_a_better_priority_goes_first_but_the_oldest_never_starves() -> None:
    waiting = Waiting()
    old = [sequence(priority=2**63 - 1) for _ in range(3)]
    for row in old:
        waiting.add(row)
    for _ in range(TURN):
        waiting.add(sequence(priority=-(2**63)))
    got: list[Sequence] = []
    while old[-1] not in got:
        waiting.add(sequence(priority=-(2**63)))  # they never cease to come
        got += taken(waiting, 1)
    assert [got.index(row) for row in old] == [TURN - 1, 2 * TURN - 1, 3 * TURN - 1]
    assert sum(row.request.priority < 0 for row in got) == 3 * (TURN - 1)


def test_who_got_a_place_by_age_is_not_put_back_for_its_priority() -> None:
    waiting = Waiting()
    old = sequence(priority=5)
    waiting.add(old)
    for _ in range(TURN):
        waiting.add(sequence(priority=0))
    others = taken(waiting, TURN)[:-1]
    assert old.aged and all(old.rank < other.rank for other in others)


def test_the_next_stays_the_next_until_something_happens() -> None:
    waiting = Waiting()
    for tenant in "abab":
        waiting.add(sequence(tenant))
    assert waiting.next() is waiting.next()


def test_a_tenant_that_floods_gets_its_share_and_no_more() -> None:
    waiting = Waiting()
    for _ in range(100):
        waiting.add(sequence("flood"))
    for _ in range(10):
        waiting.add(sequence("quiet"))
    got = Counter(row.request.tenant for row in taken(waiting, 20))
    assert got == {"flood": 10, "quiet": 10}


def test_a_tenant_that_was_away_has_saved_nothing_up() -> None:
    waiting = Waiting()
    for _ in range(60):
        waiting.add(sequence("steady"))
    taken(waiting, 40)
    for _ in range(20):
        waiting.add(sequence("back"))
    got = Counter(row.request.tenant for row in taken(waiting, 20))
    assert got == {"steady": 10, "back": 10}


def test_priorities_hold_within_a_tenant_only() -> None:
    waiting = Waiting()
    for _ in range(20):
        waiting.add(sequence("pushy", priority=-(2**63)))
        waiting.add(sequence("polite"))
    got = Counter(row.request.tenant for row in taken(waiting, 20))
    assert got == {"pushy": 10, "polite": 10}


def test_priorities_put_back_nobody_of_another_tenant() -> None:
    """Blocks run out: who has more than the other gives one back, the last of its own."""
    scheduler = Scheduler(BlockManager(6, 16, False), 8, 4096, on_preempt=lambda seq: None)
    polite = sequence("polite", tokens=100, prompt=30)
    pushy = [sequence("pushy", priority=rank, tokens=100, prompt=30) for rank in (-2, -1)]
    for seq in (polite, *pushy):
        scheduler.add(seq)
    for _ in range(10):
        for row in scheduler.plan(lambda rows: [(0, None)] * len(rows)):
            row.seq.kv_len += row.tokens
            row.seq.tokens.append(1)
    assert [seq.status for seq in (polite, *pushy)] == ["running", "running", "waiting"]
    assert scheduler.preemptions == 1


def test_a_prompt_of_a_priority_runs_first_within_its_tenant_only() -> None:
    scheduler = Scheduler(BlockManager(1000, 16, False), 8, 64, on_preempt=lambda seq: None)
    for tenant, priority in (("polite", 0), ("pushy", -1), ("pushy", -2)):
        scheduler.add(sequence(tenant, priority=priority, prompt=200))
    got: Counter[str] = Counter()
    for _ in range(6):
        for row in scheduler.plan(lambda rows: [(0, None)] * len(rows)):
            row.seq.kv_len += row.tokens
            got[f"{row.seq.request.tenant} {row.seq.request.priority}"] += row.tokens
            if row.samples:
                row.seq.tokens.append(1)
    assert got["polite 0"] >= 200, got


def test_long_answers_count_for_more_than_short_ones() -> None:
    """Tokens are shared, not requests: ours of 4 tokens beside theirs of 40."""
    scheduler = Scheduler(BlockManager(1000, 16, False), 8, 4096, on_preempt=lambda seq: None)
    done = run(scheduler, 2000, {"short": {"tokens": 4, "prompt": 1}, "long": {"tokens": 40, "prompt": 1}})
    share = done["long"] / done.total()
    assert 0.4 < share < 0.6, done


def test_a_flood_of_another_key_does_not_push_a_quiet_one_out() -> None:
    scheduler = Scheduler(BlockManager(1000, 16, False), 8, 4096, on_preempt=lambda seq: None)
    for _ in range(500):
        scheduler.add(sequence("flood"))
    done = run(scheduler, 500, {"quiet": {}, "flood": {}}, depth=8)
    assert 0.45 < done["quiet"] / done.total() < 0.55, done


def test_removed_ones_are_gone_and_tenants_without_claims_are_forgotten() -> None:
    waiting = Waiting()
    for number in range(1000):
        row = sequence(f"tenant {number}")
        waiting.add(row)
        waiting.remove(row)
    assert not waiting and len(waiting._tenants) < 3
