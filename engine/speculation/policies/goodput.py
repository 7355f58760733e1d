"""goodput: draft on while the tokens that are expected of it are worth more than its time."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import msgspec
import torch
from torch import Tensor

from engine.speculation.estimator import CLASSES, CONSTANTS, EDGES, Curve, classes
from engine.speculation.load import TOKENS, Load
from engine.speculation.policy import Equipment, Need, Outcome, Signals, State, StopPolicy, register

MOST_SL, MOST_ROWS = 64, 64
_BLIND = 0.4  # the price of a step for one row, in tokens, while costs are unknown
_MEMORY, _CALM = 1 / 8, 1 / 16  # of the newest draft, in what a row gets from drafting; where it is sampled
_EASY = 0.8  # of a mean token: what one that a sampled draft gets right is worth
_POOLING = 0.02  # of the newest verdicts, in what all first tokens get
_START = 0.05  # by how much a new request is taken to gain
_HYSTERESIS = 0.03  # tokens an iteration by which drafting must gain to be taken up, lose to be given up
_PROBE = 2  # the most to draft in a probe
_LOOK = 8  # tokens a row over which the price of verifying is averaged where drafting begins

_LIMIT = {"BLIND": _BLIND, "START": _START, "HYSTERESIS": _HYSTERESIS, "PROBE": _PROBE, "LOOK": _LOOK}


class GoodputOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`max_sl`: the most to draft. `probe`: time given to trying drafts again where they did not pay."""

    max_sl: Annotated[int, msgspec.Meta(ge=0, le=64, description="the most to draft in an iteration")] = 24
    probe: Annotated[
        float,
        msgspec.Meta(
            ge=0,
            le=0.1,
            description="share of the time for trying drafts again while they do not pay; 0: never",
        ),
    ] = 0.005


class GoodputState(State):
    """What is remembered by slot, what all rows share, and what this iteration's time is worth.

    `own` [slots, 6]: max_sl, probe, the share of drafts whose first token was accepted (below 0: none
    yet), tokens accepted and drafted a draft, whether it drafts. `logs` [slots, 64]: the logarithm of
    the product of largest probabilities after each token of this draft. `shared`, by class of
    temperature: the curve and, over all requests, the share of first tokens that were accepted, `first`
    [C]. `kinds` int64[B] are the rows' classes. `draft_price` [M + 1] and `verify_price`
    [TOKENS + 1]: tokens that the batch emits in the time of a draft step by so many rows, of a pass over
    so many tokens. `since`: iterations since a probe.
    """

    def __init__(self, slots: int, device: torch.device, load: Load) -> None:
        curve = Curve.new(device)
        since, first = torch.zeros((), device=device), torch.full((CLASSES,), 0.7, device=device)
        learned = {"seen": curve.seen, "good": curve.good, "chance": curve.chance, "first": first}
        own = torch.zeros(slots, 6, dtype=torch.float32, device=device)
        logs = torch.zeros(slots, MOST_SL, dtype=torch.float32, device=device)
        super().__init__({"own": own, "logs": logs}, load, learned)
        self.bounds, self.prior, self.since = curve.bounds, curve.prior, since
        self.temperatures = torch.zeros(slots, device=device)  # greedy, until the engine says otherwise
        self.draft_price = _BLIND * torch.arange(len(load.draft), dtype=torch.float32, device=device)
        self.verify_price = torch.zeros_like(load.verify)

    @property
    def curve(self) -> Curve:
        learned = self.shared
        return Curve(learned["seen"], learned["good"], learned["chance"], self.bounds, self.prior)

    @property
    def kinds(self) -> Tensor:
        return classes(self.heat)


@register("goodput")
class Goodput(StopPolicy):
    """Tokens per second of the whole batch, decided at every draft step.

    S_i is the probability that row i's drafted tokens and the next one are all accepted, r the tokens
    that the batch emits in a second. The m rows of largest S draft on, with the m that makes
    sum(S_i) - r (draft(m) + verify(T + m) - verify(T)) largest, T the tokens to be verified so far; none
    if that is not positive. S comes from `engine.speculation.estimator`, learned from all requests'
    verdicts, apart by temperature; costs and r are the engine's, as measured. Where a step costs the same
    however few rows draft on (`Load.flat`), draft(m) is that of all rows that the draft began with.

    Where drafting does not pay at all, nothing is drafted: each row remembers what its drafts got and
    what they asked for, and drafts only while that is more than the batch would emit in that time
    without drafts. Rows that do not draft try again together now and then, for a bounded share of the time.

    Where a row samples, S counts for `_EASY` of itself: a token that the draft gets right is an easy one,
    which the next draft would have got too, so it is worth less than the mean token that r is made of.
    """

    name: ClassVar[str]
    Options: ClassVar[type[msgspec.Struct]] = GoodputOptions
    needs: ClassVar[frozenset[Need]] = frozenset({"largest"})
    shares: ClassVar[bool] = True

    def learns(self, options: Any) -> bool:
        return True

    def allocate(self, slots: int, device: torch.device, equipment: Equipment) -> State:
        return GoodputState(slots, device, equipment.load)

    def reset(self, state: State, slot: int, options: Any) -> None:
        state.reset(slot, {"own": 0.0, "logs": 0.0})
        # What the first token gets is not known yet: below 0.
        own = (float(options.max_sl), options.probe, -1.0, 0.0, 1.0, 1.0)
        state.tensors["own"][slot] = torch.tensor(own)

    def limit(self, state: State) -> Tensor:
        assert isinstance(state, GoodputState)
        return _launch_limit(state) if _fits(state) else self.reference_limit(state)

    def reference_limit(self, state: GoodputState) -> Tensor:
        """`limit` in plain torch."""
        load, mine, own = state.load, _mine(state), state["own"]
        max_sl, probe, first, taken, asked, was = own.unbind(1)
        rows = load.rows.long().clamp(0, TOKENS)
        pass_time = load.verify.take(rows)
        known = (pass_time > 0) & (load.draft[1] > 0)
        bare = load.rows / pass_time.clamp(min=1e-9)  # tokens per second without drafts
        rate = torch.maximum(load.rate, bare)
        blind = _BLIND * torch.arange(len(load.draft), device=mine.device)
        state.draft_price.copy_(torch.where(known, rate * load.draft, blind))
        state.verify_price.copy_(torch.where(known, rate * load.verify, 0.0))

        count = mine.sum()
        ahead = (rows + _LOOK * count.clamp(min=1)).clamp(max=TOKENS)
        token = bare * (load.verify.take(ahead) - pass_time) / (ahead - rows).clamp(min=1)
        step = bare * load.draft
        alone = step.take(count.clamp(max=len(step) - 1)) / count.clamp(min=1) + token  # a row's share
        hope = torch.minimum(1.5 * alone, state.shared["first"][state.kinds]) + _START
        first = torch.where(first < 0, hope, first)
        later = (taken - first - alone * (asked - 1)).clamp(min=0)  # its own price is asked of every step
        bias = torch.where(was > 0, _HYSTERESIS, -_HYSTERESIS)
        on = mine & (best(first + later - token + bias, mine, step) | ~known)

        # Probes of all rows at once cost about as much as one row's.
        gap = _PROBE * alone * count / (probe * load.rows).clamp(min=1e-9)
        due = mine & ~on & (probe > 0) & (state.since >= gap)
        resting = (mine & ~on).any() & ~due.any()
        state.since.copy_(torch.where(resting, state.since + 1, 0.0))
        new = torch.stack([max_sl, probe, first, taken, asked, on.float()], 1)
        state["own"] = torch.where(mine[:, None], new, own)
        return torch.where(on, max_sl, torch.where(due, max_sl.clamp(max=_PROBE), 0.0)).long()

    def keep_drafting(self, signals: Signals, state: State) -> Tensor:
        assert isinstance(state, GoodputState)
        return _launch_decide(signals, state) if _fits(state) else self.reference(signals, state)

    def reference(self, signals: Signals, state: GoodputState) -> Tensor:
        """`keep_drafting` in plain torch."""
        assert signals.largest is not None
        drew, step = signals.alive & _mine(state), signals.step
        logs = state.tensors["logs"]
        before = torch.where(step > 1, logs[state.rows, step.view(1) - 2], 0.0)
        log_joint = torch.where(drew, before + signals.largest.log(), before)
        logs[state.rows, step.view(1) - 1] = log_joint
        kinds = state.kinds
        chance = state.curve.read(log_joint, kinds) * torch.where(kinds > 0, _EASY, 1.0)
        count = drew.sum()
        tokens = (state.load.rows + step * count).long().clamp(0, TOKENS)
        if len(drew) == 1:
            price = state.draft_price[1] + state.verify_price.take((tokens + 1).clamp(max=TOKENS))
            return drew & (chance > price - state.verify_price.take(tokens))
        m = torch.arange(len(state.draft_price), device=drew.device)
        price = state.verify_price.take((tokens + m).clamp(max=TOKENS)) - state.verify_price.take(tokens)
        paid = m.clamp(max=0) + min(len(drew), len(m) - 1) if state.load.flat else m
        return best(chance, drew, state.draft_price.take(paid) + price)

    def observe(self, outcome: Outcome, state: State) -> None:
        assert isinstance(state, GoodputState)
        if _fits(state):
            _launch_observe(outcome, state)
        else:
            self.reference_observe(outcome, state)

    def reference_observe(self, outcome: Outcome, state: GoodputState) -> None:
        """`observe` in plain torch."""
        taught = _mine(state) & (outcome.drafted > 0)
        k = torch.arange(1, MOST_SL + 1, device=taught.device)  # tokens drafted where it stood
        counts = taught[:, None] & (k < outcome.drafted[:, None])
        kinds = state.kinds
        state.curve.learn(state["logs"], outcome.accepted[:, None] > k, counts, kinds)
        max_sl, probe, first, taken, asked, was = state["own"].unbind(1)
        began = (outcome.accepted > 0).float()
        memory = torch.where(kinds > 0, _CALM, _MEMORY)
        first = torch.lerp(first, began, memory)
        taken = torch.lerp(taken, outcome.accepted.float(), memory)
        asked = torch.lerp(asked, outcome.drafted.float(), memory)
        new = torch.stack([max_sl, probe, first, taken, asked, was], 1)
        state["own"] = torch.where(taught[:, None], new, state["own"])
        told = taught & (kinds == torch.arange(CLASSES, device=taught.device)[:, None])  # [C, B]
        share = torch.where(told, began, 0.0).sum(1) / told.sum(1).clamp(min=1)
        pooled = torch.lerp(state.shared["first"], share, _POOLING)
        state.shared["first"].copy_(torch.where(told.any(1), pooled, state.shared["first"]))


def _fits(state: State) -> bool:
    """Whether the kernels can be used."""
    return state.rows.is_cuda and len(state.rows) <= MOST_ROWS


def _launch_decide(signals: Signals, state: GoodputState) -> Tensor:
    from engine.models.kernels import goodput

    assert signals.largest is not None and state.temperatures is not None
    keep = torch.empty_like(signals.alive)
    goodput.decide(
        alive=signals.alive, mine=_mine(state), largest=signals.largest, step=signals.step,
        slots=state.rows, temperatures=state.temperatures, logs=state.tensors["logs"],
        chance=state.curve.chance, bounds=state.bounds, draft_price=state.draft_price,
        verify_price=state.verify_price, rows=state.load.rows, keep=keep, edges=EDGES, easy=_EASY,
        flat=state.load.flat,
    )  # fmt: skip
    return keep


def _launch_limit(state: GoodputState) -> Tensor:
    from engine.models.kernels import goodput

    assert state.temperatures is not None
    answer = torch.empty_like(state.rows)
    goodput.limit(
        mine=_mine(state), slots=state.rows, temperatures=state.temperatures, own=state.tensors["own"],
        load=vars(state.load), pooled=state.shared["first"], since=state.since,
        draft_price=state.draft_price, verify_price=state.verify_price, answer=answer, edges=EDGES,
        constants=_LIMIT,
    )  # fmt: skip
    return answer


def _launch_observe(outcome: Outcome, state: GoodputState) -> None:
    from engine.models.kernels import goodput

    assert state.temperatures is not None
    goodput.observe(
        mine=_mine(state), slots=state.rows, temperatures=state.temperatures, drafted=outcome.drafted,
        accepted=outcome.accepted, own=state.tensors["own"], logs=state.tensors["logs"], curve=state.curve,
        pooled=state.shared["first"], edges=EDGES,
        constants=CONSTANTS | {"MEMORY": _MEMORY, "CALM": _CALM, "POOLING": _POOLING},
    )  # fmt: skip


def _mine(state: State) -> Tensor:
    return torch.ones_like(state.rows, dtype=torch.bool) if state.mine is None else state.mine


def best(worth: Tensor, able: Tensor, price: Tensor) -> Tensor:
    """bool[B]: the m rows of largest worth for which the sum of worth less price[m] is largest, if above 0.

    worth float32[B], able bool[B] (the others may hold anything), price float32[M + 1]; beyond M rows
    the last price stands.
    """
    worth = torch.where(able, worth, float("-inf"))
    i = torch.arange(len(worth), device=worth.device)
    tie = (worth[None] == worth[:, None]) & (i[None] <= i[:, None])
    before = able[None] & ((worth[None] > worth[:, None]) | tie)  # [i, j]: j is chosen if i is
    count = before.sum(1)
    total = torch.where(before, worth[None], 0.0).sum(1)
    value = torch.where(able, total - price[count.clamp(max=len(price) - 1)], float("-inf"))
    most = value.amax().clamp(min=1e-30)
    chosen = torch.where(value == most, count, 0).amax()  # none if nothing is worth its price
    return able & (count <= chosen)
