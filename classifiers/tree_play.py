"""Plays tree drafters on a trace: the shipped rules and their tables, asked as by an engine at batch 1."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Any

from classifiers.forest import Forest, Grown
from classifiers.step_costs import MOST, StepCosts
from engine.speculation.costs import EngineCosts
from engine.speculation.drafters.base import RowDraft
from engine.speculation.policies.goodput import MOST_SL
from engine.speculation.tree import Rule
from engine.speculation.tree_table import TreeTable
from engine.types import SamplingParams


@dataclass(frozen=True)
class Played:
    """One iteration. `generated`: tokens of the text before it."""

    prompt: int
    generated: int
    emitted: int
    tree: Grown


@dataclass
class _Row:
    """What rules and tables read of an engine's sequence."""

    id: str
    options: Any
    params: SamplingParams
    max_sl: int = MOST_SL  # of chains, of which there are none here
    slot: int = -1


@dataclass
class TreePlayer:
    """One trace, with costs. `tokens`: the most of a request, if not all that was recorded.

    The draft has read the prompts beside the target. What a rule learns over requests it keeps for one play.
    """

    forest: Forest
    costs: StepCosts
    tokens: int | None = None
    _engine_costs: EngineCosts = field(init=False)

    def __post_init__(self) -> None:
        self._limit = min(self.tokens or self.forest.tokens, self.forest.tokens)
        self._layer, self._verify = self.costs.drafting(), self.costs.passes()
        self._engine_costs = self.costs.known()
        for nodes in range(1, MOST):
            self._engine_costs.drafts["tree"].know(nodes, nodes, float(self._layer[nodes]))

    def play(self, rule: Rule, options: Any, prompts: Seq[int]) -> list[Played]:
        """Every iteration of requests for these prompts, one after another."""
        table, found = rule.table(), []
        for prompt in prompts:
            heat = float(self.forest.heat[prompt])
            row: Any = _Row(str(prompt), options, SamplingParams(temperature=heat))
            table.take(row)
            total, generated = self._total(prompt), 1
            while generated < total:
                grown = self._iteration(
                    rule, table, row, int(self.forest.base[prompt]) + generated, generated
                )
                emitted = min(grown.accepted + 1, total - generated)
                found.append(Played(prompt, generated, emitted, grown))
                table.load.observe(1, emitted, self.seconds(found[-1]), frozenset([rule.name]))
                generated += emitted
            table.give_back(row)
        return found

    def _iteration(self, rule: Rule, table: TreeTable, row: Any, step: int, generated: int) -> Grown:
        """As `Drafting` and `TreeDrafter` have it."""
        deepest = min(row.options.max_depth, self._limit - generated - 1)
        if deepest <= 0:
            return Grown()
        known = self._engine_costs
        table.load.refresh(known.drafts["tree"], known.verify, 1, frozenset([rule.name]))
        limit = table.limits([row])[0]
        if limit == 0:
            return Grown()
        growth = rule.start(row.options, limit, deepest)
        growth.begin = generated
        table.begin([(row, growth)])
        grown = self.forest.grow(growth, step)
        table.grown([(row, growth)])
        if grown.nodes:
            joint = [growth.products[node] for node in grown.kept] if growth.products else []
            draft = RowDraft(tokens=[growth.tokens[node] for node in grown.kept], joint=joint)
            table.judged(row, draft, [grown.kept.index(node) for node in grown.way])
        return grown

    def oracle(self, prompts: Seq[int], budget: int) -> list[Played]:
        """Exactly the tokens that will stand, as far as the draft's order holds them at all."""
        found, rank = [], self.forest.rank
        for prompt in prompts:
            total, generated = self._total(prompt), 1
            while generated < total:
                step = int(self.forest.base[prompt]) + generated
                room = min(budget, self._limit - generated - 1, total - generated)
                run = next((k for k in range(max(room, 0)) if rank[step + k] < 0), max(room, 0))
                emitted = min(run + 1, total - generated)
                way = tuple(range(run))
                found.append(Played(prompt, generated, emitted, Grown(way, way, (1,) * run)))
                generated += emitted
        return found

    def seconds(self, played: Played) -> float:
        """Of drafting layer by layer, a target pass over the nodes, and the rest."""
        tree = played.tree
        drafting = float(self._layer[list(tree.passes)].sum())
        return self.costs.iteration + drafting + float(self._verify[tree.nodes + 1])

    def ms_per_token(self, played: Seq[Played]) -> float:
        """Milliseconds per token after the first."""
        return float(1e3 * sum(map(self.seconds, played)) / sum(each.emitted for each in played))

    def _total(self, prompt: int) -> int:
        return min(int(self.forest.total[prompt]), self._limit)
