"""POST /v1/responses: whatever JSON comes, it is taken or refused by name, never a fault of ours."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from engine.types import InvalidRequest
from server.protocol.body import validate
from server.protocol.responses import ResponsesBody
from server.responses_chat import chat_body

KINDS = [
    "message",
    "function_call",
    "function_call_output",
    "reasoning",
    "input_text",
    "output_text",
    "refusal",
    "summary_text",
    "reasoning_text",
    "function",
    "json_schema",
    "json_object",
    "text",
    "input_image",
    "item_reference",
]
NAMES = [
    "type",
    "role",
    "content",
    "text",
    "refusal",
    "call_id",
    "name",
    "arguments",
    "output",
    "id",
    "status",
    "summary",
    "input",
    "tools",
    "format",
    "schema",
    "parameters",
    "strict",
    "phase",
    "annotations",
    "logprobs",
    "effort",
    "include_obfuscation",
    "description",
]
WORDS = st.sampled_from([*KINDS, "user", "assistant", "system", "tool", "auto", "required", "c1", "{}", ""])
LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | WORDS
JSON = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=3), inner, max_size=5)
    ),
    max_leaves=12,
)
ITEM = st.fixed_dictionaries(
    {"type": st.sampled_from(KINDS)}, optional={name: JSON for name in NAMES if name != "type"}
)
FIELDS = st.sampled_from(sorted(ResponsesBody.model_fields.keys() | ResponsesBody.refused().keys()))


def taken_or_refused(data: dict[str, Any]) -> None:
    try:
        chat_body(validate(ResponsesBody, {"model": "tiny", "input": "hello"} | data))
    except InvalidRequest as refused:
        assert refused.message
        assert refused.param is None or (".[" not in refused.param and refused.param)


@given(st.dictionaries(FIELDS, JSON, max_size=3))
@settings(deadline=None, max_examples=50)
def test_any_field(data: dict[str, Any]) -> None:
    taken_or_refused(data)


@given(st.lists(ITEM, max_size=3), st.lists(ITEM, max_size=2), ITEM)
@settings(deadline=None, max_examples=50)
def test_any_items(items: list[Any], tools: list[Any], choice: Any) -> None:
    taken_or_refused({"input": items})
    taken_or_refused({"tools": tools, "tool_choice": choice, "text": {"format": choice}})
