"""`disco-serve classifier simulate-trees`: tokens per target pass and time of trees, by budget, on a trace.

Trees are grown by the shipped rules from what the trace has of every node (`classifiers.forest`); chains are
played as `simulate` plays them. At batch 1, for greedy and coupled sampling.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import msgspec
import numpy as np

from classifiers.chains import Chains
from classifiers.forest import Forest
from classifiers.head_metrics import interval
from classifiers.simulate import CPU, Iterations, Player, Rules, SimulateError
from classifiers.simulate_run import Part, _heads, _of_trace, _parts, _progress, _read, _require, _task
from classifiers.step_costs import MOST, StepCosts
from classifiers.train import prompt_key
from classifiers.tree_play import Played, TreePlayer
from engine.speculation.load import Load
from engine.speculation.policy import Equipment, options_of
from engine.speculation.tree import Rule, rules, tree_options

if TYPE_CHECKING:
    from engine.speculation.heads import Head

MOST_EMITTED, QUICKEST, DISCO, ORACLE = "static, SL = budget", "static, quickest SL", "disco", "oracle"
_DRAWS = 1000  # of the bootstrap over prompts


class SimulateTreesOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What `disco-serve classifier simulate-trees` can be told.

    `drafters`: NAME or NAME:JSON of options; none takes every tree drafter that can be played, with its
    defaults. Each is played with every budget and to `depth`, where its options do not say otherwise.
    """

    traces: tuple[Path, ...]
    costs: StepCosts
    out: Path
    drafters: tuple[str, ...] = ()
    budgets: tuple[int, ...] = (4, 8, 16, 32, 64)
    depth: int = 12
    heads: tuple[Path, ...] = ()
    part: Part = "test"
    seed: int = 0
    tokens: int | None = None

    def check(self) -> None:
        """Raises SimulateError, naming the first option that cannot work."""
        _require(bool(self.traces), "--trace is missing")
        _require(self.part in get_args(Part), f"--part {self.part}: {', '.join(get_args(Part))}")
        good = bool(self.budgets) and all(1 <= budget < MOST for budget in self.budgets)
        _require(good, f"--budgets must be from 1 to {MOST - 1}")
        _require(1 <= self.depth < MOST, f"--depth must be from 1 to {MOST - 1}")
        _require(self.tokens is None or self.tokens >= 2, "--tokens must be at least 2")
        _require(self.out.parent.is_dir(), f"--out {self.out}: no such directory")
        _require(not self.out.is_dir(), f"--out {self.out} is a directory")


@dataclass(frozen=True)
class Sums:
    """Iterations of one drafter, by iteration; `told` of the drafter."""

    prompt: np.ndarray
    emitted: np.ndarray
    verified: np.ndarray  # draft tokens that the target judged
    accepted: np.ndarray
    passes: np.ndarray  # of the draft
    seconds: np.ndarray
    read: int = 0  # nodes of trees that the draft read
    unknown: int = 0  # of these, those of which the trace knows nothing
    told: Mapping[str, Any] | None = None

    @classmethod
    def of_chains(cls, played: Iterations, told: Mapping[str, Any]) -> Sums:
        return cls(
            played.prompt,
            played.emitted,
            played.drafted,
            played.accepted,
            played.drafted,
            played.seconds,
            told=told,
        )

    @classmethod
    def of_trees(cls, played: Seq[Played], player: TreePlayer, told: Mapping[str, Any]) -> Sums:
        trees = [each.tree for each in played]
        return cls(
            np.array([each.prompt for each in played]),
            np.array([each.emitted for each in played]),
            np.array([tree.nodes for tree in trees]),
            np.array([tree.accepted for tree in trees]),
            np.array([len(tree.passes) for tree in trees]),
            np.array([player.seconds(each) for each in played]),
            read=sum(sum(tree.passes) for tree in trees),
            unknown=sum(tree.unknown for tree in trees),
            told=told,
        )

    def of(self, prompts: Seq[int]) -> dict[str, Any]:
        """Its figures on these prompts; intervals of 95%, of a bootstrap over prompts."""
        mine = np.isin(self.prompt, np.asarray(prompts))
        owner = np.searchsorted(np.sort(prompts), self.prompt[mine])
        by_prompt = [
            np.bincount(owner, weights, minlength=len(prompts))
            for weights in (self.emitted[mine], None, self.seconds[mine])
        ]
        at = np.random.default_rng(0).integers(0, len(prompts), (_DRAWS, len(prompts)))
        emitted, passes, spent = (sums[at].sum(1) for sums in by_prompt)
        total = float(self.emitted[mine].sum())
        return {
            "emitted_per_pass": total / int(mine.sum()),
            "emitted_interval": list(interval((emitted / np.maximum(passes, 1)).tolist())),
            "verified": float(self.verified[mine].mean()),
            "accepted": float(self.accepted[mine].mean()),
            "draft_passes": float(self.passes[mine].mean()),
            "ms_per_token": 1e3 * float(self.seconds[mine].sum()) / total,
            "ms_interval": list(interval((1e3 * spent / np.maximum(emitted, 1)).tolist())),
            "unknown": self.unknown / self.read if self.read else 0.0,
            **(self.told or {}),
        }


def run(options: SimulateTreesOptions) -> dict[str, Any]:
    """Plays, writes the JSON, prints a table; what it wrote is returned.

    Raises SimulateError, TraceError, CannotLoad (heads) or InvalidRequest (drafters and their options).
    """
    options.check()
    trace = _read(options.traces, False)
    forest = Forest.of(trace)
    heads = _heads(options.heads, trace.manifest)
    chosen = _parts(trace, options.seed)[options.part]
    seen = {key for head in heads.values() for key in head.seen} if options.part == "test" else set()
    judged = [i for i in chosen.tolist() if prompt_key(trace, i) not in seen and forest.total[i] > 1]
    _require(bool(judged), f"--part {options.part}: the trace has no prompts for it that no head has seen")
    tokens = options.tokens or trace.manifest.tokens
    _require(tokens <= trace.manifest.tokens, f"--tokens {tokens}: the texts have {trace.manifest.tokens}")
    asked, skipped = _asked(options, heads, trace.manifest.hidden)
    rows: list[dict[str, Any]] = []
    tasks = _tasks(judged, trace.prompts.category)
    with _progress() as progress:
        step = _task(progress, "drafters and budgets", (len(asked) + 3) * len(options.budgets))
        for label, budget, sums in _played(options, forest, Chains.of(trace), heads, asked, judged, tokens):
            rows += [{"task": t, "drafter": label, "budget": budget, **sums.of(p)} for t, p in tasks.items()]
            step()
    figures = {
        "what": "disco-serve classifier simulate-trees",
        "format": 1,
        "versions": {name: version(name) for name in ("disco-serve", "torch")},
        "trace": _of_trace(trace.manifest),
        "part": options.part,
        "prompts": len(judged),
        "left_out": len(chosen) - len(judged),
        "heads": {kind: {"weights_sha256": head.weights_sha256} for kind, head in heads.items()},
        "costs": msgspec.to_builtins(options.costs),
        "depth": options.depth,
        "budgets": list(options.budgets),
        "target_only_ms": 1e3 * (options.costs.verify[0][1] + options.costs.iteration),
        "skipped": skipped,
        "rows": rows,
    }
    text = json.dumps(figures, indent=1)
    options.out.write_text(text + "\n", encoding="utf-8")
    found: dict[str, Any] = json.loads(text)
    return found


def _played(
    options: SimulateTreesOptions,
    forest: Forest,
    chains: Chains,
    heads: Mapping[str, Head],
    asked: Mapping[str, tuple[Rule, dict[str, Any]]],
    judged: Seq[int],
    tokens: int,
) -> Any:
    """(label, budget, sums): for every budget the chains, the trees and the oracle."""
    player = Player(chains, Rules(tokens, max_sl=MOST - 1), options.costs, heads)
    trees = TreePlayer(forest, options.costs, tokens)
    statics = []
    for sl in range(1, max(options.budgets) + 1):
        played = player.play("static", options_of("static", {"sl": sl}), judged)
        statics.append(Sums.of_chains(played, {"options": {"sl": sl}}))
    for budget in options.budgets:
        within = statics[:budget]
        yield MOST_EMITTED, budget, within[-1]
        yield QUICKEST, budget, min(within, key=lambda sums: float(sums.seconds.sum()))
        if "disco" in heads:
            bounded = Player(chains, Rules(tokens, max_sl=budget), options.costs, heads)
            yield DISCO, budget, Sums.of_chains(bounded.play("disco", options_of("disco", {}), judged), {})
        for label, (rule, given) in asked.items():
            told = {"max_depth": options.depth, **given, "budget": budget}
            grown = trees.play(rule, tree_options(rule.name, told), judged)
            yield label, budget, Sums.of_trees(grown, trees, {"options": told})
        yield ORACLE, budget, Sums.of_trees(trees.oracle(judged, budget), trees, {})


def _asked(
    options: SimulateTreesOptions, heads: Mapping[str, Head], hidden: int
) -> tuple[dict[str, tuple[Rule, dict[str, Any]]], dict[str, str]]:
    """By label the rule and its options; and those that were left out, and why. Raises InvalidRequest."""
    equipment = Equipment(Load(CPU), heads, hidden)
    found: dict[str, tuple[Rule, dict[str, Any]]] = {}
    skipped: dict[str, str] = {}
    for label in options.drafters or sorted(rules()):
        name, _, text = label.partition(":")
        _require(name in rules(), f"--drafter {label!r}: tree drafters are {', '.join(sorted(rules()))}")
        try:
            given = json.loads(text) if text else {}
        except ValueError as error:
            raise SimulateError(f"--drafter {label!r}: NAME or NAME:JSON is wanted: {error}") from error
        _require(isinstance(given, dict), f"--drafter {label!r}: the options must be a JSON object")
        tree_options(name, given)
        _require("budget" not in given, f"--drafter {label!r}: budgets are given by --budgets")
        own = "draft_temperature" not in given
        _require(own, f"--drafter {label!r}: no other draft_temperature: the trace has one law of each place")
        reason = rules()[name].missing(equipment)
        if reason is None:
            found[label] = rules()[name].equipped(equipment), given
        elif options.drafters:
            raise SimulateError(f"--drafter {label!r}: {reason}")
        else:
            skipped[label] = reason
    return found, skipped


def _tasks(judged: Seq[int], categories: Seq[str]) -> dict[str, list[int]]:
    tasks: dict[str, list[int]] = {"all": list(judged)}
    for prompt in judged:
        tasks.setdefault(categories[prompt], []).append(prompt)
    return tasks
