"""One input to the server, what came back, and what is wrong with it."""

from __future__ import annotations

import asyncio
import json
import re
from collections import Counter
from dataclasses import dataclass, field

from fault.fuzzing.inputs import Input, Inputs

SECONDS = 60.0  # that anything may take
_STATUS = re.compile(rb"HTTP/1\.1 (\d{3}) [^\r\n]*\r\n")
_TRACES = (b"Traceback (most recent call last)", b'File "', b"site-packages")
_OURS = ("internal_error", "request_failed", "engine_unavailable")


@dataclass
class Told:
    """What the server did with all inputs so far."""

    kinds: Counter[str] = field(default_factory=Counter)
    statuses: Counter[int] = field(default_factory=Counter)
    silent: int = 0  # closed without an answer
    left: int = 0  # clients that did not wait for one
    faults: list[str] = field(default_factory=list)

    def add(self, given: Input, answer: bytes, closed: bool = True) -> None:
        """`answer`: what came until the server closed, or, if it did not, until the time was over."""
        self.kinds[given.kind] += 1
        if given.then == "leave":
            self.left += 1
        elif not closed:
            self._fault(given, "not closed", answer)
        else:
            self._read(given, answer)

    def _read(self, given: Input, answer: bytes) -> None:
        found = [int(status) for status in _STATUS.findall(answer) if int(status) >= 200]
        self.statuses.update(found)
        self.silent += not found
        if any(status >= 500 and status != 505 for status in found):  # 505: the client's version of HTTP
            self._fault(given, "a 5xx", answer)
        if any(trace in answer for trace in _TRACES) and b"/page/" not in b"".join(given.pieces):
            self._fault(given, "a traceback", answer)
        if any(f'"code":"{code}"'.encode() in answer for code in _OURS):
            self._fault(given, "an error of ours in a stream", answer)
        if given.kind == "good" and found != [200]:
            self._fault(given, f"a good request got {found}", answer)
        if len(found) == 1 and found[0] >= 400 and not self._openai(answer):
            self._fault(given, "an error that is not in OpenAI's shape", answer)

    @staticmethod
    def _openai(answer: bytes) -> bool:
        *_, last = _STATUS.finditer(answer)  # behind any 100
        body = answer[last.start() :].partition(b"\r\n\r\n")[2]
        try:
            return not body or set(json.loads(body)["error"]) == {"message", "type", "param", "code"}
        except (ValueError, KeyError, TypeError):
            return False

    def _fault(self, given: Input, what: str, answer: bytes) -> None:
        sent = b"".join(given.pieces)
        got = f"{len(answer)} bytes: {answer[:600]!r} ... {answer[600:][-200:]!r}"
        self.faults.append(f"{what}: {given.kind}, then {given.then}\n  sent {sent[:400]!r}\n  got {got}")


async def exchange(host: str, port: int, given: Input) -> tuple[bytes, bool]:
    """Sends it. What comes back, and whether the server closed in time."""
    answer = bytearray()
    try:
        async with asyncio.timeout(SECONDS):
            reader, writer = await asyncio.open_connection(host, port)
            try:
                await _speak(reader, writer, given, answer)
            finally:
                writer.transport.abort() if given.then == "leave" else writer.close()
    except TimeoutError:
        return bytes(answer), False
    except OSError:  # reset: closed upon what it had not read
        pass
    return bytes(answer), True


async def _speak(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, given: Input, answer: bytearray
) -> None:
    try:
        for piece in given.pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0)
        if given.then == "end":
            writer.write_eof()
        while given.then != "leave" and (data := await reader.read(65536)):
            answer += data
            if (
                given.then == "listen" and writer.can_write_eof()
            ):  # not until the connection was idle for long
                writer.write_eof()
    except OSError:
        pass


async def fuzz(host: str, port: int, inputs: Inputs, requests: int, at_once: int) -> Told:
    """So many inputs, so many at once."""
    told = Told()
    left = requests

    async def client() -> None:
        nonlocal left
        while left > 0:
            left -= 1
            given = inputs.next()
            told.add(given, *await exchange(host, port, given))

    async with asyncio.TaskGroup() as clients:
        for _ in range(at_once):
            clients.create_task(client())
    return told
