"""Memory ran out in a step: its rows run again in ever smaller parts, at last without drafts.

Drafts are kept as long as they can: how long one is depends on what was sampled, so that to drop long ones
would bias what rejection sampling gives.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from engine.flight import Flight
from engine.memory_faults import Shortage, is_out_of_memory
from engine.scheduler import PlanRow


class Rescue:
    """Of one engine. `run` runs a step of some of its rows, `give_up` ends one."""

    def __init__(
        self, run: Callable[[list[PlanRow], Flight], None], give_up: Callable[[PlanRow], None]
    ) -> None:
        self._run, self._give_up, self._shortage = run, give_up, Shortage()

    def land(self, flight: Flight) -> list[PlanRow]:
        """The rows of a step that ran out of memory, run; those that do not fit even alone have failed.

        Call it outside of the handler: the error holds what is to be freed.
        """
        for row, read in zip(flight.rows, flight.read, strict=True):  # what came later may not be written
            row.seq.draft_kv_len = min(read, row.seq.draft_kv_len)
        rows = [row for row in flight.rows if row.seq.status == "running"]
        if not rows:  # all were aborted meanwhile
            return []
        self._shortage.tell(f"in a step of {len(rows)} rows: they run again in smaller parts, and slower")
        flight.rescued, flight.drafts = True, []
        done: list[PlanRow] = []
        parts = _smaller(rows) or [rows]
        while parts:
            part = [_anew(row) for row in parts.pop(0)]
            if self._fits(part, flight):
                done += part
            elif smaller := _smaller(part):
                parts[:0] = smaller
            else:
                self._give_up(part[0])
                done += part
        return done

    def _fits(self, rows: list[PlanRow], flight: Flight) -> bool:
        flight.logits = flight.verdict = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        try:
            self._run(rows, flight)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return False
        return True


def _anew(row: PlanRow) -> PlanRow:
    again = PlanRow(row.seq, row.tokens, decodes=row.decodes)
    if row.draft.parents is None:
        again.draft = row.draft
    elif not row.settled:  # else it has been moved about; what the draft had read of it counts no more
        again.draft = replace(row.draft, read=[-1] * len(row.draft.tokens))
    return again


def _smaller(rows: list[PlanRow]) -> list[list[PlanRow]]:
    """Two halves; of one row, it without its draft, then its first half. Nothing if it cannot be less."""
    if len(rows) > 1:
        middle = len(rows) // 2
        return [rows[:middle], rows[middle:]]
    (row,) = rows
    if row.draft.tokens:
        return [[PlanRow(row.seq, row.tokens, decodes=row.decodes)]]
    return [[PlanRow(row.seq, row.tokens // 2)]] if row.tokens > 1 else []
