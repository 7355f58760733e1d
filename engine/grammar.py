"""Grammars of structured output, on xgrammar: compiled ones by key, and a matcher for each sequence.

A matcher follows the output. `after` walks it along draft tokens to say what may come at every position
of a pass; `commit` takes it back to the output and forward over what was accepted.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import xgrammar
from transformers import PreTrainedTokenizerBase
from xgrammar import TokenizerInfo, VocabType

from engine.reading import Unread
from engine.types import CompiledGrammar, InvalidRequest
from engine.words import Words, allows

_NO_TEXT = b"\xff"  # begins no UTF-8 text: what no grammar of texts can match
USUAL_SECONDS = 0.01
"""Of CPU, that a step of a matcher may take."""
SLOWEST_SECONDS = 0.25
"""Beyond that, of all steps of a matcher together: ambiguous grammars take ever longer."""
_MOST_BYTES = 256 << 20  # of compiled grammars that are kept


MARKERS = frozenset(
    [
        "<tool_call>",
        "</tool_call>",
        "[TOOL_CALLS]",
        "[ARGS]",
        "[CALL_ID]",
        "<|python_tag|>",
        "<think>",
        "</think>",
    ]
)
"""Special tokens that are text all the same: grammars of calls and of thoughts are made of them."""


def vocabulary(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> TokenizerInfo:
    """What xgrammar must know of the target's tokenizer, for compiling and for matching alike.

    Special tokens, but for `MARKERS`, are given bytes that no text has: the detokenizer drops them, so that
    within a JSON string they would not be what the grammar took them for. Raises ValueError for a
    tokenizer that xgrammar cannot read.
    """
    added = tokenizer.added_tokens_decoder
    special = {token for token, each in added.items() if each.special} | {*tokenizer.all_special_ids}
    special -= {token for token, each in added.items() if each.content in MARKERS}
    special = {token for token in special if token < vocab_size}
    eos = tokenizer.eos_token_id if isinstance(tokenizer.eos_token_id, int) else min(special, default=-1)
    if not 0 <= eos < vocab_size:
        raise ValueError("the tokenizer has no token that could end a text")
    found = TokenizerInfo.from_huggingface(tokenizer, vocab_size=vocab_size, stop_token_ids=[eos])
    texts = list(found.decoded_vocab)
    for token in special:
        texts[token] = _NO_TEXT + str(token).encode()
    return TokenizerInfo(
        texts,
        VocabType.RAW,
        vocab_size=vocab_size,
        stop_token_ids=[eos],  # a matcher is told of all that end the target's texts
        add_prefix_space=found.add_prefix_space,
    )


@dataclass(frozen=True)
class Allowed:
    """What the grammar allows next, and whether the output could end here: EOS is in `words` then."""

    words: Words
    complete: bool


class Matcher:
    """One sequence's place in its grammar. `beyond`: seconds of CPU that its steps took beyond the usual."""

    def __init__(self, compiled: xgrammar.CompiledGrammar, eos_ids: Seq[int]) -> None:
        self._matcher = xgrammar.GrammarMatcher(compiled, override_stop_tokens=list(eos_ids) or None)
        self._width = -(-compiled.tokenizer_info.vocab_size // 32)
        self.beyond = 0.0
        self._walked: list[int] = []  # beyond what is committed
        self._found: list[Allowed] = []  # after the first k of them, as far as it was asked

    @property
    def slow(self) -> bool:
        """Whether it had better end here."""
        return self.beyond > SLOWEST_SECONDS

    def after(self, drafted: Seq[int]) -> Allowed | None:
        """What may follow the output and then `drafted`; None if the grammar forbids these or has ended."""
        count = len(drafted)
        if count < len(self._found) and self._walked[:count] == list(drafted):
            return self._found[count]  # asked before, as by the draft that is verified now
        if not self._walk(drafted):
            return None
        return self._here()

    def commit(self, tokens: Seq[int]) -> None:
        """Moves on over new tokens of the output, all of them allowed, but for a last one that ends it."""
        self._walk(tokens)
        del self._walked[: len(tokens)]
        del self._found[: len(tokens)]

    def _walk(self, tokens: Seq[int]) -> bool:
        """Goes to after these tokens: back over what differs, and on. False at one that is not allowed."""
        same = 0
        for walked, token in zip(self._walked, tokens, strict=False):
            if walked != token:
                break
            same += 1
        if same < len(self._walked):
            self._matcher.rollback(len(self._walked) - same)
            del self._walked[same:]
            del self._found[same + 1 :]
        for token in tokens[same:]:
            allowed = self._here()
            if allowed is None or not allows(allowed.words, token):
                return False
            begin = time.thread_time()
            if not self._matcher.accept_token(token):
                return False
            self._watch(begin)
            self._walked.append(token)
        return True

    def _here(self) -> Allowed | None:
        if self._matcher.is_terminated():
            return None
        if len(self._found) == len(self._walked):
            words = np.empty((1, self._width), dtype=np.int32)
            begin = time.thread_time()
            self._matcher.fill_next_token_bitmask(words)
            self._watch(begin)
            self._found.append(Allowed(words[0], self._matcher.is_completed()))
        return self._found[len(self._walked)]

    def _watch(self, begin: float) -> None:
        self.beyond += max(0.0, time.thread_time() - begin - USUAL_SECONDS)


class Grammars:
    """Compiled grammars of one tokenizer, the last used ones within a bound of memory."""

    def __init__(self, vocabulary: TokenizerInfo, eos_ids: Seq[int], most_bytes: int = _MOST_BYTES) -> None:
        self._vocabulary, self._eos_ids, self._most_bytes = vocabulary, eos_ids, most_bytes
        self._kept: OrderedDict[str, xgrammar.CompiledGrammar] = OrderedDict()
        self._bytes = 0

    def matcher(self, grammar: CompiledGrammar) -> Matcher:
        """At the grammar's begin. One that is not kept is read: raises Unread if it is without its bytes,
        else as `read` does."""
        if grammar.key not in self._kept:
            if not grammar.data:
                raise Unread(self, grammar.key)
            self.keep(grammar.key, self.read(grammar.data))
        self._kept.move_to_end(grammar.key)
        return Matcher(self._kept[grammar.key], self._eos_ids)

    def read(self, data: bytes) -> xgrammar.CompiledGrammar:
        """On any thread: others go on meanwhile. Raises InvalidRequest for another tokenizer or version."""
        try:
            return xgrammar.CompiledGrammar.deserialize_json(data.decode(), self._vocabulary)
        except (RuntimeError, UnicodeDecodeError) as error:
            raise InvalidRequest(
                f"grammar: not one that was compiled for this model: {error}", "grammar"
            ) from error

    def keep(self, key: str, compiled: xgrammar.CompiledGrammar) -> None:
        """The newest is always kept."""
        before = self._kept.pop(key, None)
        self._kept[key] = compiled
        self._bytes += compiled.memory_size_bytes - (before.memory_size_bytes if before else 0)
        while self._bytes > self._most_bytes and len(self._kept) > 1:
            _, oldest = self._kept.popitem(last=False)
            self._bytes -= oldest.memory_size_bytes
