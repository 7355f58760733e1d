"""Whether idle connections and slow readers slow a normal client down.

    python benchmarks/connections.py [--idle 10000] [--slow 500] [--requests 20] [--rounds 3] [--json FILE]

Starts `disco-serve` with its default pair, or asks the server of --model at --url, whose process is --pid and
which was started with long --read-seconds and --write-seconds. In each round one client streams --requests
completions, once alone and once beside --idle connections that say nothing, or half a request's headers, and
--slow clients that ask for a stream and then for more pages than all buffers hold, and read 1000 bytes a
second. Slow streams have generated before the client is measured: what they cost the engine is not what is
asked here. All must still be open at the end of the round. Prints a table, and exits with 1 if the client's
median time to its first token, or of its whole answer, is over --bound times that of the client alone.

Both ends are here: each needs a file for every connection (`ulimit -n`, 12 000 by default).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import resource
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
import psutil
import record
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "clients"))

from live import ROOT, RunFailed, Served, serving

FLAGS = (
    "--read-seconds", "3600", "--write-seconds", "3600", "--log-level", "warning", "--device", "cpu",
    "--max-queued-requests", "1000",  # all slow clients' streams may wait at once
)  # fmt: skip
_AT_ONCE, _STREAMS = 200, 32  # connections that are opened, and streams that are asked for, at the same time
_PAGES = 12  # that a slow client asks for: some 1 MB
_BYTES, _PAUSE = 200, 0.2  # that a slow client reads, and then waits for


@dataclass
class Phase:
    """What the normal client saw; seconds of each request, and the server's memory in MB meanwhile."""

    first: list[float]
    whole: list[float]
    megabytes: float


async def measured(served: Served, requests: int, tokens: int, server: psutil.Process) -> Phase:
    body = {"model": served.model, "prompt": "Once upon a time", "max_tokens": tokens, "stream": True}
    body |= {"temperature": 0, "ignore_eos": True}
    headers = {"authorization": f"Bearer {served.key}"}
    phase = Phase([], [], 0.0)
    async with httpx.AsyncClient(base_url=served.url, headers=headers, timeout=120) as client:
        for _ in range(requests):
            start, first = time.perf_counter(), None
            async with client.stream("POST", "/v1/completions", json=body) as answer:
                answer.raise_for_status()
                async for line in answer.aiter_lines():
                    if first is None and line.startswith("data: "):
                        first = time.perf_counter() - start
            phase.first.append(first or 0.0)
            phase.whole.append(time.perf_counter() - start)
    phase.megabytes = server.memory_info().rss / 2**20
    return phase


async def connect(address: tuple[str, int], buffer: int | None = None) -> socket.socket:
    peer = socket.socket()
    if buffer is not None:
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    peer.setblocking(False)
    await asyncio.get_running_loop().sock_connect(peer, address)
    return peer


async def many(count: int, make: Callable[[int], Any], at_once: int) -> list[socket.socket]:
    made: list[socket.socket] = []
    for start in range(0, count, at_once):
        made += await asyncio.gather(*(make(place) for place in range(start, min(start + at_once, count))))
    return made


@asynccontextmanager
async def crowd(served: Served, idle: int, slow: int) -> AsyncIterator[None]:
    """Those connections are open meanwhile. Raises RunFailed if the server has closed one at the end."""
    url = urlsplit(served.url)
    address = (url.hostname or "", url.port or 0)
    loop = asyncio.get_running_loop()

    async def silent(place: int) -> socket.socket:
        peer = await connect(address)
        if place % 2:
            await loop.sock_sendall(peer, b"POST /v1/completions HTTP/1.1\r\nhost: a\r\n")
        return peer

    async def slowly(_: int) -> socket.socket:
        peer = await connect(address, 4096)
        await loop.sock_sendall(peer, _ask(served))
        status = await loop.sock_recv(peer, 12)
        if status != b"HTTP/1.1 200":
            raise RunFailed(f"a slow reader was told {status!r}")
        return peer

    idlers, readers = await many(idle, silent, _AT_ONCE), await many(slow, slowly, _STREAMS)
    reading = asyncio.create_task(_read_slowly(readers))
    try:
        await _until_idle(served)
        yield
        closed = sum(_closed(peer) for peer in idlers)
        if closed or reading.done():
            raise RunFailed(f"the server closed {closed} idle connections; slow readers: {reading}")
    finally:
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        for peer in idlers + readers:
            peer.close()
        await asyncio.sleep(2)


def _ask(served: Served) -> bytes:
    body = {"model": served.model, "prompt": "Once", "max_tokens": 2, "stream": True, "logprobs": 5}
    data = json.dumps(body).encode()
    key = f"host: a\r\nauthorization: Bearer {served.key}\r\n".encode()
    stream = b"POST /v1/completions HTTP/1.1\r\n" + key + b"content-length: %d\r\n\r\n" % len(data) + data
    return stream + (b"GET /docs HTTP/1.1\r\n" + key + b"\r\n") * _PAGES


async def _read_slowly(readers: list[socket.socket]) -> None:
    """Ends only by an exception: when a server closed one."""
    loop = asyncio.get_running_loop()
    while True:
        for peer in readers:
            if not await loop.sock_recv(peer, _BYTES):
                raise RunFailed("the server closed a slow reader")
        await asyncio.sleep(_PAUSE)


def _closed(peer: socket.socket) -> bool:
    try:
        return peer.recv(1, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


async def _until_idle(served: Served) -> None:
    async with httpx.AsyncClient(base_url=served.url, timeout=120) as client:
        for _ in range(600):
            text = (await client.get("/metrics")).text
            if "\ndisco_requests_in_flight 0.0" in text and "\ndisco_requests_running 0.0" in text:
                return
            await asyncio.sleep(1)
    raise RunFailed("the slow streams were not generated within 10 minutes")


async def run(served: Served, arguments: argparse.Namespace) -> dict[str, Any]:
    """Both phases, so many rounds, after one that does not count."""
    server = psutil.Process(arguments.pid)
    if arguments.pid is None:
        (server,) = [each for each in psutil.Process().children() if "serve" in each.cmdline()]
    await measured(served, 3, arguments.tokens, server)
    alone, beside = [], []
    for _ in range(arguments.rounds):
        alone.append(await measured(served, arguments.requests, arguments.tokens, server))
        async with crowd(served, arguments.idle, arguments.slow):
            beside.append(await measured(served, arguments.requests, arguments.tokens, server))
    return {"alone": _figures(alone), "beside": _figures(beside)}


def _figures(phases: list[Phase]) -> dict[str, float]:
    first = [1000 * each for phase in phases for each in phase.first]
    whole = [1000 * each for phase in phases for each in phase.whole]
    figures = {
        "requests": len(first),
        "ttft_p50_ms": np.median(first),
        "ttft_p95_ms": np.percentile(first, 95),
        "e2e_p50_ms": np.median(whole),
        "e2e_p95_ms": np.percentile(whole, 95),
        "server_mb": max(phase.megabytes for phase in phases),
    }
    return {name: round(float(value), 2) for name, value in figures.items()}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--idle", type=int, default=10_000)
    parser.add_argument("--slow", type=int, default=500)
    parser.add_argument("--requests", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--bound", type=float, default=1.2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--url")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--pid", type=int)
    arguments = parser.parse_args()
    wanted, hard = arguments.idle + arguments.slow + 500, resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if hard != resource.RLIM_INFINITY and hard < wanted:
        parser.error(f"{wanted} files must be open at once, and {hard} may be (ulimit -Hn)")
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    there = nullcontext(Served(arguments.url, "none", arguments.model)) if arguments.url else None
    with there or serving(ROOT / "out" / "connections.log", *FLAGS) as served:
        figures = asyncio.run(run(served, arguments))
    ratios = {name: figures["beside"][name] / figures["alone"][name] for name in figures["alone"]}
    table = Table("", *figures["alone"])
    for name, row in {**figures, "ratio": {name: round(value, 3) for name, value in ratios.items()}}.items():
        table.add_row(name, *map(str, row.values()))
    Console(width=120).print(table)
    if arguments.json:
        about = {"idle": arguments.idle, "slow": arguments.slow, "tokens": arguments.tokens}
        record.save(arguments.json, about | figures | {"ratio": ratios})
    held = all(ratios[name] <= arguments.bound for name in ("ttft_p50_ms", "e2e_p50_ms"))
    print("holds" if held else f"DOES NOT HOLD: over {arguments.bound} times")
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
