"""pydantic-ai: agents with text, tools, tool output and native output."""

from __future__ import annotations

import asyncio
from typing import Any, Literal

from openai import AsyncOpenAI
from pydantic import BaseModel
from pydantic_ai import Agent, ModelHTTPError, NativeOutput
from pydantic_ai.direct import model_request_sync
from pydantic_ai.messages import ModelRequest, ModelResponse, ToolCallPart, ToolReturnPart
from pydantic_ai.models import ModelRequestParameters
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider
from pydantic_ai.settings import ModelSettings
from pydantic_ai.tools import ToolDefinition
from served import (
    BASE_URL,
    CITY_SCHEMA,
    KEY,
    LONG,
    LONG_TOKENS,
    MODEL,
    QUESTION,
    SPECULATION,
    Session,
    assert_at_work,
    assert_idle,
    is_city,
    loop,
    raised,
)

session = Session("pydantic-ai", "pydantic-ai-slim")
TOOL = ToolDefinition(
    name="get_weather", description="The weather of a city now", parameters_json_schema=CITY_SCHEMA
)


class Weather(BaseModel):
    """The weather of a city."""

    city: Literal["Paris", "Rome", "Oslo"]
    sunny: bool


def provider(key: str = KEY) -> OpenAIProvider:
    # a client per model: an event loop closes when run_sync returns, and its connections with it
    return OpenAIProvider(openai_client=AsyncOpenAI(base_url=BASE_URL, api_key=key, max_retries=0))


def model(name: str = MODEL, key: str = KEY) -> OpenAIChatModel:
    return OpenAIChatModel(name, provider=provider(key))


def settings(**fields: Any) -> ModelSettings:
    return ModelSettings(**{"temperature": 0.0, "max_tokens": 24, **fields})  # type: ignore[typeddict-item]


def agent(output: Any = str, **fields: Any) -> Agent[None, Any]:
    return Agent(model(), output_type=output, model_settings=settings(**fields), retries=0)


@session.check("plain")
def an_agent_answers_and_remembers() -> None:
    first = agent().run_sync(QUESTION)
    assert first.output
    second = agent().run_sync("And one more?", message_history=first.all_messages())
    assert second.output and second.usage.input_tokens > first.usage.input_tokens


@session.check("plain")
def seeds_repeat_and_differ() -> None:
    texts = [agent(temperature=1.0, seed=seed).run_sync(QUESTION).output for seed in (7, 7, 8)]
    assert texts[0] == texts[1] != texts[2]


@session.check("streaming")
def stream_equals_the_answer() -> None:
    async def deltas() -> tuple[str, int]:
        async with agent().run_stream(QUESTION) as run:
            text = "".join([part async for part in run.stream_text(delta=True, debounce_by=None)])
            return text, run.usage.output_tokens

    whole = agent().run_sync(QUESTION)
    assert loop.run(deltas()) == (whole.output, whole.usage.output_tokens)


@session.check("usage")
def counts_add_up() -> None:
    usage = agent(max_tokens=9).run_sync(QUESTION).usage
    assert usage.output_tokens == 9 and usage.requests == 1
    assert usage.total_tokens == usage.input_tokens + 9


@session.check("extra fields")
def speculation_changes_no_text() -> None:
    spoken = agent(extra_body={"speculation": SPECULATION}).run_sync(QUESTION).output
    assert spoken == agent(extra_body={"speculation": {"drafter": "none"}}).run_sync(QUESTION).output


@session.check("tools")
def required_and_named_calls_and_the_way_back() -> None:
    parameters = ModelRequestParameters(function_tools=[TOOL])
    ask = ModelRequest.user_text_prompt("What is the weather in Rome, in celsius?")
    for choice in ("required", ["get_weather"]):
        forced = settings(tool_choice=choice, max_tokens=200, parallel_tool_calls=False)
        answer = model_request_sync(
            model(), [ask], model_settings=forced, model_request_parameters=parameters
        )
        (call,) = [part for part in answer.parts if isinstance(part, ToolCallPart)]
        assert call.tool_name == "get_weather" and is_city(call.args_as_dict())
    assert isinstance(answer, ModelResponse)
    result = ModelRequest(parts=[ToolReturnPart("get_weather", {"degrees": 21}, call.tool_call_id)])
    back = model_request_sync(
        model(),
        [ask, answer, result],
        model_settings=settings(),
        model_request_parameters=parameters,
    )
    assert back.parts


@session.check("structured")
def by_tool_and_by_schema() -> None:
    for output in (Weather, NativeOutput(Weather)):
        assert isinstance(agent(output, max_tokens=200).run_sync(QUESTION).output, Weather), output


@session.check("structured")
def streamed_output_ends_as_the_answer() -> None:
    async def last(output: Any) -> Any:
        async with agent(output, max_tokens=200).run_stream(QUESTION) as run:
            return [part async for part in run.stream_output(debounce_by=None)][-1]

    for output in (Weather, NativeOutput(Weather)):
        assert loop.run(last(output)) == agent(output, max_tokens=200).run_sync(QUESTION).output


@session.check("errors")
def errors_carry_the_status() -> None:
    for bad, status in ((model(key="wrong"), 401), (model("gpt-9"), 404)):
        error = raised(ModelHTTPError, lambda m=bad: Agent(m).run_sync("x"))
        assert error.status_code == status
    error = raised(ModelHTTPError, lambda: agent(top_p=3.0).run_sync("x"))
    assert error.status_code == 400 and error.body["param"] == "top_p"


@session.check("cancellation")
def leaving_the_stream_stops_the_work() -> None:
    async def leave() -> None:
        long = agent(max_tokens=LONG_TOKENS, extra_body={"ignore_eos": True})
        task = asyncio.create_task(long.run(LONG))
        await asyncio.to_thread(assert_at_work)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    loop.run(leave())
    assert_idle()


@session.check("responses")
def the_responses_api_answers() -> None:
    through = Agent(OpenAIResponsesModel(MODEL, provider=provider()), model_settings=settings())
    assert through.run_sync(QUESTION).output == agent().run_sync(QUESTION).output


if __name__ == "__main__":
    session.finish()
