"""Open files: the limit is raised as far as it may be, and connections are fewer where that is too low."""

from __future__ import annotations

import resource

import pytest

from server import launch
from server.settings import Settings


@pytest.mark.parametrize(
    ("soft", "hard", "connections", "raised", "left"),
    [
        (1024, 65536, 10_000, 10_256, 10_000),
        (1024, resource.RLIM_INFINITY, 10_000, 10_256, 10_000),
        (65536, 65536, 10_000, None, 10_000),
        (resource.RLIM_INFINITY, resource.RLIM_INFINITY, 10_000, None, 10_000),
        (1024, 4096, 10_000, 4096, 3840),
        (100, 100, 10_000, 100, 1),
    ],
)
def test_room_for_connections(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    soft: int,
    hard: int,
    connections: int,
    raised: int | None,
    left: int,
) -> None:
    limits: list[int] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda _, limit: limits.append(limit[0]))
    settings = launch._with_room(Settings(max_connections=connections))
    assert settings.max_connections == left and limits == ([] if raised is None else [raised])
    assert ("ulimit -n" in caplog.text) == (left < connections)
