"""The target's law, written down plainly and apart from the engine: what its output is held to."""

from __future__ import annotations

import math
from collections.abc import Sequence as Seq

from lossless.toys import Logits

from engine.types import SamplingParams


def adjusted_logits(
    logits: Seq[float], prompt: Seq[int], output: Seq[int], params: SamplingParams, eos: Seq[int]
) -> list[float]:
    """Logits after penalties, logit_bias and min_tokens."""
    out = []
    for token, x in enumerate(logits):
        if token in prompt or token in output:
            x = x / params.repetition_penalty if x > 0 else x * params.repetition_penalty
        times = list(output).count(token)
        x -= params.frequency_penalty * times
        if times:
            x -= params.presence_penalty
        x += params.logit_bias.get(token, 0.0)
        if len(output) < params.min_tokens and token in (*eos, *params.stop_token_ids):
            x = -math.inf
        out.append(x)
    return out


def _softmax(logits: Seq[float]) -> list[float]:
    top = max(logits)
    weights = [math.exp(x - top) for x in logits]
    return _normalised(weights)


def _normalised(weights: Seq[float]) -> list[float]:
    total = math.fsum(weights)
    return [w / total for w in weights]


def token_law(
    logits: Seq[float], prompt: Seq[int], output: Seq[int], params: SamplingParams, eos: Seq[int]
) -> list[float]:
    """The probability of every token after prompt + output."""
    values = adjusted_logits(logits, prompt, output, params, eos)
    if params.temperature == 0:
        return [float(token == values.index(max(values))) for token in range(len(values))]
    law = _softmax([x / params.temperature for x in values])
    if params.top_k:
        least = sorted(law, reverse=True)[min(params.top_k, len(law)) - 1]
        law = _normalised([p if p >= least else 0.0 for p in law])
    if params.top_p < 1:
        kept, mass = set[int](), 0.0
        for token in sorted(range(len(law)), key=lambda t: -law[t]):
            kept.add(token)
            mass += law[token]
            if mass >= params.top_p:
                break
        law = _normalised([p if token in kept else 0.0 for token, p in enumerate(law)])
    if params.min_p:
        floor = params.min_p * max(law)
        law = _normalised([p if p >= floor else 0.0 for p in law])
    return law


def ends(token: int, params: SamplingParams, eos: Seq[int]) -> bool:
    return token in params.stop_token_ids or (token in eos and not params.ignore_eos)


def sequence_law(
    target: Logits, prompt: tuple[int, ...], params: SamplingParams, eos: Seq[int] = ()
) -> dict[tuple[int, ...], float]:
    """The probability of every output that the target alone may give; NaN ends it, too."""
    done: dict[tuple[int, ...], float] = {}
    growing: dict[tuple[int, ...], float] = {(): 1.0}
    while growing:
        output, mass = growing.popitem()
        logits = target(prompt + output)
        if any(map(math.isnan, logits)):
            done[output] = mass
            continue
        for token, p in enumerate(token_law(logits, prompt, output, params, eos)):
            if p == 0:
                continue
            longer = (*output, token)
            ended = ends(token, params, eos) or len(longer) == params.max_tokens
            (done if ended else growing)[longer] = mass * p
    return done
