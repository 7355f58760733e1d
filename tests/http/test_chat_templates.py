"""Prompts made with the templates of model families: golden texts, tools, and what a template refuses."""

from __future__ import annotations

import json
from typing import Any

import pytest
import template_families as families
from template_families import with_template
from transformers import PreTrainedTokenizerFast

from engine.types import InvalidRequest
from server.chat_template import ChatTemplate, check_template
from server.protocol.body import validate
from server.protocol.chat import ChatBody

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}}
FUNCTION = {"name": "get_weather", "parameters": PARAMETERS}
TOOLS = [{"type": "function", "function": FUNCTION}]
TOLD = json.dumps(TOOLS)
USER = {"role": "user", "content": "hi"}


def call(call_id: str, arguments: str = '{"city": "Zürich"}') -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": "get_weather", "arguments": arguments}}


def called(*ids: str, content: str | None = None) -> list[dict[str, Any]]:
    answers = [{"role": "tool", "tool_call_id": i, "content": f"sun {i}"} for i in ids]
    return [USER, {"role": "assistant", "content": content, "tool_calls": [call(i) for i in ids]}, *answers]


@pytest.fixture
def render(tokenizer: PreTrainedTokenizerFast) -> Any:
    def render(template: str | None, tool_format: str = "auto", **fields: Any) -> str:
        body = validate(ChatBody, {"model": "tiny", "messages": [USER]} | fields)
        return ChatTemplate(with_template(tokenizer, template), tool_format).render(body)

    return render


CALL = '<tool_call>{"name": "get_weather", "arguments": {"city": "Zürich"}}</tool_call>'
LINED = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Zürich"}}\n</tool_call>'
GOLDEN: list[tuple[str, str, dict[str, Any], str]] = [
    ("plain", families.HERMES, {}, "<|im_start|>user hi<|im_end|><|im_start|>assistant "),
    (
        "hermes",
        families.HERMES,
        {"tools": TOOLS},
        f"<|im_start|>tools {TOLD}<|im_end|><|im_start|>user hi<|im_end|><|im_start|>assistant ",
    ),
    (
        "hermes, calls",
        families.HERMES,
        {"messages": called("c1", "c2", content="Wait.")},
        f"<|im_start|>user hi<|im_end|><|im_start|>assistant Wait.{CALL}{CALL}<|im_end|>"
        "<|im_start|>tool sun c1<|im_end|><|im_start|>tool sun c2<|im_end|><|im_start|>assistant ",
    ),
    (
        "arguments as text",
        families.TEXT_ARGUMENTS,
        {"messages": called("c1")},
        '<|im_start|>user hi<|im_end|><|im_start|>assistant <tool_call>get_weather {"city": "Zürich"}'
        "<|im_end|><|im_start|>tool sun c1<|im_end|><|im_start|>assistant ",
    ),
    (
        "llama 3",
        families.LLAMA3,
        {"messages": called("c1")},
        '<|start_header_id|>user hi<|eot_id|><|start_header_id|>assistant {"name": "get_weather", '
        '"parameters": {"city": "Zürich"}}<|eot_id|><|start_header_id|>tool sun c1<|eot_id|>'
        "<|start_header_id|>assistant ",
    ),
    (
        "mistral",
        families.MISTRAL,
        {"messages": called("abcdefghi"), "tools": TOOLS},
        f"[AVAILABLE_TOOLS]{TOLD}[user]hi[TOOL_CALLS]["
        '{"name": "get_weather", "arguments": {"city": "Zürich"}}abcdefghi]'
        "[TOOL_RESULTS]abcdefghi sun abcdefghi",
    ),
    (
        "smollm3 leaves calls out",
        families.SMOLLM3,
        {"messages": called("c1", "c2", content="Wait.")},
        f"<|im_start|>user hi<|im_end|><|im_start|>assistant Wait.\n{LINED}\n{LINED}<|im_end|>"
        "<|im_start|>user <tool_response>\nsun c1\n</tool_response>\n"
        "<tool_response>\nsun c2\n</tool_response><|im_end|>"
        "<|im_start|>assistant ",
    ),
    (
        "smollm3 has a variable of its own",
        families.SMOLLM3,
        {"tools": TOOLS},
        f"<|im_start|>system <tools>{FUNCTION}</tools><tool_call><|im_end|>"
        "<|im_start|>user hi<|im_end|><|im_start|>assistant ",
    ),
    (
        "smollm2 knows no tools",
        families.SMOLLM2,
        {"messages": called("c1")},
        "<|im_start|>system You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>"
        "<|im_start|>user hi<|im_end|><|im_start|>assistant <tool_call>[\n"
        '{"name": "get_weather", "arguments": {"city": "Zürich"}}\n]</tool_call><|im_end|>'
        "<|im_start|>user <tool_response>\nsun c1\n</tool_response><|im_end|><|im_start|>assistant ",
    ),
    (
        "reasoning of an earlier turn",
        families.THINKING,
        {"messages": [USER, {"role": "assistant", "content": "x", "reasoning_content": "hm"}, USER]},
        "<|im_start|>user hi<|im_end|><|im_start|>assistant <think>hm</think>x<|im_end|>"
        "<|im_start|>user hi<|im_end|><|im_start|>assistant ",
    ),
    (
        "a variable",
        families.THINKING,
        {"chat_template_kwargs": {"enable_thinking": False}},
        "<|im_start|>user hi<|im_end|><|im_start|>assistant <think></think>",
    ),
    (
        "effort",
        families.EFFORT,
        {"reasoning_effort": "low"},
        "low <|im_start|>user hi<|im_end|><|im_start|>assistant ",
    ),
    (
        "a refusal is text",
        families.HERMES,
        {"messages": [USER, {"role": "assistant", "refusal": "No."}, USER]},
        "<|im_start|>user hi<|im_end|><|im_start|>assistant No.<|im_end|>"
        "<|im_start|>user hi<|im_end|><|im_start|>assistant ",
    ),
]


@pytest.mark.parametrize(
    ("template", "fields", "text"), [case[1:] for case in GOLDEN], ids=[case[0] for case in GOLDEN]
)
def test_golden_prompts(render: Any, template: str, fields: dict[str, Any], text: str) -> None:
    assert render(template, **fields) == text


def test_instructions_where_the_template_knows_no_tools(render: Any) -> None:
    text = render(families.SMOLLM2, tools=TOOLS, messages=[{"role": "developer", "content": "Brief."}, USER])
    assert text.startswith("<|im_start|>system Brief.\n\n") and f"<tools>{TOLD}</tools>" in text
    assert "<tool_call>[\n" in text and text.count("<|im_start|>system") == 1
    bare = render(families.SMOLLM2, tools=TOOLS)
    assert bare.startswith("<|im_start|>system You can call functions")
    named = render(families.EFFORT, tool_format="smollm2", tools=TOOLS)
    assert f"<tools>{TOLD}</tools>" in named


def test_ids_that_mistral_takes(render: Any) -> None:
    text = render(families.MISTRAL, messages=called("call_0123456789abcdef"))
    assert "call_" not in text.split("sun")[0]


@pytest.mark.parametrize("fields", [{"tools": []}, {"tools": TOOLS, "tool_choice": "none"}])
@pytest.mark.parametrize("template", [families.EFFORT, families.HERMES, families.SMOLLM2])
def test_no_tools_to_tell_of(render: Any, template: str, fields: dict[str, Any]) -> None:
    assert render(template, **fields) == render(template)


def test_arguments_that_are_no_object_stay_text(render: Any) -> None:
    messages = called("c1")
    messages[1]["tool_calls"] = [call("c1", '{"city": ')]
    assert '"{\\"city\\": "' in render(families.HERMES, messages=messages)
    messages[1]["tool_calls"] = [call("c1", "")]
    assert '"arguments": {}}' in render(families.HERMES, messages=messages)


NO_FORMAT = "{% for m in messages %}{{ m.content }}{% endfor %}"
KNOWS_NONE = "{% for m in messages %}<tool_call>{{ m.content }}{% endfor %}"
REFUSED: list[tuple[str | None, dict[str, Any], str, str]] = [
    (None, {}, "messages", "no chat template"),
    (KNOWS_NONE, {"tools": TOOLS}, "tools", "knows no tools"),
    ("{{ m.x.y }}", {}, "messages", "refuses"),
    ("{{ 1 // 0 }}", {}, "messages", "refuses"),
    ("{{ messages[7].content }}", {}, "messages", "refuses"),
    ("{% for m in messages %}{{ 'a' + 1 }}{% endfor %}", {}, "messages", "refuses"),
    ("{% for", {}, "messages", "refuses"),
    (families.LLAMA3, {"messages": called("c1", "c2")}, "messages", "one call at a time"),
    (families.HERMES, {"chat_template_kwargs": {"enable_thinking": True}}, "chat_template_kwargs", "none"),
    (
        families.THINKING,
        {"chat_template_kwargs": {"messages": []}},
        "chat_template_kwargs",
        "enable_thinking",
    ),
    (families.THINKING, {"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs", "variable"),
    (families.THINKING, {"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs", "variable"),
    (
        families.THINKING,
        {"chat_template_kwargs": {"add_generation_prompt": True}},
        "chat_template_kwargs",
        "variable",
    ),
    (families.HERMES, {"reasoning_effort": "low"}, "reasoning_effort", "not supported"),
    (
        families.EFFORT,
        {"reasoning_effort": "low", "chat_template_kwargs": {"reasoning_effort": "high"}},
        "reasoning_effort",
        "too",
    ),
    (families.SMOLLM3, {"chat_template_kwargs": {"xml_tools": []}}, "chat_template_kwargs", "variable"),
    (NO_FORMAT, {"messages": called("c1")}, "messages", "form known here"),
    ("{{ padding }}", {"chat_template_kwargs": {"padding": True}}, "chat_template_kwargs", "variable"),
]


@pytest.mark.parametrize(("template", "fields", "param", "word"), REFUSED)
def test_what_a_template_cannot_do(
    render: Any, template: str | None, fields: dict[str, Any], param: str, word: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        render(template, **fields)
    assert caught.value.param == param and word in caught.value.message


HOSTILE = [
    "{{ 7 * 7 }}{% raw %}",
    "{{ messages.__class__.__mro__[1].__subclasses__() }}",
    "{% for x in ().__class__.__base__.__subclasses__() %}{{ x }}{% endfor %}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "%} {% endfor %} {{ tools }}",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_messages_are_data(render: Any, text: str) -> None:
    """What a client writes is never run as a template, wherever it stands."""
    prompt = render(families.HERMES, messages=[{"role": "user", "content": text}])
    assert prompt == f"<|im_start|>user {text}<|im_end|><|im_start|>assistant "
    kwargs = {"reasoning_effort": text}
    assert render(families.EFFORT, chat_template_kwargs=kwargs).startswith(f"{text} <|im_start|>")


def test_templates_run_in_a_sandbox(render: Any) -> None:
    """A model's template does not reach Python either."""
    for template in (
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ messages.append(1) }}",
    ):
        with pytest.raises(InvalidRequest) as caught:
            render(template)
        assert caught.value.code == "chat_template_error"


def test_deep_nesting_is_no_crash(render: Any) -> None:
    deep: dict[str, Any] = {}
    for _ in range(3000):
        deep = {"properties": {"a": deep}}
    with pytest.raises(InvalidRequest, match="refuses"):
        render(families.HERMES, tools=[{"type": "function", "function": {"name": "f", "parameters": deep}}])


@pytest.mark.parametrize("template", ["{{", "{{ messages | nothing }}", 5, 0, False, ["x"], {"default": 5}])
def test_a_template_that_no_chat_could_use_is_told_at_start(
    template: Any, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(ValueError, match="chat template"):
        check_template(with_template(tokenizer, template))


@pytest.mark.parametrize(
    "template", [None, "", families.HERMES, {"default": families.HERMES}, {"other": "x"}]
)
def test_other_templates_are_not(template: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    check_template(with_template(tokenizer, template))
