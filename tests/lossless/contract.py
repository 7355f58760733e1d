"""What every registered stop policy must keep to, as checks that the mutants run as well."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lossless.coupled import spec
from lossless.toy_heads import toy_heads
from lossless.toys import HIDDEN, different, run, toy_engine
from torch import Tensor

from engine.sequence import Sequence
from engine.speculation.control import PolicyTable
from engine.speculation.costs import Costs
from engine.speculation.load import Load
from engine.speculation.policy import Equipment, Outcome, Signals, options_of, policies
from engine.types import GenerateRequest, SamplingParams

CPU = torch.device("cpu")
HEADS = toy_heads(HIDDEN)


def equipped(slots: int, rows: int = 1, draft: float = 0.1) -> PolicyTable:
    """Of a drafter with heads, whose step costs `draft` of a target's pass, under `rows` decoding rows."""
    costs = [Costs(), Costs()]
    for n in (1, 64):
        costs[0].observe(n, n, draft)
        for tokens in (1, 1600):
            costs[1].observe(n, tokens, 1 + 0.0005 * tokens)
    load = Load(CPU)
    load.observe(rows, 2 * rows, 1.0)
    load.refresh(costs[0], costs[1], rows)
    return PolicyTable(slots, CPU, Equipment(load, HEADS, HIDDEN))


def sequence(policy: str, options: Mapping[str, Any] | None = None, name: str = "s") -> Sequence:
    """A sequence that asks for the policy, outside any engine."""
    return Sequence(
        request=GenerateRequest(id=name, prompt_ids=(0,)),
        seed=0,
        coupled=False,
        drafter="model",
        policy=policy,
        options=options_of(policy, options),
        max_sl=16,
    )


def signals(step: int, probs: list[float]) -> Signals:
    """Of rows whose drafted token has these probabilities, each the largest of its law."""
    prob = torch.tensor(probs, dtype=torch.float32)
    top = torch.zeros(len(probs), 10)
    top[:, 0], top[:, 1] = prob, 1 - prob
    return Signals(
        step=torch.tensor(step),
        token=torch.zeros(len(probs), dtype=torch.int64),
        position=torch.full((len(probs),), step - 1),
        alive=torch.ones(len(probs), dtype=torch.bool),
        prob=prob,
        largest=top[:, 0].clone(),
        top=top,
        entropy=-(top * top.clamp(min=1e-30).log()).sum(-1),
        joint=prob**step,
        hidden=(4 * prob - 2)[:, None].expand(-1, HIDDEN).clone(),
    )


def outcome(drafted: list[int], accepted: list[int]) -> Outcome:
    return Outcome(drafted=torch.tensor(drafted), accepted=torch.tensor(accepted))


def among_dead(table: PolicyTable, rows: list[Sequence], given: Signals, alive: list[int]) -> list[bool]:
    """Asks as a captured graph does: all rows, of which `alive` draft; the others' values are NaN."""
    living = torch.tensor(alive)
    fields: dict[str, Any] = {}
    for name in ("token", "position", "prob", "largest", "top", "entropy", "joint", "hidden"):
        value = getattr(given, name)
        garbage = float("nan") if value.is_floating_point() else 0
        fields[name] = value.new_full((len(rows), *value.shape[1:]), garbage)
        fields[name][living] = value
    mask = torch.zeros(len(rows), dtype=torch.bool)
    mask[living] = True
    slots = torch.tensor([row.slot for row in rows])
    numbers = torch.tensor([table.number(row.policy) for row in rows])
    names = sorted({row.policy for row in rows})
    keep = table.decide(names, slots, numbers, Signals(step=given.step, alive=mask, **fields))
    return keep[living].tolist()  # type: ignore[no-any-return]


def iterate(
    table: PolicyTable,
    rows: list[Sequence],
    probs: list[float],
    accept: list[bool],
    as_graph: bool = False,
) -> list[list[Any]]:
    """One iteration as the engine asks it; the answers by row: limit, then keep after every step.

    `accept`: whether all of the row's drafts stand, else none. `as_graph`: rows that have stopped are
    asked with the others, as in a captured graph.
    """
    limits = table.limits(rows)
    answers: list[list[Any]] = [[limit] for limit in limits]
    lengths = [0] * len(rows)
    alive = [i for i, limit in enumerate(limits) if limit > 0]
    step = 0
    while alive:
        step += 1
        given = signals(step, [probs[i] for i in alive])
        if as_graph:
            keep = among_dead(table, rows, given, alive)
        else:
            keep = table.keep_drafting([rows[i] for i in alive], given)
        for i, more in zip(alive, keep, strict=True):
            answers[i].append(more)
            lengths[i] = step
        alive = [i for i, more in zip(alive, keep, strict=True) if more and step < limits[i]]
    drafted = [i for i, length in enumerate(lengths) if length and table.learns(rows[i])]
    if drafted:
        ls = [lengths[i] for i in drafted]
        acc = [lengths[i] if accept[i] else 0 for i in drafted]
        table.observe([rows[i] for i in drafted], ls, acc)
    return answers


def memory(table: PolicyTable, seq: Sequence) -> dict[str, Tensor]:
    """What the policy remembers of the row."""
    tensors = table._states[seq.policy].tensors
    return {name: tensor[seq.slot].clone() for name, tensor in tensors.items()}


def check_reset_on_reuse(policy: str) -> None:
    """A request finds in a used slot what it would find in a new one."""
    used, new = equipped(1), equipped(1)
    first, second, fresh = sequence(policy), sequence(policy), sequence(policy)
    used.take(first)
    for probs, accept in ((0.9, True), (0.9, True), (0.3, False), (0.9, True)):
        iterate(used, [first], [probs], [accept])
    for tensor in used._states[policy].tensors.values():
        tensor[first.slot] = 1  # whatever it had learned
    used.give_back(first)
    used.take(second)
    new.take(fresh)
    found, expected = memory(used, second), memory(new, fresh)
    for name, value in expected.items():
        assert torch.equal(found[name], value), (
            f"{name} is {found[name]} in a used slot, {value} in a new one"
        )


def check_next_request(policy: str) -> None:
    """Through the engine, one slot: what the second request drafts is what it drafts alone.

    Not of a policy that shares what it learns.
    """
    assert not policies()[policy].shares
    pair = different(4)
    first, second = (
        GenerateRequest(
            id=name,
            prompt_ids=prompt,
            params=SamplingParams(temperature=0.5, seed=4, max_tokens=12),
            speculation=spec("model", policy),
        )
        for name, prompt in (("first", (0, 1, 2)), ("second", (3, 2)))
    )
    behind, alone = toy_engine(pair, rows=1), toy_engine(pair, rows=1)
    run(behind, [first])
    drafted = [[e.drafted for e in run(engine, [second])["second"]] for engine in (behind, alone)]
    assert drafted[0] == drafted[1], f"behind another request {drafted[0]} drafts, alone {drafted[1]}"
