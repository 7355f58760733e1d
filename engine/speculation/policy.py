"""Stop policies: the interface, the registry, and the engine's bookkeeping for them.

A policy decides, after every draft token, whether to draft one more. It never drops a token that
was sampled: under rejection sampling that would bias the output (speculation.md, section 5.2).

What a policy remembers lives in `State`: tensors by row slot, owned by the engine, so that it is
reset when another request takes the slot and never leaks from request to request.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, TypeVar

import msgspec
import torch
from torch import Tensor

from engine.types import InvalidRequest

if TYPE_CHECKING:
    from engine.speculation.heads import Head
    from engine.speculation.load import Load

Need = Literal["prob", "largest", "top", "entropy", "joint", "hidden"]
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
    hidden: Tensor | None = None  # float32[B, H], the draft's last state, normed, that `token` comes from


@dataclass
class Outcome:
    """What verification said of this iteration's drafts, for the B rows of the batch."""

    drafted: Tensor  # int64[B]
    accepted: Tensor  # int64[B], accepted prefix as verified (before any cut at EOS)


@dataclass(frozen=True)
class Equipment:
    """What an engine has for its policies. `heads`: by policy; `hidden`: the draft's width, if told."""

    load: Load
    heads: Mapping[str, Head] = field(default_factory=dict)
    hidden: int | None = None


class State:
    """A policy's tensors by row slot, seen through the rows of the batch at hand.

    `state["sl"]` gathers the batch's rows as [B, ...]; `state["sl"] = x` scatters them back. `mine`
    bool[B]: the rows that the policy governs (None: all); it is asked about all, and told of all.
    `shared`: what the policy learns over all requests; changed in place only, since captured graphs
    read it, and so is the engine's `load`.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        load: Load | None = None,
        shared: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.tensors = dict(tensors)  # each [slots, ...]
        self.shared = dict(shared or {})
        self.rows = torch.empty(0, dtype=torch.int64)
        self.mine: Tensor | None = None
        self.temperatures: Tensor | None = None
        self._load = load

    @property
    def heat(self) -> Tensor:
        """float32[B]: the temperatures of the batch's rows; 0 where nobody has told."""
        if self.temperatures is None:
            return torch.zeros(len(self.rows), dtype=torch.float32, device=self.rows.device)
        return self.temperatures[self.rows]

    @property
    def load(self) -> Load:
        if self._load is None:
            raise RuntimeError("this policy's state was allocated without the engine's load")
        return self._load

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
    """One stop policy. Stateless itself: all memory is in `State`.

    A policy inherits what it does not say: it needs no equipment, learns nothing, shares nothing, and
    drafts on up to its limit.
    """

    name: ClassVar[str]
    Options: ClassVar[type[msgspec.Struct]]
    needs: ClassVar[frozenset[Need]]  # empty: keep_drafting is not asked, `limit` alone decides
    shares: ClassVar[bool] = False  # whether a row's answers may depend on other rows, or on earlier requests

    def missing(self, equipment: Equipment) -> str | None:
        """Why an engine with this equipment cannot serve the policy, or None."""
        return None

    @abstractmethod
    def allocate(self, slots: int, device: torch.device, equipment: Equipment) -> State:
        """State for `slots` rows, for an engine that has what is needed."""
        ...

    def learns(self, options: Any) -> bool:
        """Whether `observe` changes anything; if not, it is not called and `limit` is constant."""
        return False

    @abstractmethod
    def reset(self, state: State, slot: int, options: Any) -> None:
        """A new request with these options (an instance of `Options`) takes the slot."""
        ...

    @abstractmethod
    def limit(self, state: State) -> Tensor:
        """int64[B]: the most to draft in this iteration; 0 drafts nothing."""
        ...

    def keep_drafting(self, signals: Signals, state: State) -> Tensor:
        """bool[B]: draft one more after this token? Decided on the device."""
        return torch.ones_like(signals.alive)

    def observe(self, outcome: Outcome, state: State) -> None:
        """Labels for free: learn from the verdict. Rows with drafted == 0 teach nothing."""
        return None


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
    return converted(known[name].Options, f"policy {name!r}", options)


S = TypeVar("S", bound=msgspec.Struct)


def converted(kind: type[S], owner: str, options: Mapping[str, Any] | None) -> S:
    """The options of `owner`, checked. Raises InvalidRequest naming what would be valid."""
    valid = kind.__struct_fields__
    unknown = sorted(set(options or {}) - set(valid))
    if unknown:
        name = unknown[0][:64]
        message = f"{owner} has no option {name!r}; valid: {', '.join(valid) or 'none'}"
        raise InvalidRequest(message, f"speculation.options.{name}", "unknown_option")
    try:
        return msgspec.convert(dict(options or {}), kind)
    except msgspec.ValidationError as error:
        at = re.search(r" - at `\$\.(\w+)", str(error))
        param = "speculation.options" if at is None else f"speculation.options.{at[1]}"
        raise InvalidRequest(f"options of {owner}: {error}", param, "invalid_option") from error


def refusals(equipment: Equipment) -> dict[str, str]:
    """The policies that an engine with this equipment cannot serve, and why."""
    reasons = {name: policy.missing(equipment) for name, policy in sorted(policies().items())}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def describe() -> dict[str, Any]:
    """JSON schema of every policy's options, by policy name."""
    return {name: msgspec.json.schema(policy.Options) for name, policy in sorted(policies().items())}
