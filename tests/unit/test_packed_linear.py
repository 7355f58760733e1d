"""Products of packed weights: right for every number of rows, computed with few of them."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from engine.models.packed import can_pack, packed_linear, padded

pytestmark = pytest.mark.skipif(not can_pack(), reason="this torch cannot pack")


def test_every_number_of_rows_gives_what_torch_gives() -> None:
    linear = nn.Linear(24, 40).requires_grad_(False)
    packed = packed_linear([linear], {})
    for rows in (1, 2, 15, 16, 17, 20, 21, 63, 65, 255, 257, 700):
        x = torch.randn(1, rows, 24)
        torch.testing.assert_close(packed(x), F.linear(x, linear.weight, linear.bias), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(packed(x[0]), packed(x)[0])
    assert packed(torch.zeros(0, 24)).shape == (0, 40)


def test_there_are_few_shapes_and_decoding_wastes_nothing() -> None:
    counts = range(1, 1089)
    assert [padded(rows) for rows in range(17)] == list(range(17))
    assert all(rows <= padded(rows) < rows + 64 and padded(rows) <= 1.25 * rows for rows in counts)
    assert len({padded(rows) for rows in counts}) < 60
    assert padded(0) == 0
