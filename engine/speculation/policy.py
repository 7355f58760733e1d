"""Stop policies: the interface, the registry, and the engine's bookkeeping for them.

A policy decides, after every draft token, whether to draft one more. It never drops a token that
was sampled: under rejection sampling that would bias the output (speculation.md, section 5.2).

What a policy remembers lives in `State`: tensors by row slot, owned by the engine, so that it is
reset when another request takes the slot and never leaks from request to request.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, TypeVar

import msgspec
import torch
from torch import Tensor

from engine.types import InvalidRequest

Need = Literal["prob", "largest", "top", "entropy", "joint"]
"""A signal that a policy reads; the drafter computes only the union of what policies in use need."""


@dataclass
class Signals:
    """What is known after a draft step, for the B rows that draft (fields not needed are None).

    `position` counts the request's generated tokens (the drafted one is number `position`, from 0);
    `step` is the number of tokens drafted in this iteration, including this one.
    """

    step: Tensor  # int64[]
    token: Tensor  # int64[B], drafted token
    position: Tensor  # int64[B]
    alive: Tensor  # bool[B], rows that drafted this token (others carry values without meaning)
    prob: Tensor | None = None  # float32[B], q of the drafted token
    largest: Tensor | None = None  # float32[B], the largest probability of q
    top: Tensor | None = None  # float32[B, 10], the largest probabilities of q, descending
    entropy: Tensor | None = None  # float32[B], nats, over the whole vocabulary
    joint: Tensor | None = None  # float32[B], product of `prob` along this draft


@dataclass
class Outcome:
    """What verification said of this iteration's drafts, for the B rows of the batch."""

    drafted: Tensor  # int64[B]
    accepted: Tensor  # int64[B], accepted prefix as verified (before any cut at EOS)


class State:
    """A policy's tensors by row slot, seen through the rows of the batch at hand.

    `state["sl"]` gathers the batch's rows as [B, ...]; `state["sl"] = x` scatters them back.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = dict(tensors)  # each [slots, ...]
        self.rows = torch.empty(0, dtype=torch.int64)

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name][self.rows]

    def __setitem__(self, name: str, value: Tensor) -> None:
        self.tensors[name][self.rows] = value.to(self.tensors[name].dtype)

    def reset(self, slot: int, values: Mapping[str, float]) -> None:
        """Gives the slot to a new request. Every tensor must get a value."""
        if values.keys() != self.tensors.keys():
            raise KeyError(f"state has {sorted(self.tensors)}, reset names {sorted(values)}")
        for name, value in values.items():
            self.tensors[name][slot] = value


class StopPolicy(Protocol):
    """One stop policy. Stateless itself: all memory is in `State`."""

    name: ClassVar[str]
    Options: ClassVar[type[msgspec.Struct]]
    needs: ClassVar[frozenset[Need]]  # empty: keep_drafting is not asked, `limit` alone decides
    learns: ClassVar[
        bool
    ]  # whether `observe` changes anything; if not, it is not called and `limit` is constant

    def allocate(self, slots: int, device: torch.device) -> State:
        """State for `slots` rows."""
        ...

    def reset(self, state: State, slot: int, options: Any) -> None:
        """A new request with these options (an instance of `Options`) takes the slot."""
        ...

    def limit(self, state: State) -> Tensor:
        """int64[B]: the most to draft in this iteration; 0 drafts nothing."""
        ...

    def keep_drafting(self, signals: Signals, state: State) -> Tensor:
        """bool[B]: draft one more after this token? Decided on the device."""
        ...

    def observe(self, outcome: Outcome, state: State) -> None:
        """Labels for free: learn from the verdict. Rows with drafted == 0 teach nothing."""
        ...


_REGISTRY: dict[str, StopPolicy] = {}
P = TypeVar("P", bound=type[StopPolicy])


def register(name: str) -> Callable[[P], P]:
    """Class decorator that makes a policy known under `name`."""

    def add(cls: P) -> P:
        if name in _REGISTRY:
            raise ValueError(f"policy {name!r} is registered twice")
        cls.name = name
        _REGISTRY[name] = cls()
        return cls

    return add


def policies() -> dict[str, StopPolicy]:
    """Every registered policy by name."""
    import engine.speculation.policies  # noqa: F401  (registration happens on import)

    return dict(_REGISTRY)


def options_of(name: str, options: Mapping[str, Any] | None) -> msgspec.Struct:
    """Validated options of the policy. Raises InvalidRequest naming what would be valid."""
    known = policies()
    if name not in known:
        message = f"unknown policy {name[:64]!r}; known: {', '.join(sorted(known))}"
        raise InvalidRequest(message, "speculation.policy", "unknown_policy")
    kind = known[name].Options
    valid = kind.__struct_fields__
    unknown = sorted(set(options or {}) - set(valid))
    if unknown:
        message = f"policy {name!r} has no option {unknown[0][:64]!r}; valid: {', '.join(valid) or 'none'}"
        raise InvalidRequest(message, "speculation.options", "unknown_option")
    try:
        return msgspec.convert(dict(options or {}), kind)
    except msgspec.ValidationError as error:
        raise InvalidRequest(
            f"options of policy {name!r}: {error}", "speculation.options", "invalid_option"
        ) from error


def describe() -> dict[str, Any]:
    """JSON schema of every policy's options, by policy name."""
    return {name: msgspec.json.schema(policy.Options) for name, policy in sorted(policies().items())}
