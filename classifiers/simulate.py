"""Plays stop policies on a trace: the shipped policy objects, asked as the engine asks them at batch 1.

For greedy and coupled sampling the play is exact: what an iteration drafts, and how much of it stands,
is a look-up in the trace (`classifiers.chains`).
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from classifiers.chains import Chains, Ints
from classifiers.step_costs import StepCosts
from engine.speculation.drafters.model import SMALL_LAG
from engine.speculation.load import Load
from engine.speculation.policy import Equipment, Outcome, Signals, State, StopPolicy, policies

if TYPE_CHECKING:
    from engine.speculation.heads import Head

CPU = torch.device("cpu")


class SimulateError(ValueError):
    """What was asked cannot be simulated; the message says why, in one line."""


class Rules(msgspec.Struct, frozen=True):
    """What bounds a request's drafts besides its policy, as `Engine._limits` has it.

    `budget`: tokens that the draft reads at once when its KV lags. `cached`: the draft's KV of the prompts
    is there (whole blocks of the prefix cache), so that the first iteration may draft. The models' context
    bounds nothing: a trace has only prompts that fit.
    """

    max_tokens: int
    max_sl: int = 24
    budget: int = 256
    cached: bool = False
    block: int = 16


@dataclass
class Iterations:
    """Every iteration of a play, in order; int64[I], `seconds` float64[I].

    `generated`: tokens of the text before it. `accepted`: of the drafted, as verified. `caught_up`: tokens
    that the draft's KV lacked and read instead of drafting. `truncated`: drafted to where the trace ends.
    """

    prompt: Ints
    generated: Ints
    drafted: Ints
    accepted: Ints
    emitted: Ints
    caught_up: Ints
    truncated: Ints
    seconds: NDArray[np.float64]

    def of(self, prompts: Seq[int]) -> Iterations:
        """Those of these prompts."""
        mine = np.isin(self.prompt, np.asarray(prompts))
        return Iterations(**{each.name: getattr(self, each.name)[mine] for each in fields(self)})


@dataclass
class Player:
    """One trace, one set of rules and costs; `play` is one policy on it."""

    chains: Chains
    rules: Rules
    costs: StepCosts
    heads: Mapping[str, Head] = field(default_factory=dict)

    def missing(self, name: str) -> str | None:
        """Why the policy cannot be played, or None."""
        policy = policies()[name]
        if "hidden" in policy.needs and "hidden" not in self.chains.nodes:
            return "the trace has no hidden states"
        return policy.missing(self._equipment())

    def play(self, name: str, options: Any, prompts: Seq[int], *, abreast: bool | None = None) -> Iterations:
        """The policy on these prompts, one request after another. Raises SimulateError if it cannot be.

        `abreast`: all at once, which is the same where requests cannot see each other, and quicker; None:
        if the policy does not share.
        """
        if (missing := self.missing(name)) is not None:
            raise SimulateError(f"policy {name!r}: {missing}")
        policy, equipment = policies()[name], self._equipment()
        with torch.inference_mode():
            state = policy.allocate(max(len(prompts), 1), CPU, equipment)
            state.temperatures = torch.zeros(max(len(prompts), 1))
            if abreast is None:
                abreast = not policy.shares
            groups = [list(prompts)] if abreast else [[prompt] for prompt in prompts]
            asked = _Asked(policy, state, policy.learns(options))
            game = _Game(self, asked, None if abreast else equipment.load)
            for group in groups:
                for slot, prompt in enumerate(group):
                    policy.reset(state, slot, options)
                    state.temperatures[slot] = float(self.chains.heat[prompt])
                game.requests(group)
        return game.result()

    def oracle(self, prompts: Seq[int], longest: int = 24) -> Iterations:
        """Drafts exactly what will stand, at most `longest`, and decides for nothing."""
        game = _Game(self, _Oracle(longest), None)
        game.requests(list(prompts))
        return game.result()

    def _equipment(self) -> Equipment:
        hidden = self.chains.nodes.get("hidden")
        width = None if hidden is None else hidden.shape[-1]
        return Equipment(Load(CPU), self.heads, width)


class _Decider(Protocol):
    """How far the rows of one iteration draft."""

    name: str
    asked: bool  # after every token

    def limits(self, rows: Ints) -> Ints: ...

    def draft(self, chains: Chains, rows: Ints, step: Ints, position: Ints, limits: Ints) -> Ints: ...

    def learn(self, rows: Ints, drafted: Ints, accepted: Ints) -> None: ...


class _Oracle:
    """It knows what stands."""

    name, asked = "oracle", False

    def __init__(self, longest: int) -> None:
        self._longest = longest

    def limits(self, rows: Ints) -> Ints:
        return np.full(len(rows), self._longest)

    def draft(self, chains: Chains, rows: Ints, step: Ints, position: Ints, limits: Ints) -> Ints:
        return chains.accepted(step, limits)

    def learn(self, rows: Ints, drafted: Ints, accepted: Ints) -> None:
        return None


class _Asked:
    """A shipped policy and its state; rows are its slots."""

    def __init__(self, policy: StopPolicy, state: State, learns: bool) -> None:
        self._policy, self._state, self._learns = policy, state, learns
        self.name, self.asked = policy.name, bool(policy.needs)

    def limits(self, rows: Ints) -> Ints:
        self._turn(rows)
        limits: Ints = self._policy.limit(self._state).numpy().astype(np.int64)
        return limits

    def draft(self, chains: Chains, rows: Ints, step: Ints, position: Ints, limits: Ints) -> Ints:
        """As `ModelDrafter.draft`: the policy is asked after every token, after the last one too."""
        most = int(limits.max())
        if not self.asked or most == 0:
            return limits
        nodes = torch.from_numpy(chains.along(step, most))
        wanted = {"token", "prob", *self._policy.needs} & chains.nodes.keys()
        found = {name: chains.signal(name, nodes) for name in wanted}
        joint = torch.ones(len(rows), dtype=torch.float32)
        drafted = np.zeros_like(limits)
        alive = np.flatnonzero(limits > 0)
        for taken in range(1, most + 1):
            at = torch.from_numpy(alive)
            self._turn(rows[alive])
            now = {name: values[taken - 1][at] for name, values in found.items()}
            joint[at] *= now["prob"]
            signals = Signals(
                step=torch.tensor(taken),
                position=torch.from_numpy(position[alive] + taken - 1),
                alive=torch.ones(len(alive), dtype=torch.bool),
                joint=joint[at],
                token=now.pop("token"),
                **now,
            )
            keep = self._policy.keep_drafting(signals, self._state).numpy()
            drafted[alive] = taken
            alive = alive[keep & (limits[alive] > taken)]
            if not len(alive):
                break
        return drafted

    def learn(self, rows: Ints, drafted: Ints, accepted: Ints) -> None:
        if self._learns and (told := drafted > 0).any():
            self._turn(rows[told])
            outcome = Outcome(torch.from_numpy(drafted[told]), torch.from_numpy(accepted[told]))
            self._policy.observe(outcome, self._state)

    def _turn(self, rows: Ints) -> None:
        self._state.rows = torch.from_numpy(rows)
        self._state.mine = torch.ones(len(rows), dtype=torch.bool)


class _Game:
    """Requests from their second token on; those of one call run abreast, each as if alone."""

    def __init__(self, player: Player, decider: _Decider, load: Load | None) -> None:
        self._chains, self._rules, self._costs = player.chains, player.rules, player.costs
        self._decider, self._load = decider, load
        self._engine_costs = player.costs.known()
        self._passes = player.costs.passes()
        self._step_seconds = player.costs.draft + (
            player.costs.deciding(decider.name) if decider.asked else 0.0
        )
        self._log: list[tuple[NDArray[Any], ...]] = []
        self._mix = frozenset([decider.name])
        self._drafting = True  # as `Engine` has it: then prompts are read by the draft beside the target

    def requests(self, prompts: Seq[int]) -> None:
        """Plays them to their ends."""
        chains, rules = self._chains, self._rules
        prompt = np.array(prompts, dtype=np.int64)
        total = np.minimum(chains.total[prompt], rules.max_tokens)
        generated = np.ones_like(prompt)
        lag = np.ones_like(prompt)  # tokens that the draft's KV lacks
        if not self._drafting:
            lag += chains.prompt_tokens[prompt]
            if rules.cached:
                lag -= (chains.prompt_tokens[prompt] - 1) // rules.block * rules.block
        while len(rows := np.flatnonzero(generated < total)):
            played = self._iteration(rows, prompt[rows], generated[rows], lag[rows])
            generated[rows] += played.emitted
            lag[rows] = played.lag
            self._log.append((prompt[rows], *played))

    def _iteration(self, rows: Ints, prompt: Ints, generated: Ints, lag: Ints) -> _Played:
        """As `Engine.step`: limits, drafts, verdicts, what the policy learns."""
        chains = self._chains
        step = chains.base[prompt] + generated
        if self._load is not None:
            costs = self._engine_costs
            self._load.refresh(costs.drafts["model"], costs.verify, len(rows), self._mix)
        wish = self._decider.limits(rows)
        bound = np.minimum(wish, self._rules.max_sl)
        self._drafting = bool(bound.any())
        room = np.where(lag > SMALL_LAG, 0, self._room(generated))
        limits = np.minimum(bound, np.maximum(room, 0))
        caught_up = np.where((lag > SMALL_LAG) & (bound > 0), np.minimum(lag - 1, self._rules.budget), 0)
        known = np.minimum(limits, chains.reach(step))
        drafted = self._decider.draft(chains, rows, step, generated, known)
        accepted = chains.accepted(step, drafted)
        emitted = np.minimum(accepted + 1, chains.total[prompt] - generated)
        self._decider.learn(rows, drafted, accepted)
        seconds = self._seconds(drafted, caught_up)
        if self._load is not None:
            self._load.observe(len(rows), int(emitted.sum()), float(seconds.max()), self._mix)
        # The newest draft token was not fed: after a whole acceptance the KV lacks it too.
        lag = np.where(drafted > 0, accepted + 1 - np.minimum(drafted - 1, accepted), lag - caught_up + 1)
        truncated = ((drafted == known) & (known < limits)).astype(np.int64)
        return _Played(generated, drafted, accepted, emitted, caught_up, truncated, seconds, lag)

    def _room(self, generated: Ints) -> Ints:
        """A draft of k emits up to k + 1 tokens."""
        room: Ints = self._rules.max_tokens - generated - 1
        return room

    def _seconds(self, drafted: Ints, caught_up: Ints) -> NDArray[np.float64]:
        drafting = drafted * self._step_seconds + caught_up * self._costs.catch_up
        seconds: NDArray[np.float64] = self._costs.iteration + drafting + self._passes[drafted + 1]
        return seconds

    def result(self) -> Iterations:
        if not self._log:
            raise SimulateError("no text has a second token: nothing is ever drafted")
        columns = [np.concatenate(column) for column in zip(*self._log, strict=True)]
        return Iterations(*columns[:-1])


class _Played(NamedTuple):
    """One iteration of the rows that are left; all [B]. `lag`: what the draft's KV lacks after it."""

    generated: Ints
    drafted: Ints
    accepted: Ints
    emitted: Ints
    caught_up: Ints
    truncated: Ints
    seconds: NDArray[np.float64]
    lag: Ints
