"""The passes that a stream tells, with the default pair: they add up, whatever is drafted."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from live_app import Live, live
from test_passes import PATHS, TOLD, adds_up, text_of, tokens_of

from engine.client_local import LocalEngine
from engine.config import EngineConfig
from engine.models.load import load_tokenizer

CODE = "def factorial(n):\n"
QUESTION = "Write a Python function that returns the factorial of n, and explain it."
CHOICES: list[dict[str, Any]] = [
    {},
    {"policy": "static", "options": {"sl": 4}},
    {"drafter": "ngram", "policy": "confidence"},
    {"drafter": "none"},
    {"drafter": "dyspec", "options": {"budget": 12, "threshold": 0.02}},
]


@pytest.fixture(scope="module")
def app(smollm2: Path) -> Iterator[Live]:
    config = EngineConfig(
        target=str(smollm2), draft="default", dtype="float32", device="cpu", max_model_len=512, max_num_seqs=4
    )
    with live(LocalEngine(config), load_tokenizer(str(smollm2))) as app:
        yield app


def asked(path: str, **fields: Any) -> dict[str, Any]:
    prompt = {"prompt": CODE} if path == PATHS[0] else {"messages": [{"role": "user", "content": QUESTION}]}
    return {"max_tokens": 24, "stream_options": TOLD} | prompt | fields


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("speculation", CHOICES, ids=lambda choice: str(choice.get("drafter", choice)))
def test_they_add_up(app: Live, path: str, speculation: dict[str, Any]) -> None:
    chunks = app.stream(path, **asked(path, speculation=speculation, temperature=0.6, seed=3))
    passes = adds_up(chunks)
    origins = {token["origin"] for token in tokens_of(passes)}
    if speculation.get("drafter") == "none":
        assert origins == {"target"} and all(each["drafted"] == 0 for each in passes)
    if speculation.get("drafter") == "dyspec":
        assert any(each["drafted"] > each["lookahead"] for each in passes) and "draft" in origins
    if speculation.get("policy") == "static":
        assert {"draft", "correction"} < origins and max(each["drafted"] for each in passes) == 4


def test_what_is_drafted_changes_origins_not_tokens(app: Live) -> None:
    told = [
        tokens_of(
            adds_up(app.stream(PATHS[1], **asked(PATHS[1], speculation=choice, temperature=0.9, seed=5)))
        )
        for choice in CHOICES
    ]
    texts = [[(token["id"], token["text"]) for token in tokens] for tokens in told]
    assert all(text == texts[0] for text in texts)
    assert told[1] != told[3]


def test_rejection_sampling_and_choices(app: Live) -> None:
    chunks = app.stream(PATHS[0], **asked(PATHS[0], n=3, temperature=1, speculation=CHOICES[1]))
    for index in range(3):
        adds_up(chunks, index)


@pytest.mark.parametrize("stop", ["factorial(n", "n == 0", "\n"])
def test_with_a_stop_string(app: Live, stop: str) -> None:
    chunks = app.stream(PATHS[1], **asked(PATHS[1], stop=stop, temperature=0, speculation=CHOICES[1]))
    adds_up(chunks)
    assert stop not in text_of(chunks) and chunks[-1]["choices"][0]["finish_reason"] == "stop"
