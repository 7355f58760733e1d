"""The core of `disco-serve bench`: what is sent when, and what is read."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from dataclasses import replace
from statistics import mean
from typing import Any

import numpy as np
import pytest
from fake_openai import CHUNKS, FakeOpenAI, serving

from server.bench import exchange
from server.bench.exchange import Record
from server.bench.figures import level_of
from server.bench.load import Load, LoadStopped, Share, drive
from server.bench.processes import send

PROMPTS = tuple(f"prompt {i}" for i in range(100))


@pytest.fixture
def fake() -> Iterator[FakeOpenAI]:
    with serving() as fake:
        yield fake


def load(
    fake: FakeOpenAI, model: str = "good", tokens: int = 5, path: str = "completions", **more: Any
) -> Load:
    usage = {"include_usage": True, **more.pop("usage", {})}
    fields = {"model": model, "max_tokens": tokens, "stream": True, "stream_options": usage}
    given: dict[str, Any] = {"requests": 4, **more}
    if "rate" not in given:
        given = {"streams": 2, **given}
    return Load(fake.url, path, PROMPTS, fields, **given)


def only(fake: FakeOpenAI, model: str, **more: Any) -> Record:
    (record,) = send(load(fake, model, streams=1, requests=1, **more)).records
    return record


# ---- what is read


def test_a_good_answer(fake: FakeOpenAI) -> None:
    record = only(fake, "good")
    assert (record.error, record.chunks, record.tokens, record.prompt_tokens) == (None, 3, 5, 7)
    assert record.counted == "usage" and not record.by_token and len(record.gaps) == 2
    assert record.first is not None and record.last is not None and record.ttft is not None
    assert record.sent < record.first < record.last < record.ended
    assert record.tpot == pytest.approx((record.last - record.first) / 4)
    assert sum(record.gaps) == pytest.approx(record.last - record.first)


def test_chat_counts_neither_its_role_nor_its_end(fake: FakeOpenAI) -> None:
    record = only(fake, "good", path="chat/completions")
    assert (record.error, record.chunks, record.tokens) == (None, 3, 5)
    assert record.finish_reason == "length" and len(record.gaps) == 2


def test_usage_in_every_chunk_gives_gaps_between_tokens(fake: FakeOpenAI) -> None:
    record = only(fake, "good", usage={"continuous_usage_stats": True})
    assert record.by_token and len(record.gaps) == 2 + 1  # of chunks with 2 and 1 tokens after the first
    assert record.gaps[0] == record.gaps[1]
    assert record.last is not None and record.first is not None
    assert sum(record.gaps) == pytest.approx(record.last - record.first)


def test_without_usage_chunks_are_counted_and_told(fake: FakeOpenAI) -> None:
    record = only(fake, "counts nothing")
    assert (record.error, record.tokens, record.counted, record.prompt_tokens) == (None, 3, "chunks", None)


def test_an_answer_of_nothing_but_its_end_is_one(fake: FakeOpenAI) -> None:
    record = only(fake, "good", path="chat/completions", tokens=0)
    assert record.error is None and record.first is not None and record.tokens == 0


@pytest.mark.parametrize(
    ("model", "kind", "message"),
    [
        ("full", "HTTP 429", "too many requests"),
        ("errs in the middle", "error in stream", "on fire"),
        ("errs as llama.cpp", "error in stream", "on fire"),
        ("breaks off", "broke off", "RemoteProtocolError"),
        ("ends without a word", "broke off", "[DONE]"),
        ("talks nonsense", "not a chunk", "nonsense"),
        ("says nothing", "no output", "choice"),
        ("does not stream", "not a stream", "application/json"),
    ],
)
def test_failures_have_a_kind_and_what_was_seen(
    fake: FakeOpenAI, model: str, kind: str, message: str
) -> None:
    record = only(fake, model)
    assert record.error == kind and message in record.message
    assert record.ended > record.sent


@pytest.mark.parametrize("model", [*CHUNKS, "leaps"])
@pytest.mark.parametrize("how", [{"streams": 2}, {"rate": 500.0}])
def test_what_no_server_should_say_is_a_failure_of_its_request(
    fake: FakeOpenAI, model: str, how: dict[str, Any]
) -> None:
    given = load(fake, model, **how)
    outcome = send(given)
    level_of(given, outcome, 1)
    kinds = {record.error for record in outcome.records}
    assert len(outcome.records) == 4 and len(kinds) == 1
    assert kinds <= {None} if model == "drafts nothing" else kinds <= {"not a chunk", "bad figure"}
    for record in outcome.records:
        assert record.error is None or record.message.isprintable()


@pytest.mark.parametrize("how", [{"streams": 2}, {"rate": 500.0}])
def test_any_exception_is_a_failure_of_its_request(
    fake: FakeOpenAI, how: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = replace(load(fake, **how), prompts=("good", "half a character: \ud800"))
    outcome = send(given)
    assert [each.error for each in sorted(outcome.records, key=lambda each: each.number)] == [
        None, "UnicodeEncodeError", None, "UnicodeEncodeError"
    ]  # fmt: skip

    def bad(*_: Any) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(exchange._Reader, "read", bad)
    assert {each.error for each in send(load(fake, **how)).records} == {"MemoryError"}


def test_a_line_without_end_is_not_kept(fake: FakeOpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "_LONGEST", 5)
    assert only(fake, "cut lines").error == "not a chunk"


def test_a_slow_server_times_out(fake: FakeOpenAI) -> None:
    assert only(fake, "slow", timeout=0.02).error == "timeout"


def test_nobody_there() -> None:
    gone = Load("http://127.0.0.1:9/v1", "completions", PROMPTS, {}, streams=1, requests=1)
    (record,) = send(gone).records
    assert record.error == "connect"


def test_one_failure_spoils_no_connection(fake: FakeOpenAI) -> None:
    outcome = send(load(fake, "fails every third", requests=9))
    kinds = [record.error for record in outcome.records]
    assert kinds.count("HTTP 500") == 3 and kinds.count(None) == 6


def test_a_full_server_is_not_asked_in_a_frenzy(fake: FakeOpenAI) -> None:
    outcome = send(load(fake, "full", streams=1, requests=None, seconds=0.3))  # its Retry-After is a second
    assert [record.retry_after for record in outcome.records] == [1.0]


@pytest.mark.parametrize(
    ("model", "told"),
    [
        ("llama", {"drafted": 8, "accepted": 2}),
        ("predicts", {"drafted": 4, "accepted": 3}),
    ],
)
def test_drafts_as_others_tell_them(fake: FakeOpenAI, model: str, told: dict[str, int]) -> None:
    assert only(fake, model).speculation == [told]


# ---- what is sent


def test_a_closed_loop_sends_every_request_once(fake: FakeOpenAI) -> None:
    outcome = send(load(fake, streams=3, requests=7, warmup=3, first=5))
    assert (len(outcome.records), len(outcome.warmup)) == (7, 3)
    assert {body["prompt"] for body in fake.bodies[:3]} == set(PROMPTS[5:8])
    assert sorted(body["prompt"] for body in fake.bodies) == sorted(PROMPTS[5:15])
    assert fake.most == 3 and outcome.cpu > 0 and outcome.lags


def test_several_processes_share_streams_and_requests(fake: FakeOpenAI) -> None:
    outcome = send(load(fake, streams=3, requests=8, warmup=3), processes=2)
    assert (len(outcome.records), len(outcome.warmup)) == (8, 3)
    assert sorted(body["prompt"] for body in fake.bodies) == sorted(PROMPTS[:11])
    assert fake.most == 3


def test_time_ends_a_closed_loop_and_answers_are_waited_for(fake: FakeOpenAI) -> None:
    begin = time.monotonic()
    outcome = send(load(fake, "slow", requests=None, seconds=0.3))
    assert 0.3 <= time.monotonic() - begin < 5
    assert len(outcome.records) >= 2 and all(each.error is None for each in outcome.records)
    assert max(each.sent for each in outcome.records) - min(each.sent for each in outcome.records) < 0.35


def test_an_open_loop_keeps_its_schedule(fake: FakeOpenAI) -> None:
    given = load(fake, "slow", rate=100.0, requests=20, seed=3)
    outcome = send(given)
    due = sorted(each.due or 0.0 for each in outcome.records)
    times = list(given.arrivals())
    assert np.diff(due) == pytest.approx(np.diff(times))
    assert all(each.sent >= (each.due or 0.0) for each in outcome.records)
    assert fake.most > 5  # an answer takes longer than the whole schedule


def test_arrivals_are_a_poisson_process_of_the_seed() -> None:
    def times(seed: int, **bound: Any) -> list[float]:
        given = Load("http://x", "completions", PROMPTS, {}, rate=50.0, seed=seed, **bound)
        return list(given.arrivals())

    many = times(1, requests=20_000)
    gaps = np.diff(many)
    assert mean(gaps) == pytest.approx(1 / 50, rel=0.03)
    assert np.std(gaps) == pytest.approx(1 / 50, rel=0.05)
    assert times(1, seconds=1.0) == [at for at in many if at < 1.0]
    assert times(1, requests=5) == many[:5] != times(2, requests=5)


def test_an_open_loop_over_processes_sends_each_arrival_once(fake: FakeOpenAI) -> None:
    outcome = send(load(fake, rate=200.0, requests=9, warmup=4), processes=2)
    assert (len(outcome.records), len(outcome.warmup)) == (9, 4)
    assert sorted(body["prompt"] for body in fake.bodies) == sorted(PROMPTS[:13])


async def test_every_share_warms_up(fake: FakeOpenAI) -> None:
    shares = [Share(index, 6) for index in range(6)]
    given = load(fake, rate=100.0, requests=1, warmup=8)
    outcomes = [await drive(given, share) for share in shares]
    assert sorted(each.number for outcome in outcomes for each in outcome.warmup) == list(range(8))


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("how", [{"streams": 2}, {"rate": 1000.0}])
def test_the_first_failure_can_end_all(fake: FakeOpenAI, processes: int, how: dict[str, Any]) -> None:
    given = load(fake, "fails every third", requests=400, stop_at_error=True, **how)
    with pytest.raises(LoadStopped) as stopped:
        send(given, processes)
    assert stopped.value.record.error == "HTTP 500"
    assert len(fake.bodies) < 400


async def test_what_is_cancelled_gives_what_it_has(fake: FakeOpenAI) -> None:
    task = asyncio.create_task(drive(load(fake, "slow", tokens=4, requests=1000)))
    await asyncio.sleep(0.8)
    task.cancel()
    outcome = await task
    assert outcome.interrupted and outcome.cut == 2
    assert outcome.records and all(record.error is None for record in outcome.records)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"streams": 0}, "streams"),
        ({"streams": None}, "one of streams and rate"),
        ({"rate": 1.0}, "one of streams and rate"),
        ({"streams": None, "rate": 0.0}, "rate"),
        ({"streams": None, "rate": float("nan")}, "rate"),
        ({"requests": None}, "requests or seconds"),
        ({"requests": 1}, "idle"),
        ({"seconds": 0.0}, "seconds"),
        ({"prompts": ()}, "no prompts"),
        ({"url": "http://127.0.0.1:port/v1"}, "url"),
        ({"url": "http://u:sesame@127.0.0.1:port/v1"}, "url 'http://127.0.0.1:port/v1' is not one"),
        ({"seconds": float("inf")}, "seconds"),
        ({"timeout": float("inf")}, "timeout"),
        ({"timeout": float("nan")}, "timeout"),
        ({"timeout": 1e9}, "timeout"),
        ({"api_key": "sesame\n"}, "the API key has characters"),
    ],
)
def test_loads_that_cannot_work(changed: dict[str, Any], message: str) -> None:
    given = {
        "url": "http://x",
        "path": "completions",
        "prompts": PROMPTS,
        "fields": {},
        "streams": 2,
        "requests": 2,
    }
    with pytest.raises(ValueError, match=message):
        send(Load(**{**given, **changed}))


@pytest.mark.parametrize("processes", [0, 3])
def test_processes_that_cannot_work(processes: int) -> None:
    given = Load("http://x", "completions", PROMPTS, {}, streams=2, requests=2)
    with pytest.raises(ValueError, match=f"{processes} load processes"):
        send(given, processes)
