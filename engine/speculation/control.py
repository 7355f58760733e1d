"""Which policy governs which row, and the merging of their answers for one batch."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from engine.sequence import Sequence
from engine.speculation.policy import Need, Outcome, Signals, State, StopPolicy, policies


class PolicyTable:
    """Engine-owned policy state for `slots` rows.

    Every policy in use answers for all rows of the batch; each row takes its own policy's answer.
    """

    def __init__(self, slots: int, device: torch.device) -> None:
        self._device = device
        self._policies = policies()
        # One slot more than rows: what the padding of a captured graph reads and writes.
        self.spare_slot = slots
        self._states: dict[str, State] = {
            p: self._policies[p].allocate(slots + 1, device) for p in self._policies
        }
        self._numbers = {name: i for i, name in enumerate(sorted(self._policies))}
        self._free = list(range(slots - 1, -1, -1))
        self._limits: dict[int, int] = {}  # by slot; constants of policies that do not learn

    def take(self, seq: Sequence) -> None:
        """Gives the sequence a slot, reset to its options or as it was put aside.

        The caller keeps to `slots` sequences at a time.
        """
        seq.slot = self._free.pop()
        self._limits.pop(seq.slot, None)
        state = self._states[seq.policy]
        self._policies[seq.policy].reset(state, seq.slot, seq.options)
        for name, value in (seq.policy_state or {}).items():
            state.tensors[name][seq.slot] = value
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
        unknown = [row for row in rows if self.learns(row) or row.slot not in self._limits]
        if unknown:
            answers = [(name, policy.limit(state)) for name, policy, state in self._in_use(unknown)]
            merged = self._merge(answers[0][1], answers[1:], self._numbers_of(unknown))
            for row, limit in zip(unknown, merged.tolist(), strict=True):
                self._limits[row.slot] = limit
        return [self._limits[row.slot] for row in rows]

    def keep_drafting(self, rows: Seq[Sequence], signals: Signals) -> list[bool]:
        """Draft one more? By row; the one read-back of a draft step."""
        names = sorted({row.policy for row in rows})
        keep: list[bool] = self.decide(names, self._slots_of(rows), self._numbers_of(rows), signals).tolist()
        return keep

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
                state.rows = slots
                answers.append((name, policy.keep_drafting(signals, state)))
        return self._merge(torch.ones_like(signals.alive), answers, numbers)

    def needs_of(self, names: Seq[str]) -> frozenset[Need]:
        """The signals that these policies read."""
        return frozenset().union(*(self._policies[name].needs for name in names))

    def observe(self, rows: Seq[Sequence], outcome: Outcome) -> None:
        for _, policy, state in self._in_use(rows):
            policy.observe(outcome, state)

    def learns(self, seq: Sequence) -> bool:
        """Whether the row's policy is to be told of outcomes."""
        return self._policies[seq.policy].learns

    def _in_use(self, rows: Seq[Sequence]) -> list[tuple[str, StopPolicy, State]]:
        slots = self._slots_of(rows)
        found = []
        for name in sorted({row.policy for row in rows}):
            self._states[name].rows = slots
            found.append((name, self._policies[name], self._states[name]))
        return found

    def _merge(self, first: Tensor, answers: Seq[tuple[str, Tensor]], numbers: Tensor) -> Tensor:
        """`first`, but for the rows whose policy has an answer of its own."""
        for name, answer in answers:
            first = torch.where(numbers == self._numbers[name], answer, first)
        return first

    def _slots_of(self, rows: Seq[Sequence]) -> Tensor:
        return torch.tensor([row.slot for row in rows], dtype=torch.int64, device=self._device)

    def _numbers_of(self, rows: Seq[Sequence]) -> Tensor:
        return torch.tensor([self._numbers[row.policy] for row in rows], device=self._device)
