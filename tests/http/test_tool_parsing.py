"""Calls found in text as it comes: every format, any chunking, and what only looks like a call."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from server.reasoning import Place, place_after, place_within
from server.tools import ToolCall, format_for, names
from server.turn import Delta, TurnReader

FORMATS = names()
FUNCTIONS = ("f", "get_weather", "a-b_c9")


def reader(name: str, *, sure: bool = False, place: Place | None = None) -> TurnReader:
    """Reads with ids that count, so that readers can be compared."""
    tool_format = format_for("", name)
    assert tool_format is not None
    count = iter(range(1000))
    tool_format.new_id = lambda: f"id{next(count)}"  # type: ignore[method-assign]
    return TurnReader(tool_format.parser(FUNCTIONS, sure=sure), place)


def read(turn: TurnReader, pieces: Sequence[str]) -> tuple[TurnReader, list[Delta]]:
    deltas = [turn.push(piece, final=False) for piece in pieces[:-1]]
    return turn, [*deltas, turn.push(pieces[-1], final=True)]


def found(turn: TurnReader) -> tuple[str, str, list[tuple[str, str, str]]]:
    calls = [(call.id, call.name, call.arguments) for call in turn.tool_calls]
    return turn.reasoning, turn.content, calls


def added_up(deltas: list[Delta]) -> tuple[str, str, list[tuple[str, str, str]]]:
    """What a client makes of the deltas."""
    calls: list[list[str]] = []
    for delta in (piece for each in deltas for piece in each.tool_calls):
        if delta.id is not None:
            assert delta.index == len(calls) and delta.name is not None
            calls.append([delta.id, delta.name, ""])
        assert delta.index == len(calls) - 1
        calls[delta.index][2] += delta.arguments
    reasoning = "".join(delta.reasoning for delta in deltas)
    return reasoning, "".join(delta.content for delta in deltas), [(a, b, c) for a, b, c in calls]


def covered(deltas: list[Delta]) -> list[int]:
    """The places in the raw text that content is of."""
    return [place for delta in deltas for span in delta.spans for place in range(*span)]


def cut(text: str, places: Sequence[int]) -> list[str]:
    ends = [*sorted(place % (len(text) + 1) for place in places), len(text)]
    starts = [0, *ends[:-1]]
    return [text[start:end] for start, end in zip(starts, ends, strict=True)]


FRAGMENTS = st.sampled_from(
    [
        *("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>", "<think>", "</think>"),
        *('{"name": "f", "arguments": {}}', '{"name": "f", "parameters": {"x": [1, {"y": "}"}]}}', "[", "]"),
        *('{"name": "nope", "arguments": {}}', '{"arguments": {"k": 1}, "name": "f"}', '{"name": "f"', "}"),
        *(
            ', "arguments": {"q": "',
            '\\"é🎉\\u00e9',
            '"}',
            "f",
            ", ",
            ";",
            " ",
            "\n",
            "text",
            "<tool",
            "[TOOL",
            "{",
        ),
        *('{"name": "f", "arguments": "{\\"a\\": 1}"}', '"x": 1', '"', "\\", "12", "null", "get_weather"),
    ]
)
TEXTS = st.lists(FRAGMENTS, max_size=14).map("".join)
CUTS = st.lists(st.integers(0, 10_000), max_size=12)
PLACES = st.sampled_from([None, *Place])


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(FORMATS), TEXTS, CUTS, st.booleans(), PLACES)
@example("hermes", '<tool_call>{"name": "f", "arguments": {}, "x": 1}</tool_call>', [40, 48], True, None)
@example(
    "hermes", '<tool_call>{"name": "f", "arguments": {"a": 1}</tool_call>x<tool_call>', [45], False, None
)
@example("hermes", "<think><think>\nhm </think> x", [7, 14], False, Place.OPENED)
def test_any_chunking_gives_the_same(
    name: str, text: str, places: list[int], sure: bool, place: Place | None
) -> None:
    whole, at_once = read(reader(name, sure=sure, place=place), [text])
    pieces, deltas = read(reader(name, sure=sure, place=place), cut(text, places))
    single, _ = read(reader(name, sure=sure, place=place), list(text) or [""])
    assert found(pieces) == found(whole) == found(single) == added_up(deltas)
    for each in (deltas, at_once):
        spans = [span for delta in each for span in delta.spans]
        parts = [part for delta in each for part in delta.parts if isinstance(part, str)]
        assert [text[start:end] for start, end in spans] == parts
    assert covered(deltas) == covered(at_once)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(FORMATS), TEXTS)
def test_nothing_is_lost(name: str, text: str) -> None:
    """Without calls the content is the text; with calls every character of content is the text's."""
    turn, _ = read(reader(name), [text])
    if not turn.called:
        assert turn.content == text
    rest = iter(text)
    assert all(character in rest for character in turn.content)
    for call in turn.tool_calls:
        assert call.name in FUNCTIONS
        assert isinstance(json.loads(call.arguments), dict)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
ARGUMENTS = st.dictionaries(st.text(max_size=6), VALUES, max_size=4)
CALLS = st.lists(st.tuples(st.sampled_from(FUNCTIONS), ARGUMENTS, st.booleans()), min_size=1, max_size=3)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(FORMATS), CALLS, CUTS, st.booleans())
def test_what_a_format_writes_it_reads(
    name: str, calls: list[tuple[str, dict[str, Any], bool]], places: list[int], sure: bool
) -> None:
    tool_format = format_for("", name)
    assert tool_format is not None
    made = [
        ToolCall("", function, json.dumps(arguments, ensure_ascii=ascii, indent=2 if ascii else None))
        for function, arguments, ascii in calls
    ]
    text = tool_format.calls_text(made)
    turn, deltas = read(reader(name, sure=sure), cut(text, places))
    assert turn.content == "" and added_up(deltas) == found(turn)
    assert [(call.name, call.arguments) for call in turn.tool_calls] == [(c.name, c.arguments) for c in made]


F = '{"name": "f", "arguments": {}}'
TAGGED: list[tuple[str, str, list[tuple[str, str]]]] = [
    ("hello \n", "hello \n", []),
    (f"Let me see.\n<tool_call>\n{F}\n</tool_call>\n", "Let me see.", [("f", "{}")]),
    (f"<tool_call>{F}</tool_call>\nDone.", "\nDone.", [("f", "{}")]),
    (f"<tool_call>{F}</tool_call><tool_call>{F}</tool_call>", "", [("f", "{}"), ("f", "{}")]),
    (f"<tool_call>{F}", "", [("f", "{}")]),  # the answer ended, or a stop string did it
    (f"<tool_call>{F}</tool_c", "", [("f", "{}")]),
    ('<tool_call>{"name": "f"}</tool_call>', "", [("f", "{}")]),
    ('<tool_call>{"name": "f", "arguments": null}</tool_call>', "", [("f", "{}")]),
    ('<tool_call>{"name": "f", "parameters": {"a":1}}</tool_call>', "", [("f", '{"a":1}')]),
    ('<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>', "", [("f", '{"a": 1}')]),
    ('<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [("f", '{"a": 1}')]),
    (
        '<tool_call>{"name": "f", "arguments": {"t": "</tool_call>"}}</tool_call>',
        "",
        [("f", '{"t": "</tool_call>"}')],
    ),
    (f"<tool_call>[{F}, {F}]</tool_call>", "", [("f", "{}"), ("f", "{}")]),
]
BROKEN = [
    '<tool_call>{"name": "nope", "arguments": {}}</tool_call>',
    '<tool_call>{"name": "f", "arguments": {"a": 1}</tool_call>',
    '<tool_call>{"name": "f", "arguments": {"a": 1}}}</tool_call>',
    '<tool_call>{"name": "f", "arguments": [1]}</tool_call>',
    '<tool_call>{"name": "f", "arguments": "x"}</tool_call>',
    '<tool_call>{"name": "f", "arguments": {"a": 1, "a" 2}}</tool_call>',
    '<tool_call>{"name": "f", "arguments": {"a": "\n"}}</tool_call>',
    '<tool_call>{"name": "f", "arguments": {}, "arguments": {}}</tool_call>',
    '<tool_call>{"name": "f", "name": "f"}</tool_call>',
    '<tool_call>{"name": "f", "arguments": {}, "why": 1}</tool_call>',
    '<tool_call>{"name": 3}</tool_call>',
    '<tool_call>{"name": "f", "arguments": {"a": tru}}</tool_call>',
    '<tool_call>{"name": "f", "arguments": "{\\"a\\": \\"\\ud800\\"}"}</tool_call>',
    "<tool_call>[]</tool_call>",
    "<tool_call>f()</tool_call>",
    '<tool_call>{"name": "f", "arguments": {"city": "Par',
    "<tool_call>",
    "Use <tool_call> tags.",
    f"<tool_call>{F} and so on",
]


@pytest.mark.parametrize(("text", "content", "calls"), TAGGED)
def test_calls_in_tags(text: str, content: str, calls: list[tuple[str, str]]) -> None:
    turn, _ = read(reader("hermes"), [text])
    assert turn.content == content
    assert [(call.name, call.arguments) for call in turn.tool_calls] == calls
    assert turn.called == bool(calls)


@pytest.mark.parametrize("text", BROKEN)
def test_broken_calls_stay_content(text: str) -> None:
    turn, _ = read(reader("hermes"), [text])
    assert turn.content == text and not turn.called
    after, _ = read(reader("hermes"), [f"{text}\n<tool_call>{F}</tool_call>"])
    if not text.endswith("Par"):  # an open string swallows what follows, up to the end of the line
        assert after.content.rstrip() == text.rstrip() and len(after.tool_calls) == 1


OTHERS = [
    ("llama3", '{"name": "f", "parameters": {"a": 1}}', "", 1),
    ("llama3", '<|python_tag|>{"name": "f", "parameters": {}}; {"name": "f", "parameters": {}}', "", 2),
    ("llama3", 'I say {"name": "f", "parameters": {}}', 'I say {"name": "f", "parameters": {}}', 0),
    ("llama3", '{"name": "Ann", "age": 3}', '{"name": "Ann", "age": 3}', 0),
    ("llama3", '<|python_tag|>search.call(query="x")', '<|python_tag|>search.call(query="x")', 0),
    ("mistral", '[TOOL_CALLS] [{"name": "f", "arguments": {}, "id": "abcdefghi"}]', "", 1),
    ("mistral", "ok [TOOL_CALLS]f[ARGS]{}[TOOL_CALLS]f[CALL_ID]abcdefghi[ARGS]{}", "ok", 2),
    ("mistral-args", '[TOOL_CALLS]f{"a": 1}', "", 1),
    ("mistral", "[TOOL_CALLS]nope[ARGS]{}", "[TOOL_CALLS]nope[ARGS]{}", 0),
    ("mistral", "[TOOL_CALLS]" + "f" * 300, "[TOOL_CALLS]" + "f" * 300, 0),
]


@pytest.mark.parametrize(("name", "text", "content", "count"), OTHERS)
def test_other_formats(name: str, text: str, content: str, count: int) -> None:
    turn, _ = read(reader(name), [text])
    assert (turn.content, len(turn.tool_calls)) == (content, count)


def test_arguments_come_in_pieces_where_the_form_is_sure() -> None:
    text = '<tool_call>\n{"name": "f", "arguments": {"code": "one two three"}}\n</tool_call>'
    _, deltas = read(reader("hermes", sure=True), cut(text, range(0, len(text), 4)))
    pieces = [piece for delta in deltas for piece in delta.tool_calls]
    assert pieces[0].name == "f" and pieces[0].arguments == ""
    assert len(pieces) > 5 and "".join(p.arguments for p in pieces) == '{"code": "one two three"}'
    cut_short, _ = read(reader("hermes", sure=True), ['<tool_call>\n{"name": "f", "arguments": {"code": "on'])
    assert cut_short.content == "" and cut_short.tool_calls[0].arguments == '{"code": "on'


def test_what_is_no_call_is_told_at_once() -> None:
    """The client does not wait for the end of an answer that begins like a call."""
    turn = reader("llama3")
    told = [turn.push(piece, final=False).content for piece in ('{"name": ', '"Ann"', ', "age"')]
    assert told == ["", '{"name": "Ann"', ', "age"']


def test_long_answers_take_linear_time() -> None:
    """A model that repeats itself must not hold up the event loop."""
    for text in (
        "<tool_call>{" * 20_000,
        "<tool_call>" + " " * 100_000,
        '<tool_call>{"name": "' + "[" * 100_000,
    ):
        turn, _ = read(reader("hermes"), cut(text, range(0, len(text), 37)))
        assert turn.content.rstrip() == text.rstrip()


THOUGHTS = [
    (Place.START, "<think>\nhm\n</think>\n\nhello", "hm", "hello"),
    (Place.START, "hello <think>", "", "hello <think>"),
    (Place.START, "<think>never ends ", "never ends ", ""),
    (Place.START, "<think>\n\n</think>\n\nhello", "", "hello"),
    (Place.OPENED, "hm</think>hello", "hm", "hello"),
    (Place.OPENED, "<think>\nhm</think>hello", "hm", "hello"),
    (Place.THINKING, " more\n</think> done", " more", "done"),
    (Place.CLOSED, "\nhello", "", "hello"),
    (Place.ANSWER, " and on", "", " and on"),
    (Place.START, f"<think>a <tool_call></think><tool_call>{F}</tool_call>", "a <tool_call>", ""),
]


@pytest.mark.parametrize(("place", "text", "reasoning", "content"), THOUGHTS)
def test_reasoning_is_split_off(place: Place, text: str, reasoning: str, content: str) -> None:
    turn, _ = read(reader("hermes", place=place), [text])
    assert (turn.reasoning, turn.content) == (reasoning, content)


def test_where_an_answer_begins() -> None:
    assert place_after("<assistant>\n") is Place.START
    assert place_after("<assistant><think>\n") is Place.OPENED
    assert place_after("<assistant><think>\n\n</think>\n\n") is Place.CLOSED
    assert place_within(" ") is Place.START
    assert place_within("<think>hm") is Place.THINKING
    assert place_within("<think>hm</think>yes") is Place.ANSWER


def test_formats_are_found_by_template() -> None:
    def name(template: str) -> str | None:
        tool_format = format_for(template)
        return None if tool_format is None else tool_format.name

    assert name('{"name": <n>} in <tool_call></tool_call>') == "hermes"
    assert name("<tool_call><function=f><parameter=x>") is None
    assert name("<|python_tag|>") == "llama3"
    assert name("[TOOL_CALLS]") == "mistral" and name("[TOOL_CALLS] [ARGS]") == "mistral-args"
    assert name("{{ messages }}") is None
    with pytest.raises(ValueError, match="nope"):
        format_for("", "nope")


def test_mistral_ids() -> None:
    mistral = format_for("", "mistral")
    assert mistral is not None
    assert all(len(i) == 9 and i.isalnum() for i in (mistral.new_id(), mistral.template_id("call_1")))
    assert mistral.template_id("abcdefghi") == "abcdefghi"
    assert mistral.template_id("call_1") == mistral.template_id("call_1") != mistral.template_id("call_2")


@pytest.mark.parametrize(
    "cut", ["<tool_c", '<tool_call>[\n{"na', '<tool_call>[\n{"name": "f", "arguments": {}},\n']
)
def test_where_nothing_but_calls_may_come_a_cut_one_is_no_content(cut: str) -> None:
    form = format_for("", "smollm2")
    assert form is not None
    for only in (False, True):
        turn = TurnReader(form.parser(FUNCTIONS, sure=True, only=only), None)
        read(turn, [cut])
        assert bool(turn.content) == (not only) and len(turn.tool_calls) == cut.count("}},")
