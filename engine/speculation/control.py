"""Which policy governs which row, and the merging of their answers for one batch."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from engine.sequence import Sequence
from engine.speculation.faults import PolicyFault, blamed
from engine.speculation.judge import Judge
from engine.speculation.load import Load
from engine.speculation.policy import (
    Equipment,
    Need,
    Outcome,
    Signals,
    State,
    StopPolicy,
    options_of,
    policies,
)
from engine.speculation.soundness import decisions_said, limits_said
from engine.speculation.stopwatch import Stopwatch
from engine.types import InvalidRequest

MOST_JUDGED = 64  # rows
MOST_JUDGES = 64  # mixes of policies and numbers of rows that are kept captured


class PolicyTable:
    """Engine-owned policy state for `slots` rows of one drafter.

    Every policy in use answers for all rows of the batch; each row takes its own policy's answer.
    """

    def __init__(self, slots: int, device: torch.device, equipment: Equipment | None = None) -> None:
        """Policies that `equipment` (a bare engine's if None) cannot serve are left out."""
        self._device = device
        self._equipment = equipment = equipment or Equipment(Load(device))
        self.load = equipment.load
        self.asked_while_drafting = Stopwatch()
        self._policies = {n: each for n, each in policies().items() if each.missing(equipment) is None}
        # One slot more than rows: what the padding of a captured graph reads and writes.
        self.spare_slot = slots
        self._states: dict[str, State] = {
            name: policy.allocate(slots + 1, device, equipment) for name, policy in self._policies.items()
        }
        self._numbers = {name: i for i, name in enumerate(sorted(self._policies))}
        self._free = list(range(slots - 1, -1, -1))
        self._limits: dict[int, int] = {}  # by slot: of policies that do not learn, and what a judge said
        self._judges: dict[tuple[tuple[str, ...], int], Judge] = {}
        self._captures = device.type == "cuda"
        self._begun: tuple[Judge, dict[int, int]] | None = None  # and by slot the row's place in it
        self._heat = torch.zeros(slots + 1, dtype=torch.float32, device=device)
        for state in self._states.values():
            state.temperatures = self._heat

    def take(self, seq: Sequence, options: object = None) -> None:
        """Gives the sequence a slot, reset to its options or as it was put aside.

        The caller keeps to `slots` sequences at a time. `options`: the policy's, if not the sequence's.
        """
        seq.slot = self._free.pop()
        self._limits.pop(seq.slot, None)
        if self._begun is not None:
            self._begun[1].pop(seq.slot, None)
        self._heat[seq.slot] = seq.params.temperature
        state = self._states[seq.policy]
        try:
            with blamed(seq.policy):
                self._policies[seq.policy].reset(state, seq.slot, seq.options if options is None else options)
            for name, value in (seq.policy_state or {}).items():
                state.tensors[name][seq.slot] = value
        except Exception:
            self.give_back(seq)  # it is not the row's state yet
            raise
        seq.policy_state = None

    def put_aside(self, seq: Sequence) -> None:
        """Takes the slot of a preempted sequence; what its policy remembers goes with the sequence."""
        if seq.slot >= 0:
            tensors = self._states[seq.policy].tensors
            seq.policy_state = {name: tensor[seq.slot].clone() for name, tensor in tensors.items()}
        self.give_back(seq)

    def give_back(self, seq: Sequence) -> None:
        if seq.slot >= 0:
            self._free.append(seq.slot)
            seq.slot = -1

    def needs(self, rows: Seq[Sequence]) -> frozenset[Need]:
        """The signals that the rows' policies read; empty if none is asked while drafting."""
        return self.needs_of(list({row.policy for row in rows}))

    def limits(self, rows: Seq[Sequence]) -> list[int]:
        """What each row's policy wants to draft at most. Read back only where it may have changed."""
        told = self._told()
        learning = [row for row in rows if self.learns(row)]
        if any(row.slot not in told for row in learning):  # those who share must see all rows at once
            told = set()
        unknown = [row for row in learning if row.slot not in told]
        unknown += [row for row in rows if not self.learns(row) and row.slot not in self._limits]
        if unknown:
            answers = []
            for policy, state in self._in_use(unknown):
                with blamed(policy.name):
                    answers.append((state.mine, limits_said(policy.limit(state), state.rows)))
            merged = _merge(answers[0][1], answers[1:])
            for row, limit in zip(unknown, merged.tolist(), strict=True):
                self._limits[row.slot] = limit
        wrong = [row for row in rows if self._limits[row.slot] < 0]
        for row in wrong:
            del self._limits[row.slot]
        if wrong:
            raise PolicyFault(wrong[0].policy, "its limit is negative, or no whole number")
        return [self._limits[row.slot] for row in rows]

    def _told(self) -> set[int]:
        """Takes over the limits that a judge was asked for; the slots they are of."""
        if self._begun is None:
            return set()
        (judge, places), self._begun = self._begun, None
        found = judge.limits()
        self._limits |= {slot: found[at] for slot, at in places.items()}
        return set(places)

    def keep_drafting(self, rows: Seq[Sequence], signals: Signals) -> list[bool]:
        """Draft one more? By row; the one read-back of a draft step."""
        names = sorted({row.policy for row in rows})
        with self.asked_while_drafting:
            keep: list[bool] = self.decide(
                names, self._slots_of(rows), self._numbers_of(rows), signals
            ).tolist()
        return keep

    def serves(self, policy: str) -> bool:
        """Whether the drafter has what the policy needs."""
        return policy in self._policies

    def number(self, policy: str) -> int:
        """What stands for the policy in the `numbers` of `decide`."""
        return self._numbers[policy]

    def decide(self, names: Seq[str], slots: Tensor, numbers: Tensor, signals: Signals) -> Tensor:
        """bool[B]: draft one more? All on the device, with no read-back: what a graph captures.

        `names`: the policies in use; slots int64[B], numbers int64[B] of each row's own.
        """
        answers = []
        for name in names:
            policy, state = self._policies[name], self._states[name]
            if policy.needs:
                state.rows, state.mine = slots, numbers == self._numbers[name]
                with blamed(name):
                    answers.append((state.mine, decisions_said(policy.keep_drafting(signals, state), slots)))
        return _merge(torch.ones_like(signals.alive), answers)

    def asked(self, names: Iterable[str]) -> tuple[str, ...]:
        """Of these policies those that are asked while drafting, in order."""
        return tuple(name for name in sorted(set(names)) if self._policies[name].needs)

    def check(self, policy: str, options: object) -> None:
        """Raises InvalidRequest for options that no state can hold, such as those that overflow, and
        PolicyFault."""
        if policy not in self._policies:
            return
        try:
            with blamed(policy):
                self._policies[policy].reset(self._states[policy], self.spare_slot, options)
        except PolicyFault as fault:
            error = fault.__cause__
            if not isinstance(error, RuntimeError | ArithmeticError | ValueError):
                raise
            raise InvalidRequest(
                f"options of policy {policy!r} cannot be computed with: {error}",
                "speculation.options",
                "invalid_option",
            ) from error

    def warm(self, policy: str, rows: int) -> None:
        """Captures on a GPU what telling up to `rows` rows of the policy needs, under default options."""
        found = self._policies.get(policy)
        if self._captures and found is not None and found.learns(options_of(policy, {})):
            for size in powers_of_two(min(rows, MOST_JUDGED)):
                self.judge((policy,), size)

    def needs_of(self, names: Seq[str]) -> frozenset[Need]:
        """The signals that these policies read."""
        return frozenset().union(*(self._policies[name].needs for name in names))

    def observe(self, rows: Seq[Sequence], drafted: Seq[int], accepted: Seq[int]) -> None:
        """Tells the policies of rows that learn what became of their drafts.

        On a GPU it also asks for their next limits, which `limits` will read.
        """
        if self._judged(len(rows)):
            self._judge(rows, drafted, accepted)
            return
        told = [i for i, count in enumerate(drafted) if count]
        if told:
            taught = torch.tensor([[drafted[i], accepted[i]] for i in told], device=self._device)
            outcome = Outcome(taught[:, 0], taught[:, 1])
            for policy, state in self._in_use([rows[i] for i in told]):
                with blamed(policy.name):
                    policy.observe(outcome, state)

    def observe_ahead(self, rows: Seq[Sequence], drafted: Seq[int], verdicts: Tensor) -> bool:
        """`observe` while the host does not know the verdicts yet: int32[2, B] on the device, accepted tokens
        and whether the row is sound. False where that cannot be."""
        if not self._judged(len(rows)):
            return False
        self._judge(rows, drafted, verdicts)
        return True

    def _judged(self, rows: int) -> bool:
        return self._captures and rows <= MOST_JUDGED

    def _judge(self, rows: Seq[Sequence], drafted: Seq[int], accepted: Seq[int] | Tensor) -> None:
        judge = self.judge(tuple(sorted({row.policy for row in rows})), len(rows))
        slots, numbers = [row.slot for row in rows], [self._numbers[row.policy] for row in rows]
        judge.begin(slots, numbers, drafted, accepted)
        self._begun = judge, {slot: at for at, slot in enumerate(slots)}

    def judge(self, names: tuple[str, ...], rows: int) -> Judge:
        """For at most so many rows of these policies; captured at first use."""
        key = names, 1 << (rows - 1).bit_length()
        if key not in self._judges:
            rule = functools.partial(self.verdict, names)
            held = [(each, each.clone()) for name in names for each in self._states[name].shared.values()]
            self._judges[key] = Judge(rule, key[1], self.spare_slot, self._device)
            for tensor, value in held:  # capturing runs it once, for nobody
                tensor.copy_(value)
            if len(self._judges) > MOST_JUDGES:
                del self._judges[next(iter(self._judges))]
        self._judges[key] = self._judges.pop(key)  # the one used last comes last
        return self._judges[key]

    def verdict(
        self, names: Seq[str], slots: Tensor, numbers: Tensor, drafted: Tensor, accepted: Tensor
    ) -> Tensor:
        """int64[B]: tells these policies, then asks for limits; all on the device: what a graph captures."""
        answers = []
        for name in names:
            policy, state = self._policies[name], self._states[name]
            state.rows, state.mine = slots, numbers == self._numbers[name]
            with blamed(name):
                policy.observe(Outcome(drafted, accepted), state)
                answers.append((state.mine, limits_said(policy.limit(state), slots)))
        return _merge(answers[0][1], answers[1:])

    def shared(self) -> dict[str, dict[str, Tensor]]:
        """What policies have learned over all requests, by policy and name; not a copy."""
        return {name: state.shared for name, state in self._states.items() if state.shared}

    def heal(self) -> list[str]:
        """The policies that had learned NaN or infinity; they begin anew."""
        found = []
        for name, learned in self.shared().items():
            if not all(bool(each.isfinite().all()) for each in learned.values()):
                fresh = (
                    self._policies[name].allocate(self.spare_slot + 1, self._device, self._equipment).shared
                )
                for key, tensor in learned.items():
                    tensor.copy_(fresh[key])
                found.append(name)
        return found

    def learns(self, seq: Sequence) -> bool:
        """Whether the row's policy is to be told of outcomes."""
        with blamed(seq.policy):
            return self._policies[seq.policy].learns(seq.options)

    def _in_use(self, rows: Seq[Sequence]) -> list[tuple[StopPolicy, State]]:
        slots, numbers = self._slots_of(rows), self._numbers_of(rows)
        found = []
        for name in sorted({row.policy for row in rows}):
            state = self._states[name]
            state.rows, state.mine = slots, numbers == self._numbers[name]
            found.append((self._policies[name], state))
        return found

    def _slots_of(self, rows: Seq[Sequence]) -> Tensor:
        return torch.tensor([row.slot for row in rows], dtype=torch.int64, device=self._device)

    def _numbers_of(self, rows: Seq[Sequence]) -> Tensor:
        return torch.tensor([self._numbers[row.policy] for row in rows], device=self._device)


def powers_of_two(most: int) -> list[int]:
    """1, 2, 4, ... up to `most`: the numbers of rows that are captured ahead."""
    return [1 << n for n in range(most.bit_length())]


def _merge(first: Tensor, answers: Seq[tuple[Tensor | None, Tensor]]) -> Tensor:
    """`first`, but for the rows that have an answer of their own: (which rows, answer)."""
    for mine, answer in answers:
        first = answer if mine is None else torch.where(mine, answer, first)
    return first
