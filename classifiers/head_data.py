"""What a head is taught on: rows of inputs and labels, read from a trace by the engine's own feature code."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from classifiers.stop_time import LONGEST, Ints, Reals, Starts, along
from classifiers.traces import Trace
from engine.speculation.policy import Signals
from engine.speculation.scoring import inputs_of, needs_of

_CHUNK = 16384  # nodes whose states are held at once in float32
CHAINED = frozenset({"step", "joint", "log_joint"})
"""Inputs that depend on where a draft began."""


class DataError(ValueError):
    """The trace has not what a head is to be taught on."""


@dataclass(frozen=True)
class Rows:
    """N places: inputs float32[N, F], label float32[N] (probability of acceptance), and whose they are."""

    inputs: Tensor
    label: Tensor
    prompt: Ints  # [N]
    position: Ints  # [N], of the generated text

    def of(self, chosen: Ints) -> Rows:
        """Those of these prompts."""
        here = np.isin(self.prompt, chosen)
        at = torch.from_numpy(here)
        return Rows(self.inputs[at], self.label[at], self.prompt[here], self.position[here])

    def columns(self, kept: Seq[int]) -> Rows:
        """With these columns of the inputs alone."""
        return replace(self, inputs=self.inputs[:, list(kept)])


def rows(trace: Trace, starts: Starts, inputs: Seq[str], *, soft: bool = False, fed: bool = False) -> Rows:
    """The rows of the drafted tokens that verification would judge.

    `soft`: the label is min(1, p/q), else whether the token is the target's. `fed`: the state is the one
    after feeding the judged token, else the one that it was chosen from. Inputs that depend on where
    a draft began give a row for every start whose earlier tokens were all accepted.
    """
    labels = trace.steps.accept if soft else trace.steps.match
    if fed:
        judged, seen = _fed(trace, starts)
    else:
        judged = seen = starts.steps
    if CHAINED & set(inputs):
        parts = [
            (_read(starts, inputs, _Place(t + 1, nodes, position, joint), live), starts.nodes[t][live])
            for t, nodes, position, joint, live in _chains(starts)
        ]
        judged = np.concatenate([step for _, step in parts])
        found = torch.cat([each for each, _ in parts])
    else:
        place = _Place(1, seen, trace.steps.pos[judged].astype(np.int64), None)
        found = _read(starts, inputs, place, np.ones(len(seen), dtype=bool))
    return Rows(
        inputs=found,
        label=torch.from_numpy(labels[judged].astype(np.float32)),
        prompt=trace.steps.prompt[judged].astype(np.int64),
        position=trace.steps.pos[judged].astype(np.int64),
    )


def _fed(trace: Trace, starts: Starts) -> tuple[Ints, Ints]:
    """Steps whose draft token was fed, and the nodes whose state came of it: the next step, or a branch."""
    chains, at = starts.chains, starts.steps
    ends = np.asarray(trace.begins)[1:][trace.steps.prompt[at]] - 1
    after = np.where(chains.stands[at] == 1, at + 1, len(chains.broke) + chains.branch[at] * chains.width)
    there = np.where(chains.stands[at] == 1, at < ends, chains.length[chains.branch[at]] > 0)
    return at[there], after[there]


@dataclass(frozen=True)
class _Place:
    """The t-th token of drafts: their nodes and positions, and the products of their probabilities."""

    step: int
    nodes: Ints
    position: Ints
    joint: Tensor | None


def _chains(starts: Starts) -> Iterator[tuple[int, Ints, Ints, Tensor, np.ndarray]]:
    """By t from 0: nodes, positions, joint probabilities, and which starts still have all accepted before."""
    run = starts.chains.broke[starts.steps] - starts.steps + 1  # tokens that are judged
    joint = torch.ones(len(starts.steps))
    for t in range(LONGEST):
        live = (run > t) & (starts.room > t)
        joint = joint * starts.chains.signal("prob", torch.from_numpy(starts.nodes[t]))
        yield t, starts.nodes[t], starts.position + t, joint, live


def _read(starts: Starts, inputs: Seq[str], place: _Place, live: np.ndarray) -> Tensor:
    nodes = torch.from_numpy(place.nodes[live])
    needs = needs_of(inputs) - {"joint"}
    absent = sorted(needs - starts.chains.nodes.keys())
    if absent:
        raise DataError(f"the trace has no {', '.join(absent)}; collect it with the draft's hidden states")
    signals = Signals(
        step=torch.tensor(place.step),
        token=torch.zeros(len(nodes), dtype=torch.int64),
        position=torch.from_numpy(place.position[live]),
        alive=torch.ones(len(nodes), dtype=torch.bool),
        joint=None if place.joint is None else place.joint[torch.from_numpy(live)],
        **{need: starts.chains.signal(need, nodes) for need in needs},
    )
    return inputs_of(signals, inputs)


def probabilities(starts: Starts, inputs: Seq[str], predict: Callable[[Tensor], Tensor]) -> Reals:
    """float64[LONGEST, S]: `predict` (inputs [N, F] to probabilities [N]) along every start's draft."""
    if CHAINED & set(inputs):
        every = np.ones(len(starts.steps), dtype=bool)
        found = [
            predict(_read(starts, inputs, _Place(t + 1, nodes, position, joint), every))
            for t, nodes, position, joint, _ in _chains(starts)
        ]
        out: Reals = torch.stack(found).double().numpy()
        return out
    count, position = len(starts.chains.nodes["token"]), _positions(starts)
    parts = []
    for begin in range(0, count, _CHUNK):
        nodes = np.arange(begin, min(begin + _CHUNK, count))
        place = _Place(1, nodes, position[nodes], None)
        parts.append(predict(_read(starts, inputs, place, np.ones(len(nodes), dtype=bool))))
    return along(starts, torch.cat(parts))


def _positions(starts: Starts) -> Ints:
    """int64[N + M K]: the generated position of every node."""
    chains = starts.chains
    steps = np.arange(len(chains.broke)) - np.repeat(chains.base, chains.total)
    broken = np.flatnonzero(chains.branch >= 0)
    order = broken[np.argsort(chains.branch[broken])]
    away = steps[order][:, None] + 1 + np.arange(chains.width)
    return np.concatenate([steps, away.reshape(-1)])
