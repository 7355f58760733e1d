"""Through the real engine: a stream adds up to the whole answer, whatever is drafted, wherever it stops."""

from __future__ import annotations

from typing import Any

import pytest
from http_support import joined
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from live_app import CONTEXT, Live, Script
from transformers import PreTrainedTokenizerFast

PATH = "/v1/completions"
CHARACTERS = "ab \n€é😀👩‍🚀🇫🇷漢字かな한e\u0301n\u0303o\u0302\u0323"
TEXTS = st.text(st.sampled_from(CHARACTERS), min_size=1, max_size=18)
SLIPS = st.frozensets(st.integers(0, CONTEXT), max_size=20)


def fields(sl: int, **more: Any) -> dict[str, Any]:
    speculation = {"drafter": "model", "policy": "static", "options": {"sl": sl}}
    return {
        "prompt": [5], "max_tokens": CONTEXT - 1, "temperature": 0, "logprobs": 0, "return_token_ids": True,
        "speculation": speculation if sl else {"drafter": "none"},
    } | more  # fmt: skip


def both(app: Live, *, accepted: int = 0, **body: Any) -> dict[str, Any]:
    """The choice of the whole answer; the stream must add up to it. `accepted`: at least so many drafts."""
    whole = app.ask(PATH, **body)
    *chunks, last = app.stream(PATH, stream_options={"include_usage": True}, **body)
    choice, parts = whole["choices"][0], [chunk["choices"][0] for chunk in chunks]
    assert "".join(part["text"] for part in parts) == choice["text"]
    assert joined(part["token_ids"] for part in parts) == choice["token_ids"]
    for key, values in choice["logprobs"].items():
        assert joined(part["logprobs"][key] for part in parts) == values
    assert [part["finish_reason"] for part in parts] == [None] * (len(parts) - 1) + [choice["finish_reason"]]
    assert all(chunk["usage"] is None for chunk in chunks) and last["usage"] == whole["usage"]
    assert whole["usage"]["completion_tokens"] == len(choice["token_ids"])
    assert whole["speculation"]["accepted"] >= accepted
    return choice


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=TEXTS, slips=SLIPS, sl=st.integers(0, 8))
def test_a_stream_adds_up(
    app: Live, script: Script, tokenizer: PreTrainedTokenizerFast, text: str, slips: frozenset[int], sl: int
) -> None:
    script.answer, script.slips = tokenizer(text, add_special_tokens=False)["input_ids"], slips
    choice = both(app, **fields(sl))
    assert choice["text"] == text


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.data(),
    before=TEXTS,
    stop=st.text(st.sampled_from(CHARACTERS), min_size=1, max_size=4),
    sl=st.integers(0, 8),
)
def test_a_stop_anywhere_in_a_block(
    app: Live,
    script: Script,
    tokenizer: PreTrainedTokenizerFast,
    data: st.DataObject,
    before: str,
    stop: str,
    sl: int,
) -> None:
    text = f"{before}{stop}{before[::-1]}"[:20]
    script.answer = tokenizer(text, add_special_tokens=False)["input_ids"]
    script.slips = data.draw(SLIPS)
    kept = text.find(stop)
    choice = both(app, **fields(sl, stop=[stop]))
    if kept < 0:
        assert choice["text"] == text
        return
    assert (choice["text"], choice["finish_reason"]) == (text[:kept], "stop")
    included = both(app, **fields(sl, stop=[stop], include_stop_str_in_output=True))
    assert included["text"] == text[: kept + len(stop)]


@pytest.mark.parametrize("sl", range(9))
def test_every_offset_of_a_stop(
    app: Live, script: Script, tokenizer: PreTrainedTokenizerFast, sl: int
) -> None:
    script.slips = frozenset()  # whole blocks are accepted: the stop falls on each place in one
    for offset in range(10):
        text = "é" * (offset // 2) + "x" * (offset % 2) + "漢!" + "tail of it"
        script.answer = tokenizer(text, add_special_tokens=False)["input_ids"]
        choice = both(app, accepted=sl > 0 and offset > 3, **fields(sl, stop="漢!"))
        assert (choice["text"], choice["finish_reason"]) == (text[: text.index("漢")], "stop")


def test_usage_sums_over_choices(app: Live, script: Script, tokenizer: PreTrainedTokenizerFast) -> None:
    script.answer, script.slips = (
        tokenizer("né 漢字", add_special_tokens=False)["input_ids"],
        frozenset({2, 5}),
    )
    one = app.ask(PATH, **fields(4))["usage"]
    three = app.ask(PATH, **fields(4, n=3))["usage"]
    assert one["completion_tokens"] == len(script.answer) + 1  # with EOS
    assert three["completion_tokens"] == 3 * one["completion_tokens"] and three["prompt_tokens"] == 1
    assert three["total_tokens"] == three["prompt_tokens"] + three["completion_tokens"]
    two = app.ask(PATH, **fields(4, prompt=[[5], [6]], n=2))["usage"]
    assert (two["prompt_tokens"], two["completion_tokens"]) == (2, 4 * one["completion_tokens"])


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=TEXTS, slips=SLIPS, sl=st.integers(0, 8), cut=st.integers(0, 20))
def test_a_chat_adds_up(
    app: Live,
    script: Script,
    tokenizer: PreTrainedTokenizerFast,
    text: str,
    slips: frozenset[int],
    sl: int,
    cut: int,
) -> None:
    text = text[:8]
    script.answer, script.slips = tokenizer(text, add_special_tokens=False)["input_ids"], slips
    messages = [{"role": "user", "content": "a"}]
    script.prompt = app.ask("/tokenize", messages=messages)["count"]
    stop = text[cut % len(text) :][:2]
    try:
        body = fields(sl, messages=messages, max_tokens=40, logprobs=True, stop=stop)
        del body["prompt"]
        whole = app.ask("/v1/chat/completions", **body)
        chunks = app.stream("/v1/chat/completions", **body)
    finally:
        script.prompt = 1
    choice, parts = whole["choices"][0], [chunk["choices"][0] for chunk in chunks]
    assert choice["message"]["content"] == text[: text.index(stop)]
    assert "".join(part["delta"].get("content", "") for part in parts) == choice["message"]["content"]
    assert joined(part.get("token_ids", []) for part in parts) == choice["token_ids"]
    told = joined(part["logprobs"]["content"] for part in parts if part["logprobs"])
    assert told == choice["logprobs"]["content"]
    assert [part["delta"].get("role") for part in parts] == ["assistant"] + [None] * (len(parts) - 1)
    assert [part["finish_reason"] for part in parts] == [None] * (len(parts) - 1) + ["stop"]
