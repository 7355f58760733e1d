"""Open files: the limit is raised as far as it may be, and connections are fewer where that is too low."""

from __future__ import annotations

import asyncio
import resource

import pytest

from server import launch
from server.http1_protocol import fitting, most_open
from server.settings import Settings


@pytest.mark.parametrize(
    ("soft", "hard", "connections", "raised", "left"),
    [
        (1024, 65536, 10_000, 11_272, 10_000),
        (1024, resource.RLIM_INFINITY, 10_000, 11_272, 10_000),
        (65536, 65536, 10_000, None, 10_000),
        (resource.RLIM_INFINITY, resource.RLIM_INFINITY, 10_000, None, 10_000),
        (1024, 4096, 10_000, 4096, 3476),
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


@pytest.mark.parametrize("sockets", [17, 18, 100, 744, 3840, 16_384])
def test_a_bound_takes_no_more_sockets_than_there_are(sockets: int) -> None:
    """With those that are told that they are too many."""
    assert most_open(fitting(sockets)) <= sockets < most_open(fitting(sockets) + 2)


async def test_connections_without_a_file_are_told_once(caplog: pytest.LogCaptureFixture) -> None:
    complain, loop = launch._Complaints(), asyncio.get_running_loop()
    for _ in range(1000):
        complain(loop, {"message": "socket.accept() out of system resource", "exception": OSError(24, "no")})
    assert len(caplog.records) == 1 and "cannot be accepted" in caplog.text
    complain(loop, {"message": "something else"})
    assert "something else" in caplog.text
