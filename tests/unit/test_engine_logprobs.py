"""Log-probabilities are those of the target, whatever was drafted."""

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from tiny_engine import (
    SETTINGS,
    SPECULATIONS,
    ask,
    make_engine,
    plain_greedy,
    plain_logits,
    prompt,
    run,
    static,
)

from engine.types import TokenLogprob


def check_logprobs(
    entries: Iterable[TokenLogprob], logits: torch.Tensor, tokens: list[int], top: int
) -> None:
    law = logits.log_softmax(-1)
    entries = list(entries)
    assert [entry.token_id for entry in entries] == tokens
    for row, entry in zip(law, entries, strict=True):
        assert entry.logprob == pytest.approx(float(row[entry.token_id]), abs=2e-4)
        best = row.topk(top) if top else None
        assert [token for token, _ in entry.top] == ([] if best is None else best.indices.tolist())
        values = [] if best is None else best.values.tolist()
        assert [value for _, value in entry.top] == pytest.approx(values, abs=2e-4)


@pytest.mark.parametrize("draft", [None, "near", "other"])
@pytest.mark.parametrize("settings", ["as they come", "smallest pool, small chunks, no cache"])
def test_logprobs_are_the_targets_own(draft: str | None, settings: str):
    kinds: list[dict[str, Any]] = [
        {},
        {"temperature": 0.7, "seed": 1, "top_p": 0.5, "presence_penalty": 1.0},
        {"temperature": 1.0, "sampling_method": "rejection"},
        {"logit_bias": {7: 5.0}},
    ]
    requests = [
        ask(f"{i}", prompt(5 + 9 * i), SPECULATIONS[i], logprobs=i % 3, **kind)
        for i, kind in enumerate(kinds)
    ]
    results = run(make_engine(draft, **SETTINGS[settings]), requests)
    for request in requests:
        result = results[request.id]
        logits = plain_logits([*result.prompt, *result.tokens])[len(result.prompt) - 1 : -1]
        top = request.params.logprobs
        assert top is not None
        check_logprobs(result.logprobs, logits, result.tokens, top)
        assert all(len(e.logprobs or ()) == len(e.token_ids) for e in result.events)


@pytest.mark.parametrize("draft", [None, "near"])
@pytest.mark.parametrize("most", [0, 1, 15])
@pytest.mark.parametrize("name", SETTINGS)
def test_prompt_logprobs_are_the_targets_own(draft: str | None, most: int, name: str):
    engine = make_engine(draft, **SETTINGS[name])
    lengths = (1, 2, 15, 16, 17, 18, 40, 60, 80)
    warm = [ask(f"w{n}", prompt(n), static(3), max_tokens=8) for n in lengths]
    asking = [ask(f"{n}", prompt(n), static(3), max_tokens=most, prompt_logprobs=n % 3) for n in lengths]
    results = run(engine, [*warm, *asking])
    if most == 15:
        assert (engine._scheduler.preemptions > 0) == ("blocks" in SETTINGS[name])
    for n in lengths:
        first, *others = results[f"{n}"].events
        assert first.prompt_logprobs is not None and first.prompt_logprobs[0] is None
        assert first.cached_tokens == 0
        check_logprobs(
            [entry for entry in first.prompt_logprobs[1:] if entry is not None],
            plain_logits(prompt(n))[:-1],
            prompt(n)[1:],
            n % 3,
        )
        assert all(event.prompt_logprobs is None for event in others)
        assert results[f"{n}"].tokens == plain_greedy(prompt(n), most)
        assert all(event.prompt_logprobs is None for event in results[f"w{n}"].events)
