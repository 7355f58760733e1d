"""openai (PyPI): the responses API."""

from __future__ import annotations

import json
from typing import Any, Literal

import openai
from pydantic import BaseModel
from served import (
    BASE_URL,
    CITY_SCHEMA,
    KEY,
    LONG,
    LONG_TOKENS,
    MODEL,
    QUESTION,
    SPECULATION,
    USER,
    Session,
    assert_at_work,
    assert_idle,
    is_city,
    raised,
)

session = Session("openai (PyPI), responses", "openai")
client = openai.OpenAI(base_url=BASE_URL, api_key=KEY, max_retries=0, timeout=120)
responses = client.responses
WEATHER: Any = {
    "type": "function",
    "name": "get_weather",
    "description": "The weather of a city now",
    "parameters": CITY_SCHEMA,
    "strict": True,
}


class Weather(BaseModel):
    city: Literal["Paris", "Rome", "Oslo"]
    sunny: bool


def greedy(**fields: Any) -> Any:
    usual = {"model": MODEL, "input": QUESTION, "temperature": 0, "max_output_tokens": 24, "store": False}
    return responses.create(**{**usual, **fields})


@session.check("plain")
def text_equals_the_chats() -> None:
    answer = greedy()
    chat = client.chat.completions.create(model=MODEL, messages=USER, temperature=0, max_tokens=24)
    assert answer.output_text == chat.choices[0].message.content
    assert answer.object == "response" and answer.status in ("completed", "incomplete")
    listed = greedy(input=[{"role": "user", "content": [{"type": "input_text", "text": QUESTION}]}])
    assert listed.output_text == answer.output_text


@session.check("plain")
def instructions_count() -> None:
    assert greedy(instructions="Answer in French.").usage.input_tokens != greedy().usage.input_tokens


@session.check("usage")
def counts_and_why_it_ended() -> None:
    answer = greedy(max_output_tokens=9)
    assert answer.usage.output_tokens == 9
    assert answer.usage.total_tokens == answer.usage.input_tokens + 9
    assert answer.status == "incomplete" and answer.incomplete_details.reason == "max_output_tokens"


@session.check("streaming")
def events_come_in_order_and_equal_the_answer() -> None:
    whole = greedy()
    events = list(greedy(stream=True))
    kinds = [event.type for event in events]
    assert kinds[0] == "response.created" and kinds[-1] == f"response.{whole.status}", kinds
    assert [event.sequence_number for event in events] == list(range(len(events)))
    order = ["response.output_item.added", "response.content_part.added", "response.output_text.delta",
             "response.output_text.done", "response.content_part.done",
             "response.output_item.done"]  # fmt: skip
    places = [kinds.index(kind) for kind in order]
    assert places == sorted(places), kinds
    deltas = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert deltas == whole.output_text == events[-1].response.output_text
    assert events[-1].response.usage.output_tokens == whole.usage.output_tokens


@session.check("streaming")
def stream_helper_accumulates() -> None:
    ends: Any = {"stop": ["."]}  # the helper takes a cut answer for an error
    with responses.stream(
        model=MODEL, input=QUESTION, temperature=0, max_output_tokens=60, store=False, extra_body=ends
    ) as stream:
        deltas = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        assert deltas == stream.get_final_response().output_text != ""


@session.check("tools")
def a_call_and_the_way_back() -> None:
    ask: list[Any] = [{"role": "user", "content": "What is the weather in Rome, in celsius?"}]
    for choice in ("required", {"type": "function", "name": "get_weather"}):
        answer = greedy(
            input=ask,
            tools=[WEATHER],
            tool_choice=choice,
            parallel_tool_calls=False,
            max_output_tokens=200,
        )
        (call,) = [item for item in answer.output if item.type == "function_call"]
        assert call.name == "get_weather" and call.call_id and is_city(json.loads(call.arguments))
    result = {"type": "function_call_output", "call_id": call.call_id, "output": '{"degrees": 21}'}
    back = greedy(input=[*ask, call, result], tools=[WEATHER])
    assert back.output_text


@session.check("tools")
def streamed_arguments_equal_the_answers() -> None:
    fields: dict[str, Any] = {
        "tools": [WEATHER],
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "max_output_tokens": 200,
    }
    (call,) = [item for item in greedy(**fields).output if item.type == "function_call"]
    events = list(greedy(**fields, stream=True))
    kind = "response.function_call_arguments"
    deltas = "".join(event.delta for event in events if event.type == f"{kind}.delta")
    done = [event.arguments for event in events if event.type == f"{kind}.done"]
    assert deltas == call.arguments and done == [call.arguments]


@session.check("structured")
def parse_gives_the_model() -> None:
    answer = responses.parse(
        model=MODEL, input=QUESTION, text_format=Weather, temperature=0, max_output_tokens=200, store=False
    )
    assert isinstance(answer.output_parsed, Weather)


@session.check("structured")
def a_bad_schema_is_named() -> None:
    form = {"format": {"type": "json_schema", "name": "x", "schema": {"type": "nonsense"}}}
    error = raised(openai.BadRequestError, lambda: greedy(text=form))
    assert error.param and error.param.startswith("text")


@session.check("extra fields")
def speculation_is_a_choice_per_request() -> None:
    told = greedy(extra_body={"speculation": SPECULATION}).model_extra["speculation"]
    assert told["policy"] == "static" and told["drafted"] >= told["accepted"]


@session.check("errors")
def errors_are_the_sdks_own() -> None:
    wrong = openai.OpenAI(base_url=BASE_URL, api_key="wrong", max_retries=0)
    raised(openai.AuthenticationError, lambda: wrong.responses.create(model=MODEL, input="hello"))
    error = raised(openai.NotFoundError, lambda: greedy(model="gpt-9"))
    assert error.code == "model_not_found"
    for name, value in (("temperature", 3), ("max_output_tokens", -1), ("top_p", 2)):
        error = raised(openai.BadRequestError, lambda n=name, v=value: greedy(**{n: v}))
        assert error.param == name, (name, error.param)
    image = [{"role": "user", "content": [{"type": "input_image", "image_url": "https://x/y.png"}]}]
    error = raised(openai.BadRequestError, lambda: greedy(input=image))
    assert "input_image" in str(error) and error.param.startswith("input")


@session.check("cancellation")
def a_closed_stream_stops_the_work() -> None:
    stream = greedy(input=LONG, max_output_tokens=LONG_TOKENS, stream=True, extra_body={"ignore_eos": True})
    for event in stream:
        if event.type == "response.output_text.delta":
            break
    assert_at_work()
    stream.close()
    assert_idle()


if __name__ == "__main__":
    session.finish()
