"""A trace as look-ups: what a chain that begins at a place of a text holds, and how much of it stands.

Along the target's own output the draft is forced; as long as its choices are the target's, that is
what it would have drafted. Where it first fails it would have gone on along its own wrong token: that
continuation depends on the place alone, and the trace has it (a branch).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from classifiers.traces import Branches, Steps, Trace, TraceError

Ints = NDArray[np.int64]


@dataclass
class Chains:
    """A trace as look-ups. Nodes are the N steps, then the K steps of every branch, M x K."""

    base: Ints  # [P], the step of a prompt's position 0
    total: Ints  # [P], tokens of its text
    prompt_tokens: Ints  # [P]
    heat: NDArray[np.float32]  # [P], the temperature of its text
    broke: Ints  # [N], from a step on the first that the draft misses, or the text's last
    stands: Ints  # [N], 1 where the draft's choice is the text's
    branch: Ints  # [N], or -1
    length: Ints  # [M + 1], known tokens after the branch's first; the last entry is for no branch
    width: int  # K
    nodes: dict[str, Tensor]  # by signal, [N + M K, ...]

    @classmethod
    def of(cls, trace: Trace) -> Chains:
        """Raises TraceError where a prompt's positions are not 0, 1, 2, ..."""
        steps, branches, begins = trace.steps, trace.branches, np.asarray(trace.begins)
        count, places = len(steps.pos), np.diff(begins)
        expected = np.arange(count) - np.repeat(begins[:-1], places)
        if not np.array_equal(expected, steps.pos):
            raise TraceError("not a trace: the positions of a prompt are not 0, 1, 2, ...")
        ends = ~np.asarray(steps.match, dtype=bool)
        ends[begins[1:][places > 0] - 1] = True
        broke = np.where(ends, np.arange(count), count)
        return cls(
            base=begins[:-1].astype(np.int64),
            total=places.astype(np.int64),
            prompt_tokens=np.asarray(trace.prompts.tokens, dtype=np.int64),
            heat=heat_of(trace),
            broke=np.minimum.accumulate(broke[::-1])[::-1],
            stands=np.asarray(steps.match, dtype=np.int64),
            branch=np.asarray(trace.branch_of(), dtype=np.int64),
            length=np.append(branches.length, 0).astype(np.int64),
            width=int(branches.drafted.shape[1]),
            nodes=_nodes(steps, branches),
        )

    def reach(self, step: Ints) -> Ints:
        """The most tokens that are known of a chain that begins at the step."""
        broke = self.broke[step]
        return broke - step + 1 + self.length[self.branch[broke]]

    def accepted(self, step: Ints, drafted: Ints) -> Ints:
        """How many of the first `drafted` tokens stand."""
        broke = self.broke[step]
        found: Ints = np.minimum(drafted, broke - step + self.stands[broke])
        return found

    def along(self, step: Ints, most: int) -> Ints:
        """int64[most, B]: the nodes of the chains from `step` on; beyond `reach` they mean nothing."""
        at = step + np.arange(most)[:, None]
        broke = self.broke[step]
        past = np.clip(at - broke - 1, 0, max(self.width - 1, 0))
        away = len(self.broke) + self.branch[broke] * self.width + past
        nodes: Ints = np.where(at <= broke, at, away)
        return np.minimum(nodes, len(self.nodes["token"]) - 1)

    def signal(self, name: str, nodes: Tensor) -> Tensor:
        """Of these nodes, as the engine gives it; [..., width] or [...]."""
        found = self.nodes[name][nodes]
        return found.float() if found.dtype == torch.float16 else found


def heat_of(trace: Trace) -> NDArray[np.float32]:
    """By prompt: 0 where a draft's chance to stand is whether it did, 1 where it was sampled."""
    steps = trace.steps
    sampled = np.asarray(steps.accept) != np.asarray(steps.match)
    count = np.bincount(steps.prompt[sampled], minlength=len(trace.prompts.category))
    return (count > 0).astype(np.float32)


def _nodes(steps: Steps, branches: Branches) -> dict[str, Tensor]:
    """By signal, the steps' and then the branches' values."""
    found = {}
    for name in ("drafted", "prob", "top", "entropy", "hidden"):
        along, away = getattr(steps, name), getattr(branches, name)
        if along is not None and away is not None:
            rest = np.asarray(away).reshape(-1, *np.shape(along)[1:])
            found[name] = torch.from_numpy(np.concatenate([np.asarray(along), rest]))
    found["token"] = found.pop("drafted").to(torch.int64)
    found["largest"] = found["top"][:, 0]
    return found
