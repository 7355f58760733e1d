"""Compiling grammars in a process of its own: results, faults, time, memory, cache, and its end."""

from __future__ import annotations

import asyncio
import copy
import json
import os
from collections.abc import Iterator

import psutil
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from engine.grammar import MARKERS, Grammars, allows, vocabulary
from engine.types import CompiledGrammar, EngineUnavailable, InvalidRequest
from server.grammar import GrammarCompiler, Structure
from server.reasoning import BEGIN, END
from server.tools import names
from server.tools.format import by_name


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>")
    found.add_special_tokens({"additional_special_tokens": ["<tool>"]})
    return found


def build(
    tokenizer: PreTrainedTokenizerFast, seconds: float = 30.0, max_bytes: int = 65536
) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, seconds=seconds, max_bytes=max_bytes, vocab_size=lambda: len(tokenizer))


@pytest.fixture(scope="module")
def compiler(tokenizer: PreTrainedTokenizerFast) -> Iterator[GrammarCompiler]:
    one = build(tokenizer)
    yield one
    one.close()


def structure(kind: str, text: str, param: str = "structured_outputs.x") -> Structure:
    return Structure(kind, text, param)  # type: ignore[arg-type]


def accepts(tokenizer: PreTrainedTokenizerFast, grammar: CompiledGrammar, text: str) -> bool:
    """Whether the engine's matcher takes the text as a whole."""
    eos = tokenizer.eos_token_id
    matcher = Grammars(vocabulary(tokenizer, len(tokenizer)), (eos,)).matcher(grammar)
    found = matcher.after(tokenizer(text, add_special_tokens=False)["input_ids"])
    return found is not None and found.complete and allows(found.words, eos)


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
TAG = {"type": "tag", "begin": "call(", "content": {"type": "json_schema", "json_schema": SCHEMA}, "end": ")"}


@pytest.mark.parametrize(
    ("kind", "text", "yes", "no"),
    [
        ("json_object", "", '{"x": [1, {"y": null}]}', "[1]"),
        ("json_schema", json.dumps(SCHEMA), '{"a": 3}', '{"a": "3"}'),
        ("json_schema", "true", "[null]", "[nul]"),
        ("regex", "^(ab|[0-9]+)$", "42", "abab"),
        ("choice", '["yes", "no \\"really\\"\\n", "日本"]', 'no "really"\n', "no"),
        ("choice", '["only"]', "only", "onl"),
        ("choice", '["a", "ab"]', "ab", "b"),
        ("grammar", 'root ::= item ("," item)*\nitem ::= [a-z]+', "a,bc", "a,"),
        (
            "structural_tag",
            json.dumps({"type": "structural_tag", "format": TAG}),
            'call({"a": 1})',
            'call({"b": 1})',
        ),
    ],
)
async def test_every_kind(
    compiler: GrammarCompiler, tokenizer: PreTrainedTokenizerFast, kind: str, text: str, yes: str, no: str
):
    grammar = await compiler.compile(structure(kind, text))
    assert accepts(tokenizer, grammar, yes)
    assert not accepts(tokenizer, grammar, no)


@pytest.mark.parametrize(
    ("kind", "text", "where"),
    [
        ("json_schema", '{"type": "object", "properties": {"a": {"type": "int"}}}', "$.properties.a.type"),
        ("json_schema", "{", "line 1 column 2"),
        ("json_schema", "[" * 30000, "recursion"),
        ("regex", "a(b", "position"),
        ("regex", "a(?=b)", "position 1"),
        ("regex", "(" * 30000, "position"),
        ("grammar", "root ::= a", '"a" is not defined'),
        ("grammar", 'start ::= "a"', '"root" is not found'),
        ("grammar", "root ::= root", "nothing matches"),
        ("grammar", "root ::= " + "(" * 30000, "limit"),
        ("structural_tag", '{"type": "x"}', "structural_tag"),
        (
            "structural_tag",
            json.dumps(
                {
                    "type": "structural_tag",
                    "format": {**TAG, "content": {"type": "regex", "pattern": "(?=a)"}},
                }
            ),
            "position 0",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
async def test_faults_say_where(compiler: GrammarCompiler, kind: str, text: str, where: str):
    for _ in range(2):  # a refusal is kept as a grammar is
        with pytest.raises(InvalidRequest) as caught:
            await compiler.compile(structure(kind, text))
        assert where in caught.value.message and "/" not in caught.value.message.split(":")[1]
        assert (caught.value.param, caught.value.code) == ("structured_outputs.x", "invalid_grammar")


async def test_places_in_a_tag_of_ours_are_the_schemas_own(compiler: GrammarCompiler):
    tag = json.dumps(
        {
            "type": "structural_tag",
            "format": {**TAG, "content": {"type": "json_schema", "json_schema": {"not": {}}}},
        }
    )
    for param, place in (
        ("tools", "'tools': $: "),
        ("structured_outputs.structural_tag", "$.format.content.json_schema: $: "),
    ):
        with pytest.raises(InvalidRequest) as caught:
            await compiler.compile(structure("structural_tag", tag, param))
        assert place in caught.value.message


async def test_special_tokens_are_no_text(compiler: GrammarCompiler, tokenizer: PreTrainedTokenizerFast):
    """Else the detokenizer would drop from a string what the grammar took for a part of it."""
    grammar = await compiler.compile(structure("json_schema", '{"type": "string"}'))
    matcher = Grammars(vocabulary(tokenizer, len(tokenizer)), (tokenizer.eos_token_id,)).matcher(grammar)
    inside = matcher.after(tokenizer('"a', add_special_tokens=False)["input_ids"])
    assert inside is not None
    assert not any(allows(inside.words, token) for token in tokenizer.all_special_ids)
    tool = tokenizer.convert_tokens_to_ids("<tool>")
    by_id = {"type": "structural_tag", "format": {"type": "token", "token": tool}}
    grammar = await compiler.compile(structure("structural_tag", json.dumps(by_id)))
    matcher = Grammars(vocabulary(tokenizer, len(tokenizer)), (tokenizer.eos_token_id,)).matcher(grammar)
    assert matcher.after([tool]) is not None


async def test_grammars_are_compiled_once(compiler: GrammarCompiler):
    many = await asyncio.gather(*(compiler.compile(structure("regex", "once[0-9]")) for _ in range(8)))
    assert all(one is many[0] for one in many)
    other = await compiler.compile(structure("grammar", 'root ::= "once"'))
    assert other.key != many[0].key


async def test_what_takes_too_long_is_killed_and_the_next_one_compiles(tokenizer: PreTrainedTokenizerFast):
    one = build(tokenizer, seconds=1.0)
    try:
        slow = {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(2000)}}
        first = await one.compile(structure("regex", "a"))
        process = one._process
        assert process is not None and first.data
        with pytest.raises(InvalidRequest, match="takes longer than 1 seconds"):
            await one.compile(structure("json_schema", json.dumps(slow)))
        assert not psutil.pid_exists(process.pid or 0)
        assert (await one.compile(structure("regex", "b"))).data
        assert one._process is not process
    finally:
        one.close()
    assert one._process is None


async def test_a_process_that_dies_is_replaced(tokenizer: PreTrainedTokenizerFast):
    one = build(tokenizer)
    try:
        await one.compile(structure("regex", "a"))
        assert one._process is not None
        os.kill(one._process.pid or 0, 9)
        one._process.join()
        assert (await one.compile(structure("regex", "b"))).data
        asking = asyncio.create_task(one.compile(structure("regex", "c")))
        asking.cancel()  # whoever asked is gone; the next answer is the next one's own
        await asyncio.gather(asking, return_exceptions=True)
        assert (await one.compile(structure("grammar", "root ::= [a-z]"))).data
    finally:
        one.close()


async def test_too_much_text_is_refused_unread(tokenizer: PreTrainedTokenizerFast):
    one = build(tokenizer, max_bytes=10)
    with pytest.raises(InvalidRequest, match="12 bytes are too many: at most 10"):
        await one.compile(structure("regex", "é" * 6))
    assert one._process is None  # nothing was started for it


async def test_nothing_is_compiled_after_the_end(tokenizer: PreTrainedTokenizerFast):
    one = build(tokenizer)
    one.close()
    with pytest.raises(EngineUnavailable):
        await one.compile(structure("regex", "a"))


def test_markers_of_calls_are_text_in_a_grammar_though_they_are_special_tokens(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    for name in names():
        assert MARKERS.issuperset(filter(None, by_name(name).markers)), name
    assert {BEGIN, END} <= MARKERS
    own = copy.deepcopy(tokenizer)
    own.add_special_tokens({"additional_special_tokens": ["<tool>", "[TOOL_CALLS]"]})
    texts = vocabulary(own, len(own)).decoded_vocab
    assert texts[own.convert_tokens_to_ids("[TOOL_CALLS]")] == b"[TOOL_CALLS]"
    assert texts[own.convert_tokens_to_ids("<tool>")].startswith(b"\xff")
