"""A log that nobody reads: who logs goes on, what waits is kept in order, what is lost is told."""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path

import pytest

from engine import log_writer
from engine.log_writer import LineHandler

WORD = "x" * 100


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for end in ends:
        with contextlib.suppress(OSError):
            os.close(end)


@pytest.fixture
def handler(pipe: tuple[int, int]) -> Iterator[LineHandler]:
    handler = LineHandler(pipe[1])
    handler.setFormatter(logging.Formatter("%(message)s"))
    yield handler
    with contextlib.suppress(OSError):
        os.close(pipe[0])
    handler.flush()  # into nothing, what a test left unread
    handler.close()


def log(handler: LineHandler, message: str, *args: object) -> None:
    handler.handle(logging.LogRecord("server", logging.INFO, "here.py", 7, message, args, None))


def read_until(fd: int, last: str) -> list[str]:
    data = b""
    while not data.endswith(f"{last}\n".encode()):
        data += os.read(fd, 1 << 16)
    return data.decode().splitlines()


def test_a_reader_that_stalls_stops_nobody(
    pipe: tuple[int, int], handler: LineHandler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_writer, "_LINES", 2000)
    log(handler, "x" * (1 << 20))  # more than a pipe holds
    assert os.read(pipe[0], 1) == b"x"  # it is being written, and no more waits
    for i in range(5000):
        log(handler, "%d %s", i, WORD)
    _, *kept, last = read_until(pipe[0], "in time")
    assert [int(line.split()[0]) for line in kept] == list(range(2000))
    assert last.startswith("3000 lines of the log are lost")
    log(handler, "and on")
    assert read_until(pipe[0], "on") == ["and on"]


def test_long_lines_are_bounded_by_their_bytes(
    pipe: tuple[int, int], handler: LineHandler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_writer, "_BYTES", 1 << 20)
    for i in range(8):
        log(handler, "%d %s", i, "x" * (300 << 10))
    lines = read_until(pipe[0], "in time")
    assert [line[0] for line in lines] == ["0", "1", "2", "3", "4"]  # the last one tells of the loss
    assert lines[-1].startswith("4 lines")


def test_the_end_does_not_wait_for_ever(handler: LineHandler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_writer, "_PATIENCE", 0.05)
    for _ in range(2000):
        log(handler, WORD)
    handler.flush()


def test_a_reader_that_is_gone_is_harmless(pipe: tuple[int, int], handler: LineHandler) -> None:
    os.close(pipe[0])
    for _ in range(3):
        log(handler, WORD)
        handler.flush()
    again, end = os.pipe()
    os.dup2(end, pipe[1])
    os.close(end)
    log(handler, "here again")
    handler.flush()
    log(handler, "last")
    lines = read_until(again, "last")
    os.close(again)
    (lost,) = [line for line in lines if "lost" in line]
    assert lost.startswith("3 lines") and [line for line in lines if line != lost] == ["here again", "last"]


def test_a_pipe_that_does_not_block_loses_nothing(pipe: tuple[int, int], handler: LineHandler) -> None:
    os.set_blocking(pipe[1], False)
    for i in range(2000):
        log(handler, "%d %s", i, WORD)
    assert len(read_until(pipe[0], f"1999 {WORD}")) == 2000


def test_lines_of_many_threads_are_all_there(pipe: tuple[int, int], handler: LineHandler) -> None:
    def say(name: int) -> None:
        for i in range(200):
            log(handler, "%d %d", name, i)

    threads = [threading.Thread(target=say, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    log(handler, "end")
    *lines, _ = read_until(pipe[0], "end")
    for name in range(4):
        assert [line for line in lines if line[0] == str(name)] == [f"{name} {i}" for i in range(200)]


def test_a_record_that_does_not_fit_is_told_without_its_content(
    pipe: tuple[int, int], handler: LineHandler
) -> None:
    log(handler, "%d", "secret")
    log(handler, "end")
    first, *_, last = read_until(pipe[0], "end")
    assert first == "a log record of here.py:7 cannot be written" and last == "end"


def test_a_forked_process_has_a_thread_of_its_own(pipe: tuple[int, int], handler: LineHandler) -> None:
    log(handler, "parent")
    handler.flush()
    child = get_context("fork").Process(target=_say, args=(handler, "child"))
    child.start()
    child.join()
    log(handler, "end")
    assert read_until(pipe[0], "end") == ["parent", "child", "end"]


def _say(handler: LineHandler, text: str) -> None:
    log(handler, text)
    handler.flush()


ENDS = {
    "returns": ("", 0),
    "exits": ("sys.exit(3)", 3),
    "raises": ("raise ValueError('the reason')", 1),
    "prints": ("print('the reason', file=sys.stderr); sys.exit(1)", 1),
    "at once": ("logging.shutdown(); os._exit(4)", 4),
    "in the engine's process": (
        "from multiprocessing import get_context; from engine.worker_process import main\n"
        "bad = ('the reason', None, 'no:engine', 20, None)\n"
        "child = get_context('spawn').Process(target=main, args=bad)\n"
        "child.start(); child.join(); sys.exit(child.exitcode)",
        1,
    ),
}


@pytest.mark.parametrize("reads", [True, False])
@pytest.mark.parametrize("end", ENDS)
def test_every_end_writes_what_is_left_and_waits_for_no_reader(end: str, reads: bool) -> None:
    code = (
        "import logging, os, sys\nfrom engine import log_writer\nlog_writer.configure(20, None)\n"
        f"for i in range(3000): logging.getLogger('server').info('%d {WORD}', i)\n{ENDS[end][0]}"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]
    )
    assert process.stderr is not None
    with process.stderr:
        lines = process.stderr.read().splitlines() if reads else []
        assert process.wait(60) == ENDS[end][1]  # before its pipe is closed
    if reads:
        assert [line for line in lines if WORD in line][-1].endswith(f"2999 {WORD}")
        assert ("the reason" in "".join(lines[-9:])) is ("the reason" in ENDS[end][0])


def test_without_stderr_nothing_is_written() -> None:
    code = (
        "import logging, os, socket\nfrom engine import log_writer\nlog_writer.configure(20, None)\n"
        "ours, theirs = socket.socketpair()\nlogging.getLogger('server').error('no')\nlogging.shutdown()\n"
        "ours.setblocking(False); theirs.setblocking(False)\n"
        "for each in (ours, theirs):\n"
        "    try: each.recv(1)\n"
        "    except BlockingIOError: pass\n"
        "    else: os._exit(1)\n"
    )
    command = f'exec {sys.executable} -c "$CODE" 2>&-'
    done = subprocess.run(
        ["sh", "-c", command], env=os.environ | {"CODE": code}, cwd=Path(__file__).parents[2]
    )
    assert done.returncode == 0


def test_below_info_only_our_own_loggers_tell_anything() -> None:
    loggers = [logging.getLogger(name) for name in ("", "server", "engine", "disco")]
    before = [each.level for each in loggers]
    try:
        found = {}
        for level in (logging.DEBUG, logging.INFO, logging.ERROR):
            log_writer.set_levels(level)
            names = ("server.logs", "engine.core", "disco.models", "sse_starlette.sse")
            found[level] = [logging.getLogger(name).getEffectiveLevel() for name in names]
    finally:
        for each, level in zip(loggers, before, strict=True):
            each.setLevel(level)
    assert found == {10: [10, 10, 10, 20], 20: [20] * 4, 40: [40] * 4}
