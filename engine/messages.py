"""What client and engine loop say to each other: msgpack between processes, plain objects within one.

Requests travel under a *ticket*, a number the client never gives twice: an id may be used again
as soon as its request was left, while events of the old one are still on their way.
"""

from __future__ import annotations

import msgspec

from engine.types import CompiledGrammar, GenerateRequest, ModelInfo, StepStats, TokenEvent


class Add(msgspec.Struct, frozen=True, tag="add"):
    """Serve this request. Its grammar is without its bytes, for which the engine asks if it lacks them."""

    ticket: int
    request: GenerateRequest


class Abort(msgspec.Struct, frozen=True, tag="abort"):
    """Nobody reads this request any more. Unknown and finished tickets are ignored."""

    ticket: int


class Cut(msgspec.Struct, frozen=True, tag="cut"):
    """As `Abort`, but the first `tokens` of its tokens count: its reader found the output's end in them."""

    ticket: int
    tokens: int


class Grammar(msgspec.Struct, frozen=True, tag="grammar"):
    """What a `GrammarWanted` asked for. One that nobody waits for any more is ignored."""

    grammar: CompiledGrammar


class Stop(msgspec.Struct, frozen=True, tag="stop"):
    """End the loop now, whatever is open."""


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """The models are loaded; the first message of an engine that could load."""

    info: ModelInfo


class LoadFailed(msgspec.Struct, frozen=True, tag="load_failed"):
    """The engine could not be made; the last message."""

    reason: str


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """The engine raised InvalidRequest for this request."""

    ticket: int
    message: str
    param: str | None
    code: str | None


class GrammarWanted(msgspec.Struct, frozen=True, tag="grammar_wanted"):
    """Requests were added whose grammar, of this key, the engine has not or no more: they wait for it."""

    key: str


class Stepped(msgspec.Struct, frozen=True, tag="stepped"):
    """One step: `tickets[i]` is whom `events[i]` belongs to.

    `left`: each ticket of an `Abort` or `Cut` once, after which no event of it comes.
    """

    stats: StepStats
    tickets: list[int]
    events: list[TokenEvent]
    left: list[int] = []


class Alive(msgspec.Struct, frozen=True, tag="alive"):
    """No step has ended, and yet all is well. `unbounded`: work has begun whose time has no bound, until the
    next message."""

    unbounded: bool = False


class Fault(msgspec.Struct, frozen=True, tag="fault"):
    """The engine raised, and what it had open is lost. The last message."""

    reason: str


ToEngine = Add | Abort | Cut | Grammar | Stop
FromEngine = Ready | LoadFailed | Refused | GrammarWanted | Stepped | Alive | Fault

encode = msgspec.msgpack.Encoder().encode
decode_to_engine = msgspec.msgpack.Decoder(ToEngine).decode
decode_from_engine = msgspec.msgpack.Decoder(FromEngine).decode


def unburdened(request: GenerateRequest) -> GenerateRequest:
    """Without the compiled grammar's bytes: they may be many, and of as many choices the same."""
    params = request.params
    if params.grammar is None:
        return request
    grammar = msgspec.structs.replace(params.grammar, data=b"")
    return msgspec.structs.replace(request, params=msgspec.structs.replace(params, grammar=grammar))
