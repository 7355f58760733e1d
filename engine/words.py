"""Sets of tokens as words of bits: what a grammar, a list or a mask allows at a position."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from engine.types import TokenSet

Words = NDArray[np.int32]
"""int32[ceil(V / 32)]: bit t % 32 of word t // 32 is whether token t is allowed."""


def words_of(tokens: Sequence[int] | TokenSet, vocab_size: int) -> Words:
    """The words in which exactly these tokens are allowed; all of them are below `vocab_size`."""
    if isinstance(tokens, TokenSet):
        return np.frombuffer(tokens.bits.ljust(-(-vocab_size // 32) * 4, b"\0"), "<i4")
    bits = np.zeros(-(-vocab_size // 32) * 32, dtype=np.uint8)
    bits[slice(tokens.start, tokens.stop) if isinstance(tokens, range) else list(tokens)] = 1
    return np.packbits(bits, bitorder="little").view("<i4")


def allows(words: Words, token: int) -> bool:
    return bool(words[token >> 5] >> (token & 31) & 1)
