"""After a target pass over draft tokens, on the device: how many of each row stand, and the next token."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from engine.models.decode_data import MOST


@triton.jit
def _agree(meta, token, fine, answer, MOST: tl.constexpr):
    i, j = tl.arange(0, MOST), tl.arange(0, MOST)[None, :]
    there = i < tl.load(meta + 1)
    begin = tl.load(meta + 8 + MOST + i, there, 0)[:, None]
    length = tl.load(meta + 8 + 2 * MOST + i, there, 0)[:, None]
    inside = j < length
    chosen = tl.load(token + begin + j, inside, 0)
    sound = tl.min(tl.load(fine + begin + j, inside, 1).to(tl.int32), 1)
    drafted = tl.load(meta + 8 + 4 * MOST + begin + j + 1, j + 1 < length, -1)
    fallen = (j + 1 >= length) | (chosen != drafted)  # at the last position nothing was drafted
    accepted = tl.min(tl.where(fallen & inside, j, MOST), 1)
    next_token = tl.sum(tl.where(j == accepted[:, None], chosen, 0), 1)
    tl.store(answer + i, accepted, there)
    tl.store(answer + MOST + i, next_token, there)
    tl.store(answer + 2 * MOST + i, sound, there)
    real = i < tl.load(meta)
    tl.store(
        answer + 3 * MOST + i,
        tl.where(tl.load(fine + i, real, 0) != 0, tl.load(token + i, real, 0), -1),
        real,
    )


def agree(meta: Tensor, token: Tensor, fine: Tensor, answer: Tensor) -> None:
    """answer int32[4, MOST]: by row of `meta` (decode_data.META words) the draft tokens that stand if they
    are a chain, the token after them, and whether the row's logits were sound; by token what was chosen after
    it, -1 if the logits were not sound.

    A row's first token is its newest, the others are drafted. token int32, fine int8: the target's choice
    after every token of the pass.
    """
    _agree[(1,)](meta, token, fine, answer, MOST=MOST, num_warps=1)
