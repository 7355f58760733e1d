"""Speculation as a fault domain: what a drafter or a policy does wrong costs speed, never a request.

Whoever raised, or gave NaN, is not asked for a while; its rows go on with SL=0, which is the target alone.
Only what harms the target too is not survived here: a lost device, and memory that ran out.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from engine.memory_faults import is_out_of_memory, poisons

log = logging.getLogger(__name__)

_OFF, _LONGEST = 30.0, 3600.0  # seconds without it after the first fault; doubled by each one, up to that
_FORGIVEN = 3600.0  # seconds without a fault after which the next one is the first again


class PolicyFault(Exception):
    """A policy raised, or said what cannot be. The message says what."""

    def __init__(self, policy: str, why: str) -> None:
        super().__init__(f"policy {policy!r}: {why}")
        self.policy = policy


class DraftFault(Exception):
    """A drafter gave what cannot be. The message says what."""


@contextlib.contextmanager
def blamed(policy: str) -> Iterator[None]:
    """What is raised within is the policy's fault: PolicyFault, or what no policy can be blamed for."""
    try:
        yield
    except PolicyFault:
        raise
    except Exception as error:
        if fatal(error):
            raise
        raise PolicyFault(policy, f"{type(error).__name__}: {error}") from error


def fatal(error: Exception) -> bool:
    """Whether the target cannot go on either, or not as if nothing had happened."""
    return poisons(error) or is_out_of_memory(error)


@dataclass
class _Off:
    until: float  # by `time.monotonic`
    count: int


class Faults:
    """Of all drafters of an engine. `total` counts them since start, by drafter."""

    def __init__(self) -> None:
        self.total: Counter[str] = Counter()
        self._off: dict[tuple[str, str | None], _Off] = {}

    def met(self, drafter: str, error: Exception) -> None:
        """Notes a fault and turns off whoever is to blame for a while. Raises `error` if it is fatal."""
        if fatal(error):
            raise error
        policy = error.policy if isinstance(error, PolicyFault) else None
        key, now = (drafter, policy), time.monotonic()
        before = self._off.get(key)
        count = 1 if before is None or now - before.until > _FORGIVEN else before.count + 1
        seconds = min(_OFF * 2.0 ** (count - 1), _LONGEST)
        self._off[key] = _Off(now + seconds, count)
        self.total[drafter] += 1
        who = f"drafter {drafter!r}" if policy is None else f"policy {policy!r} of drafter {drafter!r}"
        log.error(
            "speculation: %s is off for %.0f s, its requests go on without a draft (fault %d): %s",
            *(who, seconds, count, error),
            exc_info=error if count == 1 else None,
        )

    def off(self, drafter: str, policy: str) -> bool:
        """Whether the drafter, or the policy that governs it, is not to be asked now."""
        if not self._off:
            return False
        now = time.monotonic()
        return any(
            (found := self._off.get((drafter, each))) is not None and now < found.until
            for each in (None, policy)
        )
