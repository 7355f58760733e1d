"""What one draft step costs, all in, under a policy."""

from __future__ import annotations

import time
from statistics import median
from typing import Any
from unittest.mock import patch

from torch import Tensor

from engine.core import Engine
from engine.sequence import Sequence
from engine.speculation.control import PolicyTable
from engine.speculation.drafters.model import ModelDrafter
from engine.speculation.policy import Signals, options_of
from engine.types import GenerateRequest, SamplingParams

SHORT, LONG = 4, 16


ENDLESS = {"signal": "joint", "threshold": 0.0, "max_sl": LONG}
"""Options under which `confidence` never stops."""


def draft_step(
    engine: Engine,
    policy: str,
    options: dict[str, Any],
    *,
    context: int = 512,
    rounds: int = 30,
    overrule: bool = False,
) -> dict[str, float]:
    """Seconds of a draft step (choose, signals, policy, model) of one greedy row, by the host's clock.

    The slope between drafts of 4 and of 16 tokens. With `overrule` what the policy says is worked out
    and not followed, so that the drafts have their full length; use the engine for nothing else
    afterwards, since what its graphs have captured is overruled for good.
    """
    drafter, table, blocks = engine._parts.drafters["model"], engine._tables["model"], engine._parts.blocks
    assert isinstance(drafter, ModelDrafter)
    request = GenerateRequest(
        id="x", prompt_ids=tuple(range(5, 5 + context)), params=SamplingParams(temperature=0)
    )
    seq = Sequence(request, 0, True, "model", policy, options_of(policy, options), LONG)
    seq.table = blocks.match(seq.tokens, "", 0)
    assert blocks.extend(seq.table, context + 2 * LONG)
    table.take(seq)
    found: dict[int, list[float]] = {SHORT: [], LONG: []}
    shipped = PolicyTable.decide

    def decide(
        self: PolicyTable, names: list[str], slots: Tensor, numbers: Tensor, signals: Signals
    ) -> Tensor:
        return shipped(self, names, slots, numbers, signals) | overrule

    if overrule:
        drafter._loop = None  # what it has captured is not overruled
    with patch.object(PolicyTable, "decide", decide):
        seq.draft_kv_len = 0
        while drafter.lags(seq):
            drafter.read([(seq, context - 1)], 2048)
        for _ in range(rounds):
            for sl, times in found.items():
                seq.draft_kv_len = context - 1
                begin = time.perf_counter()
                drafts = drafter.begin([seq], [sl], table)().rows
                times.append(time.perf_counter() - begin)
                assert len(drafts[0].tokens) == sl, drafts[0]
    table.give_back(seq)
    blocks.release(seq.table)
    warm = rounds // 6
    short, long = (median(found[sl][warm:]) for sl in (SHORT, LONG))
    return {"seconds": (long - short) / (LONG - SHORT), "four": short, "sixteen": long}
