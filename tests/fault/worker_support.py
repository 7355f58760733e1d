"""What tests ask of a supervised scripted engine."""

import asyncio
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine.client_worker import WorkerEngine
from engine.types import GenerateRequest, SamplingParams, TokenEvent

sys.path.insert(0, str(Path(__file__).parent))  # the worker process gets it too
from scripted_engine import COUNT

FACTORY = "scripted_engine:Scripted"
PATIENCE = 60  # seconds; a bound for hangs, not a measure
numbers = itertools.count()


def request(
    kind: int = COUNT, max_tokens: int = 5, request_id: str | None = None, **more: Any
) -> GenerateRequest:
    return GenerateRequest(
        id=request_id or f"r{next(numbers)}",
        prompt_ids=(kind, 1),
        params=SamplingParams(max_tokens=max_tokens),
        **more,
    )


async def read(engine: WorkerEngine, asked: GenerateRequest) -> list[TokenEvent]:
    async with asyncio.timeout(PATIENCE):
        return [event async for event in engine.generate(asked)]


def tokens(events: list[TokenEvent]) -> list[int]:
    return [token for event in events for token in event.token_ids]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not condition():
            await asyncio.sleep(0.01)
