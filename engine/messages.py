"""What client and engine loop say to each other: msgpack between processes, plain objects within one.

Requests travel under a *ticket*, a number the client never gives twice: an id may be used again
as soon as its request was left, while events of the old one are still on their way.
"""

from __future__ import annotations

import msgspec

from engine.types import GenerateRequest, ModelInfo, StepStats, TokenEvent


class Add(msgspec.Struct, frozen=True, tag="add"):
    """Serve this request."""

    ticket: int
    request: GenerateRequest


class Abort(msgspec.Struct, frozen=True, tag="abort"):
    """Nobody reads this request any more. Unknown and finished tickets are ignored."""

    ticket: int


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


class Stepped(msgspec.Struct, frozen=True, tag="stepped"):
    """One step: `tickets[i]` is whom `events[i]` belongs to."""

    stats: StepStats
    tickets: list[int]
    events: list[TokenEvent]


class Fault(msgspec.Struct, frozen=True, tag="fault"):
    """The engine raised: the requests of these tickets failed. The last message."""

    reason: str
    tickets: list[int]


ToEngine = Add | Abort | Stop
FromEngine = Ready | LoadFailed | Refused | Stepped | Fault

encode = msgspec.msgpack.Encoder().encode
decode_to_engine = msgspec.msgpack.Decoder(ToEngine).decode
decode_from_engine = msgspec.msgpack.Decoder(FromEngine).decode
