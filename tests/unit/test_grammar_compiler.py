"""Compiling grammars in a process of its own: results, faults, time, memory, cache, and its end."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import json
import multiprocessing
import os
import signal
from collections.abc import AsyncIterator, Iterator
from typing import Any

import psutil
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from engine.grammar import MARKERS, Grammars, vocabulary
from engine.types import CompiledGrammar, EngineUnavailable, InvalidRequest
from engine.words import allows
from server.grammar import GrammarCompiler, Structure, _key, _Lane
from server.log_lines import JsonLines
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


SLOW: dict[str, Any] = {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(2000)}}


def slow(i: int = 0) -> Structure:
    return structure("json_schema", json.dumps({**SLOW, "title": str(i)}))


def compiling(pid: int) -> list[psutil.Process]:
    return [child for child in psutil.Process(pid).children() if child.status() != psutil.STATUS_ZOMBIE]


async def idle(pid: int) -> bool:
    """Whether nothing is being compiled, soon."""
    for _ in range(100):
        if not compiling(pid):
            return True
        await asyncio.sleep(0.02)
    return False


@pytest.fixture
async def own(
    tokenizer: PreTrainedTokenizerFast, request: pytest.FixtureRequest
) -> AsyncIterator[tuple[GrammarCompiler, int]]:
    """A started compiler and its process id. The parameter: seconds."""
    one = build(tokenizer, seconds=getattr(request, "param", 30.0))
    await one.compile(structure("regex", "a"))
    assert one._forks is not None and one._forks.pid is not None
    pid = one._forks.pid
    yield one, pid
    one.close()
    assert one._forks is None and not psutil.pid_exists(pid)


@pytest.mark.parametrize("own", [1.0], indirect=True)
async def test_what_takes_too_long_is_killed_and_the_next_one_compiles(own: tuple[GrammarCompiler, int]):
    one, pid = own
    # A quick machine has it compiled in that time, and finds following it too slow.
    with pytest.raises(InvalidRequest, match=r"takes longer than 1 seconds|takes too long"):
        await one.compile(slow())
    assert await idle(pid)
    assert (await one.compile(structure("regex", "b"))).data
    assert one._forks is not None and one._forks.pid == pid


async def test_light_grammars_do_not_wait_for_heavy_ones(own: tuple[GrammarCompiler, int]):
    one, pid = own
    heavy = [asyncio.create_task(one.compile(slow(i))) for i in range(4)]
    await asyncio.sleep(0.1)
    for i, most in enumerate((len(heavy) + 2.0, 2.0, 2.0)):  # each of the heavy ones was tried for 1 s
        async with asyncio.timeout(most):
            assert (await one.compile(structure("regex", f"light{i}"))).data
        assert len(compiling(pid)) <= 2
    assert not all(task.done() for task in heavy)
    for task in heavy:
        task.cancel()
    await asyncio.gather(*heavy, return_exceptions=True)
    assert await idle(pid)  # nobody waits for them


async def test_what_takes_much_memory_is_given_more_once(own: tuple[GrammarCompiler, int]):
    one, _ = own
    schema = json.dumps({"type": "object", "properties": dict(list(SLOW["properties"].items())[:200])})
    little, much = _Lane(20.0, 8 << 20), _Lane(20.0, 1 << 30)
    one._lanes = little, little
    with pytest.raises(InvalidRequest, match="memory"):
        await one.compile(structure("json_schema", schema))
    one._lanes = little, much
    assert (await one.compile(structure("json_schema", schema + " "))).data


async def test_a_process_that_dies_is_replaced(own: tuple[GrammarCompiler, int]):
    one, pid = own
    os.kill(pid, 9)
    with contextlib.suppress(EngineUnavailable):  # asked before it was known
        await one.compile(structure("regex", "b"))
    assert (await one.compile(structure("regex", "b"))).data
    assert one._forks is not None and one._forks.pid != pid


async def test_signals_to_the_group_are_not_its_business(tokenizer: PreTrainedTokenizerFast):
    one = build(tokenizer)
    compiling = asyncio.create_task(one.compile(structure("regex", "a")))
    while not compiling.done():  # from its first instruction on
        for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if one._forks is not None and one._forks.pid is not None:
                os.kill(one._forks.pid, each)
        await asyncio.sleep(0.02)
    assert compiling.result().data
    one.close()


async def test_whoever_leaves_takes_no_answer_of_others(own: tuple[GrammarCompiler, int]):
    one, _ = own
    asking = asyncio.create_task(one.compile(structure("regex", "c")))
    await asyncio.sleep(0.01)
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    grammar = await one.compile(structure("grammar", "root ::= [a-z]"))
    assert grammar.key == _key(structure("grammar", "root ::= [a-z]")) and grammar.data


async def test_what_is_being_compiled_ends_with_the_server(own: tuple[GrammarCompiler, int]):
    one, pid = own
    task = asyncio.create_task(one.compile(slow()))
    while not compiling(pid):
        await asyncio.sleep(0.01)
    [child] = compiling(pid)
    one.close()
    with pytest.raises(EngineUnavailable, match="closing"):
        await task
    child.wait(5)


async def test_too_much_text_is_refused_unread(tokenizer: PreTrainedTokenizerFast):
    one = build(tokenizer, max_bytes=10)
    with pytest.raises(InvalidRequest, match="12 bytes are too many: at most 10"):
        await one.compile(structure("regex", "é" * 6))
    assert one._forks is None  # nothing was started for it


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


async def test_tokens_of_a_tag_are_told_by_ids_that_there_are(compiler: GrammarCompiler):
    for token, where in (("a", "$.format.token: tokens are told by their ids"), (10**6, "1000000")):
        tag = {"type": "structural_tag", "format": {"type": "token", "token": token}}
        with pytest.raises(InvalidRequest) as caught:
            await compiler.compile(
                structure("structural_tag", json.dumps(tag), "structured_outputs.structural_tag")
            )
        assert where in caught.value.message


async def test_what_its_process_logs_is_written_as_the_servers_log(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def broken(schema: object) -> object:
        raise ZeroDivisionError

    monkeypatch.setattr("server.grammar_worker.normalized", broken)
    forked = multiprocessing.get_context("fork")  # so that it is broken there, too
    monkeypatch.setattr("server.grammar.multiprocessing.get_context", lambda _: forked)
    one = GrammarCompiler(
        tokenizer,
        seconds=30.0,
        max_bytes=65536,
        vocab_size=lambda: len(tokenizer),
        log_formatter=JsonLines(),
    )
    with contextlib.closing(one), pytest.raises(InvalidRequest, match="cannot be read: ZeroDivisionError"):
        await one.compile(structure("check", "{}"))
    lines = capfd.readouterr().err.splitlines()
    (told,) = [json.loads(line) for line in lines if "server.grammar_worker" in line]
    assert told["message"] == "a check cannot be read" and "ZeroDivisionError" in told["exception"]
