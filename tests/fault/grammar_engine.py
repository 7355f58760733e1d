"""A scripted engine that keeps one grammar at a time, and says by its tokens how many it has read."""

from __future__ import annotations

import os
import time

import msgspec
from scripted_engine import Scripted

from engine.config import EngineConfig
from engine.reading import Unread
from engine.types import GenerateRequest, InvalidRequest, StepStats, TokenEvent

SLOW, BAD = b"slow", b"bad"
SECONDS = 1.0
"""That reading `SLOW` takes."""


class Reader(Scripted):
    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config)
        self.kept = ""
        self.reads = 0

    def read(self, data: bytes) -> bytes:
        self.reads += 1
        if data == SLOW:
            time.sleep(SECONDS)
        if data == BAD:
            raise InvalidRequest("that is no grammar", "grammar")
        return data

    def keep(self, key: str, compiled: bytes) -> None:
        assert compiled
        self.kept = key

    def add(self, request: GenerateRequest) -> None:
        grammar = request.params.grammar
        if grammar is not None:
            assert not grammar.data
            if self.kept != grammar.key:
                raise Unread(self, grammar.key)
        super().add(request)

    def step(self) -> tuple[list[TokenEvent], StepStats]:
        time.sleep(0.001)
        events, stats = super().step()
        return [
            msgspec.structs.replace(event, token_ids=(self.reads, os.getpid())) for event in events
        ], stats
