"""The engine's process: its entry point, and its end of the socket to its client."""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import multiprocessing
import os
import sys
from collections.abc import Sequence

import zmq

from engine import group_signals, log_writer
from engine.config import EngineConfig
from engine.messages import FromEngine, ToEngine, decode_to_engine, encode
from engine.standard_streams import open_missing
from engine.worker import ClientGone, import_factory, serve

_POLL_MS = 1000  # the longest the loop sleeps without looking whether its parent lives
_LINGER_MS = 2000  # for the last message to leave


class _SocketChannel:
    """A bound PAIR socket, watched together with the parent process."""

    def __init__(self, socket: zmq.Socket[bytes]) -> None:
        parent = multiprocessing.parent_process()
        if parent is None:
            raise RuntimeError("the engine's process must be started by multiprocessing")
        self.socket, self.parent = socket, parent
        self.poller = zmq.Poller()
        self.poller.register(socket, zmq.POLLIN)
        self.poller.register(parent.sentinel, zmq.POLLIN)  # readable once the parent is gone

    def receive(self, wait: bool) -> Sequence[ToEngine]:
        ready = dict(self.poller.poll(_POLL_MS if wait else 0))
        if self.parent.sentinel in ready:
            raise ClientGone
        messages: list[ToEngine] = []
        with contextlib.suppress(zmq.Again):  # raised once it is drained
            while self.socket in ready:
                messages.append(decode_to_engine(self.socket.recv(zmq.NOBLOCK)))
        return messages

    def send(self, message: FromEngine) -> None:
        data = encode(message)
        while True:
            try:
                return self.socket.send(data)  # waits at most SNDTIMEO
            except zmq.Again:
                if not self.parent.is_alive():
                    raise ClientGone from None


def main(
    endpoint: str, config: EngineConfig, factory: str, log_level: int, formatter: logging.Formatter | None
) -> None:
    """The process: binds `endpoint`, serves, ends with exit code 0, or 1 after a fault.

    `formatter` writes the lines of its log; None: as text.
    """
    group_signals.ignore()
    group_signals.go_on_when_orphaned()
    open_missing()
    faulthandler.enable()
    log_writer.configure(log_level, formatter)
    context = zmq.Context()
    socket: zmq.Socket[bytes] = context.socket(zmq.PAIR)
    socket.setsockopt(zmq.LINGER, _LINGER_MS)
    socket.setsockopt(zmq.SNDTIMEO, _POLL_MS)
    try:
        socket.bind(endpoint)
    except zmq.ZMQError as error:
        sys.exit(f"the engine's socket cannot be opened: {error}")
    try:
        sound = serve(lambda: import_factory(factory)(config), _SocketChannel(socket))
    except ClientGone:
        sound = False
    socket.close()
    context.term()
    # Without teardown: after a CUDA error it can hang, torch's alone takes seconds, and all is saved.
    logging.shutdown()
    os._exit(0 if sound else 1)
