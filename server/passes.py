"""Passes of the target as a stream tells them: what was drafted, what stood, whose each token is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from engine.types import TokenEvent
from server.detokenize import TextStream

Origin = Literal["draft", "correction", "bonus", "target"]


class Passes:
    """The passes behind one choice's tokens. Each is told once, when its tokens and their text are final.

    Sums over all of them are the choice's `Speculated`: what a stop string took counts alike.
    """

    def __init__(self, events: Sequence[TokenEvent], token_ids: Sequence[int], stream: TextStream) -> None:
        """All three grow, and a stop string cuts the last two; `events` are those of the choice."""
        self._events, self._ids, self._stream = events, token_ids, stream
        self._starts: list[int] = []  # of the passes told: the place of the first token
        self._told_tokens = 0

    def news(self, *, last: bool) -> range:
        """Which passes may be told now and were not before; with `last` all that are left."""
        first, final = len(self._starts), self._stream.final_tokens
        for event in self._events[first:]:
            end = self._told_tokens + len(event.token_ids)
            if end > final and not last:
                break
            self._starts.append(self._told_tokens)
            self._told_tokens = end
        return range(first, len(self._starts))

    def bodies(self, passes: range) -> list[dict[str, Any]]:
        """What a chunk tells of them."""
        return [self._body(self._events[i], self._starts[i]) for i in passes]

    def _body(self, event: TokenEvent, start: int) -> dict[str, Any]:
        kept = self._ids[start : start + len(event.token_ids)]
        return {
            "iteration": event.iterations > 0,
            "drafted": event.drafted,
            "lookahead": event.lookahead,
            "accepted": min(event.accepted, len(kept)),
            "stop_reason": event.stop_reason,
            "draft_seconds": event.draft_seconds,
            "verify_seconds": event.verify_seconds,
            "tokens": [
                {"id": token_id, "text": self._stream.text_of(start + i), "origin": _origin(event, i)}
                for i, token_id in enumerate(kept)
            ],
        }


def _origin(event: TokenEvent, place: int) -> Origin:
    """Whose the token at `place` of the event is: behind what stood of a draft comes one of the target's."""
    if place < event.accepted:
        return "draft"
    if event.drafted == 0:
        return "target"
    return "bonus" if event.bonus else "correction"
