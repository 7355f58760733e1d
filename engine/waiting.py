"""Who waits for a place in the batch, and who is next: fair between tenants, and no priority starves another.

Between tenants it is the one that was served least (virtual token counters, arXiv 2401.00588); within one,
priority, then arrival, but every eighth place goes to who came first whatever the priorities.
"""

from __future__ import annotations

from bisect import insort
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import count

from engine.sequence import Sequence

TURN = 8
"""One of so many places of a tenant goes to its oldest sequence. With k older ones before it, a sequence
waits for TURN * (k + 1) places of its tenant at most."""
_OUTPUT = 2  # what a token of output counts, where one of a prompt counts 1: it takes a pass of its own


@dataclass
class _Tenant:
    served: int  # tokens, weighted; see `Waiting`
    places: int = 0  # given to it so far
    queue: list[Sequence] = field(default_factory=list)  # by rank

    def next(self) -> Sequence:
        if self.places % TURN == TURN - 1:
            return min(self.queue, key=_age)
        return self.queue[0]


class Waiting:
    """The sequences that wait. A tenant that had nothing to ask for has saved nothing up meanwhile."""

    def __init__(self) -> None:
        self._tenants: dict[str, _Tenant] = {}
        self._count = 0
        self._now = 0  # what the tenant that got the last place had been served by then

    def __len__(self) -> int:
        return self._count

    def add(self, seq: Sequence) -> None:
        """Takes a new sequence in, or one that was preempted."""
        name = seq.request.tenant
        if name not in self._tenants:
            # who waits for nothing and would begin at `_now` anyway is forgotten
            kept = self._tenants.items()
            self._tenants = {key: each for key, each in kept if each.queue or each.served > self._now}
            self._tenants[name] = _Tenant(self._now)
        tenant = self._tenants[name]
        if not tenant.queue:
            tenant.served = max(tenant.served, self._now)
        insort(tenant.queue, seq, key=lambda s: s.rank)
        self._count += 1

    def remove(self, seq: Sequence) -> None:
        """Lets a sequence go that waits."""
        self._tenants[seq.request.tenant].queue.remove(seq)
        self._count -= 1

    def next(self) -> Sequence:
        """Whose turn it is: the same until places were given, sequences added, or tokens counted."""
        waiting = [tenant for tenant in self._tenants.values() if tenant.queue]
        if len(waiting) == 1:
            return waiting[0].next()
        return min(waiting, key=lambda tenant: (tenant.served, _age(tenant.queue[0]))).next()

    def take(self, seq: Sequence) -> None:
        """`seq`, the next, gets a place. Where that is by its age, no priority goes before it any more."""
        tenant = self._tenants[seq.request.tenant]
        self._now = max(self._now, tenant.served)
        seq.aged = seq.aged or tenant.queue[0] is not seq
        self.remove(seq)
        tenant.places += 1
        if not seq.started:
            tenant.served += seq.prompt_len - seq.cached_tokens

    def count(self, running: Iterable[Sequence]) -> None:
        """Counts the tokens that these have been given since they were counted last."""
        if len(self._tenants) == 1:
            return  # nobody to compare with
        for seq in running:
            tenant = self._tenants.get(seq.request.tenant)
            if tenant is not None:
                tenant.served += _OUTPUT * (seq.generated - seq.counted)
                seq.counted = seq.generated


def in_turn(seqs: Iterable[Sequence]) -> list[Sequence]:
    """By who runs first and is preempted last: the first of each tenant by rank, then the second of each, and
    so on, among them by age. Between tenants priorities have no say."""
    turns: defaultdict[str, Iterator[int]] = defaultdict(count)
    placed = [(next(turns[seq.request.tenant]), seq) for seq in sorted(seqs, key=lambda seq: seq.rank)]
    return [seq for _, seq in sorted(placed, key=lambda each: (each[0], _age(each[1])))]


def _age(seq: Sequence) -> tuple[float, int]:
    return seq.request.arrival, seq.order
