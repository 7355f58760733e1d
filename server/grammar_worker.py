"""The process that compiles grammars: it forks one for each, which is killed when it takes too long."""

from __future__ import annotations

import json
import logging
import os
import random
import re
import resource
import signal
import socket
import threading
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import psutil
import xgrammar
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from engine import group_signals, log_writer
from engine.grammar import SLOWEST_SECONDS, Matcher, vocabulary
from server.grammar_messages import Answer, Ask
from server.grammar_regex import Refused, check_regex
from server.grammar_schema import normalized

log = logging.getLogger(__name__)

_MOST_COMPILED = 64 << 20  # bytes of the result
_GRACE = 5.0  # seconds
_WHITESPACE = 2  # the longest run between two tokens of JSON: an answer of blanks alone would never end
_TRIAL_TOKENS = 64
_TOKENS = ("token", "exclude_tokens", "trigger_tokens")  # fields of structural tags
# How xgrammar keeps [^"\\\r\n], a character of a string whose characters are counted, and what it is to be:
# [^\x00-\x1f"\\], since JSON forbids every control character.
_COUNTED = [1, 9, 1, 34, 34, 92, 92, 13, 13, 10, 10]
_CHARACTER = [1, 9, 1, 0, 31, 34, 34, 92, 92, 92, 92]
_ORIGIN = re.compile(r"^\[[\d:]+\] \S+:\d+: (Check failed: \(.*?\) is false: )?", re.DOTALL)


def main(
    control: socket.socket,
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
    log_level: int,
    formatter: logging.Formatter | None,
) -> None:
    """Forks for every line that comes over `control`, until its other end closes.

    What is forked says by a byte that it is there, takes an `Ask`, gives its `Answer`, and ends; also once
    the line is closed, or much later than it was given time for.
    """
    group_signals.ignore()  # the server ends us
    group_signals.go_on_when_orphaned()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody asks how they ended
    log_writer.configure(log_level, formatter)
    try:
        compiler = xgrammar.GrammarCompiler(
            vocabulary(tokenizer, vocab_size), max_threads=1, cache_enabled=False
        )
        unfit = None
    except (RuntimeError, ValueError) as error:
        compiler, unfit = None, str(error)
    while True:
        begun, lines, _, _ = socket.recv_fds(control, 1, 1)
        if not begun:
            return
        with socket.socket(fileno=lines[0]) as line:
            if os.fork() == 0:
                try:
                    control.close()
                    _serve(line, compiler, unfit)
                finally:
                    os._exit(0)


def _serve(line: socket.socket, compiler: xgrammar.GrammarCompiler | None, unfit: str | None) -> None:
    """Answers one question, in a process that is for nothing else."""
    line.sendall(b"+")
    size = int.from_bytes(_received(line, 4))
    ask = msgspec.msgpack.decode(_received(line, size), type=Ask)
    signal.setitimer(signal.ITIMER_REAL, ask.seconds + _GRACE)  # nobody handles it: it kills
    threading.Thread(target=_end_with, args=(line,), daemon=True).start()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if compiler is None or ask.kind == "ready":
        found = Answer(refused=unfit)
    else:
        limit = psutil.Process().memory_info().vms + ask.memory
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        found = answer(compiler, ask)
    logging.shutdown()  # once it is answered, the process may end at any time
    line.sendall(msgspec.msgpack.encode(found))


def _received(line: socket.socket, size: int) -> bytes:
    data = line.recv(size, socket.MSG_WAITALL)
    if len(data) < size:
        raise EOFError
    return data


def _end_with(line: socket.socket) -> None:
    """Ends the process once nobody waits for its answer."""
    line.recv(1)
    os._exit(1)


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
            return Answer(
                refused=f"compiling it takes more than {ask.memory >> 20} MiB of memory", beyond=True
            )
        return Answer(refused=_ORIGIN.sub("", str(error)).strip() or type(error).__name__)
    except Exception as error:  # not foreseen: of the server, not of the client
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
        elif name in _TOKENS and any(isinstance(each, str) for each in _listed(value)):
            raise Refused(where or "a structural tag", "tokens are told by their ids")
        else:
            found[name] = _tag(value, where)
    return found


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _try_out(compiled: xgrammar.CompiledGrammar) -> None:
    """Follows the grammar along two texts, one that repeats itself: what is slow to follow is refused,
    and what has no text."""
    chance = random.Random(0)
    _follow(compiled, lambda allowed, last: int(chance.choice(allowed)))
    _follow(compiled, lambda allowed, last: last if last in allowed else int(allowed[0]))


def _follow(compiled: xgrammar.CompiledGrammar, choose: Callable[[NDArray[np.int64], int], int]) -> None:
    matcher = Matcher(compiled, ())
    vocab, token = compiled.tokenizer_info.vocab_size, -1
    for step in range(_TRIAL_TOKENS):
        found = matcher.after(())
        if found is None:  # ended
            return
        allowed = np.flatnonzero(np.unpackbits(found.words.view(np.uint8), bitorder="little")[:vocab])
        if not len(allowed):
            raise Refused(f"after {step} tokens", "nothing matches it")
        token = choose(allowed, token)
        matcher.commit([token])
        if matcher.beyond > SLOWEST_SECONDS / 2:  # half of what ends a request
            raise Refused(f"after {step} tokens", "it is so ambiguous that following it takes too long")
