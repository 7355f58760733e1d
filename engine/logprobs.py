"""The target's own log-probabilities, from its raw logits, for the answer to a request."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from engine.types import TokenLogprob


def gather(logits: Tensor, tokens: Seq[int], top: int) -> list[TokenLogprob]:
    """One entry for each row of `logits` [k, V] and its token, with the `top` most likely ones."""
    if not tokens:
        return []
    logprobs = logits.float().log_softmax(-1)
    chosen = logprobs[torch.arange(len(tokens)), torch.tensor(tokens, device=logits.device)].tolist()
    if top == 0:
        return [TokenLogprob(token, value) for token, value in zip(tokens, chosen, strict=True)]
    best = logprobs.topk(min(top, logprobs.shape[-1]), dim=-1)
    rows = zip(tokens, chosen, best.indices.tolist(), best.values.tolist(), strict=True)
    return [TokenLogprob(t, value, tuple(zip(ids, values, strict=True))) for t, value, ids, values in rows]
