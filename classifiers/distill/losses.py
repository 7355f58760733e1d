"""How far the draft's law q is from the target's p: forward KL and total variation.

Acceptance of one sampled token is 1 - TV(p, q) (Leviathan et al., arXiv 2211.17192, corollary 3.6);
at a low temperature TV becomes the share of disagreeing choices, which is what greedy requests see.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch
from torch import Tensor


def kl(target: Tensor, draft: Tensor) -> Tensor:
    """float32[N]: sum of p log(p / q) over the draft's V' ids, nats; `target` [N, V], `draft` [N, V'].

    The first V' target ids are the draft's. What p gives to the others no draft can match: it is
    left out, or KL would be infinite.
    """
    logp = target[:, : draft.shape[1]].float() - target.float().logsumexp(-1, keepdim=True)
    logq = draft.float().log_softmax(-1)
    return (logp.exp() * (logp - logq)).sum(-1)


def total_variation(target: Tensor, draft: Tensor, temperature: float) -> Tensor:
    """float32[N]: 1 - sum of min(p, q), both laws at `temperature`; shapes as in `kl`."""
    target, draft = target.float() / temperature, draft.float() / temperature
    p = (target[:, : draft.shape[1]] - target.logsumexp(-1, keepdim=True)).exp()
    return 1 - torch.minimum(p, draft.softmax(-1)).sum(-1)


def kl_loss(target: Tensor, draft: Tensor, weights: Tensor) -> Tensor:
    """The weighted sum of KL."""
    return (kl(target, draft) * weights).sum()


FINISH_KL = 0.1
"""Weight of KL in the finish: TV alone gives no gradient where the draft is sure and wrong."""


def finish_loss(target: Tensor, draft: Tensor, weights: Tensor, temperatures: Seq[float]) -> Tensor:
    """The weighted sum of TV, averaged over the temperatures, and a little KL."""
    loss = FINISH_KL * kl(target, draft)
    for temperature in temperatures:
        loss = loss + (1 - FINISH_KL) / len(temperatures) * total_variation(target, draft, temperature)
    return (loss * weights).sum()
