"""Structured output of the default model, fp32: `structured.py` on a few schemas, with every drafter."""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import pytest
from schemas import schema
from structured import Result, compile_all, generate, judge, prompt

from engine.config import EngineConfig
from engine.core import Engine
from engine.models.load import load_tokenizer
from engine.types import SpeculationParams

SCHEMAS = [
    {
        "type": "object",
        "properties": {"größe": {"type": "integer", "maximum": 9}, "名": {"enum": ["日本", "🙂"]}},
        "required": ["größe", "名"],
        "additionalProperties": False,
    },
    {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 2},
    {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"},
    {"anyOf": [{"type": "null"}, {"type": "number", "minimum": 0.5, "maximum": 2}]},
    schema(random.Random(1)),
]
ARGS = argparse.Namespace(batch=5, tokens=16)


@pytest.fixture(scope="module")
def served(smollm2: Path) -> Engine:
    return Engine(
        EngineConfig(
            target=str(smollm2),
            draft="default",
            dtype="float32",
            device="cpu",
            max_model_len=512,
            max_num_seqs=5,
        )
    )


def test_answers_validate_and_are_the_same_with_every_drafter(served: Engine, smollm2: Path):
    tokenizer = load_tokenizer(str(smollm2))
    grammars = compile_all(tokenizer, SCHEMAS)
    prompts = [prompt(tokenizer, each) for each in SCHEMAS]
    results = {}
    model, ngram = (
        SpeculationParams(drafter=drafter, policy="static", options={"sl": 5})
        for drafter in ("model", "ngram")
    )
    for name, asked, masked in (
        ("none", SpeculationParams(drafter="none"), True),
        ("masked", model, True),
        ("free", model, False),
        ("ngram", ngram, True),
    ):
        results[name] = generate(served, prompts, grammars, asked, masked, ARGS)
    assert judge(tokenizer, SCHEMAS, results) == []
    assert [results["none"].reasons[i] for i in range(4)] == ["stop"] * 4
    assert all(results[name].drafted > 0 for name in ("masked", "free"))
    assert results["none"].masks > 0


def test_the_judge_finds_what_is_wrong(smollm2: Path):
    tokenizer = load_tokenizer(str(smollm2))

    def told(first: str, second: str, reason: str = "stop") -> list[str]:
        results = {
            name: Result(texts={0: tokenizer(text)["input_ids"]}, reasons={0: reason})
            for name, text in (("none", first), ("masked", second))
        }
        return judge(tokenizer, SCHEMAS[1:2], results)

    assert told("[true, false]", "[true, false]") == []
    assert told("[true", "[true", "length") == []
    assert "is not that of 'none'" in told("[true, false]", "[false, true]")[0]
    assert "schema 0" in told("[true]", "[true]")[0]
    assert "schema 0" in told("[true, false", "[true, false")[0]
    assert "ended with 'error'" in told("[true", "[true", "error")[0]
