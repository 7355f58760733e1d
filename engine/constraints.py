"""Which tokens a request forbids at a position: its grammar, allowed_token_ids, bad_words, min_tokens.

Asked of every position of a pass, after the tokens drafted before it, and while drafting.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from engine.grammar import Grammars, Matcher
from engine.types import InvalidRequest, SamplingParams
from engine.words import Words, allows, words_of

if TYPE_CHECKING:
    from engine.sequence import Sequence
    from engine.speculation.drafters.base import RowDraft

SLOW = "the grammar is so ambiguous that following it takes too long"
STUCK = "no token may follow: grammar, allowed_token_ids, bad_words and min_tokens together forbid every one"


@dataclass(frozen=True)
class Outlook:
    """What may come at a position.

    `state`: "open", one of `words`; "over", nothing, since the grammar is complete; "stuck", nothing,
    though it is not; "closed", the position cannot be reached.
    """

    state: Literal["open", "over", "stuck", "closed"]
    words: Words


class Constraint:
    """One sequence's masks."""

    def __init__(
        self, params: SamplingParams, matcher: Matcher | None, eos_ids: Seq[int], vocab_size: int
    ) -> None:
        self._params, self._matcher = params, matcher
        known = range(vocab_size) if params.allowed_token_ids is None else params.allowed_token_ids
        self._allowed = words_of(known, vocab_size)
        self._not_eos = ~words_of(eos_ids, vocab_size)
        self._not_end = ~words_of([*eos_ids, *params.stop_token_ids], vocab_size)
        self._words = [(word[:-1], word[-1]) for word in params.bad_words]
        self._reach = max((len(head) for head, _ in self._words), default=0)
        self.nothing = np.zeros_like(self._allowed)

    def at(self, seq: Sequence, drafted: Seq[int]) -> Outlook:
        """What may follow the sequence and then `drafted`."""
        words, complete = self._allowed, False
        if self._matcher is not None:
            found = self._matcher.after(drafted)
            if self._matcher.slow:
                return Outlook("stuck", self.nothing)
            if found is None:
                return Outlook("closed", self.nothing)
            complete = found.complete
            words = words & found.words
            if self._params.ignore_eos:
                words &= self._not_eos
        if seq.generated + len(drafted) < self._params.min_tokens:
            words = words & self._not_end
        words = self._without_bad(words, seq, drafted)
        if complete and not (words & self._not_eos).any():
            return Outlook("over", self.nothing)
        return Outlook("open" if words.any() else "stuck", words)

    def _without_bad(self, words: Words, seq: Sequence, drafted: Seq[int]) -> Words:
        if not self._words:
            return words
        words = words.copy()
        begin = max(seq.prompt_len, len(seq.tokens) - self._reach)
        tail = (*seq.tokens[begin:], *drafted)
        for head, last in self._words:
            if tail[len(tail) - len(head) :] == head:
                words[last >> 5] &= ~np.int32(np.uint32(1 << (last & 31)).view(np.int32))
        return words

    @property
    def failure(self) -> str:
        """Why the sequence cannot go on where it is stuck."""
        return SLOW if self._matcher is not None and self._matcher.slow else STUCK

    def permits(self, seq: Sequence, drafted: Seq[int], token: int) -> bool:
        """Whether `token` may follow the sequence and then `drafted`."""
        outlook = self.at(seq, drafted)
        return outlook.state == "open" and allows(outlook.words, token)

    def trim(self, seq: Sequence, draft: RowDraft) -> None:
        """Drops what was drafted behind the first token that is forbidden, which falls for certain."""
        for k, token in enumerate(draft.tokens):
            outlook = self.at(seq, draft.tokens[:k])
            if outlook.state != "open" or not allows(outlook.words, token):
                keep = k + (outlook.state == "open")
                draft.trimmed = len(draft.tokens) - keep
                del draft.tokens[keep:], draft.laws[keep:]
                return

    def commit(self, tokens: Seq[int]) -> None:
        """Follows the output over its new tokens."""
        if self._matcher is not None:
            self._matcher.commit(tokens)


def constraint_of(
    params: SamplingParams, grammars: Grammars | None, eos_ids: Seq[int], vocab_size: int
) -> Constraint | None:
    """The request's masks, None if it has none but min_tokens'. Raises InvalidRequest and Unread."""
    if params.grammar is None and params.allowed_token_ids is None and not params.bad_words:
        return None
    matcher = None
    if params.grammar is not None:
        if grammars is None:
            raise InvalidRequest("structured output is not available for this model's tokenizer", "grammar")
        matcher = grammars.matcher(params.grammar)
    return Constraint(params, matcher, eos_ids, vocab_size)


def tokens_allowed(words: Seq[Words], vocab_size: int, device: torch.device) -> Tensor:
    """bool[len(words), V]: by one copy to the device."""
    packed = np.stack(words).view(np.uint8)
    if device.type == "cpu":  # twenty times as fast as the same in torch
        return torch.from_numpy(np.unpackbits(packed, axis=1, bitorder="little")[:, :vocab_size]).bool()
    bits = torch.arange(8, dtype=torch.uint8, device=device)
    there = torch.from_numpy(packed).to(device)
    return ((there[:, :, None] >> bits) & 1).flatten(1)[:, :vocab_size].bool()
