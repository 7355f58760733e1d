"""instructor: pydantic models out of tools and out of JSON schemas."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any, Literal

import instructor
import openai
from instructor.core.exceptions import InstructorRetryException
from pydantic import BaseModel, Field
from served import (
    BASE_URL,
    KEY,
    LONG_TOKENS,
    MODEL,
    SPECULATION,
    USER,
    Session,
    assert_at_work,
    assert_idle,
    loop,
    raised,
)

session = Session("instructor", "instructor", "openai")
MODES = (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA)


class Weather(BaseModel):
    """The weather of a city."""

    city: Literal["Paris", "Rome", "Oslo"]
    sunny: bool
    wind: Literal["calm", "breeze", "storm"]


class Story(BaseModel):
    """A story that takes minutes on a CPU."""

    chapters: Annotated[list[Literal["river", "sea", "hill"]], Field(min_length=1000)]


def client(mode: instructor.Mode, key: str = KEY) -> instructor.Instructor:
    inner = openai.OpenAI(base_url=BASE_URL, api_key=key, max_retries=0, timeout=120)
    return instructor.from_openai(inner, mode=mode)


def ask(mode: instructor.Mode, kind: Any = Weather, **fields: Any) -> Any:
    usual = {"model": MODEL, "messages": USER, "temperature": 0, "max_tokens": 200, "max_retries": 0}
    return client(mode).create(response_model=kind, **{**usual, **fields})


@session.check("plain")
def without_a_model_it_is_chat() -> None:
    answer = ask(instructor.Mode.TOOLS, None, max_tokens=16)
    assert answer.choices[0].message.content


@session.check("structured")
def a_model_in_each_mode() -> None:
    for mode in MODES:
        assert isinstance(ask(mode), Weather), mode


@session.check("tools")
def an_iterable_is_a_stream_of_models() -> None:
    usual = {"model": MODEL, "messages": USER, "temperature": 0, "max_tokens": 150}
    found = []
    for weather in client(instructor.Mode.TOOLS).create_iterable(response_model=Weather, **usual):
        found.append(weather)
        if len(found) == 2:  # so small a model might never end the list
            break
    assert found and all(isinstance(weather, Weather) for weather in found)


@session.check("streaming")
def partial_models_end_as_the_answer() -> None:
    for mode in MODES:
        usual = {"model": MODEL, "messages": USER, "temperature": 0, "max_tokens": 200}
        parts = list(client(mode).create_partial(response_model=Weather, **usual))
        assert len(parts) > 2 and parts[-1].model_dump() == ask(mode).model_dump(), mode


@session.check("usage")
def the_completion_comes_too() -> None:
    for mode in MODES:
        weather, raw = client(mode).create_with_completion(
            response_model=Weather, model=MODEL, messages=USER, temperature=0, max_tokens=200
        )
        assert isinstance(weather, Weather) and raw.usage.completion_tokens > 0
        assert raw.usage.total_tokens == raw.usage.prompt_tokens + raw.usage.completion_tokens


@session.check("extra fields")
def speculation_changes_no_answer() -> None:
    for mode in MODES:
        spoken = ask(mode, extra_body={"speculation": SPECULATION})
        alone = ask(mode, extra_body={"speculation": {"drafter": "none"}})
        assert spoken.model_dump() == alone.model_dump(), mode


@session.check("errors")
def errors_say_what_the_server_said() -> None:
    def cause(call: Any) -> BaseException:
        error = raised((InstructorRetryException, openai.APIStatusError), call)
        while not isinstance(error, openai.APIStatusError):
            error = error.__cause__ or error.__context__ or error.args[0]
        return error

    wrong = client(instructor.Mode.TOOLS, "wrong")
    usual: dict[str, Any] = {"response_model": Weather, "messages": USER, "max_retries": 0}
    assert isinstance(cause(lambda: wrong.create(model=MODEL, **usual)), openai.AuthenticationError)
    right = client(instructor.Mode.TOOLS)
    assert isinstance(cause(lambda: right.create(model="gpt-9", **usual)), openai.NotFoundError)
    error = cause(lambda: right.create(model=MODEL, top_p=3, **usual))
    assert isinstance(error, openai.BadRequestError) and error.param == "top_p"


@session.check("cancellation")
def a_cancelled_task_stops_the_work() -> None:
    async def leave() -> None:
        inner = openai.AsyncOpenAI(base_url=BASE_URL, api_key=KEY, max_retries=0)
        many = instructor.from_openai(inner, mode=instructor.Mode.JSON_SCHEMA)
        usual: dict[str, Any] = {"model": MODEL, "messages": USER, "max_tokens": LONG_TOKENS}
        task = asyncio.create_task(many.create(response_model=Story, max_retries=0, **usual))
        await asyncio.to_thread(assert_at_work)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    loop.run(leave())
    assert_idle()


if __name__ == "__main__":
    session.finish()
