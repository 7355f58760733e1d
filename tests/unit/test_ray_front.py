"""The front of Ray Serve: what a client sees when replicas answer, are full, fail or die."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from starlette.types import Message

pytest.importorskip("ray.serve", reason="Ray is not installed: pip install -e '.[ray]'")
sys.path.insert(0, str(Path(__file__).parents[2] / "deploy" / "ray"))

from disco_ray.call import Call
from disco_ray.front import FrontApp
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError

HEADERS = [(b"content-type", b"text/event-stream"), (b"x-request-id", b"of-the-app")]
START = {"type": "http.response.start", "status": 200, "headers": HEADERS}


def part(body: bytes, more: bool = True) -> Message:
    return {"type": "http.response.body", "body": body, "more_body": more}


class Answers:
    """Batches as a replica gives them; an exception among them is raised, a float waited for."""

    def __init__(self, *batches: Any) -> None:
        self._batches = iter(batches)
        self.cancelled = False
        self.calls: list[Call] = []

    def submit(self, call: Call) -> Answers:
        self.calls.append(call)
        return self

    def __aiter__(self) -> AsyncIterator[list[Message]]:
        return self

    async def __anext__(self) -> list[Message]:
        for batch in self._batches:
            if isinstance(batch, Exception):
                raise batch
            if isinstance(batch, float):
                await asyncio.sleep(batch)
                continue
            return list(batch)
        raise StopAsyncIteration

    def cancel(self) -> None:
        self.cancelled = True


class Client:
    """One request to a front. `leave`: when it has this many messages, it disconnects."""

    def __init__(self, leave: int | None = None) -> None:
        self.messages: list[Message] = []
        self.counted: list[str] = []  # codes that the front told its metrics
        self._leave = leave
        self._left = asyncio.Event()

    async def ask(
        self,
        answers: Answers,
        *,
        path: str = "/v1/completions",
        body: tuple[bytes, ...] = (b'{"prompt": "Hello"}',),
        limit: int = 1000,
        seconds: float = 5.0,
    ) -> Client:
        incoming = [
            {"type": "http.request", "body": each, "more_body": i + 1 < len(body)}
            for i, each in enumerate(body)
        ]

        async def receive() -> Message:
            if incoming:
                return incoming.pop(0)
            await self._left.wait()
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            self.messages.append(message)
            if len(self.messages) == self._leave:
                self._left.set()

        scope = {"type": "http", "method": "POST", "path": path, "headers": []}
        await FrontApp(answers.submit, limit, seconds, self.counted.append)(scope, receive, send)
        return self

    @property
    def status(self) -> int:
        return int(self.messages[0]["status"])

    @property
    def text(self) -> bytes:
        return b"".join(each.get("body", b"") for each in self.messages)

    @property
    def error(self) -> dict[str, Any]:
        told: dict[str, Any] = json.loads(self.text)["error"]
        return told


async def test_the_answer_is_passed_on_and_the_body_is_whole() -> None:
    answers = Answers([], [START, part(b"a")], [part(b"b", more=False)])
    client = await Client().ask(answers, body=(b'{"prompt": ', b'"Hello"}'))
    assert (client.status, client.text) == (200, b"ab")
    (call,) = answers.calls
    assert call.body == b'{"prompt": "Hello"}' and call.affinity is not None
    assert b"x-request-id" not in dict(client.messages[0]["headers"])  # Ray's proxy adds the same one


async def test_a_replica_that_dies_before_its_answer_is_a_503() -> None:
    client = await Client().ask(Answers([], RayActorError()))
    assert (client.status, client.error["code"]) == (503, "replica_died")
    assert dict(client.messages[0]["headers"])[b"retry-after"]
    assert set(client.error) == {"message", "type", "param", "code"}


async def test_a_replica_that_dies_in_a_stream_is_its_last_event() -> None:
    client = await Client().ask(Answers([], [START, part(b"data: 1\n\n")], RayActorError()))
    head, last = client.text.split(b"\n\n", 1)
    assert (client.status, head) == (200, b"data: 1")
    assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == "replica_died"
    assert client.messages[-1]["more_body"] is False and b"[DONE]" not in client.text


async def test_a_responses_stream_ends_with_its_own_kind_of_event() -> None:
    event = b'event: response.created\ndata: {"sequence_number": 0}\n\n'
    answers = Answers([], [START, part(event)], RayActorError())
    client = await Client().ask(answers, path="/v1/responses")
    kind, data = client.text.removeprefix(event).strip().split(b"\n")
    told = json.loads(data.removeprefix(b"data: "))
    assert kind == b"event: error"
    assert (told["type"], told["code"], told["sequence_number"]) == ("error", "replica_died", 1)


async def test_a_half_body_that_is_no_stream_breaks_off() -> None:
    plain = {**START, "headers": [(b"content-type", b"application/json")]}
    with pytest.raises(Exception, match="died"):
        await Client().ask(Answers([], [plain, part(b'{"a"')], RayActorError()))


async def test_a_death_after_the_last_byte_is_nobodys_business() -> None:
    client = await Client().ask(Answers([], [START, part(b"all", more=False)], RayActorError()))
    assert client.text == b"all"


@pytest.mark.parametrize(
    ("batches", "status", "code"),
    [
        ((BackPressureError(9, 8),), 503, "no_replica"),
        ((2.0, []), 503, "no_replica"),
        (([], RayTaskError("answer", "traceback", ValueError("secret"))), 500, "internal_error"),
    ],
)
async def test_other_faults_have_a_clear_answer(batches: tuple[Any, ...], status: int, code: str) -> None:
    answers = Answers(*batches)
    client = await Client().ask(answers, seconds=0.1)
    assert (client.status, client.error["code"]) == (status, code)
    assert b"secret" not in client.text and answers.cancelled


async def test_errors_of_the_front_are_counted_and_others_are_not() -> None:
    died = Answers([], [START, part(b"data: 1\n\n")], RayActorError())
    assert (await Client().ask(died)).counted == ["replica_died"]
    assert (await Client().ask(Answers(BackPressureError(9, 8)))).counted == ["no_replica"]
    assert (await Client().ask(Answers(), body=(b"x" * 2000,))).counted == ["request_too_large"]
    of_the_replica = [{**START, "status": 503}, part(b"{}", more=False)]
    assert (await Client().ask(Answers([], of_the_replica))).counted == []
    late = Answers([], [START, part(b"all", more=False)], RayActorError())
    assert (await Client().ask(late)).counted == []


async def test_the_wait_for_room_does_not_bound_the_answer() -> None:
    client = await Client().ask(Answers([], 0.3, [START, part(b"a", more=False)]), seconds=0.1)
    assert client.text == b"a"


async def test_a_client_that_leaves_cancels_the_work() -> None:
    answers = Answers([], [START, part(b"data: 1\n\n")], 30.0)
    client = await asyncio.wait_for(Client(leave=2).ask(answers), 5)
    assert answers.cancelled and len(client.messages) == 2


async def test_a_cancelled_front_cancels_the_work() -> None:
    answers = Answers([], 30.0)
    asking = asyncio.create_task(Client().ask(answers))
    await asyncio.sleep(0.05)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    assert answers.cancelled


async def test_a_body_that_is_too_large_is_not_taken_in() -> None:
    answers = Answers([])
    client = await Client().ask(answers, body=(b"x" * 60, b"y" * 60), limit=100)
    assert (client.status, client.error["code"]) == (413, "request_too_large")
    assert not answers.calls


async def test_metrics_are_refused_since_they_would_be_of_any_replica() -> None:
    answers = Answers([])
    client = await Client().ask(answers, path="/metrics", body=(b"",))
    assert client.status == 404 and "port" in client.error["message"] and not answers.calls


async def test_a_websocket_is_closed() -> None:
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        return {"type": "websocket.connect"}

    await FrontApp(Answers().submit, 1, 1.0, lambda _: None)(
        {"type": "websocket", "path": "/"}, receive, send
    )
    assert [each["type"] for each in sent] == ["websocket.close"]


async def test_the_lifespan_is_answered() -> None:
    sent: list[str] = []
    told = iter([{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}])

    async def send(message: Message) -> None:
        sent.append(message["type"])

    async def receive() -> Message:
        return next(told)

    await FrontApp(Answers().submit, 1, 1.0, lambda _: None)({"type": "lifespan"}, receive, send)
    assert sent == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
