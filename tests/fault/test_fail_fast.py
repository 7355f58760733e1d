"""What does not belong together is told before minutes of loading."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.config import EngineConfig
from engine.models import load
from engine.pairing import ConfigError
from engine.parts import build
from engine.speculation.heads import BUILTIN


@pytest.fixture(autouse=True)
def no_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def loaded(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("a model is loaded")

    monkeypatch.setattr(load, "load_model", loaded)


def test_a_head_for_another_draft(tiny_llama: Path):
    head = str(next(BUILTIN.glob("*/heads/disco.json")))
    with pytest.raises(ConfigError, match="was trained for the draft"):
        build(EngineConfig(target=str(tiny_llama), draft="self:1", heads=(head,), device="cpu"))


def test_a_draft_with_another_tokenizer(
    tiny_llama: Path, tmp_path: Path, make_llama: Callable[..., Path], make_tokenizer: Callable[..., Any]
):
    draft = make_llama(tmp_path / "draft", make_tokenizer(merges=(("a", "b"),)), layers=1, context=64)
    with pytest.raises(ConfigError, match="does not share the tokenizer"):
        build(EngineConfig(target=str(tiny_llama), draft=str(draft), device="cpu"))
