"""The process that compiles grammars: one at a time, so that it may be killed when it takes too long."""

from __future__ import annotations

import json
import logging
import random
import re
import resource
import signal
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import msgspec
import numpy as np
import psutil
import xgrammar
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from engine.grammar import SLOWEST_SECONDS, USUAL_SECONDS, vocabulary
from server.grammar_messages import Answer, Ask
from server.grammar_regex import Refused, check_regex
from server.grammar_schema import normalized

log = logging.getLogger(__name__)

_MOST_MEMORY = 2 << 30  # bytes that compiling may add to the process
_MOST_COMPILED = 64 << 20  # bytes of the result
_GRACE = 5.0  # seconds
_MUCH = 512 << 20  # bytes that are more than is given back: the process is to be replaced
_WHITESPACE = 2  # the longest run between two tokens of JSON: an answer of blanks alone would never end
_TRIAL_TOKENS = 64
# How xgrammar keeps [^"\\\r\n], a character of a string whose characters are counted, and what it is to be:
# [^\x00-\x1f"\\], since JSON forbids every control character.
_COUNTED = [1, 9, 1, 34, 34, 92, 92, 13, 13, 10, 10]
_CHARACTER = [1, 9, 1, 0, 31, 34, 34, 92, 92, 92, 92]
_ORIGIN = re.compile(r"^\[[\d:]+\] \S+:\d+: (Check failed: \(.*?\) is false: )?", re.DOTALL)


def main(connection: Connection, tokenizer: PreTrainedTokenizerBase, vocab_size: int, seconds: float) -> None:
    """Says by an empty answer that it is ready, or why it never is; then answers until the other end closes.

    A grammar that takes much longer than `seconds` ends it, also where nobody is left to do so.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the server ends us
    try:
        known = vocabulary(tokenizer, vocab_size)
    except (RuntimeError, ValueError) as error:
        connection.send_bytes(msgspec.msgpack.encode(Answer(refused=str(error))))
        return
    compiler = xgrammar.GrammarCompiler(known, max_threads=1, cache_enabled=False)
    process = psutil.Process()
    limit, held = process.memory_info().vms + _MOST_MEMORY, process.memory_info().rss
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    connection.send_bytes(msgspec.msgpack.encode(Answer()))
    while True:
        try:
            ask = msgspec.msgpack.decode(connection.recv_bytes(), type=Ask)
        except EOFError:
            return
        signal.setitimer(signal.ITIMER_REAL, seconds + _GRACE)  # nobody handles it: it kills
        found = answer(compiler, ask)
        signal.setitimer(signal.ITIMER_REAL, 0)
        grown = process.memory_info().rss > held + _MUCH
        connection.send_bytes(msgspec.msgpack.encode(msgspec.structs.replace(found, grown=grown)))


def answer(compiler: xgrammar.GrammarCompiler, ask: Ask) -> Answer:
    try:
        if ask.kind == "check":
            normalized(json.loads(ask.text))
            return Answer()
        compiled = _compile(compiler, ask)
        _try_out(compiled)
        data = compiled.serialize_json().encode()
    except Refused as error:
        return Answer(refused=str(error))
    except (MemoryError, RuntimeError, ValueError, RecursionError) as error:
        if isinstance(error, MemoryError) or "bad_alloc" in str(error):
            return Answer(refused=f"compiling it takes more than {_MOST_MEMORY >> 20} MiB of memory")
        return Answer(refused=_ORIGIN.sub("", str(error)).strip() or type(error).__name__)
    except Exception as error:  # not foreseen, and this process must go on: others wait for it
        log.exception("a %s cannot be read", ask.kind)
        return Answer(refused=f"it cannot be read: {type(error).__name__}")
    if len(data) > _MOST_COMPILED:
        return Answer(refused=f"it is too large: {len(data)} bytes compiled, at most {_MOST_COMPILED}")
    return Answer(data)


def _compile(compiler: xgrammar.GrammarCompiler, ask: Ask) -> xgrammar.CompiledGrammar:
    text = ask.text
    match ask.kind:
        case "json_object":
            return compiler.compile_grammar(of_schema({"type": "object"}))
        case "json_schema":
            return compiler.compile_grammar(of_schema(json.loads(text)))
        case "regex":
            check_regex(text)
            return compiler.compile_regex(text)
        case "choice":
            values = [{"type": "const_string", "value": value} for value in json.loads(text)]
            form = values[0] if len(values) == 1 else {"type": "or", "elements": values}
            return compiler.compile_structural_tag({"type": "structural_tag", "format": form})
        case "grammar":
            return compiler.compile_grammar(text)
        case _:
            path = "$" if ask.own else None
            tag = json.dumps(_tag(json.loads(text), path))
            compiler.compile_structural_tag(tag)  # says what is wrong with tokens
            return compiler.compile_grammar(_counting(xgrammar.Grammar.from_structural_tag(tag)))


def of_schema(schema: Any) -> xgrammar.Grammar:
    """The grammar of the texts that a JSON schema allows. Raises Refused."""
    text = json.dumps(normalized(schema), ensure_ascii=False)
    return _counting(xgrammar.Grammar.from_json_schema(text, max_whitespace_cnt=_WHITESPACE))


def _counting(grammar: xgrammar.Grammar) -> xgrammar.Grammar:
    """Without control characters in strings that have lengths."""
    form = json.loads(grammar.serialize_json())
    data, size = form["grammar_expr_data"], len(_COUNTED)
    found = [at for at in form["grammar_expr_indptr"] if data[at : at + size] == _COUNTED]
    for at in found:
        data[at : at + size] = _CHARACTER
    return xgrammar.Grammar.deserialize_json(json.dumps(form)) if found else grammar


def _tag(node: Any, path: str | None) -> Any:
    """A structural tag whose schemas and regexes are checked and normalized. `path`: None is not told."""
    if isinstance(node, list):
        return [_tag(each, path and f"{path}[{i}]") for i, each in enumerate(node)]
    if not isinstance(node, dict):
        return node
    found = {}
    for name, value in node.items():
        where = path and f"{path}.{name}"
        if node.get("type") in ("json_schema", "qwen_xml_parameter") and name == "json_schema":
            try:
                found[name] = normalized(value)
            except Refused as error:
                if where is None:
                    raise
                raise Refused(where, str(error)) from error
        elif node.get("type") == "regex" and name == "pattern" and isinstance(value, str):
            check_regex(value)
            found[name] = value
        else:
            found[name] = _tag(value, where)
    return found


def _try_out(compiled: xgrammar.CompiledGrammar) -> None:
    """Follows the grammar along two texts, one that repeats itself: what is slow to follow is refused,
    and what has no text."""
    chance = random.Random(0)
    _follow(compiled, lambda allowed, last: int(chance.choice(allowed)))
    _follow(compiled, lambda allowed, last: last if last in allowed else int(allowed[0]))


def _follow(compiled: xgrammar.CompiledGrammar, choose: Callable[[NDArray[np.int64], int], int]) -> None:
    matcher = xgrammar.GrammarMatcher(compiled)
    vocab = compiled.tokenizer_info.vocab_size
    words = np.empty((1, -(-vocab // 32)), dtype=np.int32)
    token, beyond = -1, 0.0
    for step in range(_TRIAL_TOKENS):
        begin = time.thread_time()
        matcher.fill_next_token_bitmask(words)
        allowed = np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")[:vocab])
        if not len(allowed):
            raise Refused(f"after {step} tokens", "nothing matches it")
        token = choose(allowed, token)
        matcher.accept_token(token)
        beyond += max(0.0, time.thread_time() - begin - USUAL_SECONDS)
        if beyond > SLOWEST_SECONDS / 2:  # half of what ends a request
            raise Refused(f"after {step} tokens", "it is so ambiguous that following it takes too long")
        if matcher.is_terminated():
            return
