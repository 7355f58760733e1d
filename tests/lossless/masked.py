"""Masks over the toys' letters: grammars as xgrammar follows them, and the law written down apart from it."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from functools import cache

import xgrammar
from lossless.law import ends, token_law
from lossless.toys import Logits, Pair, toy_engine

from engine.core import Engine
from engine.grammar import Grammars
from engine.speculation.drafters.model import ModelDrafter
from engine.speculation.noise import RandomSource
from engine.types import CompiledGrammar, SamplingParams
from engine.validate import token_set

LETTERS = "abcdefgh"
_LONGEST = 5  # of what may follow a text, to see whether it is the begin of a match


@cache
def vocabulary(vocab: int, eos: int) -> xgrammar.TokenizerInfo:
    """Token t is the t-th letter; EOS has no text."""
    texts = [b"\xff" if t == eos else LETTERS[t].encode() for t in range(vocab)]
    return xgrammar.TokenizerInfo(texts, xgrammar.VocabType.RAW, vocab_size=vocab, stop_token_ids=[eos])


@cache
def compiled(regex: str, vocab: int, eos: int) -> CompiledGrammar:
    compiler = xgrammar.GrammarCompiler(vocabulary(vocab, eos), max_threads=1)
    return CompiledGrammar(regex, compiler.compile_regex(regex).serialize_json().encode())


@dataclass(frozen=True)
class Rules:
    """The masks of a request, and who answers for them here: Python's `re` and plain loops."""

    vocab: int
    eos: int
    regex: str | None = None
    allowed: tuple[int, ...] | None = None
    bad: tuple[tuple[int, ...], ...] = ()

    def params(self, **others: object) -> SamplingParams:
        grammar = None if self.regex is None else compiled(self.regex, self.vocab, self.eos)
        allowed = None if self.allowed is None else token_set(self.allowed, "allowed_token_ids", self.vocab)
        return SamplingParams(grammar=grammar, allowed_token_ids=allowed, bad_words=self.bad, **others)  # type: ignore[arg-type]

    def complete(self, output: Seq[int]) -> bool:
        return self.regex is not None and re.fullmatch(self.regex, _text(output)) is not None

    def tokens(self, output: Seq[int], params: SamplingParams) -> list[int]:
        """What may follow the output."""
        found = []
        for token in range(self.vocab):
            longer = (*output, token)
            if token == self.eos:
                fits = self.regex is None or (self.complete(output) and not params.ignore_eos)
            else:
                fits = self.regex is None or _begins(self.regex, _text(longer), self.vocab, self.eos)
            fits = fits and (self.allowed is None or token in self.allowed)
            fits = fits and not any(longer[len(longer) - len(word) :] == word for word in self.bad)
            if len(output) < params.min_tokens and token in (self.eos, *params.stop_token_ids):
                fits = False
            if fits:
                found.append(token)
        return found

    def over(self, output: Seq[int], params: SamplingParams) -> bool:
        return self.complete(output) and not {*self.tokens(output, params)} - {self.eos}


def _text(output: Seq[int]) -> str:
    return "".join(LETTERS[t] for t in output)


@cache
def _begins(regex: str, text: str, vocab: int, eos: int) -> bool:
    letters = [LETTERS[t] for t in range(vocab) if t != eos]
    for count in range(_LONGEST + 1):
        for rest in itertools.product(letters, repeat=count):
            if re.fullmatch(regex, text + "".join(rest)):
                return True
    return False


def masked_law(
    target: Logits, prompt: tuple[int, ...], params: SamplingParams, rules: Rules
) -> dict[tuple[int, ...], float]:
    """The probability of every output of the target alone under the rules. Asserts that none gets stuck."""
    eos = (rules.eos,)
    done: dict[tuple[int, ...], float] = {}
    growing: dict[tuple[int, ...], float] = {(): 1.0}
    while growing:
        output, mass = growing.popitem()
        if rules.over(output, params) or len(output) == params.max_tokens:
            done[output] = mass
            continue
        open_ = rules.tokens(output, params)
        assert open_, f"stuck after {output}"
        logits = [x if t in open_ else -math.inf for t, x in enumerate(target(prompt + output))]
        for token, p in enumerate(token_law(logits, prompt, output, params, eos)):
            if p > 0:
                longer = (*output, token)
                (done if ends(token, params, eos) else growing)[longer] = mass * p
    return done


def masked_engine(
    pair: Pair,
    eos: int,
    *,
    random: RandomSource | None = None,
    mask_drafts: bool = True,
    rows: int = 8,
    blocks: int = 256,
    block_size: int = 2,
) -> Engine:
    """A toy engine that knows the letters. Without `mask_drafts` its model drafts what it likes."""
    engine = toy_engine(pair, random=random, eos=(eos,), rows=rows, blocks=blocks, block_size=block_size)
    engine._parts.grammars = Grammars(vocabulary(pair.vocab, eos), (eos,))
    drafter = engine._parts.drafters.get("model")
    if isinstance(drafter, ModelDrafter):
        drafter.mask_drafts = mask_drafts
    return engine
