"""What a draft says off its target's text, for trees: a bush of the likeliest wrong ways at every position.

A tree that begins anywhere in a text holds the text's own tokens and, wherever it leaves them, a part of
that position's bush: what the draft says there depends on the way alone, not on where the tree began. So a
tree of any rule can be grown again from a trace, without the draft.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from classifiers.traces import Array, Bushes, Steps
from engine.models.runner import Batch, Branches, Chunk, Runner
from engine.speculation.features import TOP, signals
from engine.speculation.noise import GumbelNoise
from engine.speculation.tree import MOST_CHILDREN, MOST_NODES

HEAT = 0.6
"""The temperature of the law that trees of greedy requests grow by, as `engine.speculation.drafters.tree`."""


class Written(Protocol):
    """A text and the prompt before it."""

    @property
    def prompt_ids(self) -> tuple[int, ...]: ...
    @property
    def tokens(self) -> tuple[int, ...]: ...
    @property
    def seed(self) -> int | None: ...
    @property
    def finish(self) -> str: ...


@dataclass(frozen=True)
class Extent:
    """How far a bush goes: ways of at least `least` probability, of `depth` tokens, `nodes` at most, of
    these `wide` of one length."""

    least: float = 0.01
    depth: int = 8
    nodes: int = 48
    wide: int = 24

    def __post_init__(self) -> None:
        assert 1 <= self.nodes <= MOST_NODES


def orders(logits: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor]:
    """int64[B, 32], float32[B, 32]: the tokens in a tree's order, and their probabilities; 0 beyond the last.

    `logits` [B, V]; `noise` float64[B, V] of coupled sampling at temperature 1, None where greedy.
    """
    scaled = logits.float() / HEAT if noise is None else logits.double() + noise
    found = scaled.topk(min(MOST_CHILDREN, scaled.shape[1]), dim=-1).indices
    return found, scaled.softmax(-1).gather(1, found).float()


def padded(probs: Tensor) -> Array:
    """float32[B, 32] of fewer columns."""
    found = np.zeros((len(probs), MOST_CHILDREN), np.float32)
    found[:, : probs.shape[1]] = probs.cpu().numpy()
    return found


def columns(logits: Tensor, noise: Tensor | None, text: Array) -> dict[str, Array]:
    """What steps hold for trees, and `first`, the tokens of `order`. `text` int[B]: the text's own tokens."""
    tokens, probs = orders(logits, noise)
    hit = (tokens == torch.from_numpy(text).to(tokens)[:, None]) & (probs > 0)
    place = torch.where(hit.any(-1), hit.int().argmax(-1), -1)
    rank = place.cpu().numpy().astype(np.int32)
    return {"order": padded(probs), "rank": rank, "first": tokens.cpu().numpy()}


@dataclass
class _Bush:
    """One position's, while it grows. Nodes are numbered as they were read."""

    step: int
    base: int  # tokens before it
    room: int  # tokens that a way may have
    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)  # -1: the position itself
    ranks: list[int] = field(default_factory=list)
    joint: list[float] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    seen: list[int] = field(default_factory=list)
    layer: list[int] = field(default_factory=list)

    def extend(self, found: dict[int, tuple[list[int], list[float]]], extent: Extent, without: int) -> None:
        """Takes the likeliest followers of these nodes; `without`: a place in the position's own order."""
        ways = [
            (joint, node, rank, tokens[rank])
            for node, (tokens, probs) in found.items()
            for rank, prob in enumerate(probs)
            if (joint := prob * (self.joint[node] if node >= 0 else 1.0)) >= extent.least
            and not (node < 0 and rank == without)
        ]
        ways.sort(key=lambda way: -way[0])
        self.layer = []
        for joint, node, rank, token in ways[: min(extent.nodes - len(self.tokens), extent.wide)]:
            depth = 1 + (self.depths[node] if node >= 0 else 0)
            if depth > min(extent.depth, self.room):
                break
            at = len(self.tokens)
            self.layer.append(at)
            for column, value in (
                (self.tokens, token),
                (self.parents, node),
                (self.ranks, rank),
                (self.depths, depth),
            ):
                column.append(value)
            self.joint.append(joint)
            self.seen.append((self.seen[node] if node >= 0 else 0) | 1 << at)

    def chunk(self, blocks: Seq[int], again: int) -> Chunk:
        """The newest layer, read by the draft; a few nodes are read again, as `TreeDrafter` does."""
        nodes = range(len(self.tokens)) if len(self.tokens) <= again else self.layer
        return Chunk(
            [self.tokens[node] for node in nodes],
            self.base + len(self.tokens) - len(nodes),
            blocks,
            len(self.layer),
            Branches(
                trunk=self.base,
                positions=[self.base + self.depths[node] - 1 for node in nodes],
                sees=[self.base] * len(nodes),
                masks=[self.seen[node] for node in nodes],
            ),
        )


class BushRecorder:
    """Runs the draft off texts whose KV it has; what it reads is written over that KV, from their ends on."""

    def __init__(
        self, draft: Runner, vocab: int, block_size: int, tokens: int, noise: GumbelNoise, extent: Extent
    ) -> None:
        self._draft, self._vocab, self._block_size, self._tokens = draft, vocab, block_size, tokens
        self._noise, self._extent = noise, extent

    def record(
        self,
        texts: Seq[Written],
        steps: Steps,
        first: Array,
        blocks: Callable[[int], Seq[int]],
        on_positions: Callable[[int], None],
    ) -> Bushes:
        """`first` int64[N, 32]: the tokens of `steps.order`. `blocks`: of a text, with room for a bush."""
        assert steps.rank is not None
        begins = np.searchsorted(steps.prompt, np.arange(len(texts)))
        done: list[dict[str, Array]] = []
        for pos in range(max(len(text.tokens) for text in texts) - 1, 0, -1):
            rows = [i for i, text in enumerate(texts) if pos < len(text.tokens)]
            bushes = []
            for i in rows:
                step, text = int(begins[i]) + pos, texts[i]
                bush = _Bush(step, len(text.prompt_ids) + pos, self._tokens - 2 - pos)
                ended = pos == len(text.tokens) - 1  # what follows its last token is in no later step
                order = first[step].tolist(), np.asarray(steps.order)[step].tolist()
                bush.extend({-1: order}, self._extent, -1 if ended else int(steps.rank[step]))
                bushes.append(bush)
            done.extend(self._grow([texts[i] for i in rows], bushes, [blocks(i) for i in rows]))
            on_positions(len(rows))
        return _table(done)

    def _grow(self, texts: Seq[Written], bushes: Seq[_Bush], blocks: Seq[Seq[int]]) -> list[dict[str, Array]]:
        """The rows of these positions, bush by bush."""
        laws: list[list[dict[str, Array]]] = [[] for _ in bushes]
        again = getattr(self._draft, "decodes", 0)
        while live := [i for i, bush in enumerate(bushes) if bush.layer]:
            chunks = [bushes[i].chunk(blocks[i], again) for i in live]
            logits = self._draft.forward(Batch.pack(chunks, self._block_size))[:, : self._vocab]
            owners = [(i, node) for i in live for node in bushes[i].layer]
            noise = None
            if texts[0].seed is not None:
                seeds = [texts[i].seed or 0 for i, _ in owners]
                noise = self._noise(seeds, [bushes[i].base + bushes[i].depths[node] for i, node in owners])
            tokens, probs = orders(logits, noise)
            shown = signals(logits, tokens[:, 0], {"top", "entropy"})
            said = {
                "order": padded(probs),
                "top": shown["top"].cpu().numpy(),
                "entropy": shown["entropy"].cpu().numpy(),
            }
            ids, chances = tokens.tolist(), probs.tolist()
            at = 0
            for i in live:
                size = len(bushes[i].layer)
                laws[i].append({name: column[at : at + size] for name, column in said.items()})
                found = {node: (ids[at + k], chances[at + k]) for k, node in enumerate(bushes[i].layer)}
                bushes[i].extend(found, self._extent, -1)
                at += size
        return [
            {
                "step": np.full(len(bush.tokens), bush.step, np.int32),
                "parent": np.array(bush.parents, np.int32),
                "rank": np.array(bush.ranks, np.int32),
                **{name: np.concatenate([law[name] for law in own]) for name in own[0]},
            }
            for bush, own in zip(bushes, laws, strict=True)
            if own
        ]


def _table(done: Seq[dict[str, Array]]) -> Bushes:
    """Ascending by step."""
    done = sorted(done, key=lambda own: int(own["step"][0]))
    shapes: dict[str, tuple[tuple[int, ...], type]] = {
        "step": ((0,), np.int32),
        "parent": ((0,), np.int32),
        "rank": ((0,), np.int32),
        "order": ((0, MOST_CHILDREN), np.float32),
        "top": ((0, TOP), np.float32),
        "entropy": ((0,), np.float32),
    }
    every = {
        name: np.concatenate([np.zeros(shape, kind), *(own[name] for own in done)])
        for name, (shape, kind) in shapes.items()
    }
    return Bushes(**every)
