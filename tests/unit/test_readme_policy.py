"""The README's example of a policy is one: it passes the contract that every policy must pass."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from lossless.contract import check_reset_on_reuse, equipped, iterate, sequence

from engine.speculation import policy as registry

README = Path(__file__).parents[2] / "README.md"


def test_the_example_works(monkeypatch: pytest.MonkeyPatch) -> None:
    section = README.read_text().split("## Add a policy")[1]
    block = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert block is not None
    registry.policies()
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    exec(compile(block[1], "README.md", "exec"), {"__name__": "readme"})
    assert "flat" in registry.policies()
    check_reset_on_reuse("flat")
    table, row = equipped(1), sequence("flat", {"nats": 0.5})
    table.take(row)
    assert table.limits([row]) == [16]
    assert iterate(table, [row], [0.9], [True])[0][0] == 16
    assert torch.isfinite(table._states["flat"].tensors["nats"]).all()
