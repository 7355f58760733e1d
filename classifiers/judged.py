"""The places of a trace where classifiers are judged, and what rules without a head say there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from classifiers import head_metrics
from classifiers.head_metrics import Bools
from classifiers.stop_time import LONGEST, Ints, Reals, Starts, along
from classifiers.traces import Trace

POSITIONS = (1, 4, 8, 16, 32, 64, 128)
"""Lower ends of the bins of positions in the generated text."""


@dataclass(frozen=True)
class Places:
    """Every position of the texts but the first, once: as token `t` (from 0) of the draft begun at `start`.

    Drafts are those that go on to the first mismatch, so that all before each place were accepted.
    """

    start: Ints  # [N], index into the starts
    t: Ints  # [N]
    prompt: Ints  # [N]
    position: Ints  # [N]
    accepted: Bools  # [N]

    @classmethod
    def of(cls, trace: Trace, starts: Starts) -> Places:
        begin, ends = 0, np.append(np.flatnonzero(np.diff(starts.prompt)) + 1, len(starts.prompt))
        start: list[int] = []
        t: list[int] = []
        run = (starts.chains.broke[starts.steps] - starts.steps + 1).tolist()
        for end in ends.tolist():
            at = begin
            while at < end:
                count = min(run[at], LONGEST, end - at)
                start += [at] * count
                t += range(count)
                at += count
            begin = end
        first, along_it = np.array(start, dtype=np.int64), np.array(t, dtype=np.int64)
        step = starts.steps[first] + along_it
        return cls(
            first,
            along_it,
            starts.prompt[first],
            starts.position[first] + along_it,
            np.asarray(trace.steps.match, dtype=bool)[step],
        )

    def read(self, starts: Starts, table: Reals, late: bool) -> Reals:
        """float64[N] of a table [LONGEST, S]; nan where a late head has not judged the token."""
        if not late:
            return table[self.t, self.start]
        there = (self.t + 1 < LONGEST) & (starts.room[self.start] > self.t + 1)
        found: Reals = np.where(there, table[np.minimum(self.t + 1, LONGEST - 1), self.start], np.nan)
        return found


def plain(starts: Starts) -> dict[str, Reals]:
    """float64[LONGEST, S] of what needs no head: the largest probability, and the drafted tokens' product."""
    prob = along(starts, starts.chains.nodes["prob"])
    return {
        "top1": along(starts, starts.chains.nodes["largest"]),
        "joint": np.cumprod(prob, axis=0, dtype=np.float64),
    }


@dataclass(frozen=True)
class Judged:
    """One classifier on test: rows of `scores` (all, then by category), bins of positions, its curve."""

    scores: list[dict[str, Any]]
    by_position: list[dict[str, Any]]
    curve: list[dict[str, Any]]


def classifier(
    tables: tuple[Reals, Reals],
    starts: tuple[Starts, Starts],
    places: tuple[Places, Places],
    late: bool,
    draws: int,
) -> Judged:
    """What its probabilities are worth on test; its F1 threshold is chosen on validation.

    Pairs are validation and test; `tables` float64[LONGEST, S]. `draws`: of prompts, for the intervals.
    """
    known = [each.read(start, table, late) for each, start, table in zip(places, starts, tables, strict=True)]
    here = ~np.isnan(known[0])
    threshold = head_metrics.best_threshold(known[0][here], places[0].accepted[here])
    here, test = ~np.isnan(known[1]), places[1]
    probability, accepted = known[1][here], test.accepted[here]
    prompt, position = test.prompt[here], test.position[here]
    kinds = np.array(starts[1].categories)[prompt]
    bins = np.searchsorted(POSITIONS, position, side="right") - 1

    def within(part: Bools) -> dict[str, Any]:
        return {
            "count": int(part.sum()),
            "accepted": float(accepted[part].mean()),
            **head_metrics.judge(probability[part], accepted[part], threshold),
        }

    whole = within(np.ones(len(accepted), dtype=bool)) | {"f1_threshold": threshold}
    bounds = head_metrics.bootstrap(probability, accepted, prompt, threshold, draws, seed=0)
    for name, (low, high) in bounds.items():
        whole[name] = {"value": whole[name], "low": low, "high": high}
    return Judged(
        [{"task": "all", **whole}, *({"task": str(k), **within(kinds == k)} for k in np.unique(kinds))],
        [{"position": POSITIONS[i], **within(bins == i)} for i in np.unique(bins)],
        head_metrics.curve(probability, accepted),
    )


def always_accept(places: Places) -> dict[str, float]:
    """Who always drafts on: F1 of accept flatters it, F1 of reject is 0."""
    return head_metrics.judge(np.ones(len(places.accepted)), places.accepted, 0.5)
