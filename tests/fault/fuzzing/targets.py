"""What reads what strangers wrote, as functions of bytes: each raises AssertionError if it does not hold."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import h11
from pydantic import BaseModel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from engine.types import InvalidRequest
from server.bounds import MOST_OBJECTS
from server.detokenize import TextStream
from server.errors import ApiError
from server.http1_checks import Connection
from server.protocol import body
from server.protocol.chat import ChatBody
from server.protocol.completions import CompletionBody
from server.protocol.responses import ResponsesBody
from server.protocol.tokens import DetokenizeBody, TokenizeBody
from server.tools import format_for, names
from server.turn import TurnReader

_BODIES: tuple[type[BaseModel], ...] = (CompletionBody, ChatBody, ResponsesBody, TokenizeBody, DetokenizeBody)
_EVENTS = 10_000  # that no input of these sizes has
_BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
_TOKENIZER = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(_BYTES)}, merges=[]))
_TOKENIZER.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
_TOKENIZER.decoder = decoders.ByteLevel()
_TOKENIZER.add_special_tokens(["<|end|>", "<|im_start|>"])
_SIZE = _TOKENIZER.get_vocab_size()


def cut(data: bytes) -> tuple[bytes, Sequence[bytes]]:
    """What follows the first byte, and the same in pieces of a length that this byte tells."""
    size, rest = (data[0] % 16 + 1, data[1:]) if data else (1, b"")
    return rest, [rest[start : start + size] for start in range(0, len(rest), size)]


def protocol(data: bytes) -> None:
    """A body is taken as one of the models, or refused in words."""
    for model in _BODIES:
        try:
            body.validate(model, body.parse_json(data, MOST_OBJECTS))
        except (InvalidRequest, ApiError) as error:
            assert error.message and len(error.message) < 2000 + len(data)


def http(data: bytes) -> None:
    """Any bytes, in any pieces, are requests or a fault that has a status; however they were cut."""
    whole, pieces = cut(data)
    assert _events([whole]) == _events(pieces) or len(whole) > 16_000


def _events(pieces: Sequence[bytes]) -> list[str]:
    """The requests, the bytes of their bodies, and the status of the fault that ended them."""
    connection, told = Connection(1 << 20), [""]
    try:
        for piece in pieces:
            if not piece:
                continue
            connection.receive_data(piece)
            for _ in range(_EVENTS):
                event = connection.next_event()
                if event is h11.NEED_DATA or event is h11.PAUSED:
                    break
                if isinstance(event, h11.Request):
                    told.append(f"{event.method!r} {event.target!r} {list(event.headers)}")
                    told.append("")
                elif isinstance(event, h11.Data):
                    told[-1] += bytes(event.data).hex()
                elif isinstance(event, h11.EndOfMessage):
                    told.append("end")
                    if connection.their_state is h11.MUST_CLOSE:
                        return told
                    answer = h11.Response(status_code=204, headers=[])
                    connection.send(answer)
                    connection.send(h11.EndOfMessage())
                    if connection.states != {h11.CLIENT: h11.DONE, h11.SERVER: h11.DONE}:
                        return told
                    connection.start_next_cycle()
            else:
                raise AssertionError("the connection gives events without end")
    except h11.RemoteProtocolError as error:
        assert error.error_status_hint in (400, 413, 414, 417, 431, 501, 505)
        told.append(str(error.error_status_hint))
    return told


def detokenizer(data: bytes) -> None:
    """Any tokens: the text grows, is all told, and is what the tokenizer makes of them at once; where they
    are no characters, there are U+FFFD."""
    text = data.decode("utf-8", "ignore")
    written = _TOKENIZER.encode(text).ids[:300]
    for ids in (written, [(byte * 7) % _SIZE for byte in data[:300]]):
        stream = TextStream(_TOKENIZER)
        for token in ids:
            before = len(stream.text)
            stream.push(token)
            assert stream.safe == len(stream.text) >= before
        stream.finish()
        assert "".join(stream.text_of(place) for place in range(len(ids))) == stream.text
        whole = _TOKENIZER.decode(ids, skip_special_tokens=True)
        assert "\ufffd" in whole or stream.text == whole


def tools(data: bytes) -> None:
    """Calls are read alike, however the text was cut."""
    text, pieces = data[1:].decode("utf-8", "replace"), data[:1]
    size = (pieces[0] if pieces else 0) % 16 + 1
    for name in names():
        one, two = (_reader(name) for _ in range(2))
        one.push(text, final=True)
        for start in range(0, len(text), size):
            two.push(text[start : start + size], final=False)
        two.push("", final=True)
        assert (one.content, len(one.tool_calls)) == (two.content, len(two.tool_calls))


def _reader(name: str) -> TurnReader:
    tool_format = format_for("", name)
    assert tool_format is not None
    return TurnReader(tool_format.parser(("f", "get_weather"), sure=False), None)


TARGETS: dict[str, Callable[[bytes], None]] = {
    "protocol": protocol,
    "http": http,
    "detokenizer": detokenizer,
    "tools": tools,
}
