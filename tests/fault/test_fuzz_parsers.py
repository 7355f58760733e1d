"""The fuzzer's targets over a few hundred inputs each; tests/fault/fuzz_parsers.py goes on by coverage."""

from __future__ import annotations

import json

import pytest
from fault.fuzzing.inputs import BODIES, Inputs
from fault.fuzzing.targets import TARGETS
from hypothesis import given, settings
from hypothesis import strategies as st


@pytest.mark.parametrize("name", TARGETS)
def test_any_bytes(name: str) -> None:
    @settings(max_examples=150, deadline=None, database=None)
    @given(st.binary(max_size=400))
    def holds(data: bytes) -> None:
        TARGETS[name](data)

    holds()


@pytest.mark.parametrize("name", ["http", "protocol"])
def test_inputs_that_are_nearly_requests(name: str) -> None:
    inputs = Inputs(11, "sk-a-key", "tiny")
    for _ in range(300):
        raw = b"".join(inputs.next().pieces)[:20_000]
        TARGETS[name](raw.partition(b"\r\n\r\n")[2] if name == "protocol" else b"\x03" + raw)


@settings(max_examples=100, deadline=None, database=None)
@given(st.text(max_size=100))
def test_any_text_in_any_encoding(text: str) -> None:
    for data in (text.encode(), json.dumps(text).encode(), text.encode("utf-16", "surrogatepass")):
        for target in TARGETS.values():
            target(data)


def test_good_bodies_are_taken() -> None:
    """So that the targets get behind the first check."""
    for path, body in BODIES.items():
        TARGETS["protocol"](json.dumps(body | ({"model": "tiny"} if "v1" in path else {})).encode())
