"""Memory runs out in a step: rows run in smaller parts, and only what does not fit even alone is given up."""

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_speculation_faults import alone, asked, drafted, make_engine, raising, served, texts

from engine import governing, memory_faults
from engine.client_local import LocalEngine
from engine.config import EngineConfig
from engine.core import Engine
from engine.speculation.policies.goodput import Goodput
from engine.types import EngineUnavailable, GenerateRequest, SamplingParams, SpeculationParams

GPU = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1.00 GiB free.")
HOST = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried"
)


def short_of_memory(engine: Engine, error: Exception, fits: Callable[[Any], bool]) -> list[Any]:
    """The target's passes of batches that do not fit raise; those that did."""
    runner: Any = engine._parts.target
    right, failed = runner.forward, []

    def forward(batch: Any) -> torch.Tensor:
        if not fits(batch):
            failed.append(batch)
            raise error
        return right(batch)

    runner.forward = forward
    return failed


@pytest.mark.parametrize("error", [GPU, HOST, MemoryError()], ids=["gpu", "host", "python"])
def test_rows_run_in_smaller_parts(
    error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(memory_faults, "_QUIET", 3600.0)  # however slow this machine is
    engine = make_engine()
    failed = short_of_memory(
        engine, error, lambda batch: len(batch.query_lens) == 1 and sum(batch.query_lens) < 20
    )
    events, stats = served(engine, asked())
    assert failed and texts(events) == alone()
    assert all(told[-1].finish_reason == "length" for told in events.values())
    assert stats.speculation_faults == {} and drafted(events) > 0  # drafts are kept
    assert [record.levelname for record in caplog.records] == ["WARNING"]  # however often it happens
    assert "out of memory in a step of 3 rows" in caplog.text
    assert stats.kv_blocks_used == 0


def test_a_row_that_fits_only_without_its_draft():
    engine = make_engine()
    short_of_memory(engine, GPU, lambda batch: max(batch.query_lens) == 1 or min(batch.starts) == 0)
    events, _ = served(engine, asked())
    assert texts(events) == alone() and drafted(events) == 0


def test_a_long_prompt_is_read_in_smaller_chunks():
    engine = make_engine()
    short_of_memory(engine, GPU, lambda batch: sum(batch.query_lens) <= 16)
    request = GenerateRequest(
        id="long", prompt_ids=tuple(range(3, 60)), params=SamplingParams(max_tokens=4, temperature=0.0)
    )
    events, _ = served(engine, [request])
    right, _ = served(make_engine(draft=False), [request])
    assert texts(events) == texts(right)


def test_one_that_does_not_fit_alone_fails_and_the_others_live():
    engine = make_engine()
    large = GenerateRequest(
        id="large", prompt_ids=(60,) * 9, params=SamplingParams(max_tokens=24),
        speculation=SpeculationParams(drafter="none"),
    )  # fmt: skip
    short_of_memory(engine, GPU, lambda batch: 60 not in batch.ids)
    events, stats = served(engine, [*asked()[:2], large, *asked()[2:]])
    told = events.pop("large")
    assert [event.finish_reason for event in told] == ["error"] and told[0].token_ids == ()
    assert told[0].error is not None and "memory" in told[0].error
    assert texts(events) == alone()
    assert stats.kv_blocks_used == 0 and stats.running == 0


ASKED: dict[str, Callable[[Engine], tuple[Any, str]]] = {
    "a policy's limit": lambda engine: (Goodput, "limit"),
    "a policy's reset": lambda engine: (Goodput, "reset"),
    "a drafter's room": lambda engine: (engine._parts.drafters["model"], "room"),
    "a table's load": lambda engine: (engine._tables["model"].load, "refresh"),
    "a table's limits": lambda engine: (engine._tables["model"], "limits"),
    "a look at what was learned": lambda engine: (engine._tables["model"], "heal"),
}


@pytest.mark.parametrize("at", [1, 2, 5])
@pytest.mark.parametrize("error", [HOST, MemoryError()], ids=["host", "python"])
@pytest.mark.parametrize("place", ASKED)
def test_where_limits_are_asked_nothing_is_lost_but_drafts(
    place: str, error: Exception, at: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(governing, "_LOOK", -1.0)
    engine = make_engine(policy="goodput")
    owner, name = ASKED[place](engine)
    right, calls = getattr(owner, name), 0

    def once(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at:
            raise error
        return right(*args)

    monkeypatch.setattr(owner, name, once)
    events, stats = served(engine, asked())
    assert texts(events) == alone() and stats.speculation_faults == {}
    if calls >= at:
        assert drafted(events) > 0 and caplog.text.count("out of memory where") == 1
    assert sorted(engine._governing.chains._free) == list(range(4))  # no slot is lost


def test_a_preempted_rows_state_is_forgotten(monkeypatch: pytest.MonkeyPatch):
    engine = make_engine(policy="goodput")
    table: Any = engine._tables["model"]
    monkeypatch.setattr(table, "put_aside", raising(1, HOST)(table.put_aside))
    for request in asked():
        engine.add(request)
    events: dict[str, list[Any]] = {f"r{i}": [] for i in range(3)}
    for number in range(1000):
        if not engine.has_work():
            break
        if number == 4:
            engine._scheduler._preempt(engine._scheduler.running[-1])
        for event in engine.step()[0]:
            events[event.id].append(event)
    assert texts(events) == alone() and sorted(table._free) == list(range(4))


def test_log_probabilities_that_do_not_fit_fail_their_request_alone(monkeypatch: pytest.MonkeyPatch):
    from engine import core

    right = core.score_output

    def scored(row: Any, *arguments: Any) -> Any:
        if row.seq.params.logprobs == 7 and row.seq.generated > 4:
            raise GPU
        return right(row, *arguments)

    monkeypatch.setattr(core, "score_output", scored)
    many = GenerateRequest(id="many", prompt_ids=(5, 6, 7), params=SamplingParams(max_tokens=24, logprobs=7))
    events, _ = served(make_engine(), [many, *asked()])
    assert events.pop("many")[-1].finish_reason == "error"
    assert texts(events) == alone()


async def test_at_start_it_is_told_in_one_line_with_numbers(caplog: pytest.LogCaptureFixture):
    def load(config: EngineConfig) -> Engine:
        raise HOST

    engine = LocalEngine(EngineConfig(target="large"), load)
    with pytest.raises(EngineUnavailable) as told:
        await engine.start()
    message = str(told.value)
    assert "out of memory" in message and "GiB are free" in message and "memory_fraction" in message
    assert "\n" not in message and not [r for r in caplog.records if r.levelno >= logging.ERROR]
    await engine.close()


def test_what_poisons_a_process_and_what_does_not():
    lost = [
        torch.AcceleratorError("CUDA error: device-side assert triggered"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
    ]
    assert all(memory_faults.poisons(each) and not memory_faults.is_out_of_memory(each) for each in lost)
    survived = [GPU, HOST, MemoryError()]
    assert all(memory_faults.is_out_of_memory(each) and not memory_faults.poisons(each) for each in survived)
    bug = RuntimeError("shape mismatch")
    assert not memory_faults.poisons(bug) and not memory_faults.is_out_of_memory(bug)
