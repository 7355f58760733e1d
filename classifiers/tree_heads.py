"""What a c2t head is taught on, and how its threshold is chosen: candidates of trees grown from a trace."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Seq

import msgspec
import numpy as np
import torch

from classifiers.forest import Forest
from classifiers.head_data import DataError, Rows
from classifiers.step_costs import StepCosts
from classifiers.traces import Trace
from classifiers.tree_play import TreePlayer
from engine.speculation.c2t import C2T, C2TOptions, Candidates
from engine.speculation.heads import Head, HeadOptions
from engine.speculation.scoring import inputs_of

WIDTH, NODES, DEPTH, LEAST = 8, 24, 12, 0.01
"""Followers of a node; of a layer the nodes that are gone on from; layers; the least joint probability."""
_EVERY = 3  # a tree at every such position: neighbours see nearly the same
BUDGET = 32
"""Of the trees that choose a threshold."""
_ALIKE = 1.02  # times that are told apart no better on so few texts
GRID = (0.02, 0.03, 0.05, 0.08, 0.12, 0.16, 0.2, 0.25, 0.3, 0.4, 0.5, 0.7)


def rows(trace: Trace, inputs: Seq[str]) -> Rows:
    """Candidates of wide trees, each labelled with whether the text goes their way, from their root on.

    Off the text, too: a head must tell a likely token on a wrong way from one on the right.
    Raises TraceError, DataError.
    """
    forest = Forest.of(trace)
    parts: list[Rows] = []
    for prompt, total in enumerate(forest.total.tolist()):
        for generated in range(1 + prompt % _EVERY, total - 1, _EVERY):
            parts.extend(_tree(forest, inputs, prompt, generated))
    if not parts:
        raise DataError("the trace has no position at which a tree could begin")
    return Rows(
        torch.cat([part.inputs for part in parts]),
        torch.cat([part.label for part in parts]),
        np.concatenate([part.prompt for part in parts]),
        np.concatenate([part.position for part in parts]),
    )


def _tree(forest: Forest, inputs: Seq[str], prompt: int, generated: int) -> Iterator[Rows]:
    """Layer by layer; nodes are numbered by the places that they are at."""
    layer = {int(forest.base[prompt]) + generated: 1.0}  # by place, the joint probability
    for depth in range(1, min(DEPTH, forest.tokens - generated - 1) + 1):
        found = {place: forest.followers(place) for place in layer}
        some = Candidates.of(found, layer, WIDTH)
        if not some.token:
            return
        right = [forest.on_the_way(place, rank) for place, rank in zip(some.parent, some.token, strict=True)]
        count, position = len(right), generated + depth - 1
        yield Rows(
            inputs_of(some.signals(depth, position), inputs),
            torch.tensor(right, dtype=torch.float32),
            np.full(count, prompt, np.int64),
            np.full(count, position, np.int64),
        )
        likely = sorted(range(count), key=lambda i: -some.joint[i])[:NODES]
        below = ((forest.follow(some.parent[i], some.token[i]), some.joint[i]) for i in likely)
        layer = {place: joint for place, joint in below if place >= 0 and joint >= LEAST}


def tuned(head: Head, trace: Trace, costs: StepCosts) -> tuple[HeadOptions, float]:
    """The threshold of least time per token on these texts at a budget of 32, and its ms per token.

    Of several that take as long, the lowest: it gives most tokens for a pass of the target.
    """
    player = TreePlayer(Forest.of(trace), costs)
    prompts = range(len(player.forest.total))
    made = HeadOptions(threshold=0.0, max_sl=DEPTH)
    rule = C2T(msgspec.structs.replace(head, options=made))
    ms = [
        player.ms_per_token(
            player.play(rule, C2TOptions(budget=BUDGET, max_depth=DEPTH, threshold=least), prompts)
        )
        for least in GRID
    ]
    best = next(i for i, each in enumerate(ms) if each <= _ALIKE * min(ms))
    return HeadOptions(threshold=GRID[best], max_sl=DEPTH), ms[best]
