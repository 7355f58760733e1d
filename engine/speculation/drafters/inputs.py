"""What the host tells a draft loop, as one buffer of int32 words on either side."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.models.decode_data import META

WIDE = ("state", "key", "position", "generated", "limit", "slot")
NARROW = ("place", "alive", "policy", "rejecting", "temperature", "joint")


def parts(words: Tensor, size: int, blocks: int) -> dict[str, Tensor]:
    """The named parts of the inputs: META words, then by row int64 ones, int32 ones, the tables."""
    wide, narrow = len(WIDE), len(NARROW)
    sizes = [META, 2 * wide * size, narrow * size]
    meta, longs, ints, tables = words.split([*sizes, words.shape[0] - sum(sizes)])
    found = {"meta": meta, "tables": tables.view(size, blocks)}
    found |= zip(WIDE, longs.view(torch.int64).view(wide, size), strict=True)
    found |= zip(NARROW, ints.view(narrow, size), strict=True)
    return found | {name: found[name].view(torch.float32) for name in ("temperature", "joint")}
