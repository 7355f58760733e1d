"""The small Triton kernels against plain torch: choosing tokens, tree attention, the step between drafts."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from engine.models.kernels.advance import MOST_SL, advance
from engine.models.kernels.attention import Places, attend
from engine.models.kernels.choose import Chooser
from engine.speculation.features import signals
from engine.speculation.noise import GumbelNoise, coupled_state

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's infinities


def on(values: list[int] | list[float], dtype: torch.dtype) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=DEVICE)


# ---- choose

VOCAB, PADDED = 9001, 9010
SEEDS = [5, 2**63 + 7, -3 + 2**64, 9, 1, 77]
POSITIONS = [3, 77, 2, 1, 1, 5]
HEAT = [0.0, 0.7, 1.3, 0.0, 1.0, 0.0]
PLACES = [4, 0, 2, 3, 6, 5]


def logits() -> Tensor:
    """Rows: 2 knows five tokens, 3 has a NaN, 5 has its largest in the padding, 6 allows nothing."""
    torch.manual_seed(0)
    made = torch.randn(7, PADDED, device=DEVICE) * 3
    made[2, 5:] = float("-inf")
    made[3, 100] = float("nan")
    made[5, VOCAB + 2] = 99.0
    made[6] = float("-inf")
    return made


def choose(of: Tensor, top: bool) -> tuple[Tensor, Chooser]:
    chooser = Chooser(len(PLACES), VOCAB, DEVICE)
    chooser.choice.token.fill_(-7)
    chooser.choice.prob.fill_(float("nan"))
    states = on([coupled_state(seed) for seed in SEEDS], torch.int64)
    positions, heat = on(POSITIONS, torch.int64), on(HEAT, torch.float32)
    choice = chooser(of, on(PLACES, torch.int32), states, positions, heat, signals=True, top=top)
    return choice.token, chooser


def test_tokens_are_those_of_the_noise() -> None:
    made = logits()
    token, chooser = choose(made, top=False)
    rows = made[torch.tensor(PLACES), :VOCAB]
    heat = on(HEAT, torch.float32)[:, None]
    noise = GumbelNoise(VOCAB, DEVICE)(SEEDS, POSITIONS)
    want = torch.where(heat > 0, (rows / heat.clamp(min=1e-3)).double() + noise, rows.double()).argmax(-1)
    fine = chooser.choice.fine.bool()
    assert fine.tolist() == [True, True, True, False, False, True]
    assert token[fine].tolist() == want[fine].tolist()


def test_signals_are_those_of_the_feature_code() -> None:
    made = logits()
    token, chooser = choose(made, top=True)
    fine = chooser.choice.fine.bool()
    rows = made[torch.tensor(PLACES), :VOCAB][fine]
    want = signals(rows, token[fine].long(), frozenset({"prob", "largest", "top", "entropy"}))
    for name in ("prob", "largest", "top", "entropy"):
        torch.testing.assert_close(getattr(chooser.choice, name)[fine], want[name], atol=1e-5, rtol=1e-4)


def test_equal_logits_choose_the_first() -> None:
    made = torch.zeros(7, PADDED, device=DEVICE)
    token, _ = choose(made, top=False)
    assert token[0] == 0 and token[3] == 0


# ---- attention


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("programs", [1, 64], ids=["whole", "split"])
def test_a_tree_attends_its_own_branch(programs: int, window: int | None) -> None:
    """Three rows: a chain; a tree of five whose first node lies in the pool already; a tree behind its root.

    A node attends what is below its trunk and its ancestors, and stands at its depth.
    """
    torch.manual_seed(1)
    heads, kv_heads, dim, block = 6, 2, 16, 4
    starts, trunks, parents = [5, 9, 8], [5, 8, 9], [[-1, 0], [-1, 0, 0, 1, 2], [-1, -1, 0, 1]]
    known = [0, 1, 0]  # nodes that are not of this pass
    first = [False, False, True]  # the pass begins with the token before the tree
    rows = [[j for j in range(len(own)) if j >= skip] for own, skip in zip(parents, known, strict=True)]
    lengths = [len(own) + f for own, f in zip(rows, first, strict=True)]
    total = sum(lengths)
    qkv = torch.randn(total, heads + 2 * kv_heads, dim, device=DEVICE)
    keys = torch.full((64, kv_heads, dim), float("nan"), device=DEVICE)
    values = keys.clone()
    tables = on([3, 7, 0, 0, 9, 1, 4, 12, 5, 2, 13, 8], torch.int32).view(3, 4)  # type: ignore[arg-type]
    told: dict[str, list[int]] = {"masks": [], "sees": [], "positions": []}
    want, begin = [], 0
    for row, (start, trunk, length) in enumerate(zip(starts, trunks, lengths, strict=True)):
        slots = [int(tables[row, p // block]) * block + p % block for p in range(start + length)]
        for store in (keys, values):
            store[slots] = torch.randn(len(slots), kv_heads, dim, device=DEVICE)
        for j in ([-1] if first[row] else []) + rows[row]:
            way, at = [], j
            while at >= 0:
                way.insert(0, at)
                at = parents[row][at]
            place = trunk - 1 + len(way)
            told["masks"].append(sum(1 << a for a in way))
            told["sees"].append(trunk)
            told["positions"].append(place)
            at_positions = {p: slots[p] for p in range(trunk)}
            at_positions |= {trunk + d: slots[trunk + a] for d, a in enumerate(way)}
            seen = [slot for p, slot in at_positions.items() if window is None or p > place - window]
            q = qkv[len(want), :heads].view(kv_heads, heads // kv_heads, dim)
            scores = torch.einsum("gfd,ngd->gfn", q, keys[seen]) * 0.3
            want.append(torch.einsum("gfn,ngd->gfd", scores.softmax(-1), values[seen]).reshape(-1))
        begin += length
    begins = [0, lengths[0], lengths[0] + lengths[1]]
    places = Places(
        on(starts, torch.int32), on(begins, torch.int32), on(lengths, torch.int32), tables, 5,
        on(told["positions"], torch.int32), on(trunks, torch.int32), on(told["sees"], torch.int32),
        on(told["masks"], torch.int64),
    )  # fmt: skip
    got = attend(
        qkv,
        keys,
        values,
        places,
        heads=heads,
        scaling=0.3,
        window=window,
        block_size=block,
        programs=programs,
    )
    torch.testing.assert_close(got, torch.stack(want), atol=1e-5, rtol=1e-4)


# ---- advance


@pytest.mark.parametrize("compact", [True, False])
def test_rows_stop_each_for_its_reason(compact: bool) -> None:
    """Row 0 goes on, 1 stops by its policy, 2 by its drafter, 3 by its limit, 4 had stopped, 5 goes on."""
    size, most, block = 8, 16, 16
    longs = ("position", "key", "limit")
    rows = {name: torch.zeros(size, dtype=torch.int64, device=DEVICE) for name in longs} | {
        name: torch.zeros(size, dtype=torch.int32, device=DEVICE)
        for name in ("place", "alive", "length", "reason", "ids", "positions", "slots", "starts", "lengths")
    }
    rows["drafted"] = torch.full((size * MOST_SL,), -1, dtype=torch.int32, device=DEVICE)
    rows["progress"] = on([41, 1, 0, 0], torch.int32)
    rows["meta"] = torch.zeros(8 + 7 * most, dtype=torch.int32, device=DEVICE)
    rows["tables"] = torch.arange(size * 4, dtype=torch.int32, device=DEVICE).view(size, 4)
    rows["alive"][:6] = on([1, 1, 1, 1, 0, 1], torch.int32)
    rows["limit"][:6] = on([5, 5, 5, 2, 5, 3], torch.int64)
    rows["position"][:6] = on([20, 21, 22, 23, 24, 33], torch.int64)
    rows["reason"][4], rows["length"][:6] = 1, 1
    token = on([100, 101, 102, 103, 104, 105, 0, 0], torch.int32)
    fine = on([1, 1, 0, 1, 1, 1, 1, 1], torch.int8)
    keep = on([1, 0, 1, 1, 1, 1, 1, 1], torch.int8).bool()
    advance(token, fine, keep, rows, most=most, compact=compact, block_size=block, spare_slot=999)
    drafted = rows["drafted"].view(size, MOST_SL)
    assert drafted[:6, 1].tolist() == [100, 101, -1, 103, -1, 105] and int((drafted[:, 0] != -1).sum()) == 0
    assert rows["length"][:6].tolist() == [2, 2, 1, 2, 1, 2]
    assert rows["reason"][:6].tolist() == [0, 1, 2, 0, 1, 0]
    assert rows["alive"].tolist() == [1, 0, 0, 0, 0, 1, 0, 0]
    assert rows["position"][:6].tolist() == [21, 21, 22, 23, 24, 34]
    assert rows["key"][:6].tolist() == [1, 0, 0, 0, 0, 1]
    assert rows["progress"].tolist() == [42, 2, 2, 0]
    if compact:
        meta = rows["meta"].tolist()
        by = [meta[8 + most * field : 10 + most * field] for field in range(7)]
        assert meta[:2] == [2, 2] and by == [[20, 33], [0, 1], [1, 1], [0, 5], [100, 105], [20, 33], [1, 1]]
        assert [int(rows["place"][i]) for i in (0, 5)] == [0, 1]
    else:
        assert rows["lengths"].tolist() == [1, 0, 0, 0, 0, 1, 0, 0]
        assert rows["slots"].tolist() == [1 * 16 + 4, 999, 999, 999, 999, 22 * 16 + 1, 999, 999]
        assert rows["ids"].tolist() == [100, 0, 0, 0, 0, 105, 0, 0] and rows["starts"][5] == 33
