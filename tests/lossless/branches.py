"""Every branch of `Engine.step` with its probability, by a scripted source of randomness.

A *world* is one run of the requests under one script: forced outcomes first, then always the first
possible one. Each choice beyond the script names the scripts of its other outcomes, so that
running them all visits every branch once. Worlds that run as rows of one engine share no draws.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

import msgspec
import torch
from fixed_costs import fix_costs
from lossless.law import sequence_law
from lossless.toys import Pair, run, tokens_of, toy_engine
from torch import Tensor

from engine.core import Engine
from engine.sequence import Sequence
from engine.speculation.noise import RandomSource
from engine.types import GenerateRequest, SamplingParams, SpeculationParams, TokenEvent

Script = tuple[tuple[int, float], ...]  # outcomes and their probabilities
Outputs = tuple[tuple[int, ...], ...]  # by request
Watch = Callable[[list[TokenEvent]], None]


@dataclass
class World:
    """`path` grows beyond `script`; `others` are the scripts of the outcomes not taken."""

    script: Script
    path: Script = ()
    others: list[Script] = field(default_factory=list)

    def choose(self, law: list[float]) -> int:
        """The outcome that the script wants, else the first possible one."""
        assert all(p >= 0 for p in law), f"not a law: {law}"
        assert abs(math.fsum(law) - 1) < 1e-12, f"sums to {math.fsum(law)}: {law}"
        at = len(self.path)
        if at < len(self.script):
            outcome, p = self.script[at]
            assert abs(law[outcome] - p) < 1e-12, "a replayed choice came with another law"
        else:
            possible = [i for i, p in enumerate(law) if p > 1e-14]  # less is rounding, another one each time
            outcome = possible[0]
            self.others += [(*self.path, (i, law[i])) for i in possible[1:]]
        self.path = (*self.path, (outcome, law[outcome]))
        return outcome

    @property
    def probability(self) -> float:
        return math.prod(p for _, p in self.path)


class Scripted:
    """A `RandomSource` whose rows belong to the world named before the slash of their id."""

    def __init__(self, worlds: Seq[World]) -> None:
        self._worlds = worlds

    def _world(self, owner: Sequence) -> World:
        return self._worlds[int(owner.id.partition("/")[0])]

    def categorical(self, laws: Tensor, owners: Seq[Sequence]) -> Tensor:
        return torch.tensor(
            [self._world(o).choose(law) for law, o in zip(laws.tolist(), owners, strict=True)]
        )

    def bernoulli(self, probs: Tensor, owners: Seq[Sequence]) -> Tensor:
        return torch.tensor(
            [self._world(o).choose([1 - p, p]) == 1 for p, o in zip(probs.tolist(), owners, strict=True)]
        )

    def ordered(self, laws: Tensor, owners: Seq[Sequence], most: int) -> list[Iterator[tuple[int, float]]]:
        return [self._drawn(self._world(o), law, most) for law, o in zip(laws.tolist(), owners, strict=True)]

    def _drawn(self, world: World, law: list[float], most: int) -> Iterator[tuple[int, float]]:
        """Draws when asked, so that a follower that nobody takes is no branch."""
        left = list(law)
        for _ in range(most):
            total = math.fsum(left)
            if not total > 1e-12:  # or NaN
                return
            token = world.choose([p / total for p in left])
            left[token] = 0.0
            yield token, law[token]


def output_law(
    build: Callable[[RandomSource], Engine],
    requests: Seq[GenerateRequest],
    width: int = 1,
    watch: Watch = lambda events: None,
    errors: bool = False,
) -> dict[Outputs, float]:
    """The law of the requests' outputs, `width` worlds at a time in one engine made by `build`. With `errors`
    they may end in one, and have given what they gave."""
    law: Counter[Outputs] = Counter()
    scripts: list[Script] = [()]
    while scripts:
        worlds = [World(scripts.pop()) for _ in range(min(width, len(scripts)))]
        ids = [[f"{w}/{r}" for r in range(len(requests))] for w in range(len(worlds))]
        events = run(
            build(Scripted(worlds)),
            [
                msgspec.structs.replace(request, id=name)
                for own in ids
                for name, request in zip(own, requests, strict=True)
            ],
            errors,
        )
        for own, world in zip(ids, worlds, strict=True):
            assert len(world.path) >= len(world.script), "a replay ended before its script"
            for name in own:
                watch(events[name])
            law[tuple(tokens_of(events[name]) for name in own)] += world.probability
            scripts += world.others
    return dict(law)


@dataclass(frozen=True)
class Case:
    """One request on one pair, to be enumerated."""

    pair: Pair
    params: SamplingParams
    speculation: SpeculationParams
    prompt: tuple[int, ...] = (0, 1, 2, 0, 1)
    eos: tuple[int, ...] = ()
    block_size: int = 2
    width: int = 128

    def request(self) -> GenerateRequest:
        return GenerateRequest(
            id="", prompt_ids=self.prompt, params=self.params, speculation=self.speculation
        )

    def engine(self, random: RandomSource) -> Engine:
        # What a row cannot get in one batch but in another would make two worlds of one.
        longest = (
            len(self.prompt) + self.params.max_tokens + (self.speculation.options or {}).get("budget", 0)
        )
        blocks = self.width * (-(-longest // self.block_size) + 1)
        engine = toy_engine(
            self.pair,
            random=random,
            eos=self.eos,
            blocks=blocks,
            block_size=self.block_size,
            rows=self.width,
        )
        fix_costs(engine)  # what pays by a clock is no branch
        return engine

    def target_law(self) -> dict[tuple[int, ...], float]:
        return sequence_law(self.pair.target, self.prompt, self.params, self.eos)


def assert_same_law(found: dict[Outputs, float], expected: dict[Outputs, float]) -> None:
    """To 1e-9, output by output."""
    assert abs(math.fsum(found.values()) - 1) < 1e-9
    for output in found.keys() | expected.keys():
        difference = found.get(output, 0.0) - expected.get(output, 0.0)
        assert abs(difference) < 1e-9, f"{output}: off by {difference:+.3g} from the target's own law"


def check(case: Case, watch: Watch = lambda events: None) -> None:
    """The engine's output has the target's own law, exactly."""
    expected = {(output,): p for output, p in case.target_law().items()}
    assert_same_law(output_law(case.engine, [case.request()], case.width, watch), expected)
