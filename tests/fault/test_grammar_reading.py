"""Grammars on their way into the engine: sent once, read beside the steps, asked for again once dropped."""

from __future__ import annotations

import asyncio
import itertools
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from engine.client_base import ClientBase
from engine.client_local import LocalEngine
from engine.client_worker import WorkerEngine
from engine.config import EngineConfig
from engine.messages import Add, Grammar, ToEngine
from engine.reading import Reading, Unread
from engine.types import (
    CompiledGrammar,
    EngineUnavailable,
    GenerateRequest,
    InvalidRequest,
    SamplingParams,
    TokenEvent,
)

sys.path.insert(0, str(Path(__file__).parent))  # the worker process gets it too
from grammar_engine import BAD, SECONDS, SLOW, Reader

CONFIG = EngineConfig(target="ok")
numbers = itertools.count()


class Local(LocalEngine):
    sent: list[ToEngine]

    def _send(self, message: ToEngine) -> None:
        self.sent.append(message)
        super()._send(message)


class Worker(WorkerEngine):
    sent: list[ToEngine]

    def _send(self, message: ToEngine) -> None:
        self.sent.append(message)
        super()._send(message)


@pytest.fixture(params=["thread", "process"])
async def engine(request: pytest.FixtureRequest) -> AsyncIterator[Local | Worker]:
    made: Local | Worker
    if request.param == "thread":
        made = Local(CONFIG, Reader)
    else:
        made = Worker(CONFIG, "grammar_engine:Reader", restart_delay=0.05, grace=5.0)
    made.sent = []
    await made.start()
    yield made
    await made.close()


def asked(key: str | None = None, data: bytes = b"some", max_tokens: int = 3) -> GenerateRequest:
    grammar = None if key is None else CompiledGrammar(key, data)
    params = SamplingParams(max_tokens=max_tokens, grammar=grammar)
    return GenerateRequest(id=f"g{next(numbers)}", prompt_ids=(0, 1), params=params)


async def read(engine: ClientBase, request: GenerateRequest) -> list[TokenEvent]:
    async with asyncio.timeout(60):
        return [event async for event in engine.generate(request)]


def grammars(engine: Local | Worker) -> list[str]:
    assert not any(each.request.params.grammar.data for each in engine.sent if _burdens(each))
    return [each.grammar.key for each in engine.sent if isinstance(each, Grammar)]


def _burdens(message: ToEngine) -> bool:
    return isinstance(message, Add) and message.request.params.grammar is not None


async def test_a_grammar_is_sent_and_read_once_for_many_choices_and_requests(engine: Local | Worker):
    for _ in range(2):
        answers = await asyncio.gather(*(read(engine, asked("a")) for _ in range(8)))
        assert [answer[-1].finish_reason for answer in answers] == ["length"] * 8
        assert {event.token_ids[0] for answer in answers for event in answer} == {1}
    assert grammars(engine) == ["a"]


async def test_what_the_engine_dropped_is_sent_again(engine: Local | Worker):
    for key in ("a", "b", "a"):
        assert len(await read(engine, asked(key))) == 3
    assert grammars(engine) == ["a", "b", "a"]


async def test_others_go_on_while_a_grammar_is_read(engine: Local | Worker):
    other = engine.generate(asked(max_tokens=10**5))
    await anext(other)
    waiting = asyncio.create_task(read(engine, asked("s", SLOW)))
    begin = asyncio.get_running_loop().time()
    gaps, last = [], begin
    while not waiting.done():
        await anext(other)
        now = asyncio.get_running_loop().time()
        gaps.append(now - last)
        last = now
    assert last - begin > 0.9 * SECONDS
    assert max(gaps) < 0.5 * SECONDS and len(gaps) > 50
    assert len(waiting.result()) == 3
    await other.aclose()


async def test_small_ones_do_not_wait_for_all_large_ones(engine: Local | Worker):
    ended = []

    async def one(key: str, data: bytes) -> None:
        await read(engine, asked(key, data))
        ended.append(key)

    async with asyncio.TaskGroup() as group:
        for i in range(3):
            group.create_task(one(f"s{i}", SLOW))
        await asyncio.sleep(0.1 * SECONDS)
        group.create_task(one("a", b"x"))
    assert ended.index("a") <= 1 and len(ended) == 4


async def test_what_is_no_grammar_is_refused_to_all_who_wait(engine: Local | Worker):
    results = await asyncio.gather(
        *(read(engine, asked("bad", BAD)) for _ in range(3)), return_exceptions=True
    )
    for result in results:
        assert isinstance(result, InvalidRequest)
        assert (result.param, result.message) == ("grammar", "that is no grammar")
    assert len(await read(engine, asked("good"))) == 3


async def test_whoever_leaves_while_waiting_is_forgotten(engine: Local | Worker):
    request = asked("s", SLOW)
    leaving = asyncio.create_task(read(engine, request))
    staying = asyncio.create_task(read(engine, asked("s", SLOW)))
    await asyncio.sleep(0.3 * SECONDS)
    leaving.cancel()
    await asyncio.gather(leaving, return_exceptions=True)
    assert len(await staying) == 3
    assert len(await read(engine, request)) == 3  # its id is free
    assert grammars(engine) == ["s"]
    both = [asyncio.create_task(read(engine, asked("t", b"other"))) for _ in range(2)]
    await asyncio.sleep(0)
    for each in both:  # gone before the engine could ask
        each.cancel()
    await asyncio.gather(*both, return_exceptions=True)
    assert len(await read(engine, asked("t", b"other"))) == 3


async def test_after_a_restart_it_is_sent_anew():
    engine = Worker(CONFIG, "grammar_engine:Reader", restart_delay=0.05, grace=1.0)
    engine.sent = []
    await engine.start()
    try:
        await read(engine, asked("a"))
        waiting = asyncio.create_task(read(engine, asked("s", SLOW)))
        await asyncio.sleep(0.3 * SECONDS)
        os.kill(engine.pid or 0, 9)
        with pytest.raises(EngineUnavailable):
            await waiting
        async with asyncio.timeout(60):
            while engine.state != "ready":
                await asyncio.sleep(0.01)
        assert len(await read(engine, asked("a"))) == 3
        assert grammars(engine) == ["a", "s", "a"]
    finally:
        await engine.close()


def test_what_nobody_waits_for_is_not_read():
    reading, reader = Reading(), Reader(CONFIG)
    request = Add(1, asked("a"))
    assert reading.wait_for(Unread(reader, "a"), request)
    assert not reading.wait_for(Unread(reader, "a"), Add(2, asked("a")))
    reading.leave(1)
    reading.leave(2)
    reading.leave(2)
    reading.take(CompiledGrammar("a", b"late"))
    assert not reading.busy and reading.finished(0.0) == ([], None)
    assert reading.wait_for(Unread(reader, "a"), request)  # it is asked for anew
    reading.take(CompiledGrammar("a", b"now"))
    reading.take(CompiledGrammar("a", b"twice"))
    assert reading.finished(10.0) == ([request], None) and reader.reads == 1
    assert not reading.busy
    reading.close()
