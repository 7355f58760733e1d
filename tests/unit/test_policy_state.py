"""`--policy-state` with a whole engine: it is written and read again, and never harms a request."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fixed_costs import fix_costs
from safetensors.torch import load_file

from engine.client_local import LocalEngine
from engine.config import EngineConfig
from engine.core import Engine
from engine.speculation import memory
from engine.types import EngineUnavailable, GenerateRequest, SamplingParams


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is written after every step: nobody waits here."""
    monkeypatch.setattr(memory, "_IDLE_SECONDS", -1.0)
    monkeypatch.setattr(memory, "_BUSY_SECONDS", -1.0)


def config(target: Path, state: Path | None, **changes: Any) -> EngineConfig:
    given = {"draft": "self:3", "policy": "goodput", "device": "cpu", "kv_blocks": 64, "threads": 1} | changes
    return EngineConfig(target=str(target), policy_state=None if state is None else str(state), **given)


def made(settings: EngineConfig) -> Engine:
    """An engine for which drafting pays, whatever this machine measures."""
    engine = Engine(settings)
    fix_costs(engine)
    return engine


def text(engine: Engine) -> list[int]:
    params = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)
    engine.add(GenerateRequest(id="a", prompt_ids=(5, 6, 7), params=params))
    tokens: list[int] = []
    while engine.has_work():
        for event in engine.step()[0]:
            assert event.error is None
            tokens.extend(event.token_ids)
    return tokens


def learned(engine: Engine) -> dict[str, torch.Tensor]:
    return {
        f"{drafter}/{policy}/{name}": tensor
        for drafter, table in engine._tables.items()
        for policy, tensors in table.shared().items()
        for name, tensor in tensors.items()
    }


@pytest.mark.parametrize("policy", ["goodput", "bandit"])
def test_an_engine_goes_on_with_what_the_last_one_learned(
    tiny_llama: Path, tmp_path: Path, policy: str
) -> None:
    path = tmp_path / "deep" / "state.safetensors"
    first, fresh = (made(config(tiny_llama, at, policy=policy)) for at in (path, None))
    text(first)
    own = {name for name in learned(first) if name.startswith(f"model/{policy}/")}
    assert any(not torch.equal(learned(first)[name], learned(fresh)[name]) for name in own)
    second = made(config(tiny_llama, path, policy=policy))
    held = load_file(path)
    assert held.keys() == learned(first).keys() == learned(second).keys()
    for name, tensor in learned(second).items():
        assert torch.equal(tensor, held[name]) and torch.equal(tensor, learned(first)[name]), name
    assert text(second) == text(fresh)
    assert [each.name for each in path.parent.iterdir()] == [path.name]


def test_a_disk_that_fills_up_ends_nobodys_request(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is told once; and kept again as soon as that works."""
    path = tmp_path / "state.safetensors"
    engine, alone = made(config(tiny_llama, path)), made(config(tiny_llama, None))

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched, caplog.at_level(logging.WARNING):
        patched.setattr(memory, "save_file", full)
        assert text(engine) == text(alone)
    assert len(caplog.records) == 1 and "No space left" in caplog.text and str(path) in caplog.text
    assert not path.exists()
    text(engine)
    assert path.exists()


def a_directory(tmp_path: Path, target: Path) -> tuple[Path, dict[str, Any]]:
    return tmp_path, {}


def under_a_file(tmp_path: Path, target: Path) -> tuple[Path, dict[str, Any]]:
    (tmp_path / "file").write_text("x")
    return tmp_path / "file" / "state", {}


def no_tensors(tmp_path: Path, target: Path) -> tuple[Path, dict[str, Any]]:
    (tmp_path / "state").write_text("what is this")
    return tmp_path / "state", {}


def another_draft(tmp_path: Path, target: Path) -> tuple[Path, dict[str, Any]]:
    text(made(config(target, tmp_path / "state")))
    return tmp_path / "state", {"draft": "self:2"}


Case = Callable[[Path, Path], tuple[Path, dict[str, Any]]]


@pytest.mark.parametrize(
    ("case", "words"),
    [
        (a_directory, "is a directory"),
        (under_a_file, "cannot be kept there"),
        (no_tensors, "cannot be read"),
        (another_draft, "another draft"),
    ],
    ids=lambda each: getattr(each, "__name__", None),
)
async def test_a_file_that_cannot_be_used_is_told_at_start(
    tiny_llama: Path, tmp_path: Path, case: Case, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    path, changes = case(tmp_path, tiny_llama)
    engine = LocalEngine(config(tiny_llama, path, **changes))
    with pytest.raises(EngineUnavailable, match=f"policy state .*{words}") as raised:
        await engine.start()
    await engine.close()
    assert "\n" not in str(raised.value) and str(path) in str(raised.value)
    if case is another_draft:  # both are early exits of one target: the layers tell them apart
        assert ":self:3" in str(raised.value) and ":self:2" in str(raised.value)
    assert "Traceback" not in caplog.text
