"""Where faults are injected: a server over HTTP around a tiny pair, its clients, and what they were told."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

# The engine's process gets these, too.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "http"))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from hostile_clients import READ_SECONDS, WRITE_SECONDS
from http_support import listening
from suites.tiny_model import make

from engine.client_worker import WorkerEngine
from engine.config import EngineConfig
from engine.models.load import load_tokenizer
from server.app import create_app
from server.settings import Settings

PATIENCE = 300.0  # seconds; a bound for hangs, not a measure
TOKENS = 40


@dataclass
class Told:
    """What one client was told: `text` so far, and the `code` of the error that ended it, or None.

    `lost` says why nobody should have been answered so.
    """

    prompt: str
    text: str = ""
    code: str | None = None
    lost: str | None = None


@dataclass
class Ground:
    engine: WorkerEngine
    client: httpx.AsyncClient
    port: int
    faults: Path
    drafter: str
    right: dict[str, str] = field(default_factory=dict)  # by prompt: the text without a draft and a fault

    async def ask(self, prompt: str, stream: bool, drafter: str | None = None, tokens: int = TOKENS) -> Told:
        """One completion; never raises."""
        body = {"model": "tiny", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
        body |= {"stream": stream, "speculation": {"drafter": drafter or self.drafter}}
        told = Told(prompt)
        try:
            async with asyncio.timeout(PATIENCE):
                await self._read(told, body)
        except (httpx.HTTPError, TimeoutError, ValueError, KeyError) as error:
            told.lost = f"{type(error).__name__}: {error}"
        right = self.right.get(prompt)
        begun = told.code is not None and (right or "").startswith(told.text)
        if told.lost is None and right is not None and told.text != right and not begun:
            told.lost = f"another text: {told.text!r}"
        return told

    async def _read(self, told: Told, body: dict[str, Any]) -> None:
        async with self.client.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                await response.aread()
                told.code = response.json()["error"]["code"]
                if response.status_code == 503 and "retry-after" not in response.headers:
                    told.lost = "503 without Retry-After"
            elif not body["stream"]:
                await response.aread()
                told.text = response.json()["choices"][0]["text"]
            else:
                await self._follow(told, response)

    async def _follow(self, told: Told, response: httpx.Response) -> None:
        last = ""
        async for line in response.aiter_lines():
            last = line.removeprefix("data: ") or last
            if line.startswith("data: {"):
                chunk = json.loads(last)
                told.code = chunk["error"]["code"] if "error" in chunk else told.code
                for choice in chunk.get("choices", ()):
                    told.text += choice["text"]
        if told.code is None and last != "[DONE]":
            told.lost = "a stream without an end"

    def inject(self, fault: str) -> None:
        """In the engine's next step."""
        (self.faults / fault).touch()

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(PATIENCE):
            while not condition():
                await asyncio.sleep(0.02)

    async def counted(self) -> float:
        """Faults of speculation, as the server counts them."""
        lines = (await self.client.get("/metrics")).text.splitlines()
        return sum(
            float(line.split()[1]) for line in lines if line.startswith("disco_speculation_faults_total{")
        )

    async def idle(self) -> None:
        """Until no sequence is in flight."""
        async with asyncio.timeout(PATIENCE):
            while "\ndisco_requests_in_flight 0.0\n" not in (await self.client.get("/metrics")).text:
                await asyncio.sleep(0.05)

    async def serves(self) -> bool:
        """Whether a new request is answered."""
        return (await self.ask("is it there?", False, tokens=1)).code is None

    async def recovered(self) -> float:
        """Seconds until a new request is answered."""
        begin = time.monotonic()
        async with asyncio.timeout(PATIENCE):
            while not await self.serves():
                await asyncio.sleep(0.05)
        return time.monotonic() - begin


@asynccontextmanager
async def ground(
    asked: Sequence[str],
    *,
    scripted: bool = False,
    device: str = "cpu",
    delay: float = 0.1,
    step_seconds: float = 5.0,
) -> AsyncIterator[Ground]:
    """A server with its tiny pair loaded, or with an engine that only counts. `asked`: the prompts to come.
    `delay`: seconds before every restart of the engine.
    """
    with tempfile.TemporaryDirectory(prefix="disco-faults-") as folder:
        model, faults = Path(folder, "tiny"), Path(folder, "faults")
        faults.mkdir()
        make(model)
        os.environ["FAULTS"] = str(faults)
        config = EngineConfig(
            target=str(model), draft="self:1", policy="static", policy_options={"sl": 3},
            device=device, dtype="float32",
            kv_blocks=400, max_num_seqs=max(len(asked), 4), threads=1,
            policy_state=str(Path(folder, "learned")),
        )  # fmt: skip
        engine = WorkerEngine(
            EngineConfig(target="counts") if scripted else config,
            "scripted_engine:Paced" if scripted else "faulty_engine:Faulty",
            restart_delay=delay,
            longest_delay=delay,
            step_timeout=step_seconds,
        )
        clocks = {"read_seconds": READ_SECONDS, "write_seconds": WRITE_SECONDS}
        app = create_app(Settings(target="tiny", page=False, **clocks), engine, load_tokenizer(str(model)))
        async with listening(app) as port, _client(port) as client:
            found = Ground(engine, client, port, faults, "none" if scripted else "model")
            await found.until(lambda: engine.state != "loading")
            if engine.state != "ready":
                raise RuntimeError((await client.get("/health")).text)
            for prompt in asked:
                found.right[prompt] = (await found.ask(prompt, False, drafter="none")).text
            yield found


def _client(port: int) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=4)
    url = f"http://127.0.0.1:{port}"
    return httpx.AsyncClient(base_url=url, timeout=PATIENCE, limits=limits, trust_env=False)
