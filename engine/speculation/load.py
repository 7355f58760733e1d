"""What the engine is under now, on the device: costs by size, and how fast it emits tokens."""

from __future__ import annotations

import torch

from engine.speculation.costs import Costs

ROWS = 64
TOKENS = 1600
"""The most rows and tokens of a pass that the tables reach to; beyond, the last entry stands."""
_EVERY = 16  # iterations between looks at the costs
_MEMORY = 0.98  # of the emission rate, an iteration
_MIXES = 64  # of policies, whose rates are kept

Mix = frozenset[str]
"""The policies of a batch's rows. One that drafts less than another emits at another rate."""


class Load:
    """Buffers that policies read, also from captured graphs; `refresh` changes them in place.

    `draft` float32[ROWS + 1]: seconds of a draft step by the rows that draft, 0 for none.
    `verify` float32[TOKENS + 1]: seconds of a target pass over the present rows by tokens in all.
    `rate` float32[]: tokens per second that batches of these policies have emitted lately, with this many
    rows.
    `rows` float32[]: rows that decode. All costs are 0 while none is known.
    `flat`: a draft's steps cost what its first one does, however few rows still draft.
    """

    def __init__(self, device: torch.device, flat: bool = False) -> None:
        self.flat = flat
        words = ROWS + 1 + TOKENS + 1 + 2
        self._words = torch.zeros(words, dtype=torch.float32, device=device)
        self._host = torch.zeros(words, dtype=torch.float32)
        self._copied: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._host, self._copied = self._host.pin_memory(), torch.cuda.Event()
        self._values = self._host.numpy()
        self.draft = self._words[: ROWS + 1]
        self.verify = self._words[ROWS + 1 : -2]
        self.rate, self.rows = self._words[-2], self._words[-1]
        # By mix and by rows: tokens and seconds, both fading.
        self._emitted: dict[Mix, dict[int, list[float]]] = {}
        self._iteration = 0
        self._present: tuple[Mix, int] | None = None

    def observe(self, rows: int, emitted: int, seconds: float, mix: Mix = frozenset()) -> None:
        """An iteration of `rows` decoding rows, without prefill, took this long for so many tokens."""
        seen = self._emitted.pop(mix, {})
        self._emitted[mix] = seen  # the one seen last comes last
        if len(self._emitted) > _MIXES:
            del self._emitted[next(iter(self._emitted))]
        sums = seen.setdefault(min(rows, ROWS), [0.0, 0.0])
        sums[0], sums[1] = _MEMORY * sums[0] + emitted, _MEMORY * sums[1] + seconds

    def step(self, rows: int) -> float:
        """`draft` of so many rows, on the host."""
        return float(self._values[min(rows, ROWS)])

    def refresh(self, draft: Costs, verify: Costs, rows: int, mix: Mix = frozenset()) -> None:
        """Before an iteration of `rows` decoding rows."""
        self._iteration += 1
        if (mix, rows) == self._present and self._iteration % _EVERY:
            return
        self._present = mix, rows
        if self._copied is not None:
            self._copied.synchronize()  # the host's side may still be read
        self._values[1 : ROWS + 1] = draft.line(ROWS)
        self._values[ROWS + 1 : -2] = verify.at_rows(rows, TOKENS)
        self._values[-2:] = self._rate_of(mix, rows), rows
        self._words.copy_(self._host, non_blocking=True)
        if self._copied is not None:
            self._copied.record()

    def _rate_of(self, mix: Mix, rows: int) -> float:
        """Of the nearest number of rows of the same mix that was seen, in proportion; 0 if none was."""
        seen = self._emitted.get(mix)
        if not seen:
            return 0.0
        nearest = min(seen, key=lambda known: (abs(known - rows), known))
        emitted, seconds = seen[nearest]
        return emitted / max(seconds, 1e-9) * rows / nearest
