"""goodput in three launches: before a draft, after each of its tokens, after the verdict.

The plain torch that they must agree with is in `engine/speculation/policies/goodput.py`, which see for
what it all means. Scalars are loaded once for every row: a lane each, no reduction. `edges` divide the
temperatures into classes; what is learned lies by class, [C, ...]. `n` rows of a power of two: batches
of any size below must compile nothing of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from engine.speculation.estimator import Curve


@triton.jit
def _kind(temperatures, slot, mask, EDGES: tl.constexpr):
    """int32[ROWS]: the rows' classes of temperature."""
    heat = tl.load(temperatures + slot, mask, 0.0)
    kind = tl.zeros_like(heat).to(tl.int32)
    for edge in tl.static_range(len(EDGES)):
        kind += (heat > EDGES[edge]).to(tl.int32)
    return kind


@triton.jit(do_not_specialize=["n"])
def _decide(
    alive, mine, largest, step_at, slots, temperatures, logs, chance, bounds, draft_price, verify_price,
    rows_at, keep, logs_stride, chance_stride, top_m, top_tokens, n, EDGES: tl.constexpr,
    EASY: tl.constexpr, FLAT: tl.constexpr, ROWS: tl.constexpr, BOUNDS: tl.constexpr, HALF: tl.constexpr,
    HALVINGS: tl.constexpr,
):  # fmt: skip
    i = tl.arange(0, ROWS)
    here = i < n
    drew = here & (tl.load(alive + i, here, 0) != 0) & (tl.load(mine + i, here, 0) != 0)
    step = tl.load(step_at).to(tl.int32)
    slot = tl.load(slots + i, here, 0)
    log = logs + slot * logs_stride + step - 1
    before = tl.load(log - 1, here & (step > 1), 0.0)
    joint = before + tl.where(drew, tl.log(tl.load(largest + i, drew, 1.0)), 0.0)
    tl.store(log, joint, here)
    place = tl.zeros([ROWS], tl.int32)  # how many bounds lie below
    for halving in tl.static_range(HALVINGS):
        to = place + (HALF >> halving)
        inside = to <= BOUNDS
        place = tl.where(inside & (tl.load(bounds + to - 1, inside, float("inf")) < joint), to, place)
    kind = _kind(temperatures, slot, here, EDGES)
    worth = tl.load(chance + kind * chance_stride + place) * tl.where(kind > 0, EASY, 1.0)
    worth = tl.where(drew, worth, float("-inf"))
    count = tl.sum(drew.to(tl.int32), 0)
    tokens = tl.minimum((tl.load(rows_at) + step * count).to(tl.int32), top_tokens)
    m = _rank(worth, drew, i)
    more = tl.load(verify_price + tl.minimum(tokens + m, top_tokens)) - tl.load(verify_price + tokens)
    paid = m * 0 + n if FLAT else m
    price = tl.load(draft_price + tl.minimum(paid, top_m)) + more
    chosen = _best(worth, drew, i, m, price)
    tl.store(keep + i, chosen.to(tl.int8), here)


@triton.jit
def _before(worth, able, i):
    """int32[ROWS, ROWS]: 1 where j is chosen if i is: able, and of larger worth, or as large and earlier."""
    larger = worth[None, :] > worth[:, None]
    earlier = (worth[None, :] == worth[:, None]) & (i[None, :] <= i[:, None])
    return tl.where(able[None, :], tl.where(larger, 1, tl.where(earlier, 1, 0)), 0)


@triton.jit
def _rank(worth, able, i):
    return tl.sum(_before(worth, able, i), 1)


@triton.jit
def _best(worth, able, i, m, price):
    """int32[ROWS]: 1 for the rows that are chosen; price is that of the m rows down to each."""
    total = tl.sum(tl.where(_before(worth, able, i) != 0, worth[None, :], 0.0), 1)
    value = tl.where(able, total - price, float("-inf"))
    most = tl.maximum(tl.max(value, 0), 1e-30)
    chosen = tl.max(tl.where(value == most, m, 0), 0)  # none if nothing is worth its price
    return tl.where(able, tl.where(m <= chosen, 1, 0), 0)


@triton.jit(do_not_specialize=["n"])
def _limit(
    mine, slots, temperatures, own, draft, verify, rate_at, rows_at, pooled, since_at, draft_price,
    verify_price, answer, top_m, top_tokens, n, EDGES: tl.constexpr,
    ROWS: tl.constexpr, M: tl.constexpr, TOKENS: tl.constexpr, BLIND: tl.constexpr, START: tl.constexpr,
    HYSTERESIS: tl.constexpr, PROBE: tl.constexpr, LOOK: tl.constexpr,
):  # fmt: skip
    k = tl.arange(0, M)
    rows = tl.load(rows_at + k * 0)
    bare = _bare(rows, verify, top_tokens)
    rate = tl.maximum(tl.load(rate_at + k * 0), bare)
    known = (bare > 0) & (tl.load(draft + 1 + k * 0) > 0)
    price = tl.where(known, rate * tl.load(draft + k, k <= top_m, 0.0), BLIND * k)
    tl.store(draft_price + k, price, k <= top_m)
    t = tl.arange(0, TOKENS)
    bare = _bare(tl.load(rows_at + t * 0), verify, top_tokens)
    rate = tl.maximum(tl.load(rate_at + t * 0), bare)
    known = (bare > 0) & (tl.load(draft + 1 + t * 0) > 0)
    price = tl.where(known, rate * tl.load(verify + t, t <= top_tokens, 0.0), 0.0)
    tl.store(verify_price + t, price, t <= top_tokens)

    i = tl.arange(0, ROWS)
    here = i < n
    governs = here & (tl.load(mine + i, here, 0) != 0)
    slot = tl.load(slots + i, here, 0)
    my = own + slot * 6
    max_sl, probe = tl.load(my, here, 0.0), tl.load(my + 1, here, 0.0)
    first, taken = tl.load(my + 2, here, 0.0), tl.load(my + 3, here, 0.0)
    asked, was = tl.load(my + 4, here, 0.0), tl.load(my + 5, here, 0.0)
    rows = tl.load(rows_at + i * 0)
    at = tl.minimum(tl.maximum(rows, 0.0), top_tokens).to(tl.int32)
    bare = _bare(rows, verify, top_tokens)
    known = (bare > 0) & (tl.load(draft + 1 + i * 0) > 0)
    count = tl.sum(governs.to(tl.int32), 0) + i * 0
    some = tl.maximum(count, 1)
    ahead = tl.minimum(at + LOOK * some, top_tokens)
    token = bare * (tl.load(verify + ahead) - tl.load(verify + at)) / tl.maximum(ahead - at, 1)
    alone = bare * tl.load(draft + tl.minimum(count, top_m)) / some + token
    hope = tl.minimum(1.5 * alone, tl.load(pooled + _kind(temperatures, slot, here, EDGES))) + START
    first = tl.where(first < 0, hope, first)
    later = tl.maximum(taken - first - alone * (asked - 1), 0.0)
    worth = first + later - token + tl.where(was > 0, HYSTERESIS, -HYSTERESIS)
    worth = tl.where(governs, worth, float("-inf"))
    m = _rank(worth, governs, i)
    chosen = _best(worth, governs, i, m, bare * tl.load(draft + tl.minimum(m, top_m)))
    on = tl.where(governs, tl.where(known, chosen, 1), 0)
    since = tl.load(since_at + i * 0)
    gap = PROBE * alone * count / tl.maximum(probe * rows, 1e-9)
    off = tl.where(governs, 1 - on, 0)
    due = tl.where((probe > 0) & (since >= gap), off, 0)
    resting = (tl.sum(off, 0) + i * 0 > 0) & (tl.sum(due, 0) + i * 0 == 0)
    tl.store(since_at + i, tl.where(resting, since + 1, 0.0), i == 0)
    tl.store(my + 2, first, governs)
    tl.store(my + 5, on.to(tl.float32), governs)
    tried = tl.where(due != 0, tl.minimum(max_sl, PROBE), 0.0)
    tl.store(answer + i, tl.where(on != 0, max_sl, tried).to(tl.int64), here)


@triton.jit
def _bare(rows, verify, top_tokens):
    """Tokens per second without drafts, 0 while unknown."""
    cost = tl.load(verify + tl.minimum(tl.maximum(rows, 0.0), top_tokens).to(tl.int32))
    return tl.where(cost > 0, rows / tl.maximum(cost, 1e-9), 0.0)


@triton.jit(do_not_specialize=["n"])
def _observe(
    mine, slots, temperatures, drafted, accepted, own, logs, seen, good, chance, prior, pooled,
    logs_stride, places, n, EDGES: tl.constexpr,
    ROWS: tl.constexpr, SL: tl.constexpr, KNOTS: tl.constexpr, PLACES: tl.constexpr, FINE: tl.constexpr,
    LOW: tl.constexpr, STRENGTH: tl.constexpr, FADE: tl.constexpr, OPTIMISM: tl.constexpr,
    MEMORY: tl.constexpr, CALM: tl.constexpr, POOLING: tl.constexpr,
):  # fmt: skip
    kind = tl.program_id(0)  # a program for each class, with the rows that are of it
    i = tl.arange(0, ROWS)
    here = i < n
    asked, got = tl.load(drafted + i, here, 0).to(tl.int32), tl.load(accepted + i, here, 0).to(tl.int32)
    slot = tl.load(slots + i, here, 0)
    taught = here & (tl.load(mine + i, here, 0) != 0) & (asked > 0)
    taught = taught & (_kind(temperatures, slot, here, EDGES) == kind)
    k = tl.arange(0, SL)
    counts = taught[:, None] & (k[None, :] + 1 < asked[:, None])
    log = tl.load(logs + slot[:, None] * logs_stride + k[None, :], counts, -1.0)
    log = tl.minimum(tl.maximum(log, -20.0), -1e-6)
    at = tl.minimum(tl.maximum(log - tl.log(1 - tl.exp(log)) - LOW, 0.0), KNOTS - 1)
    good_one = counts & (got[:, None] > k[None, :] + 1)
    j = tl.arange(0, KNOTS)
    seen_at, good_at = seen + kind * KNOTS + j, good + kind * KNOTS + j
    memory = tl.exp2(FADE * (tl.sum((taught & (asked > 1)).to(tl.int32), 0) + j * 0))
    all_seen, all_good = memory * tl.load(seen_at), memory * tl.load(good_at)
    for knot in tl.static_range(KNOTS):
        near = tl.maximum(1 - tl.abs(at - knot), 0.0)
        all_seen += tl.where(j == knot, tl.sum(tl.sum(tl.where(counts, near, 0.0), 1), 0), 0.0)
        all_good += tl.where(j == knot, tl.sum(tl.sum(tl.where(good_one, near, 0.0), 1), 0), 0.0)
    tl.store(seen_at, all_seen)
    tl.store(good_at, all_good)
    known = all_seen + STRENGTH
    mean = (all_good + STRENGTH * tl.load(prior + kind * KNOTS + j)) / known
    hoped = mean + OPTIMISM * tl.sqrt(mean * (1 - mean) / known)
    hoped = tl.minimum(tl.maximum(hoped, 1e-3), 1 - 1e-3)
    odds = tl.log(hoped) - tl.log(1 - hoped)
    place = tl.arange(0, PLACES)
    weight = tl.maximum(1 - tl.abs(place[:, None] / FINE - j[None, :]), 0.0)
    fine = tl.sum(weight * odds[None, :], 1)
    tl.store(chance + kind * places + place, 1 / (1 + tl.exp(-fine)), place < places)

    my = own + slot * 6
    began = tl.where(got > 0, 1.0, 0.0)
    first, taken, wanted = (
        tl.load(my + 2, taught, 0.0),
        tl.load(my + 3, taught, 0.0),
        tl.load(my + 4, taught, 0.0),
    )
    of_newest = tl.where(kind > 0, CALM, MEMORY)
    tl.store(my + 2, first + of_newest * (began - first), taught)
    tl.store(my + 3, taken + of_newest * (got - taken), taught)
    tl.store(my + 4, wanted + of_newest * (asked - wanted), taught)
    told = tl.sum(taught.to(tl.int32), 0) + i * 0
    share = (tl.sum(tl.where(taught, began, 0.0), 0) + i * 0.0) / tl.maximum(told, 1)
    pooled += kind
    old = tl.load(pooled + i * 0)
    tl.store(pooled + i, old + tl.where(told > 0, POOLING * (share - old), 0.0), i == 0)


def decide(
    alive: Tensor,
    mine: Tensor,
    largest: Tensor,
    step: Tensor,
    slots: Tensor,
    temperatures: Tensor,
    logs: Tensor,
    chance: Tensor,
    bounds: Tensor,
    draft_price: Tensor,
    verify_price: Tensor,
    rows: Tensor,
    keep: Tensor,
    edges: tuple[float, ...],
    easy: float,
    flat: bool,
) -> None:
    """Who drafts on, into keep bool[B]; the log-products of this step, into logs [slots, 64].

    alive, mine bool[B], largest float32[B], step int64[], slots int64[B] (each row's own, padding apart),
    temperatures float32[slots], chance and bounds as `Curve` has them, prices float32 by rows and by
    tokens, rows float32[]; `easy`: what a token is worth to a sampled row; `flat`: B rows are paid for
    while any drafts. At most 64 rows.
    """
    n, size = keep.shape[0], triton.next_power_of_2(keep.shape[0])
    halvings = bounds.shape[0].bit_length()
    _decide[(1,)](
        alive.view(torch.int8), mine.view(torch.int8), largest, step, slots, temperatures, logs, chance,
        bounds, draft_price, verify_price, rows, keep.view(torch.int8), logs.stride(0), chance.stride(0),
        draft_price.shape[0] - 1, verify_price.shape[0] - 1, n, EDGES=edges, EASY=easy, FLAT=flat,
        ROWS=size, BOUNDS=bounds.shape[0], HALF=1 << (halvings - 1), HALVINGS=halvings,
        num_warps=1 if size < 32 else 4,
    )  # fmt: skip


def limit(
    mine: Tensor,
    slots: Tensor,
    temperatures: Tensor,
    own: Tensor,
    load: Mapping[str, Tensor],
    pooled: Tensor,
    since: Tensor,
    draft_price: Tensor,
    verify_price: Tensor,
    answer: Tensor,
    edges: tuple[float, ...],
    constants: Mapping[str, float],
) -> None:
    """What each row may draft, into answer int64[B], at most 64 rows; prices, `own` and `since` in place.

    `load`: draft, verify, rate, rows, as `Load` has them; `constants`: BLIND, START, HYSTERESIS, PROBE, LOOK.
    """
    n = answer.shape[0]
    _limit[(1,)](
        mine.view(torch.int8), slots, temperatures, own, load["draft"], load["verify"], load["rate"],
        load["rows"], pooled, since, draft_price, verify_price, answer, draft_price.shape[0] - 1,
        verify_price.shape[0] - 1, n, EDGES=edges,
        ROWS=triton.next_power_of_2(n), M=triton.next_power_of_2(draft_price.shape[0]),
        TOKENS=triton.next_power_of_2(verify_price.shape[0]), num_warps=4, **constants,
    )  # fmt: skip


def observe(
    mine: Tensor,
    slots: Tensor,
    temperatures: Tensor,
    drafted: Tensor,
    accepted: Tensor,
    own: Tensor,
    logs: Tensor,
    curve: Curve,
    pooled: Tensor,
    edges: tuple[float, ...],
    constants: Mapping[str, float],
) -> None:
    """Learns from drafted, accepted int64[B], at most 64 rows: `own`, the curve and `pooled`, in place.

    `constants`: those of the estimator, FINE, LOW, STRENGTH, FADE and OPTIMISM, and MEMORY, CALM, POOLING.
    """
    n = drafted.shape[0]
    kinds, places = curve.chance.shape
    _observe[(kinds,)](
        mine.view(torch.int8), slots, temperatures, drafted, accepted, own, logs, curve.seen, curve.good,
        curve.chance, curve.prior, pooled, logs.stride(0), places, n, EDGES=edges,
        ROWS=triton.next_power_of_2(n), SL=logs.shape[1], KNOTS=curve.seen.shape[1],
        PLACES=triton.next_power_of_2(places), num_warps=4, **constants,
    )  # fmt: skip
