"""Which inputs hold what: FFNs with inputs left out, exchanged and added, and taught on one task for another.

All are fitted and judged on the same places (`judged.Places`), so that their figures compare.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from classifiers import head_metrics
from classifiers.head_data import DataError, Rows
from classifiers.head_fit import Plan, calibrate, fit, raw_score, scaled
from classifiers.judged import Places
from classifiers.step_costs import StepCosts
from classifiers.stop_time import LONGEST, Ints, Reals, Rule, Starts, tune
from classifiers.traces import Trace
from engine.speculation.policy import Signals
from engine.speculation.scoring import INPUTS, inputs_of, needs_of

DISCO = ("top", "entropy", "position")
VARIANTS: dict[str, tuple[str, ...]] = {
    "disco": DISCO,
    "without top": ("entropy", "position"),
    "without entropy": ("top", "position"),
    "without position": ("top", "entropy"),
    "entropy of the top 10": ("top", "entropy_top", "position"),
    "largest alone": ("largest",),
    "entropy alone": ("entropy",),
    "with prob": (*DISCO, "prob"),
    "with joint and step": (*DISCO, "joint", "step"),
    "with recent": (*DISCO, "recent"),
    "with token": (*DISCO, "token"),
    "with hidden": (*DISCO, "hidden"),
    "hidden alone": ("hidden",),
    "with target_hidden": (*DISCO, "target_hidden"),
    "with all but states": (*DISCO, "prob", "joint", "step", "recent", "token"),
}
"""`recent`: how many of this request's latest places agreed, fading by a tenth each. `token`: how often the
drafted token is in the training texts. `target_hidden`: the target's state at the last verified token."""
_FADE = 0.9


@dataclass
class Part:
    """One part of the prompts: where drafts begin, what is judged, and columns that no signal gives."""

    trace: Trace
    starts: Starts
    frequency: Tensor  # float32[vocabulary], log counts in the training texts
    places: Places = field(init=False)
    joint: Tensor = field(init=False)  # float32[LONGEST, S]
    recent: Tensor = field(init=False)  # float32[S]

    def __post_init__(self) -> None:
        self.places = Places.of(self.trace, self.starts)
        prob = self.starts.chains.signal("prob", torch.from_numpy(self.starts.nodes))
        self.joint = prob.cumprod(0)
        self.recent = torch.from_numpy(self._recent().astype(np.float32))

    def _recent(self) -> Reals:
        match, pos = self.trace.steps.match, self.trace.steps.pos
        found, level = np.zeros(len(match)), 0.5
        for i in range(len(match)):
            if pos[i] <= 1:
                level = 0.5
            found[i] = level
            level = _FADE * level + (1 - _FADE) * bool(match[i])
        return found[self.starts.steps]

    def read(self, names: Seq[str], start: Ints, t: Ints) -> Tensor:
        """float32[n, F]: the inputs of the t-th tokens (from 0) of the drafts begun at these starts."""
        nodes = torch.from_numpy(self.starts.nodes[t, start])
        ours = [name for name in names if name in INPUTS]
        signals = Signals(
            step=torch.from_numpy(t + 1),
            token=self.starts.chains.nodes["token"][nodes],
            position=torch.from_numpy(self.starts.position[start] + t),
            alive=torch.ones(len(nodes), dtype=torch.bool),
            joint=self.joint[torch.from_numpy(t), torch.from_numpy(start)],
            **{need: self.starts.chains.signal(need, nodes) for need in needs_of(ours) - {"joint"}},
        )
        columns = [inputs_of(signals, ours)] if ours else []
        for name in (name for name in names if name not in INPUTS):
            columns.append(self._extra(name, signals.token, start, t))
        return torch.cat(columns, 1)

    def _extra(self, name: str, token: Tensor, start: Ints, t: Ints) -> Tensor:
        if name == "recent":  # those drafted before it are taken as accepted
            level = self.recent[torch.from_numpy(start)]
            return (1 - (1 - level) * _FADE ** torch.from_numpy(t).float())[:, None]
        if name == "token":
            return self.frequency[token][:, None]
        states = self.trace.steps.target_hidden
        assert name == "target_hidden" and states is not None
        return torch.from_numpy(states[self.starts.steps[start] - 1].astype(np.float32))

    def rows(self, names: Seq[str]) -> Rows:
        places = self.places
        label = torch.from_numpy(places.accepted.astype(np.float32))
        return Rows(self.read(names, places.start, places.t), label, places.prompt, places.position)

    def table(self, names: Seq[str], predict: Callable[[Tensor], Tensor]) -> Reals:
        """float64[LONGEST, S]: predictions along every start's draft."""
        every = np.arange(len(self.starts.steps))
        found = [predict(self.read(names, every, np.full(len(every), t))) for t in range(LONGEST)]
        out: Reals = torch.stack(found).double().numpy()
        return out


def parts(train: Trace, validation: Trace, test: Trace) -> tuple[Part, Part, Part]:
    """The three parts; token counts come from the training texts."""
    size = 1 + max(
        int(max(t.steps.drafted.max(), t.branches.drafted.max(initial=0))) for t in (train, validation, test)
    )
    counts = np.bincount(train.steps.token.clip(max=size - 1), minlength=size)
    frequency = torch.from_numpy(np.log1p(counts).astype(np.float32))
    made = [Part(trace, Starts(trace), frequency) for trace in (train, validation, test)]
    return made[0], made[1], made[2]


@dataclass(frozen=True)
class Taught:
    """An FFN fitted on one part, with the thresholds that validation gave it."""

    names: tuple[str, ...]
    predict: Callable[[Tensor], Tensor]
    f1_threshold: float
    rules: Mapping[str, Rule]  # by "each" and "product"


def teach(names: tuple[str, ...], train: Part, validation: Part, costs: StepCosts, seed: int) -> Taught:
    """Fits, calibrates and tunes. Raises DataError where the labels teach nothing."""
    plan = Plan("disco", seed, width=32, epochs=20, weight_decay=1e-2)
    known = validation.rows(names)
    weights = fit(plan, train.rows(names), known, None, lambda _: None).weights
    with torch.inference_mode():
        scale = calibrate(raw_score(weights, scaled(weights, known.inputs), 0), known.label, "platt")

    def predict(x: Tensor) -> Tensor:
        with torch.inference_mode():
            return (raw_score(weights, scaled(weights, x), 0) / scale.temperature + scale.bias).sigmoid()

    probability = predict(known.inputs).double().numpy()
    table = validation.table(names, predict)
    rules = {
        name: tune(validation.starts, table, costs, "disco", product=name == "product")[0]
        for name in ("each", "product")
    }
    threshold = head_metrics.best_threshold(probability, validation.places.accepted)
    return Taught(names, predict, threshold, rules)


def judge(taught: Taught, test: Part, costs: StepCosts) -> dict[str, Any]:
    """Its figures on test, with ms per token where it stops by each probability, or by their product."""
    probability = taught.predict(test.rows(taught.names).inputs).double().numpy()
    figures = head_metrics.judge(probability, test.places.accepted, taught.f1_threshold)
    table = test.table(taught.names, taught.predict)
    ms = {
        f"ms_per_token_{name}": test.starts.times(
            rule.drafted(test.starts, table), costs, "disco"
        ).ms_per_token
        for name, rule in taught.rules.items()
    }
    return {"inputs": list(taught.names), **figures, **ms}


def variants_of(trace: Trace) -> dict[str, tuple[str, ...]]:
    """Those whose inputs the trace holds."""
    missing = set()
    if trace.steps.hidden is None or trace.branches.hidden is None:
        missing.add("hidden")
    if trace.steps.target_hidden is None:
        missing.add("target_hidden")
    return {name: inputs for name, inputs in VARIANTS.items() if not missing & set(inputs)}


def transfer(
    traces: tuple[Trace, Trace, Trace], costs: StepCosts, seed: int, advance: Callable[[], None]
) -> dict[str, Any]:
    """Taught on one category, or on all, judged on every one: DISCO's inputs. Rows teach, columns judge.

    `ms_over_own`: time per token over that of the classifier taught on the judged category itself.
    """
    train, validation, test = traces
    categories = sorted(
        set(train.prompts.category) & set(validation.prompts.category) & set(test.prompts.category)
    )
    judged = {name: _only(traces, name) for name in categories}
    cells: dict[str, dict[str, dict[str, Any]]] = {}
    for row in [*categories, "all"]:
        own = parts(*traces) if row == "all" else judged[row]
        try:
            taught = teach(DISCO, own[0], own[1], costs, seed)
        except DataError:  # a category without a rejection teaches nothing
            advance()
            continue
        cells[row] = {name: judge(taught, judged[name][2], costs) for name in categories}
        advance()
    return _matrices(categories, cells)


def _matrices(categories: list[str], cells: dict[str, dict[str, dict[str, Any]]]) -> dict[str, Any]:
    rows = [*categories, "all"]

    def matrix(name: str) -> list[list[float | None]]:
        return [[cells[i][j][name] if i in cells else None for j in categories] for i in rows]

    ms = matrix("ms_per_token_each")
    own = [ms[i][i] for i in range(len(categories))]
    return {
        "tasks": categories,
        "rows": rows,
        "measure": "auroc",
        "matrix": matrix("auroc"),
        "f1_reject": matrix("f1_reject"),
        "ece": matrix("ece"),
        "ms_per_token": ms,
        "ms_over_own": [
            [None if cell is None or of is None else cell / of for cell, of in zip(row, own, strict=True)]
            for row in ms
        ],
    }


def _only(traces: tuple[Trace, Trace, Trace], category: str) -> tuple[Part, Part, Part]:
    chosen = [
        trace.select([i for i, name in enumerate(trace.prompts.category) if name == category])
        for trace in traces
    ]
    return parts(chosen[0], chosen[1], chosen[2])
