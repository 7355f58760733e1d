"""What an answer must look like, compiled in a process of its own: off the event loop, bounded, cached."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import multiprocessing
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Literal

import msgspec
from transformers import PreTrainedTokenizerBase

from engine.types import CompiledGrammar, EngineUnavailable, InvalidRequest
from server.grammar_messages import Answer, Ask

log = logging.getLogger(__name__)

Kind = Literal["json_object", "json_schema", "regex", "choice", "grammar", "structural_tag", "check"]

_MOST_KEPT = 256 << 20  # bytes of compiled grammars
_START_SECONDS = 120.0
_UNFIT = "structured output is not available for this model's tokenizer"
_TURNS = 3  # of the slowest grammars, that one waits for


@dataclass(frozen=True)
class Structure:
    """What an answer must look like.

    "check" compiles nothing: it tells whether a JSON schema can be followed.

    `text`: the schema as JSON, the regex, the choices as a JSON list, the EBNF, or xgrammar's structural
    tag as JSON; "" for json_object. `param`: the request's field, for errors.
    """

    kind: Kind
    text: str
    param: str


class GrammarCompiler:
    """One per app. Its process starts with the first grammar and is replaced when it takes too long."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        seconds: float,
        max_bytes: int,
        vocab_size: Callable[[], int],
    ) -> None:
        """`seconds` for one grammar, `max_bytes` of its text; `vocab_size()`: that of the served model."""
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._seconds, self._max_bytes = seconds, max_bytes
        self._kept: OrderedDict[str, CompiledGrammar | str] = OrderedDict()  # grammars and refusals, by key
        self._bytes = 0
        self._turn = asyncio.Lock()
        self._process: BaseProcess | None = None
        self._connection: Connection | None = None
        self._closed = self._unfit = False

    async def compile(self, structure: Structure) -> CompiledGrammar:
        """Raises InvalidRequest, which says where the grammar is wrong, and EngineUnavailable."""
        size = len(structure.text.encode("utf-8", "surrogatepass"))
        if size > self._max_bytes:
            raise _refused(structure, f"{size} bytes are too many: at most {self._max_bytes} are taken")
        key = _key(structure)
        if self._unfit:
            raise _refused(structure, _UNFIT)
        if key not in self._kept:
            await self._take_turn()
            try:
                if key not in self._kept:  # nobody else asked for the same meanwhile
                    self._keep(key, await self._compiled(key, structure))
            finally:
                self._turn.release()
        self._kept.move_to_end(key)
        found = self._kept[key]
        if isinstance(found, str):
            raise _refused(structure, found)
        return found

    def close(self) -> None:
        """Ends the process. What is being compiled fails."""
        self._closed = True
        self._end()

    async def _take_turn(self) -> None:
        try:
            async with asyncio.timeout(_TURNS * self._seconds if self._process else _START_SECONDS):
                await self._turn.acquire()
        except TimeoutError as error:
            raise EngineUnavailable("other grammars are being compiled: try again later") from error

    async def _compiled(self, key: str, structure: Structure) -> CompiledGrammar | str:
        connection = await self._ready()
        if self._unfit:
            self._end()
            return _UNFIT
        ask = msgspec.msgpack.encode(Ask(structure.kind, structure.text, _own(structure)))
        try:
            answer = await asyncio.to_thread(_exchange, connection, ask, self._seconds)
        except TimeoutError:
            self._end()
            return f"compiling it takes longer than {self._seconds:g} seconds"
        except (EOFError, OSError) as error:
            self._end()
            if self._closed:
                raise EngineUnavailable("the server is closing") from error
            log.warning("the grammar compiler's process died of a %s", structure.kind)
            return "compiling it takes too much memory or depth"
        except asyncio.CancelledError:
            self._end()  # an answer to nobody would be taken for the next one's
            raise
        if answer.grown:
            self._end()  # the next grammar starts another one
        return answer.refused if answer.refused is not None else CompiledGrammar(key, answer.data)

    async def _ready(self) -> Connection:
        if self._closed:
            raise EngineUnavailable("the server is closing")
        if self._connection is None or self._process is None or not self._process.is_alive():
            self._end()
            context = multiprocessing.get_context("spawn")
            self._connection, theirs = context.Pipe()
            arguments = (theirs, self._tokenizer, self._vocab_size(), self._seconds)
            self._process = context.Process(
                target=_run, args=arguments, name="disco-serve-grammars", daemon=True
            )
            connection = self._connection
            try:
                await asyncio.to_thread(self._process.start)
                theirs.close()
                unfit = (await asyncio.to_thread(_exchange, connection, None, _START_SECONDS)).refused
                if unfit is not None:
                    log.warning("no structured output: %s", unfit)
                    self._unfit = True
            except (EOFError, OSError, TimeoutError) as error:
                self._end()
                raise EngineUnavailable("the grammar compiler does not start") from error
            except asyncio.CancelledError:
                self._end()
                raise
        return self._connection

    def _keep(self, key: str, found: CompiledGrammar | str) -> None:
        self._kept[key] = found
        self._bytes += _size(found)
        while self._bytes > _MOST_KEPT and len(self._kept) > 1:
            _, oldest = self._kept.popitem(last=False)
            self._bytes -= _size(oldest)

    def _end(self) -> None:
        process, connection = self._process, self._connection
        self._process = self._connection = None
        if process is not None and process.pid is not None:
            process.kill()
            process.join()
        if connection is not None:
            connection.close()


def _run(connection: Connection, tokenizer: PreTrainedTokenizerBase, vocab_size: int, seconds: float) -> None:
    from server.grammar_worker import main  # imports torch, which the server itself does without

    main(connection, tokenizer, vocab_size, seconds)


def _exchange(connection: Connection, ask: bytes | None, seconds: float) -> Answer:
    if ask is not None:
        connection.send_bytes(ask)
    if not connection.poll(seconds):
        raise TimeoutError
    return msgspec.msgpack.decode(connection.recv_bytes(), type=Answer)


def _own(structure: Structure) -> bool:
    """Whether the client wrote the tag: it is told of places in it."""
    return structure.param.endswith("structural_tag")


def _key(structure: Structure) -> str:
    text = f"{structure.kind}{_own(structure)}\n{structure.text}"
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _size(found: CompiledGrammar | str) -> int:
    return len(found if isinstance(found, str) else found.data) + 256


def _refused(structure: Structure, why: str) -> InvalidRequest:
    return InvalidRequest(f"'{structure.param}': {why}", structure.param, "invalid_grammar")
