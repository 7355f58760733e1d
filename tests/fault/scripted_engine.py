"""An engine without a model, whose requests say by their first prompt id what shall go wrong.

It counts: every step gives every request the next number, until max_tokens. A module of its own,
so that a worker process that loads it loads nothing else.
"""

import gc
import os
import signal
import socket
import time

import psutil
import zmq

from engine.config import EngineConfig
from engine.long_work import long_work
from engine.reading import Unread
from engine.types import GenerateRequest, InvalidRequest, ModelInfo, StepStats, TokenEvent

COUNT, EXIT, KILL, RAISE, HANG, REFUSE, BREAK_ADD, SLOW, LONG, WAITS, GARBAGE, CLOSES, CUTS = range(13)


class Nothing:
    """Takes its time to read what is nothing."""

    def read(self, data: bytes) -> None:
        time.sleep(1.2)

    def keep(self, key: str, compiled: None) -> None:
        return None


def line() -> zmq.Socket[bytes]:
    """The socket to the client."""
    (found,) = [each for each in gc.get_objects() if isinstance(each, zmq.Socket)]
    return found


def cut_line() -> None:
    """Ends the connection under it."""
    for each in psutil.Process().net_connections("unix"):
        with socket.socket(fileno=os.dup(each.fd)) as half:
            if not half.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):  # ZeroMQ aborts without that one
                half.shutdown(socket.SHUT_RDWR)


class Scripted:
    def __init__(self, config: EngineConfig) -> None:
        if config.target.startswith("/"):  # a file with the number of loads that shall yet succeed
            with open(config.target, "r+") as file:
                left = int(file.read())
                file.seek(0)
                file.write(str(left - 1))
            if left <= 0:
                raise ValueError("no more loads")
        if config.target == "unknown":
            raise ValueError("unknown model 'unknown'")
        if config.target == "exits":
            os._exit(3)
        if config.target == "slow":
            time.sleep(1.5)
        if config.target == "forever":
            time.sleep(600)
        self.info = ModelInfo(
            target=config.target, draft=None, vocab_size=1000, max_model_len=10**6, eos_token_ids=(),
            bos_token_id=None, dtype="float32", device="cpu", kv_blocks=1, block_size=16,
            drafters=("none",), default_drafter="none", default_policy="none", default_options={}, max_sl=0,
        )  # fmt: skip
        self.open: dict[str, tuple[GenerateRequest, int]] = {}
        self.aborted = 0
        self.waited: set[str] = set()

    def add(self, request: GenerateRequest) -> None:
        if request.prompt_ids[0] == REFUSE:
            raise InvalidRequest("the engine says no", "prompt", "no")
        if request.prompt_ids[0] == WAITS and request.id not in self.waited:
            self.waited.add(request.id)
            raise Unread(Nothing(), "nothing")
        if request.prompt_ids[0] == BREAK_ADD:
            raise RuntimeError("add is broken")
        self.open[request.id] = (request, 0)

    def abort(self, request_id: str) -> None:
        if self.open.pop(request_id, None):
            self.aborted += 1

    def cut(self, request_id: str, n_tokens: int) -> None:
        self.abort(request_id)

    def close(self) -> None:
        return None

    def has_work(self) -> bool:
        return bool(self.open)

    def step(self) -> tuple[list[TokenEvent], StepStats]:
        events = []
        for request, count in list(self.open.values()):
            kind = request.prompt_ids[0]
            if count == 2:
                self.misbehave(kind)
            if kind == SLOW:
                time.sleep(0.02)
            last = count + 1 == request.params.max_tokens
            events.append(
                TokenEvent(id=request.id, token_ids=(count,), finish_reason="length" if last else None)
            )
            self.open[request.id] = (request, count + 1)
            if last:
                del self.open[request.id]
        return events, StepStats(rows=len(events), running=len(self.open), preemptions=self.aborted)

    def misbehave(self, kind: int) -> None:
        if kind == EXIT:
            os._exit(7)
        if kind == KILL:
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == RAISE:
            raise RuntimeError("the step is broken")
        if kind == HANG:
            time.sleep(600)
        if kind == LONG:
            with long_work():
                time.sleep(1.2)
        if kind == GARBAGE:
            line().send(b"no message")
        if kind == CLOSES:
            line().close(linger=0)
        if kind == CUTS:
            cut_line()
            time.sleep(600)


class Paced(Scripted):
    """Its steps take as long as those of a small model."""

    def step(self) -> tuple[list[TokenEvent], StepStats]:
        time.sleep(0.02)
        return super().step()
