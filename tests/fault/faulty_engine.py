"""The shipped engine around a tiny pair, which fails as files in the folder $FAULTS tell it to.

A file is a fault's name; it is taken away when the fault is injected. Steps take `PACE` seconds more than
they would, so that requests are in flight when it is.
"""

import ctypes
import logging
import os
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from scripted_engine import cut_line, line

from engine.config import EngineConfig
from engine.core import Engine
from engine.speculation import memory
from engine.speculation.policies.static import Static
from engine.types import GenerateRequest, ModelInfo, StepStats, TokenEvent

FOLDER = "FAULTS"
MARK = ord("#")  # the first byte of the prompt whose row is to be harmed
PACE = 0.02
log = logging.getLogger(__name__)


class Faulty:
    def __init__(self, config: EngineConfig) -> None:
        self._folder = Path(os.environ[FOLDER])
        self._engine = Engine(config)
        self._harmed: list[tuple[Any, str, Any]] = []
        self._hogged: list[ctypes.c_uint64] = []
        self.add, self.abort = self._engine.add, self._engine.abort
        self.cut, self.has_work, self.close = self._engine.cut, self._engine.has_work, self._engine.close
        self.mark = -1
        self._mark(config)

    def _mark(self, config: EngineConfig) -> None:
        from engine.models.load import load_tokenizer

        (self.mark,) = load_tokenizer(config.target).encode(chr(MARK), add_special_tokens=False)

    @property
    def info(self) -> ModelInfo:
        return self._engine.info

    def step(self) -> tuple[list[TokenEvent], StepStats]:
        time.sleep(PACE)
        for name in os.listdir(self._folder):
            (self._folder / name).unlink()
            FAULTS[name](self)
        return self._engine.step()

    def replace(self, owner: Any, name: str, value: Any) -> None:
        """Until it is healed."""
        self._harmed.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    def heal(self) -> None:
        while self._harmed:
            owner, name, value = self._harmed.pop()
            setattr(owner, name, value)
        while self._hogged:
            ctypes.CDLL("libcuda.so.1").cuMemFree_v2(self._hogged.pop())
        self._engine._governing.faults._off.clear()
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    def marked(self, row: Any) -> bool:
        request: GenerateRequest = row.seq.request
        return self.mark in request.prompt_ids[:2]

    # ---- faults that the process survives

    def nan_of_a_row(self) -> None:
        right, again = self._engine._run_target, self._engine._verifying._pass

        def run(rows: Any, flight: Any) -> None:
            right(rows, flight)
            for row in rows:
                if self.marked(row) and row.seq.generated:
                    row.logits.fill_(float("nan"))

        def ask_again(asked: Any) -> Any:
            laws = again(asked)
            for (row, _), law in zip(asked, laws, strict=True):
                if self.marked(row):
                    law.fill_(float("nan"))
            return laws

        self.replace(self._engine, "_run_target", run)
        self.replace(self._engine._verifying, "_pass", ask_again)

    def no_memory(self, short: Callable[[Any], bool]) -> None:
        right = self._engine._run_target

        def run(rows: Any, flight: Any) -> None:
            if short(rows):
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            right(rows, flight)

        self.replace(self._engine, "_run_target", run)

    def hog(self) -> None:
        """All that is left of the GPU's memory is somebody else's: torch keeps what it has."""
        driver = ctypes.CDLL("libcuda.so.1")
        for size in (2**30, 2**24, 2**21):
            while driver.cuMemAlloc_v2(ctypes.byref(place := ctypes.c_uint64()), ctypes.c_size_t(size)) == 0:
                self._hogged.append(place)

    def draft(self, forward: Callable[[Any, Callable[[Any], Any]], Any]) -> None:
        runner = self._engine._parts.drafters["model"].runner  # type: ignore[attr-defined]
        right = runner.forward
        self.replace(runner, "forward", lambda batch: forward(batch, right))

    def full_disk(self) -> None:
        """What policies have learned is to be written after every step, and no file may grow."""
        for name in ("_IDLE_SECONDS", "_BUSY_SECONDS"):
            self.replace(memory, name, -1.0)
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))

    def full_log(self) -> None:
        with open("/dev/full", "w") as full:
            os.dup2(full.fileno(), 2)
        log.error("nobody reads this")

    def clock(self, seconds: float) -> None:
        right = time.time
        self.replace(time, "time", lambda: right() + seconds)


def _raise(error: Exception) -> Callable[..., Any]:
    def run(*_: Any) -> Any:
        raise error

    return run


def _hang(_: Faulty) -> None:
    while True:
        time.sleep(1000)


def _spin(_: Faulty) -> None:
    while True:
        pass


def _cut(_: Faulty) -> None:
    cut_line()
    time.sleep(1000)


FAULTS: dict[str, Callable[[Faulty], Any]] = {
    "exit": lambda _: os._exit(3),
    "abort": lambda _: os.abort(),
    "segfault": lambda _: ctypes.string_at(0),
    "raise": _raise(RuntimeError("the step is broken")),
    "cuda": _raise(torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nadvice")),
    "assert": lambda _: torch.zeros(1, device="cuda")[torch.tensor([9], device="cuda")],
    "hog": Faulty.hog,
    "hang": _hang,
    "spin": _spin,
    "garbage": lambda _: line().send(b"no message"),
    "close": lambda _: line().close(linger=0),
    "cut": _cut,
    "nan": Faulty.nan_of_a_row,
    "memory": lambda it: it.no_memory(lambda rows: len(rows) > 1),
    "memory_row": lambda it: it.no_memory(lambda rows: any(map(it.marked, rows))),
    "draft": lambda it: it.draft(_raise(ValueError("the draft is broken"))),
    "draft_nan": lambda it: it.draft(lambda batch, right: right(batch) * float("nan")),
    "policy": lambda it: it.replace(Static, "limit", _raise(KeyError("state"))),
    "disk": Faulty.full_disk,
    "log": Faulty.full_log,
    "clock": lambda it: it.clock(-86400.0),
    "heal": Faulty.heal,
}
