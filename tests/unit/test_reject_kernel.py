"""Rejection sampling in kernels: its decisions against the formula, and its law against p."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from engine.models.kernels.choose import Chooser, Laws
from engine.models.kernels.reject import reject
from engine.speculation.noise import draws_state, uniform

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's infinities


def ints(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def longs(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device=DEVICE)


def floats(values: list[float], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=DEVICE)


def test_decisions_are_those_of_the_formula() -> None:
    """Rows: two drafts of a kept law, one of a one-hot law, no draft, and one with a NaN behind its draft."""
    torch.manual_seed(3)
    vocab, lengths = 5000, [2, 1, 0, 1]
    target = torch.randn(10, vocab + 7, device=DEVICE) * 2
    target[:, vocab:] = 50.0  # padding: never read
    places = [4, 2, 7, 0, 1, 9, 3, 5]
    target[5, 17] = float("nan")
    laws = (target[places, :vocab] + torch.randn(8, vocab, device=DEVICE)).bfloat16()
    law, token = [3, 6, -1, -1, -1, -1, 1, -1], [11, 4999, 0, 2, 0, 0, 42, 0]
    heat = [0.7, 0.7, 0.7, 1.0, 1.0, 1.3, 1.0, 1.0]
    begin = [0, 3, 5, 6]
    p = (target[places, :vocab] / floats(heat)[:, None]).softmax(-1)
    q = (laws.float()[[max(i, 0) for i in law]] / floats(heat)[:, None]).softmax(-1)
    for u in (0.0, 0.4, 0.999):
        found = reject(
            target, laws,
            (ints(places), ints(law), ints(token), floats(heat), floats([u] * 8, torch.float64)),
            (ints(begin), ints(lengths), longs([5, 6, 7, 8]), longs([0, 1, 2, 3])), vocab,
        )  # fmt: skip
        for row, (first, length) in enumerate(zip(begin, lengths, strict=True)):
            stands = []
            for j in range(first, first + length):
                ratio = p[j, token[j]] / (q[j, token[j]] if law[j] >= 0 else 1.0)
                stands.append(u < float(ratio))
            assert int(found[row, 0]) == [*stands, False].index(False), (u, row)
            assert int(found[row, 1]) == (row != 3)
            if row != 3:
                assert 0 <= int(found[row, 2]) < vocab


P = [0.4, 0.05, 0.3, 0.0, 0.25]
Q = [0.1, 0.5, 0.1, 0.2, 0.1]


def outcomes(one_hot: bool, rows: int, lie: bool = False) -> Tensor:
    """int[rows]: the token at the first position, of a draft of one token and its verification."""
    target, draft = (torch.tensor(law, device=DEVICE).log().expand(rows, -1).contiguous() for law in (P, Q))
    seeds = list(range(1000, 1000 + rows))
    states = longs([draws_state(seed) for seed in seeds])
    kept = torch.zeros(rows, 3, len(Q), dtype=torch.bfloat16, device=DEVICE)
    chooser = Chooser(rows, len(Q), DEVICE)
    choice = chooser(
        draft, ints(list(range(rows))), states, longs([0] * rows), floats([1.0] * rows),
        laws=Laws(kept, ints([1] * rows), ints([2])),
    )  # fmt: skip
    drafted = torch.full_like(choice.token, 1) if one_hot else choice.token.clone()
    if lie:
        kept[:, 2] = torch.tensor(P, device=DEVICE).log()
    twice = [i for i in range(rows) for _ in range(2)]
    law = [-1 if one_hot or k else 3 * i + 2 for i in range(rows) for k in range(2)]
    token = torch.stack([drafted, torch.zeros_like(drafted)], 1).flatten()
    uniforms = floats([uniform(seeds[i], 1 + k) for i in range(rows) for k in range(2)], torch.float64)
    found = reject(
        target, kept.view(-1, len(Q)), (ints(twice), ints(law), token, floats([1.0] * 2 * rows), uniforms),
        (ints(list(range(0, 2 * rows, 2))), ints([1] * rows), states, longs([2] * rows)), len(P),
    )  # fmt: skip
    assert found[:, 1].all()
    return torch.where(found[:, 0] > 0, drafted, found[:, 2])


def chi_square(tokens: Tensor) -> float:
    counts = torch.bincount(tokens.long().cpu(), minlength=len(P)).double()
    want = torch.tensor(P, dtype=torch.float64) * len(tokens)
    assert counts[want == 0].sum() == 0
    return float(((counts - want) ** 2 / want)[want > 0].sum())


LIMIT = 16.3  # 0.1% of the law with three degrees of freedom exceed it


@pytest.mark.parametrize("one_hot", [False, True])
def test_the_law_is_the_targets(one_hot: bool) -> None:
    assert chi_square(outcomes(one_hot, 120)) < LIMIT


def test_a_wrong_q_shows() -> None:
    """The mutant: verified against another law than it was drawn from."""
    with pytest.raises(AssertionError):
        assert chi_square(outcomes(False, 120, lie=True)) < LIMIT
