"""The draft along the target's texts, by teacher forcing; and what a step of each costs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch
from torch import Tensor

from classifiers.acceptance import (
    Costs,
    acceptance_probability,
    coupled_match,
    greedy_match,
    overlap,
)
from classifiers.pair_texts import PairError, Text
from engine.models.runner import Batch, Chunk, Runner
from engine.speculation.noise import GumbelNoise

_CHUNK = 64  # positions whose laws are held at once
ROUNDS, _WARM_UP = 18, 3  # of `measure_costs`; the first ones are not counted

Logits = Callable[[Text], Iterable[Tensor]]
"""A model along a text: its logits [n, V] for the law of every token of the text, in order, in chunks.
Two models that are compared cut alike. V is the real vocabulary, without padding."""


@dataclass(frozen=True)
class Scores:
    """A text of T tokens: the chance [T] that a draft token there is accepted, by sampling method.

    A greedy text has "greedy", a sampled one "coupled" and "rejection", and the `overlap` float32[T]
    of the two laws, 1 - TV. All on the CPU.
    """

    text: Text
    accept: dict[str, Tensor]
    overlap: Tensor | None = None


class Forced:
    """A runner along texts. It writes blocks 0, 1, ... of its KV pool: whatever they held is lost."""

    def __init__(self, runner: Runner, vocab: int, block_size: int) -> None:
        self._runner, self._vocab, self._block_size = runner, vocab, block_size

    def __call__(self, text: Text) -> Iterator[Tensor]:
        ids = (*text.prompt_ids, *text.tokens[:-1])
        first = len(text.prompt_ids) - 1  # its logits are the law of the text's first token
        for start in range(0, first, _CHUNK):
            self._forward(ids[start : min(first, start + _CHUNK)], start, logits=False)
        for start in range(first, len(ids), _CHUNK):
            yield self._forward(ids[start : start + _CHUNK], start, logits=True)

    def _forward(self, ids: Seq[int], start: int, *, logits: bool) -> Tensor:
        blocks = range(-(-(start + len(ids)) // self._block_size))
        chunk = Chunk(ids, start, blocks, len(ids) if logits else 0)
        batch = Batch.pack([chunk], self._block_size)
        return self._runner.forward(batch)[:, : self._vocab]


def score(text: Text, target: Logits, draft: Logits, noise: GumbelNoise) -> Scores:
    """The chances of acceptance along one text. The target runs along sampled texts only.

    Raises PairError if the draft's logits are NaN.
    """
    start = 0
    parts: dict[str, list[Tensor]] = {}
    laws = draft(text) if text.seed is None else zip(draft(text), target(text), strict=True)
    for each in laws:
        q, p = (each, None) if isinstance(each, Tensor) else each
        if bool(q.isnan().any()):
            raise PairError("the draft's logits are NaN")
        tokens = torch.tensor(text.tokens[start : start + len(q)], device=q.device)
        if p is None:
            found = {"greedy": greedy_match(q, tokens)}
        else:
            found = _sampled(text, start, p, q, tokens, noise)
        for name, values in found.items():
            parts.setdefault(name, []).append(values.cpu())
        start += len(q)
    whole = {name: torch.cat(values) for name, values in parts.items()}
    return Scores(text, whole, whole.pop("overlap", None))


def _sampled(
    text: Text, start: int, p: Tensor, q: Tensor, tokens: Tensor, noise: GumbelNoise
) -> dict[str, Tensor]:
    assert text.seed is not None
    position = len(text.prompt_ids) + start
    gumbel = noise([text.seed] * len(q), range(position, position + len(q)))
    return {
        "coupled": coupled_match(q, tokens, gumbel),
        "rejection": acceptance_probability(p, q, tokens),
        "overlap": overlap(p, q),
    }


def evaluate(
    texts: Seq[Text],
    target: Logits,
    draft: Logits,
    noise: GumbelNoise,
    on_text: Callable[[], None] = lambda: None,
) -> list[Scores]:
    """`score` of every text, in order; `on_text` is called after each."""
    scores = []
    for text in texts:
        scores.append(score(text, target, draft, noise))
        on_text()
    return scores


class Stopwatch:
    """Times steps of a runner after `context` tokens at batch 1, host work and transfer included."""

    def __init__(self, runner: Runner, ids: Seq[int], block_size: int) -> None:
        """`ids`: the context, then at least as many tokens as any step is given."""
        self._runner, self._ids, self._block_size = runner, ids, block_size

    def forward(self, start: int, count: int) -> float:
        """Seconds of one pass over `count` tokens from position `start` on, to their chosen tokens."""
        blocks = range(-(-(start + count) // self._block_size))
        begin = time.perf_counter()
        chunk = Chunk(self._ids[start : start + count], start, blocks, count)
        batch = Batch.pack([chunk], self._block_size)
        self._runner.forward(batch).argmax(-1).tolist()  # the transfer waits for the device
        return time.perf_counter() - begin


def measure_costs(
    target: Runner,
    draft: Runner,
    sl: int,
    ids: Seq[int],
    block_size: int,
    on_round: Callable[[], None] = lambda: None,
) -> Costs:
    """Medians over rounds in which all take turns, of a chain of `sl` draft steps and of target passes over
    1 to `sl` + 1 tokens, after a context of len(ids) - sl - 1 tokens. Writes blocks as `Forced` does."""
    context = len(ids) - sl - 1
    clocks = Stopwatch(target, ids, block_size), Stopwatch(draft, ids, block_size)
    for clock in clocks:
        for start in range(0, context, _CHUNK):
            clock.forward(start, min(_CHUNK, context - start))
    drafts: list[float] = []
    passes: list[list[float]] = [[] for _ in range(sl + 1)]
    for number in range(ROUNDS):
        # A chain, since a small draft's weights stay in the caches from one step to the next.
        chain = sum(clocks[1].forward(context + step, 1) for step in range(sl)) / sl
        if number >= _WARM_UP:
            drafts.append(chain)
        for turn in range(sl + 1):  # in turn, each length is the one that finds the draft in the caches
            more = (number + turn) % (sl + 1)
            seconds = clocks[0].forward(context, more + 1)
            if number >= _WARM_UP:
                passes[more].append(seconds)
        on_round()
    return Costs(statistics.median(drafts), tuple(map(statistics.median, passes)))
