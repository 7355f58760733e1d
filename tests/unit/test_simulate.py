"""Simulation against the engine itself: the same lookaheads and verdicts, iteration by iteration."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from lossless.toy_heads import toy_heads
from toy_traces import ending

from classifiers import simulate, traces
from classifiers.chains import Chains
from classifiers.collect import CollectOptions, collect
from classifiers.simulate import Player, Rules
from classifiers.step_costs import StepCosts
from engine.config import EngineConfig
from engine.core import Engine
from engine.models.runner import Batch
from engine.parts import build
from engine.speculation.drafters.model import ModelDrafter
from engine.speculation.heads import Head
from engine.speculation.policy import options_of, policies
from engine.types import GenerateRequest, SamplingParams, SpeculationParams

TOKENS, SEED, MAX_SL = 20, 11, 8
COSTS = StepCosts(0.1, ((1, 1.0), (9, 1.2)))
TEXTS = ["def f(x): return", "x = [1, 2", "A b c d e f g h", "a prompt of more than 16 tokens, so" * 2]
ENDS = (2, *range(36, 44))  # several, so that some texts end early
POLICIES: dict[str, tuple[str, dict[str, Any]]] = {
    "none": ("static", {"sl": 0}),
    "static 8": ("static", {"sl": 8}),
    "joint": ("confidence", {"signal": "joint", "threshold": 0.3}),
    "long": ("confidence", {"threshold": 0.05}),  # reaches far into branches
    **{name: (name, {}) for name in sorted(policies())},
}
Verdicts = list[list[tuple[int, int, int]]]
"""By request: (drafted, accepted, emitted) of every iteration."""


@dataclass
class Recorded:
    """A pair, its trace, and the engine that it came from."""

    config: EngineConfig
    trace: traces.Trace
    seed: int | None

    heads: dict[str, Head]

    def player(self) -> Player:
        return Player(Chains.of(self.trace), Rules(TOKENS, max_sl=MAX_SL), COSTS, self.heads)

    def engine(self, monkeypatch: pytest.MonkeyPatch) -> Engine:
        """With heads; time passes in the models only, at COSTS."""
        parts = build(self.config)
        equipment = replace(parts.equipment["model"], heads=self.heads)
        info = msgspec.structs.replace(parts.info, refusals={})
        engine = Engine(
            self.config, replace(parts, info=info, equipment=parts.equipment | {"model": equipment})
        )
        engine._governing.costs = COSTS.known()
        now, passes = [0.0], COSTS.passes()
        drafter = parts.drafters["model"]
        assert isinstance(drafter, ModelDrafter)

        def slow(runner: Any, seconds: Callable[[Batch], float]) -> None:
            forward = runner.forward

            def run(batch: Batch, *args: Any, **more: Any) -> Any:
                now[0] += seconds(batch)
                return forward(batch, *args, **more)

            monkeypatch.setattr(runner, "forward", run)

        slow(parts.target, lambda batch: float(passes[min(len(batch.ids), MAX_SL + 1)]))
        slow(drafter.runner, lambda batch: COSTS.draft if len(batch.logits_at) else 0.0)
        monkeypatch.setattr("engine.core.time.perf_counter", lambda: now[0])
        return engine


@pytest.fixture(scope="module", params=[None, SEED], ids=["greedy", "coupled"])
def recorded(request: Any, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    seed, directory = request.param, tmp_path_factory.mktemp("recorded")
    target = ending(tiny_llama, directory / "target", ENDS)
    data = directory / "texts.jsonl"
    data.write_text("".join(json.dumps({"category": "a", "text": text}) + "\n" for text in TEXTS))
    options = CollectOptions(
        target=str(target),
        draft="self:3",
        data=(str(data),),
        out=directory / "trace",
        temperature=0.0 if seed is None else 1.0,
        seed=seed or 0,
        tokens=TOKENS,
        branch=MAX_SL,
        device="cpu",
    )
    collect(options)
    trace = traces.load(options.out, ("steps.hidden", "branches.hidden"))
    matched = trace.steps.match[trace.branches.step]  # an end token that was drafted
    assert {"stop", "length"} <= set(trace.prompts.finish) and matched.any() and not matched.all()
    config = EngineConfig(
        target=str(target), draft="self:3", device="cpu", max_num_seqs=1, max_sl=MAX_SL, prefix_cache=False
    )
    return Recorded(config, trace, seed, toy_heads(trace.manifest.hidden))


def served(
    recorded: Recorded, policy: str, options: dict[str, Any], prompts: Seq[int], engine: Engine
) -> Verdicts:
    """What the engine does with these prompts, one after another."""
    asked = SpeculationParams(drafter="model", policy=policy, options=options)
    for i in prompts:
        params = (
            SamplingParams(temperature=0.0, max_tokens=TOKENS)
            if recorded.seed is None
            else SamplingParams(temperature=1.0, seed=recorded.seed + i, max_tokens=TOKENS)
        )
        ids = tuple(recorded.trace.prompts.ids_of(i).tolist())
        engine.add(GenerateRequest(id=str(i), prompt_ids=ids, params=params, speculation=asked))
    found: Verdicts = [[] for _ in TEXTS]
    while engine.has_work():
        for event in engine.step()[0]:
            if event.iterations:
                verdict = event.drafted, event.accepted, len(event.token_ids)
                found[int(event.id)].append(verdict)
    return found


def played(
    player: Player, policy: str, options: dict[str, Any], prompts: Seq[int] | None = None, **more: Any
) -> Verdicts:
    prompts = range(len(player.chains.total)) if prompts is None else prompts
    its = player.play(policy, options_of(policy, options), prompts, **more)
    found: Verdicts = [[] for _ in player.chains.total]
    for prompt, *verdict in zip(its.prompt, its.drafted, its.accepted, its.emitted, strict=True):
        found[prompt].append(tuple(map(int, verdict)))  # type: ignore[arg-type]
    return found


@pytest.mark.parametrize("policy", POLICIES)
def test_simulation_is_what_the_engine_does(
    recorded: Recorded, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, options = POLICIES[policy]
    player = recorded.player()
    assert player.missing(name) is None
    engine = recorded.engine(monkeypatch)
    asked = range(len(TEXTS))
    if policies()[name].shares:  # a trace does not know what a draft got beyond an end token
        asked = [i for i in asked if recorded.trace.prompts.finish[i] == "length"]
    assert played(player, name, options, asked) == served(recorded, name, options, asked, engine)


def _room(by: int) -> Callable[[pytest.MonkeyPatch, Player], None]:
    room = simulate._Game._room

    def mutate(monkeypatch: pytest.MonkeyPatch, player: Player) -> None:
        monkeypatch.setattr(simulate._Game, "_room", lambda *args: room(*args) + by)

    return mutate


def _branch(by: int) -> Callable[[pytest.MonkeyPatch, Player], None]:
    def mutate(monkeypatch: pytest.MonkeyPatch, player: Player) -> None:
        there = player.chains.branch >= 0
        moved = np.clip(player.chains.branch + by, 0, len(player.chains.length) - 2)
        player.chains.branch = np.where(there, moved, -1)

    return mutate


def _away(monkeypatch: pytest.MonkeyPatch, player: Player) -> None:
    """A branch's steps, one too late."""
    along = Chains.along
    nodes = len(player.chains.broke)
    monkeypatch.setattr(
        Chains, "along", lambda *args: (found := along(*args)) + ((found >= nodes) & (found % 2 == 0))
    )


def _unread(monkeypatch: pytest.MonkeyPatch, player: Player) -> None:
    """The draft has not read the prompts."""
    begin = simulate._Game.__init__

    def begun(game: simulate._Game, *args: object) -> None:
        begin(game, *args)  # type: ignore[arg-type]
        game._drafting = False

    monkeypatch.setattr(simulate._Game, "__init__", begun)


def _unlearned(monkeypatch: pytest.MonkeyPatch, player: Player) -> None:
    monkeypatch.setattr(simulate._Asked, "learn", lambda *args: None)


MUTANTS: dict[str, tuple[str, Callable[[pytest.MonkeyPatch, Player], None]]] = {
    "room + 1": ("static 8", _room(1)),
    "room - 1": ("static 8", _room(-1)),
    "the branch before": ("long", _branch(-1)),
    "the branch after": ("long", _branch(1)),
    "the step after": ("long", _away),
    "prompts not read": ("static 8", _unread),
    "no verdicts": ("heuristic", _unlearned),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_what_is_played_wrongly_differs(
    recorded: Recorded, mutant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, mutate = MUTANTS[mutant]
    right = played(recorded.player(), *POLICIES[policy])
    player = recorded.player()
    mutate(monkeypatch, player)
    with contextlib.suppress(IndexError):  # so wrong that it ends
        assert played(player, *POLICIES[policy]) != right
