"""What is measured side by side: transformers' decoders and this engine's, greedy, at batch 1."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from engine.config import EngineConfig
from engine.core import Engine
from engine.models.builtin import builtin_draft
from engine.models.load import load_model, load_tokenizer, resolve
from engine.types import GenerateRequest, SamplingParams, SpeculationParams

Contender = Callable[[list[int]], tuple[list[int], dict[str, int]]]
"""Prompt ids -> output ids and counts."""

COUNTS = ("iterations", "drafted", "accepted")


def transformers_contenders(
    target: str, draft: str, tokens: int, assisted: list[int]
) -> dict[str, Contender]:
    """Plain generate, and its own speculation of the same kind: prompt lookup, or the very same draft."""
    model = AutoModelForCausalLM.from_pretrained(resolve(target), dtype=torch.float32).eval()

    def contender(**extra: Any) -> Contender:
        def run(ids: list[int]) -> tuple[list[int], dict[str, int]]:
            prompt = torch.tensor([ids])
            with torch.inference_mode():
                out = model.generate(
                    prompt, attention_mask=torch.ones_like(prompt), do_sample=False,
                    max_new_tokens=tokens, min_new_tokens=tokens, **extra,
                )  # fmt: skip
            return out[0, len(ids) :].tolist(), {}

        return run

    found = {"transformers": contender()}
    if draft == "ngram":
        return found | {"transformers, prompt lookup 3": contender(prompt_lookup_num_tokens=3)}
    for sl in assisted:
        where = str(builtin_draft(target, load_tokenizer(target))) if draft == "default" else draft
        assistant = load_model(where, dtype=torch.float32, device="cpu")
        settings = assistant.generation_config  # arguments of generate() would be ignored
        settings.num_assistant_tokens = sl
        settings.num_assistant_tokens_schedule = "constant"
        settings.assistant_confidence_threshold = 0.0
        assistant.config.use_cache = settings.use_cache = True
        found[f"transformers, assistant_model SL={sl}"] = contender(assistant_model=assistant)
    return found


def disco_contenders(target: str, draft: str, tokens: int, lookaheads: list[int]) -> dict[str, Contender]:
    """No draft, every static SL with the draft, and the default policy."""
    engine = Engine(
        EngineConfig(target=target, draft=draft, dtype="float32", device="cpu", prefix_cache=False)
    )
    params = SamplingParams(temperature=0, max_tokens=tokens, min_tokens=tokens)

    def contender(drafter: str, policy: str, **options: int) -> Contender:
        speculation = SpeculationParams(drafter=drafter, policy=policy, options=options)

        def run(ids: list[int]) -> tuple[list[int], dict[str, int]]:
            request = GenerateRequest(id="0", prompt_ids=tuple(ids), params=params, speculation=speculation)
            engine.add(request)
            out: list[int] = []
            counts = dict.fromkeys(COUNTS, 0)
            while engine.has_work():
                for event in engine.step()[0]:
                    out.extend(event.token_ids)
                    for name in counts:
                        counts[name] += getattr(event, name)
            return out, counts

        return run

    drafter = engine.info.default_drafter
    found = {"disco-serve, SL=0": contender("none", "static", sl=0)}
    for sl in lookaheads:
        found[f"disco-serve, {draft}, static SL={sl}"] = contender(drafter, "static", sl=sl)
    found[f"disco-serve, {draft}, heuristic"] = contender(drafter, "heuristic")
    return found
