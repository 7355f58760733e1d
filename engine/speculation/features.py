"""Signals for stop policies from the draft's logits: the only feature code, in collection and in serving.

They describe the draft's own law at temperature 1, before the request's temperature, filters and
penalties, so that what was learned under one setting of a request holds under another.
"""

from __future__ import annotations

from collections.abc import Set

from torch import Tensor

from engine.speculation.policy import Need

TOP = 10
VERSION = 1
"""Of the features: a head taught on others is refused."""


def signals(logits: Tensor, tokens: Tensor, needs: Set[Need]) -> dict[Need, Tensor]:
    """prob, largest float32[B], top float32[B, 10], entropy float32[B] (nats, whole vocabulary), as needed.

    `logits` [B, V] raw draft logits, `tokens` int64[B] the drafted ones. "joint" is the drafter's
    running product of `prob`, which is therefore computed for it too.
    """
    found: dict[Need, Tensor] = {}
    if not needs:
        return found
    logprobs = logits.float().log_softmax(-1)
    if needs & {"prob", "joint"}:
        found["prob"] = logprobs.gather(1, tokens[:, None])[:, 0].exp()
    if "largest" in needs:
        found["largest"] = logprobs.amax(-1).exp()
    if "top" in needs:
        found["top"] = _top(logprobs.exp())
    if "entropy" in needs:
        found["entropy"] = -(logprobs.exp() * logprobs.clamp(min=-1e4)).sum(-1)
    return found


def _top(probs: Tensor) -> Tensor:
    """float32[B, 10], descending, zeros where the vocabulary is smaller."""
    width = min(TOP, probs.shape[-1])
    top = probs.new_zeros(probs.shape[0], TOP)
    top[:, :width] = probs.topk(width, dim=-1).values
    return top
