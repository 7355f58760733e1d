"""Time per token of heads, of rules without one, of fixed lookaheads and of the oracle, on the same texts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from classifiers import head_metrics
from classifiers.judged import plain
from classifiers.step_costs import StepCosts
from classifiers.stop_time import LONGEST, Ints, Reals, Rule, Starts, Times, static_times, tune
from engine.speculation.heads import Head

DRAWS = 1000


def time_table(
    validation: Starts,
    test: Starts,
    heads: Mapping[str, Head],
    predicted: Mapping[str, Reals],
    costs: StepCosts,
) -> dict[str, Any]:
    """By name; `predicted` float64[LONGEST, S] of each head on test.

    `static_validation` is the fixed lookahead that was best on validation, `static_hindsight` the one
    that is best on test: nobody can choose it beforehand. `top1` and `joint` are thresholds chosen on
    validation. Heads stop as they would when served, by their own options.
    """
    known, fixed = static_times(validation, costs), static_times(test, costs)
    chosen = min(range(len(known)), key=lambda sl: known[sl].ms_per_token)
    hindsight = min(range(len(fixed)), key=lambda sl: fixed[sl].ms_per_token)
    found: dict[str, tuple[Times, dict[str, Any]]] = {
        "none": (fixed[0], {}),
        "static_5": (fixed[5], {"sl": 5}),
        "static_validation": (fixed[chosen], {"sl": chosen}),
        "static_hindsight": (fixed[hindsight], {"sl": hindsight}),
    }
    tables, own = plain(validation), plain(test)
    for name in tables:
        rule, _ = tune(validation, tables[name], costs, name)
        drafted = rule.drafted(test, own[name])
        found[name] = test.times(drafted, costs, name), {"threshold": rule.least, "max_sl": rule.max_sl}
    for name, head in heads.items():
        drafted = served(head).drafted(test, predicted[name])
        told = {"threshold": head.options.threshold, "max_sl": head.options.max_sl}
        found[name] = test.times(drafted, costs, head.kind), told
    found["oracle"] = test.times(test.oracle(), costs), {"max_sl": LONGEST}
    return {name: _row(times, found["none"][0], test, told) for name, (times, told) in found.items()}


def served(head: Head) -> Rule:
    """How the policy of the head's kind stops with it."""
    product = head.kind == "specdec_pp"
    threshold = head.options.threshold
    return Rule(
        least=1 - threshold if product else threshold,
        max_sl=head.options.max_sl,
        product=product,
        late=head.judges == "fed",
        min_sl=head.options.min_sl,
    )


def _row(times: Times, none: Times, starts: Starts, told: dict[str, Any]) -> dict[str, Any]:
    categories = np.array(starts.categories)

    def speedup(of: Ints | slice) -> float:
        return float(none.seconds[of].sum() / times.seconds[of].sum())

    low, _, high = head_metrics.paired_ratio(none.seconds, times.seconds, DRAWS)
    return {
        **told,
        "ms_per_token": times.ms_per_token,
        "speedup": speedup(slice(None)),
        "speedup_interval": (low, high),
        "sl_mean": float(times.sl.mean()),
        "sl_sd": float(times.sl.std()),
        "acceptance": float(times.accepted.sum() / max(int(times.drafted.sum()), 1)),
        "emitted_per_pass": float(times.tokens.sum() / max(int(times.iterations.sum()), 1)),
        "by_category": {
            str(kind): {
                "ms_per_token": 1e3
                * float(times.seconds[categories == kind].sum())
                / max(int(times.tokens[categories == kind].sum()), 1),
                "speedup": speedup(np.flatnonzero(categories == kind)),
            }
            for kind in np.unique(categories)
        },
    }
