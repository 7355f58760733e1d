"""Gives the events of the scripted engine the times that a real one tells."""

from __future__ import annotations

import time
from typing import Any

import msgspec
import pytest
from fake_engine import FakeEngine

from engine.types import TokenEvent


def timed(engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each event says when it was made; the first of a sequence, that it ran a millisecond before."""
    plain = engine._event

    def event(*args: Any, first: bool, **kwargs: Any) -> TokenEvent:
        scheduled = None
        if first:
            time.sleep(0.001)
            scheduled = time.monotonic()
        time.sleep(0.001)
        made = plain(*args, first=first, **kwargs)
        return msgspec.structs.replace(made, scheduled=scheduled, at=time.monotonic())

    monkeypatch.setattr(engine, "_event", event)
