"""What a trace holds: prompts, positions along the target's texts, branches; see `classifiers.traces`."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

FORMAT = 1
Array = NDArray[Any]


class Identity(msgspec.Struct, frozen=True):
    """A model: how it was asked for, and `engine.models.fingerprint` of it."""

    name: str
    fingerprint: str


class Source(msgspec.Struct, frozen=True):
    """Where prompts came from: the file's name or the hub's, the digest, and how many were taken."""

    name: str
    sha256: str
    prompts: int


class Counts(msgspec.Struct, frozen=True):
    prompts: int
    steps: int
    branches: int


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """What was recorded, and how. `counts` None: the recording is not finished.

    `mode`: "greedy" or "coupled T=1 seed=S"; prompt i was sampled with seed S + i. `tokens`: the most
    that a text may have. `branch`: K, the steps of a branch. `hidden`, `target_hidden`: the widths of
    the two models' states, 0 where not recorded. `left_out`: prompts too long for the models.
    """

    format: int = FORMAT
    feature_version: int
    target: Identity
    draft: Identity
    data: tuple[Source, ...]
    mode: str
    tokens: int
    branch: int
    hidden: int = 0
    target_hidden: int = 0
    vocab: int
    eos_ids: tuple[int, ...] = ()
    settings: dict[str, Any] = {}
    versions: dict[str, str] = {}
    left_out: int = 0
    counts: Counts | None = None

    @property
    def greedy(self) -> bool:
        return self.mode == "greedy"


@dataclass(frozen=True)
class Prompts:
    """P prompts. `finish`: why the text ended, "stop" (end token) or "length"."""

    category: list[str]
    name: list[str]
    finish: list[str]
    tokens: Array  # int32[P], tokens of the prompt
    ids: Array  # int32[sum of tokens], all prompts one after the other

    def ids_of(self, prompt: int) -> Array:
        """int32[tokens]: the prompt's ids."""
        end = int(self.tokens[: prompt + 1].sum())
        return self.ids[end - int(self.tokens[prompt]) : end]


@dataclass(frozen=True)
class Steps:
    """N positions along the target's texts, text after text, each from position 0 on.

    Position 0 comes from prefill and the last of a full text (`manifest.tokens` - 1) from the target
    too: no draft is ever asked for them. `drafted` is the draft's choice after the target's own tokens.
    """

    prompt: Array  # int32[N], index into the prompts
    pos: Array  # int32[N], generated position, from 0
    token: Array  # int32[N], the target's
    drafted: Array  # int32[N]
    match: Array  # bool[N], drafted == token
    top: Array  # float32[N, 10], the draft's largest probabilities, descending
    entropy: Array  # float32[N], nats, whole vocabulary
    entropy_top: Array  # float32[N], nats, of the top 10 renormalised
    prob: Array  # float32[N], q of the drafted token
    accept: Array  # float32[N], min(1, p/q) of the drafted token; greedy: match
    overlap: Array | None = None  # float32[N], sum of min(p, q); None where greedy
    hidden: Array | None = None  # float16[N, H], the draft's last normed state, that gave `drafted`
    order: Array | None = None  # float32[N, 32], probabilities of what a tree would take, in its order
    rank: Array | None = None  # int32[N], the place of `token` in that order, -1 where it is not
    target_hidden: Array | None = None  # float16[N, Ht], the target's, that gave `token`


@dataclass(frozen=True)
class Branches:
    """M continuations by the draft alone: after its wrong token, or after an end token that matched.

    Every mismatch at a position from 1 on has one, and so has a matched end token. Row i's first
    `length[i]` columns are there; the others are zeros (the request or the context would be over).
    Column k is the draft's token k + 1 places after `drafted` of the step.
    """

    step: Array  # int32[M], index into the steps, ascending
    length: Array  # int32[M]
    drafted: Array  # int32[M, K]
    top: Array  # float32[M, K, 10]
    entropy: Array  # float32[M, K]
    entropy_top: Array  # float32[M, K]
    prob: Array  # float32[M, K]
    hidden: Array | None = None  # float16[M, K, H]


@dataclass(frozen=True)
class Bushes:
    """L places off the texts: what the draft says after a step's text and some wrong tokens; for trees.

    Of each step those ways that are likely enough (`classifiers.collect_bushes`), a parent before its
    children; of a text's last step its own token too. `parent` is the row of the way without its last token,
    counted from the step's first row, -1 for the step itself; `rank` the place of that token in the order.
    """

    step: Array  # int32[L], index into the steps, ascending
    parent: Array  # int32[L]
    rank: Array  # int32[L]
    order: Array  # float32[L, 32], as that of the steps
    top: Array  # float32[L, 10]
    entropy: Array  # float32[L]


Rows = TypeVar("Rows", "Steps", "Branches", "Bushes")


def take(table: Rows, rows: Array) -> Rows:
    """What is in these rows alone; `rows` a mask or indices."""
    arrays = {each.name: getattr(table, each.name) for each in fields(table)}
    return replace(table, **{name: array[rows] for name, array in arrays.items() if array is not None})


@dataclass(frozen=True)
class Trace:
    """A recording, or a part of one."""

    manifest: Manifest
    prompts: Prompts
    steps: Steps
    branches: Branches
    begins: Array = field(init=False)  # int64[P + 1]: prompt i's steps are begins[i] to begins[i + 1]
    bushes: Bushes | None = None  # where they were recorded

    def __post_init__(self) -> None:
        counts = np.bincount(self.steps.prompt, minlength=len(self.prompts.category))
        object.__setattr__(self, "begins", np.concatenate([[0], np.cumsum(counts)]))

    def branch_of(self) -> Array:
        """int64[N]: the branch of every step, -1 where it has none."""
        found = np.full(len(self.steps.pos), -1, dtype=np.int64)
        found[self.branches.step] = np.arange(len(self.branches.step))
        return found

    def select(self, prompts: Seq[int] | Array) -> Trace:
        """The trace of these prompts alone, in their order here."""
        kept = np.unique(np.asarray(prompts, dtype=np.int64))
        here = np.isin(self.steps.prompt, kept)
        steps = take(self.steps, here)
        steps = replace(steps, prompt=np.searchsorted(kept, steps.prompt).astype(np.int32))
        number = np.cumsum(here) - 1
        branches = take(self.branches, here[self.branches.step])
        branches = replace(branches, step=number[branches.step].astype(np.int32))
        old = self.prompts
        ids = [old.ids_of(int(i)) for i in kept]
        chosen = Prompts(
            category=[old.category[i] for i in kept],
            name=[old.name[i] for i in kept],
            finish=[old.finish[i] for i in kept],
            tokens=old.tokens[kept],
            ids=np.concatenate([*ids, np.zeros(0, np.int32)]).astype(np.int32),
        )
        bushes = self.bushes
        if bushes is not None:
            bushes = take(bushes, here[bushes.step])
            bushes = replace(bushes, step=number[bushes.step].astype(np.int32))
        return Trace(self.manifest, chosen, steps, branches, bushes)
