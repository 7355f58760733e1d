"""A load that leaves nothing at zero: policies, cancellations, faults of clients, and an engine that dies."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
from live import RunFailed, Served

PAIRS = (
    ("goodput", "model"),
    ("static", "model"),
    ("disco", "model"),
    ("confidence", "ngram"),
    ("static", "none"),
)
RESTARTS = 2
RESTART_SECONDS = 240.0
_PROMPT = "Tell me of a river that runs from the mountains to the sea. "


def bench(served: Served, out: Path, policy: str, drafter: str) -> None:
    """`disco-serve bench` with this policy. Raises RunFailed if a request failed."""
    command = [
        str(Path(sys.executable).with_name("disco-serve")), "bench", "--url", f"{served.url}/v1",
        "--policy", policy, "--drafter", drafter, "--concurrency", "4", "--requests", "8", "--warmup", "0",
        "--input-tokens", "96", "--max-tokens", "64",
    ]  # fmt: skip
    with (out / f"bench-{policy}-{drafter}.log").open("w") as log:
        done = subprocess.run(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**served.environment(), "OPENAI_API_KEY": served.key},
        )
    if done.returncode:
        raise RunFailed(f"disco-serve bench ended with {done.returncode}; see {log.name}")


def bench_all(served: Served, out: Path) -> None:
    """All pairs, two at a time, so that policies share steps and the KV cache is short."""
    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(bench, served, out, *pair) for pair in PAIRS]:
            done.result()


def provoke(served: Served) -> None:
    """What clients do besides: each kind of ending, and faults of their own."""
    with _client(served) as client:
        body = {"model": served.model, "prompt": _PROMPT * 8, "max_tokens": 24, "temperature": 0}
        sampled = {**body, "temperature": 1.0}
        for _ in range(3):
            for path, sent, status in (
                ("/v1/completions", body, 200),  # the same prompt: prefix cache
                ("/v1/completions", {**sampled, "best_of": 3}, 200),
                ("/v1/completions", {**body, "stop": [" the", " a", "e"]}, 200),
                ("/v1/chat/completions", {"model": served.model, "max_tokens": 8,
                                          "messages": [{"role": "user", "content": "Hello"}]}, 200),
                ("/v1/completions", {**body, "temperature": -1}, 400),
                ("/v1/completions", {**body, "model": "nobody"}, 404),
                ("/nowhere", body, 404),
            ):  # fmt: skip
                answer = client.post(path, json=sent)
                if answer.status_code != status:
                    raise RunFailed(f"{path} answers {answer.status_code}, not {status}: {answer.text}")
            _leave(client, {**sampled, "max_tokens": 200, "stream": True})
            time.sleep(1.5)  # the next round is another scrape's


def _leave(client: httpx.Client, body: dict[str, Any]) -> None:
    with client.stream("POST", "/v1/completions", json=body) as answer:
        next(answer.iter_lines())


def kill_engine(served: Served) -> None:
    """Kills the engine under a stream, asks in vain while it loads, and waits until it is back.

    Raises RunFailed if the stream does not end with an error, nothing is refused, or it does not come back.
    """
    engine = max(_workers(), key=lambda process: process.memory_info().rss)
    body = {"model": served.model, "prompt": _PROMPT, "max_tokens": 400, "stream": True, "temperature": 1.0}
    with _client(served) as client:
        with client.stream("POST", "/v1/completions", json=body) as answer:
            lines = answer.iter_lines()
            next(lines)
            engine.kill()
            with suppress(httpx.RemoteProtocolError):
                _error_in(lines)
        refused, end = 0, time.monotonic() + RESTART_SECONDS
        while client.get("/ready").status_code != 200:
            if time.monotonic() > end:
                raise RunFailed(f"the engine is not back after {RESTART_SECONDS:g} s")
            refused += client.post("/v1/completions", json={**body, "stream": False}).status_code == 503
            time.sleep(0.5)
    if not refused:
        raise RunFailed("nothing was answered with 503 while the engine was gone")


def _error_in(lines: Iterator[str]) -> None:
    for line in lines:
        if line.startswith("data: {") and "error" in json.loads(line.removeprefix("data: ")):
            return
    raise RunFailed("the stream of a killed engine ended without an error")


def _workers() -> list[psutil.Process]:
    """The spawned children of the server that this process started."""
    return [
        child
        for child in psutil.Process().children(recursive=True)
        if any("multiprocessing.spawn" in word for word in child.cmdline())
    ]


def _client(served: Served) -> httpx.Client:
    return httpx.Client(
        base_url=served.url, headers={"Authorization": f"Bearer {served.key}"}, timeout=120, trust_env=False
    )
