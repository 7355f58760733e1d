"""What an answer must look like, compiled in processes of their own: off the event loop, bounded, cached.

A grammar is tried for a moment first, and what takes longer again in a lane of its own: heavy grammars wait
for heavy ones alone. In both lanes API keys take turns: a key that asks for many keeps no other waiting.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import multiprocessing
import socket
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from typing import Any, Literal
from weakref import WeakValueDictionary

import msgspec
from transformers import PreTrainedTokenizerBase

from engine import group_signals
from engine.types import CompiledGrammar, EngineUnavailable, InvalidRequest
from server.grammar_messages import Answer, Ask
from server.turns import Turns

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


@dataclass(frozen=True)
class _Lane:
    """Grammars one after the other, by turns of tenants: `seconds` and bytes of memory that one may take."""

    seconds: float
    memory: int
    turns: Turns = field(default_factory=Turns)


class GrammarCompiler:
    """One per app. Its process starts with the first grammar and forks one for every grammar: at most two."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        seconds: float,
        max_bytes: int,
        vocab_size: Callable[[], int],
        log_formatter: logging.Formatter | None = None,
    ) -> None:
        """`seconds` for one grammar, `max_bytes` of its text; `vocab_size()`: that of the served model;
        `log_formatter` writes the log lines of its processes; None: as text."""
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._seconds, self._max_bytes, self._log_formatter = seconds, max_bytes, log_formatter
        self._kept: OrderedDict[str, CompiledGrammar | str] = OrderedDict()  # grammars and refusals, by key
        self._bytes = 0
        self._lanes = _Lane(min(1.0, seconds), 512 << 20), _Lane(seconds, 1536 << 20)
        self._asked: WeakValueDictionary[tuple[str, str], Turns] = WeakValueDictionary()  # by tenant, key
        self._begun: asyncio.Task[None] | None = None
        self._forks: _Forks | None = None
        self._closed = self._unfit = False

    async def compile(self, structure: Structure, tenant: str = "") -> CompiledGrammar:
        """On behalf of `tenant`; tenants take turns. Raises InvalidRequest, which says where the grammar is
        wrong, and EngineUnavailable.
        """
        size = len(structure.text.encode("utf-8", "surrogatepass"))
        if size > self._max_bytes:
            raise _refused(structure, f"{size} bytes are too many: at most {self._max_bytes} are taken")
        key = _key(structure)
        if key not in self._kept:
            # Of the same tenant: who asks for what another one waits for comes in its own turn.
            async with self._turn(self._asked.setdefault((tenant, key), Turns()), tenant):
                if key not in self._kept:  # nobody else asked for the same meanwhile
                    await self._add(key, structure, tenant)
        self._kept.move_to_end(key)
        found = self._kept[key]
        if isinstance(found, str):
            raise _refused(structure, found)
        return found

    def close(self) -> None:
        """Ends the processes. What is being compiled fails."""
        self._closed = True
        self._end()

    @asynccontextmanager
    async def _turn(self, turns: Turns, tenant: str) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(_TURNS * self._seconds + (0 if self._forks else _START_SECONDS)):
                await turns.acquire(tenant)
        except TimeoutError as error:
            raise EngineUnavailable("other grammars are being compiled: try again later") from error
        try:
            yield
        finally:
            turns.release()

    async def _add(self, key: str, structure: Structure, tenant: str) -> None:
        """Compiles it, in one lane or the other, and keeps what is found."""
        for lane in self._lanes:
            async with self._turn(lane.turns, tenant):
                if key in self._kept:
                    return
                answer = await self._tried(structure, lane)
            if not answer.beyond:
                break
        if key not in self._kept:  # two tenants may have it tried in two lanes
            self._keep(key, CompiledGrammar(key, answer.data) if answer.refused is None else answer.refused)

    async def _tried(self, structure: Structure, lane: _Lane) -> Answer:
        forks = await self._ready()
        if self._unfit:
            return Answer(refused=_UNFIT)
        ask = Ask(structure.kind, structure.text, _own(structure), lane.seconds, lane.memory)
        try:
            return await forks.ask(ask)
        except TimeoutError:
            return Answer(refused=f"compiling it takes longer than {self._seconds:g} seconds", beyond=True)
        except EOFError:
            log.warning("the process that compiled a %s died", structure.kind)
            return Answer(refused="compiling it takes too much memory or depth", beyond=True)
        except OSError as error:
            if forks is self._forks:
                self._end()  # the next grammar starts another one
            why = "the server is closing" if self._closed else "the grammar compiler died: try again"
            raise EngineUnavailable(why) from error

    async def _ready(self) -> _Forks:
        """Starts the process if need be. The start is everybody's: who leaves meanwhile does not end it."""
        if self._closed:
            raise EngineUnavailable("the server is closing")
        living = self._forks is not None and self._forks.alive()
        if self._begun is None or (self._begun.done() and not living):
            self._begun = asyncio.create_task(self._begin())
            self._begun.add_done_callback(lambda task: task.cancelled() or task.exception())
        await asyncio.shield(self._begun)
        if self._forks is None:
            raise EngineUnavailable("the grammar compiler died: try again")
        return self._forks

    async def _begin(self) -> None:
        self._end()
        self._forks = _Forks(self._tokenizer, self._vocab_size(), self._log_formatter)
        try:
            unfit = await self._forks.start()
        except (EOFError, OSError, TimeoutError) as error:
            self._end()
            raise EngineUnavailable("the grammar compiler does not start") from error
        if unfit is not None:
            log.warning("no structured output: %s", unfit)
            self._unfit = True

    def _keep(self, key: str, found: CompiledGrammar | str) -> None:
        self._kept[key] = found
        self._bytes += _size(found)
        while self._bytes > _MOST_KEPT and len(self._kept) > 1:
            _, oldest = self._kept.popitem(last=False)
            self._bytes -= _size(oldest)

    def _end(self) -> None:
        forks, self._forks = self._forks, None
        if forks is not None:
            forks.close()


class _Forks:
    """The process that forks another for every question, and the lines to these.

    Whoever answers ends when its line is closed. All may raise OSError: the process is gone.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, vocab_size: int, formatter: logging.Formatter | None
    ) -> None:
        self._control, theirs = socket.socketpair()
        arguments = (theirs, tokenizer, vocab_size, log.getEffectiveLevel(), formatter)
        self._process: BaseProcess = multiprocessing.get_context("spawn").Process(
            target=_run, args=arguments, name="disco-serve-grammars", daemon=True
        )
        self._theirs = theirs
        self._lines: set[asyncio.StreamWriter] = set()
        self._ended = False

    @property
    def pid(self) -> int | None:
        return self._process.pid

    async def start(self) -> str | None:
        """Why it cannot compile anything, if so. Raises EOFError, OSError, TimeoutError."""
        with self._theirs:
            await asyncio.to_thread(_start, self._process)
        if self._ended:  # meanwhile, when there was no process to end yet
            self._kill()
            raise ConnectionError("the processes were ended")
        return (await self.ask(Ask("ready", "", seconds=_START_SECONDS))).refused

    def alive(self) -> bool:
        return self._process.is_alive()

    async def ask(self, ask: Ask) -> Answer:
        """Raises TimeoutError after `ask.seconds`, EOFError if whoever was to answer died of it."""
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                socket.send_fds(self._control, [b"+"], [theirs.fileno()])
            except OSError:
                ours.close()
                raise
        reader, writer = await asyncio.open_unix_connection(sock=ours, limit=1 << 20)
        self._lines.add(writer)
        try:
            async with asyncio.timeout(ask.seconds):
                said = msgspec.msgpack.encode(ask)
                writer.write(len(said).to_bytes(4) + said)
                begun = await reader.read(1)
                if not begun:
                    raise ConnectionError("nobody was there to answer")
                answer = await reader.read()
            return msgspec.msgpack.decode(answer, type=Answer)
        except msgspec.DecodeError as error:
            if self._ended:
                raise ConnectionError("the processes were ended") from error
            raise EOFError from error
        finally:
            self._lines.discard(writer)
            writer.transport.abort()

    def close(self) -> None:
        self._ended = True
        self._control.close()
        for line in self._lines:
            line.transport.abort()
        if self._process.pid is not None:
            self._kill()

    def _kill(self) -> None:
        self._process.kill()
        self._process.join()


def _start(process: BaseProcess) -> None:
    with group_signals.blocked():
        process.start()


def _run(*arguments: Any) -> None:
    from server.grammar_worker import main  # imports torch, which the server itself does without

    main(*arguments)


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
