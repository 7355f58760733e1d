"""What policies learn over all requests survives a restart, and is refused where it does not belong."""

import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from engine.speculation import memory
from engine.speculation.control import PolicyTable
from engine.speculation.memory import Memory, PolicyStateError

CPU = torch.device("cpu")
PAIR = {"target": "t" * 20, "draft": "d" * 20}


def tables() -> dict[str, PolicyTable]:
    return {"model": PolicyTable(2, CPU), "ngram": PolicyTable(2, CPU)}


def first(found: dict[str, PolicyTable]) -> torch.Tensor:
    """Some tensor that goodput has learned of the model's drafts."""
    shared = found["model"].shared()["goodput"]
    return shared[sorted(shared)[0]]


def kept(path: Path, monkeypatch: pytest.MonkeyPatch, value: float = 0.25) -> None:
    monkeypatch.setattr(memory, "_IDLE_SECONDS", 0.0)
    made = tables()
    first(made).fill_(value)
    Memory(path, made, PAIR).keep(idle=True)


def test_a_restart_knows_what_was_learned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "deep" / "state.safetensors"
    kept(path, monkeypatch)
    again = tables()
    assert not bool((first(again) == 0.25).all())
    Memory(path, again, PAIR)
    assert bool((first(again) == 0.25).all())
    assert [each.name for each in path.parent.iterdir()] == [path.name]


def test_it_is_written_seldom(tmp_path: Path) -> None:
    path = tmp_path / "state"
    Memory(path, tables(), PAIR).keep(idle=True)
    assert not path.exists()


def test_a_full_disk_is_told_once_and_harms_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "state"
    kept(path, monkeypatch)
    whole = path.read_bytes()
    made = tables()
    found = Memory(path, made, PAIR)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, limits[1]))
    try:
        for _ in range(3):
            found.keep(idle=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "cannot be written" in caplog.text
    assert path.read_bytes() == whole and list(tmp_path.iterdir()) == [path]
    found.keep(idle=True)
    assert "is written again" in caplog.text


def test_nan_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The next start would refuse the file."""
    path = tmp_path / "state"
    kept(path, monkeypatch)
    whole = path.read_bytes()
    made = tables()
    found = Memory(path, made, PAIR)
    name = next(n for n, each in made["model"].shared()["goodput"].items() if each.is_floating_point())
    made["model"].shared()["goodput"][name].fill_(float("nan"))
    found.keep(idle=True)
    assert "NaN" in caplog.text and path.read_bytes() == whole
    Memory(path, tables(), PAIR)


def test_another_pairs_state_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state"
    kept(path, monkeypatch)
    with pytest.raises(PolicyStateError, match="another draft"):
        Memory(path, tables(), PAIR | {"draft": "e" * 20})


@pytest.mark.parametrize("harm", ["garbage", "shape", "nan"])
def test_a_damaged_file_is_refused_and_nothing_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harm: str
) -> None:
    path = tmp_path / "state"
    kept(path, monkeypatch)
    if harm == "garbage":
        path.write_bytes(b"\x08\x00\x00\x00 no tensors")
    else:
        held: dict[str, Any] = {
            f"{drafter}/{policy}/{name}": tensor.clone()
            for drafter, table in tables().items()
            for policy, tensors in table.shared().items()
            for name, tensor in tensors.items()
        }
        last = next(name for name in reversed(sorted(held)) if held[name].is_floating_point())
        held[last] = torch.zeros(3, 7, 9) if harm == "shape" else held[last].fill_(float("nan"))
        save_file(held, path, metadata={**PAIR, "features": "1"})
    again, untouched = tables(), tables()
    with pytest.raises(PolicyStateError):
        Memory(path, again, PAIR)
    assert torch.equal(first(again), first(untouched))
