"""goodput in an engine whose draft model falls behind while nothing is drafted."""

from __future__ import annotations

from pathlib import Path

import torch
from fixed_costs import fix_costs

from engine.config import EngineConfig
from engine.core import Engine
from engine.speculation.drafters.model import SMALL_LAG
from engine.types import GenerateRequest, SamplingParams


def test_a_probe_drafts_though_the_draft_lags(tiny_llama: Path) -> None:
    """It reads what the draft has not seen and drafts in the same iteration, or no probe would ever draft."""
    engine = Engine(
        EngineConfig(
            target=str(tiny_llama), draft="self:3", policy="goodput", device="cpu", kv_blocks=64, threads=1
        )
    )
    fix_costs(engine)
    params = SamplingParams(max_tokens=220, temperature=0.0, ignore_eos=True)
    engine.add(GenerateRequest(id="a", prompt_ids=(5, 6, 7), params=params))
    state = engine._tables["model"]._states["goodput"]
    rests, rested, probes = 0, 0, []
    while engine.has_work():
        for event in engine.step()[0]:
            if event.iterations:
                probes += [rests] if event.drafted and rests > SMALL_LAG else []
                rests = 0 if event.drafted else rests + 1
                rested = max(rested, rests)
        for seq in engine._sequences.values():  # what it gets from drafting does not pay
            if seq.slot >= 0:
                state.tensors["own"][seq.slot, 2:] = torch.tensor([0.02, 0.02, 5.0, 0.0])
    assert rested > SMALL_LAG and probes, (rested, probes)
