"""The draft loop on a GPU: one graph replay for each draft token, no read-back in between.

A replay chooses the token, computes the signals, asks the policies, notes who drafts on, and runs
the model for the next token; where no row drafts on, the model's kernel returns at once. The host
watches a word in pinned memory that is written before the model runs, so that it knows of the end,
or queues the next replay, while the device still works. Only for rows without penalties; the others
draft step by step on the host (`model.py`). Rejecting rows sample by noise keyed by their draw
counter and keep the logits that they sampled from.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence as Seq

import torch

from engine.models.fused import FusedRunner
from engine.models.graphs import SPARE, bucket
from engine.models.kernels.advance import MOST_SL
from engine.sampling import unadjusted
from engine.sequence import Sequence
from engine.speculation.control import PolicyTable
from engine.speculation.drafters.base import Drafts
from engine.speculation.drafters.lane import Lane

MOST_ROWS = 64


class DraftLoop:
    """Draft loops for up to 64 rows, one `Lane` for each power of two."""

    def __init__(
        self, runner: FusedRunner, vocab: int, table: PolicyTable, blocks: int, most_sl: int = MOST_SL
    ) -> None:
        """`vocab`: ids at or above it are never proposed. `blocks`, `most_sl`: the most a row may have."""
        pool = torch.cuda.graph_pool_handle()
        self._make = functools.partial(Lane, runner, vocab, table, blocks, min(most_sl, MOST_SL), pool)
        self._lanes: dict[int, Lane] = {}

    @torch.inference_mode()
    def takes(self, rows: Seq[Sequence]) -> bool:
        """Whether it can draft for them: they are no more than 64, and what rejecting ones keep has room."""
        if len(rows) > MOST_ROWS or not all(map(unadjusted, rows)):
            return False
        return all(row.coupled for row in rows) or self._lane(len(rows)).keeps()

    @torch.inference_mode()
    def begin(self, rows: Seq[Sequence], limits: Seq[int]) -> Drafts:
        """Queues the first step; the function returned queues the others and gives the drafts.

        The rows' `draft_kv_len` is right once it has returned.
        """
        return self._lane(len(rows)).begin(rows, limits)

    @torch.inference_mode()
    def warm(self, policies: Seq[str], rows: int) -> None:
        """Captures what drafting for `rows` rows under these policies needs."""
        lane = self._lane(rows)
        names = lane.table.asked(policies)
        lane.graph(names, rejects=False)
        if torch.cuda.mem_get_info(lane.device)[0] > SPARE and lane.keeps():
            lane.graph(names, rejects=True)

    def _lane(self, rows: int) -> Lane:
        size = bucket(rows)
        if size not in self._lanes:
            self._lanes[size] = self._make(size)
        return self._lanes[size]
