"""Waiting, prefill and decoding of a sequence, from the times on its events."""

from __future__ import annotations

import time

import pytest
from prometheus_client import CollectorRegistry

from engine.types import TokenEvent
from server.metrics_times import Times


def test_the_phases_of_a_sequence() -> None:
    registry = CollectorRegistry()
    arrival = time.monotonic() - 4.0
    times = Times(registry).of(arrival)
    times.take(TokenEvent(id="r", token_ids=(1,), scheduled=arrival + 1.0, at=arrival + 1.5))
    times.take(TokenEvent(id="r", token_ids=(2, 3, 4), at=arrival + 2.0))
    times.take(TokenEvent(id="r", finish_reason="stop", at=arrival + 3.5))
    times.end()

    def told(name: str, what: str) -> float:
        return registry.get_sample_value(f"disco_{name}_seconds_{what}") or 0.0

    for name, seconds in (("request_queue", 1.0), ("request_prefill", 0.5), ("request_decode", 2.0)):
        assert (told(name, "count"), told(name, "sum")) == (1, pytest.approx(seconds))
    assert told("time_to_first_token", "sum") >= 4.0 and told("request", "sum") >= 4.0
    assert told("inter_token_latency", "count") == 3  # of the one gap, in which three came


def test_what_never_ended_has_no_end() -> None:
    registry = CollectorRegistry()
    times = Times(registry).of(time.monotonic() + 1.0)  # by a clock that is not quite ours
    times.take(TokenEvent(id="r", token_ids=(1, 2), scheduled=time.monotonic(), at=time.monotonic()))
    assert registry.get_sample_value("disco_request_queue_seconds_sum") == 0.0
    assert registry.get_sample_value("disco_request_seconds_count") == 0
    assert registry.get_sample_value("disco_request_decode_seconds_count") == 0
    assert registry.get_sample_value("disco_inter_token_latency_seconds_count") == 1


def test_what_has_no_token_was_not_decoded() -> None:
    registry = CollectorRegistry()
    arrival = time.monotonic() - 4.0
    times = Times(registry).of(arrival)  # of `max_tokens: 0`: its one event ends it
    times.take(TokenEvent(id="r", finish_reason="length", scheduled=arrival + 1, at=arrival + 2))
    times.end()
    counts = {
        name: registry.get_sample_value(f"disco_{name}_seconds_count")
        for name in ("request_queue", "request_prefill", "request_decode", "time_to_first_token", "request")
    }
    assert counts == {
        "request_queue": 1,
        "request_prefill": 1,  # the prompt was read
        "request_decode": 0,
        "time_to_first_token": 0,
        "request": 1,
    }
