"""What the request router counts: which replica each request under way is with."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("ray.serve", reason="Ray is not installed: pip install -e '.[ray]'")
sys.path.insert(0, str(Path(__file__).parents[2] / "deploy" / "ray"))

from disco_ray.call import Call
from disco_ray.router import PrefixRouter
from ray.serve.request_router import RequestRouter


class Router(PrefixRouter):
    """Without what Ray starts around a router."""

    def __init__(self, **options: Any) -> None:
        self.initialize_state(**options)

    async def first(self, request: str, affinity: str | None) -> str:
        """The replica that Ray would try first, of a and b."""
        pending: Any = SimpleNamespace(
            args=[Call({}, b"", affinity)],
            metadata=SimpleNamespace(internal_request_id=request),
            routing_context=SimpleNamespace(should_backoff=False),
            future=asyncio.get_running_loop().create_future(),
        )
        self.future = pending.future
        ranks = await self.choose_replicas([replica("a"), replica("b")], pending)
        assert sorted(name_of(each) for each in ranks) == ["a", "b"]
        assert pending.routing_context.should_backoff
        return name_of(ranks[0])


def replica(name: str) -> Any:
    return SimpleNamespace(replica_id=SimpleNamespace(unique_id=name))


def name_of(rank: list[Any]) -> str:
    (only,) = rank
    return str(only.replica_id.unique_id)


@pytest.fixture(autouse=True)
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("update_replicas", "on_request_routed", "on_request_completed"):
        monkeypatch.setattr(RequestRouter, name, lambda *_: None)


async def test_a_burst_of_one_prefix_spreads_before_anything_is_sent() -> None:
    router = Router(spare=2)
    chosen = [await router.first(str(i), "k") for i in range(40)]
    assert chosen[0] == chosen[1]
    assert 15 <= chosen.count("a") <= 25


async def test_requests_without_a_prefix_go_to_the_least_busy() -> None:
    router = Router()
    chosen = [await router.first(str(i), None) for i in range(40)]
    assert chosen.count("a") == 20


async def test_a_request_that_ends_makes_room() -> None:
    router = Router(spare=1)
    home = await router.first("1", "k")
    other = {"a": "b", "b": "a"}[home]
    assert await router.first("2", "k") == home  # the bound is 1.25 * 2 / 2, rounded up
    assert await router.first("3", "k") == other
    for request in ("1", "2"):
        router.on_request_completed(replica(home).replica_id, request)
    assert await router.first("4", "k") == home


async def test_a_request_counts_where_it_was_taken() -> None:
    router = Router()
    home = await router.first("1", "k")
    other = {"a": "b", "b": "a"}[home]
    pending: Any = SimpleNamespace(metadata=SimpleNamespace(internal_request_id="1"))
    router.on_request_routed(pending, replica(other).replica_id, None)
    router.on_request_completed(replica(home).replica_id, "1")  # of the attempt that was turned down
    assert router._loads == {home: 0, other: 1}
    router.on_request_completed(replica(other).replica_id, "1")
    assert router._loads == {home: 0, other: 0}


async def test_a_request_that_is_cancelled_before_it_is_sent_counts_no_more() -> None:
    router = Router()
    await router.first("1", "k")
    router.future.cancel()
    await asyncio.sleep(0)
    assert not any(router._loads.values()) and not router._places


async def test_a_replica_that_goes_takes_its_requests_along() -> None:
    router = Router()
    home = await router.first("1", "k")
    other = {"a": "b", "b": "a"}[home]
    router.update_replicas([replica(other)])
    router.on_request_completed(replica(home).replica_id, "1")
    assert not any(router._loads.values())


def test_options_that_cannot_work_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        Router(slack=0.5)
