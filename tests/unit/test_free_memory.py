"""What a container's limit leaves."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
import torch

from engine.free_memory import free_memory

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def host(monkeypatch: pytest.MonkeyPatch) -> None:
    class Memory:
        available = 10_000

    monkeypatch.setattr(psutil, "virtual_memory", lambda: Memory)


@pytest.mark.parametrize(("limit", "free"), [("4000", 3000), ("900", 0), ("max", 10_000), ("99999", 10_000)])
def test_of_cgroup_2(tmp_path: Path, limit: str, free: int) -> None:
    (tmp_path / "memory.max").write_text(limit + "\n")
    (tmp_path / "memory.current").write_text("1000\n")
    assert free_memory(CPU, tmp_path) == free


def test_of_cgroup_1(tmp_path: Path) -> None:
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory/memory.limit_in_bytes").write_text("5000\n")
    (tmp_path / "memory/memory.usage_in_bytes").write_text("1000\n")
    assert free_memory(CPU, tmp_path) == 4000


def test_without_a_container(tmp_path: Path) -> None:
    assert free_memory(CPU, tmp_path) == 10_000
