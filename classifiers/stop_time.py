"""What a stop rule takes per token, for many thresholds at once: the quick sibling of `simulate`.

Where an iteration may begin, what it would draft is worked out for every place of the texts at once;
then each text is walked from iteration to iteration. Exact, as `simulate` is, for rules whose answer
depends on the present draft alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from classifiers.chains import Chains
from classifiers.step_costs import StepCosts
from classifiers.traces import Trace

Ints = NDArray[np.int64]
Reals = NDArray[np.float64]
LONGEST = 24
"""The most that a rule may draft here; a trace's branches are about as long."""


@dataclass(frozen=True)
class Times:
    """By prompt: `seconds` float64[P], `tokens` int64[P] emitted after the first; `sl` of all iterations."""

    seconds: Reals
    tokens: Ints
    drafted: Ints  # [P]
    accepted: Ints  # [P]
    iterations: Ints  # [P]
    sl: Ints  # [all iterations]

    @property
    def ms_per_token(self) -> float:
        return 1e3 * float(self.seconds.sum()) / max(int(self.tokens.sum()), 1)


class Starts:
    """The S places of a trace where an iteration may begin (every position but the first), text by text.

    `nodes` int64[LONGEST, S]: what a draft begun there shows after its t-th token, as nodes of
    `chains`; `room` int64[S]: the most that it can draft.
    """

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.chains = Chains.of(trace)
        begins = np.asarray(trace.begins, dtype=np.int64)
        at = np.flatnonzero(trace.steps.pos > 0).astype(np.int64)
        self.steps: Ints = at
        self.prompt: Ints = trace.steps.prompt[at].astype(np.int64)
        self.position: Ints = trace.steps.pos[at].astype(np.int64)
        self.nodes: Ints = self.chains.along(at, LONGEST)
        left = trace.manifest.tokens - 1 - self.position
        self.room: Ints = np.minimum(np.minimum(self.chains.reach(at), left), LONGEST).clip(min=0)
        self.categories = trace.prompts.category
        counts = np.diff(begins)
        ends = np.cumsum((counts - 1).clip(min=0))
        self._bounds = list(zip(np.append(0, ends[:-1]).tolist(), ends.tolist(), strict=True))

    def drafted(self, keep: NDArray[np.bool_], max_sl: int) -> Ints:
        """int64[S]: tokens drafted where keep bool[LONGEST, S] says whether to go on after the t-th token."""
        on = np.logical_and.accumulate(keep, axis=0).sum(axis=0)
        found: Ints = np.minimum(np.minimum(on + 1, self.room), max_sl)
        return found

    def oracle(self, max_sl: int = LONGEST) -> Ints:
        """int64[S]: exactly what will be accepted."""
        return np.minimum(self.chains.accepted(self.steps, self.room), max_sl)

    def times(self, drafted: Ints, costs: StepCosts, policy: str | None = None) -> Times:
        """Every text from its second token to its end, drafting `drafted` int64[S] wherever it comes by.

        `policy`: whose cost of deciding is added to a draft step; None: of nobody.
        """
        accepted = self.chains.accepted(self.steps, drafted)
        step = costs.draft + (0.0 if policy is None else costs.deciding(policy))
        cost = drafted * step + costs.passes()[drafted + 1] + costs.iteration
        jump = (accepted + 1).tolist()
        visited: list[int] = []
        counts = []
        for begin, end in self._bounds:
            at, before = begin, len(visited)
            while at < end:
                visited.append(at)
                at += jump[at]
            counts.append(len(visited) - before)
        which = np.array(visited, dtype=np.int64)
        owner = np.repeat(np.arange(len(counts)), counts)

        def by_prompt(values: Reals | Ints) -> Reals:
            return np.bincount(owner, weights=values[which], minlength=len(counts)).astype(np.float64)

        return Times(
            seconds=by_prompt(cost),
            tokens=np.array([end - begin for begin, end in self._bounds], dtype=np.int64),
            drafted=by_prompt(drafted).astype(np.int64),
            accepted=by_prompt(accepted).astype(np.int64),
            iterations=np.array(counts, dtype=np.int64),
            sl=drafted[which],
        )


@dataclass(frozen=True)
class Rule:
    """When to stop, by a probability of every node.

    `product`: that of the whole draft, else of the newest token, must be at least `least`; `late`: the
    head judges the token before the newest, so that the first node says nothing.
    """

    least: float
    max_sl: int
    product: bool = False
    late: bool = False
    min_sl: int = 0

    def drafted(self, starts: Starts, probability: Reals) -> Ints:
        """int64[S], by probability float64[LONGEST, S] as `along` gives it."""
        return starts.drafted(self.keep(judged(probability, self.product, self.late)), self.max_sl)

    def keep(self, judgement: Reals) -> NDArray[np.bool_]:
        keep = judgement >= self.least
        keep[: max(self.min_sl - 1, 0)] = True
        return keep


def judged(probability: Reals, product: bool, late: bool) -> Reals:
    """float64[T, S]: what is compared with a threshold after each token."""
    if late:
        probability = probability.copy()
        probability[0] = 1.0
    found: Reals = np.cumprod(probability, axis=0, dtype=np.float64) if product else probability
    return found


def along(starts: Starts, by_node: torch.Tensor) -> Reals:
    """float64[LONGEST, S] of a value of every node."""
    values: Reals = by_node.double().numpy()[starts.nodes]
    return values


GRID = np.concatenate([[0.005, 0.01], np.arange(0.02, 0.99, 0.02).round(2)])
_BESIDE = 2  # thresholds on either side that are looked at with one
CAPS = (4, 6, 8, 10, 12, 16, 20, 24)


def tune(
    starts: Starts,
    probability: Reals,
    costs: StepCosts,
    policy: str,
    *,
    product: bool = False,
    late: bool = False,
    min_sl: int = 0,
    caps: tuple[int, ...] = CAPS,
) -> tuple[Rule, float]:
    """The rule of least time per token on these texts, and its ms per token there.

    Of least time in the mean over neighbouring thresholds: the least of many noisy figures is luck.
    """
    judgement = judged(probability, product, late)
    ms = np.empty((len(GRID), len(caps)))
    for row, least in enumerate(GRID.tolist()):
        keep = Rule(least, LONGEST, product, late, min_sl).keep(judgement)
        longest = starts.drafted(keep, LONGEST)
        for column, cap in enumerate(caps):
            ms[row, column] = starts.times(np.minimum(longest, cap), costs, policy).ms_per_token
    padded = np.pad(ms, ((_BESIDE, _BESIDE), (0, 0)), mode="edge")
    smooth = np.lib.stride_tricks.sliding_window_view(padded, 2 * _BESIDE + 1, axis=0).mean(-1)
    row, column = divmod(int(smooth.argmin()), len(caps))
    return Rule(float(GRID[row]), caps[column], product, late, min_sl), float(ms[row, column])


def static_times(starts: Starts, costs: StepCosts, most: int = LONGEST) -> list[Times]:
    """A fixed lookahead of 0, 1, ... `most`."""
    return [starts.times(np.minimum(starts.room, sl), costs) for sl in range(most + 1)]
