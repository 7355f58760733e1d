"""The engine on a thread: events in order, on the event loop; refusals, faults, early leave, close."""

import asyncio
import threading
import time
from typing import Any

import pytest

from engine.client_local import LocalEngine
from engine.config import EngineConfig
from engine.types import (
    EngineUnavailable,
    GenerateRequest,
    InvalidRequest,
    ModelInfo,
    SamplingParams,
    StepStats,
    TokenEvent,
)

CONFIG = EngineConfig(target="scripted")
OK, RAISE, REFUSE = range(3)  # by first prompt id


class Scripted:
    """Counts to max_tokens for every request, a step at a time."""

    def __init__(self, config: EngineConfig) -> None:
        self.threads = {threading.get_ident()}
        self.calls: list[tuple[str, str]] = []
        self.open: dict[str, tuple[GenerateRequest, int]] = {}
        self.info = ModelInfo(
            target=config.target, draft=None, vocab_size=9, max_model_len=10**6, eos_token_ids=(),
            bos_token_id=None, dtype="float32", device="cpu", kv_blocks=1, block_size=16,
            drafters=("none",), default_drafter="none", default_policy="none", default_options={}, max_sl=0,
        )  # fmt: skip

    def add(self, request: GenerateRequest) -> None:
        self.calls.append(("add", request.id))
        if request.prompt_ids[0] == REFUSE:
            raise InvalidRequest("no", "prompt", "why")
        self.open[request.id] = (request, 0)

    def abort(self, request_id: str) -> None:
        self.calls.append(("abort", request_id))
        self.open.pop(request_id, None)

    def cut(self, request_id: str, n_tokens: int) -> None:
        self.calls.append((f"cut {n_tokens}", request_id))
        self.open.pop(request_id, None)

    def close(self) -> None:
        return None

    def has_work(self) -> bool:
        return bool(self.open)

    def step(self) -> tuple[list[TokenEvent], StepStats]:
        self.threads.add(threading.get_ident())
        time.sleep(0.001)
        events = []
        for request, count in list(self.open.values()):
            if request.prompt_ids[0] == RAISE and count == 2:
                raise RuntimeError("broken step")
            last = count + 1 == request.params.max_tokens
            events.append(
                TokenEvent(id=request.id, token_ids=(count,), finish_reason="length" if last else None)
            )
            self.open[request.id] = (request, count + 1)
            if last:
                del self.open[request.id]
        return events, StepStats(rows=len(events))


class Recorded:
    """A factory that keeps the engine it made."""

    engine: Scripted

    def __call__(self, config: EngineConfig) -> Scripted:
        self.engine = Scripted(config)
        return self.engine


def request(name: str, kind: int = OK, max_tokens: int = 5, **more: Any) -> GenerateRequest:
    return GenerateRequest(id=name, prompt_ids=(kind,), params=SamplingParams(max_tokens=max_tokens), **more)


async def read(engine: LocalEngine, asked: GenerateRequest) -> list[TokenEvent]:
    async with asyncio.timeout(30):
        return [event async for event in engine.generate(asked)]


async def test_requests_are_served_together_on_one_other_thread():
    made = Recorded()
    engine = LocalEngine(CONFIG, made)
    with pytest.raises(EngineUnavailable, match="not started"):
        _ = engine.info
    await engine.start()
    assert (engine.state, engine.restarts, engine.info.target) == ("ready", 0, "scripted")
    heard: list[int] = []
    threads: set[int] = set()

    def listen(stats: StepStats, events: list[TokenEvent]) -> None:
        assert stats.rows == len(events)
        heard.append(stats.rows)
        threads.add(threading.get_ident())

    engine.on_step(listen)
    for events in await asyncio.gather(*(read(engine, request(f"r{i}", max_tokens=20)) for i in range(5))):
        assert [event.token_ids for event in events] == [(k,) for k in range(20)]
        assert events[-1].finish_reason == "length"
    assert sum(heard) == 100 and max(heard) > 1
    assert threads == {threading.get_ident()}
    assert len(made.engine.threads) == 1 and made.engine.threads.isdisjoint(threads)
    await engine.close()


async def test_a_listener_that_raises_stops_nobody(caplog: pytest.LogCaptureFixture):
    engine = LocalEngine(CONFIG, Scripted)
    await engine.start()
    engine.on_step(lambda stats, events: 1 // 0)
    assert len(await read(engine, request("r"))) == 5
    assert "ZeroDivisionError" in caplog.text
    await engine.close()


async def test_refusals():
    made = Recorded()
    engine = LocalEngine(CONFIG, made)
    await engine.start()
    stream = engine.generate(request("same", max_tokens=10**5))
    await anext(stream)
    for asked, message in (
        (request("a", REFUSE), "no"),
        (request("b", 9), "vocabulary"),
        (request("same"), "same"),
    ):
        with pytest.raises(InvalidRequest, match=message):
            await read(engine, asked)
    for asked in (request("b", 9), request("same")):
        with pytest.raises(InvalidRequest):
            await engine.check(asked)
    assert made.engine.calls == [("add", "same"), ("add", "a")]  # the others never got there
    assert (await anext(stream)).finish_reason is None
    await stream.aclose()
    assert len(await read(engine, request("a"))) == 5  # a refused id is free
    await engine.close()


async def test_leaving_early_aborts_and_frees_the_id_at_once():
    made = Recorded()
    engine = LocalEngine(CONFIG, made)
    await engine.start()
    stream = engine.generate(request("r", max_tokens=10**5))
    await anext(stream)
    time.sleep(0.02)  # events of the old request pile up behind the busy event loop
    await stream.aclose()
    assert [event.token_ids for event in await read(engine, request("r"))] == [(k,) for k in range(5)]
    assert made.engine.calls == [("add", "r"), ("abort", "r"), ("add", "r")]
    await engine.close()


async def test_a_cut_ends_the_iteration_and_the_engine_says_when_nothing_more_comes():
    made = Recorded()
    engine = LocalEngine(CONFIG, made)
    steps: list[tuple[StepStats, list[TokenEvent]]] = []
    engine.on_step(lambda stats, events: steps.append((stats, events)))
    await engine.start()
    stream = engine.generate(request("r", max_tokens=10**5))
    first = await anext(stream)
    time.sleep(0.02)  # steps that the reader has not heard of
    engine.cut("r", len(first.token_ids))
    engine.cut("r", 1)  # it is no longer open
    engine.cut("unknown", 1)
    for _ in range(10**5):  # what came before the cut may still be read
        if await anext(stream, None) is None:
            break
    else:
        pytest.fail("the iteration goes on")
    assert len(await read(engine, request("r"))) == 5  # its id is free
    assert made.engine.calls == [("add", "r"), ("cut 1", "r"), ("add", "r")]
    (last,) = (i for i, (stats, _) in enumerate(steps) if stats.left == ("r",))
    of_both = [event.token_ids[0] for _, events in steps for event in events]
    cut_at = sum(len(events) for _, events in steps[: last + 1])
    assert of_both[:cut_at] == list(range(cut_at)) and of_both[cut_at:] == list(range(5))
    await engine.close()


async def test_a_fault_fails_what_is_open_and_the_engine_is_dead(caplog: pytest.LogCaptureFixture):
    engine = LocalEngine(CONFIG, Scripted)
    await engine.start()
    other = asyncio.create_task(read(engine, request("other", max_tokens=10**5)))
    await asyncio.sleep(0.02)
    seen: list[TokenEvent] = []
    with pytest.raises(EngineUnavailable, match="broken step"):
        async for event in engine.generate(request("bad", RAISE)):
            seen.append(event)
    assert [event.token_ids for event in seen] == [(0,), (1,)]
    with pytest.raises(EngineUnavailable, match="broken step"):
        await other
    assert engine.state == "dead"
    with pytest.raises(EngineUnavailable, match="broken step"):
        await read(engine, request("late"))
    assert any(record.exc_info for record in caplog.records)
    await engine.close()
    assert engine.state == "closed"


async def test_what_cannot_load_says_why():
    def factory(config: EngineConfig) -> Scripted:
        raise ValueError(f"unknown model {config.target!r}")

    engine = LocalEngine(CONFIG, factory)
    with pytest.raises(EngineUnavailable, match="unknown model 'scripted'"):
        await engine.start()
    assert engine.state == "dead"
    await engine.close()


async def test_close_fails_the_waiters_and_ends_the_thread():
    before = threading.active_count()
    engine = LocalEngine(CONFIG, Scripted)
    await engine.start()
    reader = asyncio.create_task(read(engine, request("r", max_tokens=10**5)))
    await asyncio.sleep(0.02)
    await asyncio.gather(engine.close(), engine.close())
    with pytest.raises(EngineUnavailable, match="closed"):
        await reader
    async with asyncio.timeout(30):
        while threading.active_count() > before:
            await asyncio.sleep(0.01)
    with pytest.raises(EngineUnavailable, match="closed"):
        await read(engine, request("late"))
    with pytest.raises(RuntimeError, match="once"):
        await engine.start()


async def test_close_does_not_wait_for_ever(caplog: pytest.LogCaptureFixture):
    let_go = threading.Event()

    class Stuck(Scripted):
        def step(self) -> tuple[list[TokenEvent], StepStats]:
            let_go.wait()
            return super().step()

    before = threading.active_count()
    engine = LocalEngine(CONFIG, Stuck, grace=0.1)
    await engine.start()
    reader = asyncio.create_task(read(engine, request("r")))
    await asyncio.sleep(0.02)
    await engine.close()
    assert "left behind" in caplog.text
    with pytest.raises(EngineUnavailable):
        await reader
    let_go.set()
    async with asyncio.timeout(30):
        while threading.active_count() > before:
            await asyncio.sleep(0.01)


def test_a_thread_ends_with_its_event_loop():
    async def forget() -> None:
        await LocalEngine(CONFIG, Scripted).start()

    before = threading.active_count()
    asyncio.run(forget())
    deadline = time.monotonic() + 30
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert threading.active_count() == before
