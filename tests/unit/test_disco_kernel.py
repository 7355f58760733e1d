"""DISCO's kernel, in Triton's interpreter where there is no GPU, against what taught it."""

from __future__ import annotations

import pytest
import torch
from head_support import shown
from lossless.toy_heads import toy_head

pytest.importorskip("triton")

from engine.models.kernels.disco import decide
from engine.speculation.scoring import inputs_of, score

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("rows", [1, 5, 64])
@pytest.mark.parametrize("step", [1, 900])  # the second beyond what the head has seen
def test_decides_as_the_head_scores(rows: int, step: int) -> None:
    head = toy_head("disco")
    weights = {name: value.to(DEVICE) for name, value in head.folded(torch.device("cpu")).items()}
    signals = shown(rows, step, seed=rows)
    assert signals.top is not None and signals.entropy is not None
    want = score(head.folded(torch.device("cpu")), inputs_of(signals, head.inputs))
    slots = torch.randperm(2 * rows)[:rows]
    least = torch.full((2 * rows,), float("nan"))  # another slot's is not read
    least[slots] = want.median() + 1e-4  # so that some stop and some do not
    seen = [each.to(DEVICE) for each in (signals.top, signals.entropy, signals.position, slots, least)]
    assert decide(*seen, weights).tolist() == (want >= least[slots]).tolist()


def test_nan_stops() -> None:
    head = toy_head("disco")
    weights = {name: value.to(DEVICE) for name, value in head.folded(torch.device("cpu")).items()}
    top = torch.full((2, 10), 0.05, device=DEVICE)
    entropy = torch.tensor([float("nan"), 1.0], device=DEVICE)
    row, least = torch.zeros(2, dtype=torch.int64, device=DEVICE), torch.full((1,), -1e30, device=DEVICE)
    assert decide(top, entropy, row, row, least, weights).tolist() == [False, True]
