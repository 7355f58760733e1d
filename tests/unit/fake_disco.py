"""A disco-serve for `disco-serve top`: its pages of metrics, and a server that comes and goes."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from rich.console import Console
from typer.testing import CliRunner

from server import cli
from server.top_page import Page, Window

BY = 'policy="disco",drafter="model",zone="a"'  # with a constant label of --metrics-label


def page(k: int = 0, *, time: float = 0.0, up: int = 1) -> Page:
    return Page(text(k, up=up), time)


def text(k: int, *, up: int = 1) -> str:
    """A page after `k` rounds, each of which does the same."""
    return f"""
# TYPE disco_engine_up gauge
disco_engine_up {up}
# TYPE disco_model_info gauge
disco_model_info{{target="big",draft="small",dtype="float32",device="cpu",version="1.2.3"}} 1
disco_requests_running 3
disco_requests_waiting 2
disco_requests_in_flight 5
disco_requests_total{{outcome="stop"}} {4 * k}
disco_requests_total{{outcome="abort"}} {k}
disco_generated_tokens_total {400 * k}
disco_prompt_tokens_total {100 * k}
disco_discarded_tokens_total{{reason="aborted"}} {7 * k}
disco_kv_blocks 200
disco_kv_blocks_used 50
disco_kv_usage_ratio 0.25
disco_preemptions_total {k}
disco_prefix_cache_queried_tokens_total {100 * k}
disco_prefix_cache_hit_tokens_total {20 * k}
# TYPE disco_time_to_first_token_seconds histogram
disco_time_to_first_token_seconds_bucket{{le="0.1"}} {5 * k}
disco_time_to_first_token_seconds_bucket{{le="0.2"}} {9 * k}
disco_time_to_first_token_seconds_bucket{{le="+Inf"}} {10 * k}
disco_time_to_first_token_seconds_count {10 * k}
disco_time_to_first_token_seconds_sum {k}
disco_iterations_total{{{BY}}} {100 * k}
disco_draft_tokens_total{{{BY}}} {300 * k}
disco_lookahead_sum{{{BY}}} {300 * k}
disco_accepted_tokens_total{{{BY}}} {225 * k}
disco_emitted_tokens_total{{{BY}}} {325 * k}
disco_baseline_seconds_total{{{BY}}} {3 * k}
disco_iteration_seconds_total{{{BY},phase="draft"}} {0.5 * k}
disco_iteration_seconds_total{{{BY},phase="verify"}} {1.5 * k}
disco_stop_reason_total{{{BY},reason="policy"}} {75 * k}
disco_stop_reason_total{{{BY},reason="cap"}} {25 * k}
disco_stop_decisions_total{{{BY},decision="stop",verdict="rejected"}} {30 * k}
disco_stop_decisions_total{{{BY},decision="stop",verdict="accepted"}} {10 * k}
disco_stop_decisions_total{{{BY},decision="continue",verdict="rejected"}} {20 * k}
disco_iterations_total{{policy="static",drafter="model"}} 7
"""


def window(*pages: Page, seconds: float = 30.0) -> Window:
    found = Window(seconds)
    for each in pages:
        found.add(each)
    return found


def drawn(found: Any) -> str:
    console = Console(width=160)
    with console.capture() as captured:
        console.print(found)
    return captured.get()


def lines(found: Any) -> dict[str, list[str]]:
    """Rows of a frame by their first word."""
    return {words[0]: words for line in drawn(found).splitlines() if (words := line.split())}


class Server:
    """Answers as a server does, or not at all."""

    def __init__(self) -> None:
        self.rounds, self.there, self.ours, self.health = 0, True, True, 200
        self.bad: dict[str, Any] = {}  # path to what is answered there
        self.asked: list[str] = []

    def answer(self, request: httpx.Request) -> httpx.Response:
        self.asked.append(str(request.url))
        if not self.there:
            raise httpx.ConnectError("[Errno 111] Connection refused")
        if request.url.path in self.bad:
            return httpx.Response(200, **self.bad[request.url.path])
        if request.url.path == "/health":
            bad = {"error": {"message": "the engine is restarting"}}
            good = {"status": "ok", "engine": "ready", "restarts": 2}
            return httpx.Response(self.health, json=good if self.health == 200 else bad)
        self.rounds += 1
        return httpx.Response(200, text=text(self.rounds) if self.ours else "vllm:num_requests_running 3\n")


def answering(monkeypatch: pytest.MonkeyPatch) -> Server:
    """One that every client reaches, until the test ends."""
    fake, client = Server(), httpx.AsyncClient
    monkeypatch.setattr(httpx, "AsyncClient", lambda **_: client(transport=httpx.MockTransport(fake.answer)))
    return fake


def run(*arguments: str) -> Any:
    return CliRunner().invoke(cli.app, ["top", "--url", "http://x:1/v1", "--interval", "0.1", *arguments])
