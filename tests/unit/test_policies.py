"""Stop policies: a contract that every registered one keeps, and each one's own rule."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import msgspec
import pytest
import torch
from lossless.branches import Case, check
from lossless.contract import (
    check_next_request,
    check_reset_on_reuse,
    equipped,
    iterate,
    memory,
    sequence,
    signals,
)
from lossless.coupled import check_identity, requests, spec
from lossless.toys import different, toy_engine
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode

from engine.speculation.policy import Need, Outcome, State, describe, options_of, policies, register
from engine.types import InvalidRequest, SamplingParams

EVERY = sorted(policies())
APART = [name for name in EVERY if not policies()[name].shares]  # a row is all that a row depends on
SHARING = [name for name in EVERY if policies()[name].shares]
LARGEST = 64  # no policy may want more

PATTERNS = [  # (probability of every draft token, all accepted) by iteration
    [(0.9, True), (0.8, True), (0.2, False), (0.6, True)],
    [(0.3, False), (0.9, True), (0.9, True), (0.1, False)],
    [(0.5, True), (0.5, False), (0.5, True), (0.5, False)],
]


def options_for(policy: str) -> list[tuple[str, msgspec.inspect.Field]]:
    info = msgspec.inspect.type_info(policies()[policy].Options)
    assert isinstance(info, msgspec.inspect.StructType)
    return [(field.name, field) for field in info.fields]


EVERY_OPTION = [(policy, name, field) for policy in EVERY for name, field in options_for(policy)]


# ---- contract


def test_the_first_policies_are_there():
    assert {"static", "heuristic", "confidence"} <= set(EVERY)


@pytest.mark.parametrize("policy", EVERY)
def test_declares_itself(policy: str):
    found = policies()[policy]
    assert found.name == policy
    assert found.needs <= set(get_args(Need))
    assert found.__doc__
    schema = describe()[policy]
    (options,) = schema["$defs"].values()
    assert options.get("additionalProperties") is False
    assert all(field.get("description") for field in options.get("properties", {}).values())


@pytest.mark.parametrize("policy", EVERY)
def test_an_unknown_option_is_refused_naming_the_valid_ones(policy: str):
    with pytest.raises(InvalidRequest) as refused:
        options_of(policy, {"no_such_option": 1})
    assert refused.value.param == "speculation.options.no_such_option"
    assert "no_such_option" in refused.value.message
    assert all(name in refused.value.message for name, _ in options_for(policy))


@pytest.mark.parametrize("policy", EVERY)
def test_the_documentation_names_every_option_with_its_default(policy: str):
    page = (Path(__file__).parents[2] / "docs" / "policies.md").read_text(encoding="utf-8")
    (line,) = (line for line in page.splitlines() if line.startswith(f"| `{policy}` | `"))
    options = options_of(policy, None)
    for name, _ in options_for(policy):
        assert f"`{name}` (" in line, name
        told = line.split(f"`{name}` (")[1].split(")")[0]
        default = getattr(options, name)
        if isinstance(default, str):
            assert told.startswith(f"`{default}`")
        else:
            assert told.split(":")[0] == msgspec.json.encode(default).decode().removesuffix(".0"), name


def test_an_unknown_policy_is_refused_naming_the_known_ones():
    with pytest.raises(InvalidRequest) as refused:
        options_of("no_such_policy", {})
    assert refused.value.param == "speculation.policy"
    assert all(name in refused.value.message for name in EVERY)


def _bad_values(field: msgspec.inspect.Field) -> list[Any]:
    kind = field.type
    while isinstance(kind, msgspec.inspect.Metadata):
        kind = kind.type
    bad: list[Any] = [None, [], {}]
    if isinstance(kind, msgspec.inspect.LiteralType):
        return [*bad, "no_such_value", 1, True]
    if isinstance(kind, msgspec.inspect.IntType | msgspec.inspect.FloatType):
        assert kind.ge is not None or kind.gt is not None, "no lower bound"
        assert kind.le is not None or kind.lt is not None, "no upper bound"
        low = kind.ge if kind.ge is not None else kind.gt
        high = kind.le if kind.le is not None else kind.lt
        assert low is not None and high is not None
        bad += ["1", True, low - 1, high + 1, float("nan"), float("inf"), float("-inf")]
        if isinstance(kind, msgspec.inspect.IntType):
            bad.append(low + 0.5)
        return bad
    if isinstance(kind, msgspec.inspect.BoolType):
        return [*bad, 1, "true"]
    raise AssertionError(f"this test knows no bad values of {kind}")


@pytest.mark.parametrize(("policy", "name", "field"), EVERY_OPTION, ids=lambda value: str(value)[:20])
def test_bad_values_are_refused_by_name(policy: str, name: str, field: msgspec.inspect.Field):
    for value in _bad_values(field):
        with pytest.raises(InvalidRequest, match=name) as refused:
            options_of(policy, {name: value})
        assert refused.value.param == f"speculation.options.{name}", value
        assert policy in refused.value.message


@pytest.mark.parametrize("policy", EVERY)
def test_defaults_are_valid_and_frozen(policy: str):
    options = options_of(policy, None)
    assert options == options_of(policy, {}) == options_of(policy, msgspec.structs.asdict(options))
    for name, _ in options_for(policy):
        with pytest.raises(AttributeError):
            setattr(options, name, 1)


def test_only_policies_that_share_have_something_to_share():
    assert {"bandit", "tetris"} <= set(SHARING) and len(APART) > 6
    learned = equipped(1).shared()
    assert learned.keys() <= set(SHARING) and "bandit" in learned


@pytest.mark.parametrize("policy", APART)
def test_rows_do_not_read_each_other(policy: str):
    """Each row answers among others, in any order of the batch, as it answers alone."""
    together = equipped(4)
    rows = [sequence(policy, name=str(i)) for i in range(len(PATTERNS))]
    for row in rows:
        together.take(row)
    order = [2, 0, 1]
    found: list[list[Any]] = [[] for _ in rows]
    for step in range(4):
        now = [PATTERNS[i][step] for i in order]
        answers = iterate(together, [rows[i] for i in order], [p for p, _ in now], [a for _, a in now])
        for i, answer in zip(order, answers, strict=True):
            found[i].append(answer)
        order = order[1:] + order[:1]
    for row, pattern, answers in zip(rows, PATTERNS, found, strict=True):
        alone = equipped(1)
        single = sequence(policy)
        alone.take(single)
        assert answers == [iterate(alone, [single], [p], [a])[0] for p, a in pattern]
        assert memory(together, row).keys() == memory(alone, single).keys()
        for name, value in memory(alone, single).items():
            assert torch.equal(memory(together, row)[name], value)


@pytest.mark.parametrize("policy", EVERY)
def test_rows_that_have_stopped_change_nothing(policy: str):
    """A captured graph asks them on, with NaN: the others' answers and all memory are the host's own."""
    host, graph = equipped(4), equipped(4)
    rows, twins = ([sequence(policy, name=str(i)) for i in range(3)] for _ in range(2))
    for row, twin in zip(rows, twins, strict=True):
        host.take(row)
        graph.take(twin)
    for step in range(4):
        probs, accept = zip(*(pattern[step] for pattern in PATTERNS), strict=True)
        expected = iterate(host, rows, list(probs), list(accept))
        assert iterate(graph, twins, list(probs), list(accept), as_graph=True) == expected
    for name, value in host.shared().get(policy, {}).items():
        assert torch.equal(graph.shared()[policy][name], value), name
    for row, twin in zip(rows, twins, strict=True):
        expected_next, found_next = host.limits([row]), graph.limits([twin])
        assert found_next == expected_next


@pytest.mark.parametrize("policy", SHARING)
def test_only_its_own_rows_teach_what_a_policy_shares(policy: str):
    """Beside a row that another policy governs, and of which it is told as well."""
    among, alone = equipped(2), equipped(1)
    own, other, single = sequence(policy, name="own"), sequence("heuristic", {"start": 7}), sequence(policy)
    among.take(own)
    before = sequence(policy)
    among.take(before)  # what its slot remembers is still there
    slot = before.slot
    for tensor in among._states[policy].tensors.values():
        tensor[slot] = 1
    among.give_back(before)
    among.take(other)
    assert other.slot == slot
    alone.take(single)
    for p, a in PATTERNS[0]:
        answers = iterate(among, [other, own], [0.4, p], [not a, a], as_graph=True)
        assert answers[1] == iterate(alone, [single], [p], [a])[0]
    for name, value in alone.shared().get(policy, {}).items():
        assert torch.equal(among.shared()[policy][name], value), name


@pytest.mark.parametrize("policy", EVERY)
def test_decides_without_a_read_back(policy: str):
    """On tensors without values, whatever would wait for the device, or for a size, raises."""
    table = equipped(4)
    rows = [sequence(policy, name=str(i)) for i in range(3)]
    for row in rows:
        table.take(row)
    found, state = policies()[policy], table._states[policy]
    given, slots = signals(1, [0.9, 0.5, 0.1]), torch.tensor([row.slot for row in rows])
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        state.rows, state.mine = mode.from_tensor(slots), mode.from_tensor(given.alive)
        for values in (vars(given), state.tensors, state.shared, vars(state), vars(state).get("weights", {})):
            for name, value in values.items():
                if isinstance(value, torch.Tensor) and not isinstance(value, FakeTensor):
                    values[name] = mode.from_tensor(value)
        limit = found.limit(state)
        keep = found.keep_drafting(given, state) if found.needs else limit > 0
        found.observe(Outcome(drafted=limit, accepted=limit), state)
        for answer in (limit, keep, given.step):
            with pytest.raises(DataDependentOutputException):
                answer.flatten()[0].item()


@pytest.mark.parametrize("policy", EVERY)
def test_a_slot_not_in_the_batch_is_left_alone(policy: str):
    table = equipped(2)
    rows = [sequence(policy, name=str(i)) for i in range(2)]
    for row in rows:
        table.take(row)
    before = memory(table, rows[1])
    for probs, accept in PATTERNS[0]:
        iterate(table, rows[:1], [probs], [accept])
    for name, value in memory(table, rows[1]).items():
        assert torch.equal(value, before[name])


def test_policies_mixed_in_a_batch_answer_as_alone():
    table = equipped(16)
    rows = [sequence(policy, name=policy) for policy in EVERY]
    for row in rows:
        table.take(row)
    for step in range(4):
        p, a = PATTERNS[0][step]
        mixed = iterate(table, rows, [p] * len(rows), [a] * len(rows))
        for row, answer in zip(rows, mixed, strict=True):
            alone = equipped(1)
            single = sequence(row.policy)
            alone.take(single)
            expected = [iterate(alone, [single], [p], [a])[0] for p, a in PATTERNS[0][: step + 1]]
            assert answer == expected[-1]


@pytest.mark.parametrize("policy", EVERY)
def test_state_is_reset_when_a_slot_is_reused(policy: str):
    check_reset_on_reuse(policy)
    if policy in APART:
        check_next_request(policy)


@pytest.mark.parametrize("policy", EVERY)
def test_memory_goes_with_a_preempted_row(policy: str):
    """Put aside, its slot used by another, taken again elsewhere: as if nothing had happened."""
    table, undisturbed = equipped(2), equipped(1)
    row, twin = sequence(policy), sequence(policy)
    table.take(row)
    undisturbed.take(twin)
    for p, a in PATTERNS[0][:2]:
        iterate(table, [row], [p], [a])
        iterate(undisturbed, [twin], [p], [a])
    old_slot = row.slot
    table.put_aside(row)
    assert row.slot == -1
    other = sequence(policy, name="other")
    table.take(other)
    assert other.slot == old_slot
    iterate(table, [other], [0.1], [False])
    table.take(row)
    assert row.slot not in (old_slot, -1) and row.policy_state is None
    for name, value in memory(undisturbed, twin).items():
        assert torch.equal(memory(table, row)[name], value)
    for p, a in PATTERNS[0][2:] if policy in APART else ():
        assert iterate(table, [row], [p], [a]) == iterate(undisturbed, [twin], [p], [a])


def test_a_row_preempted_again_before_it_drafts_keeps_its_memory():
    table = equipped(1)
    row = sequence("heuristic")
    table.take(row)
    table.observe([row], [5], [0])
    table.put_aside(row)
    table.put_aside(row)
    table.take(row)
    assert table.limits([row]) == [4]


def test_a_row_preempted_before_it_drafted_has_nothing_to_put_aside():
    table = equipped(1)
    row = sequence("heuristic")
    table.put_aside(row)
    assert row.policy_state is None
    table.take(row)
    assert table.limits([row]) == [5]


@pytest.mark.parametrize("policy", EVERY)
def test_limits_and_answers_are_well_formed(policy: str):
    table = equipped(4)
    rows = [sequence(policy, name=str(i)) for i in range(3)]
    for row in rows:
        table.take(row)
    found, state = policies()[policy], table._states[policy]
    for step in range(40):
        state.rows = torch.tensor([row.slot for row in rows])
        state.mine = None if step % 2 else torch.ones(3, dtype=torch.bool)
        limit = found.limit(state)
        assert limit.shape == (3,) and limit.dtype == torch.int64
        assert ((limit >= 0) & (limit <= LARGEST)).all()
        keep = found.keep_drafting(signals(1, [0.9, 0.5, 0.1]), state)
        assert keep.shape == (3,) and keep.dtype == torch.bool
        accept = [True, step % 2 == 0, False]
        iterate(table, rows, [0.9, 0.5, 0.1], accept)


@pytest.mark.parametrize("policy", EVERY)
def test_rows_that_drafted_nothing_teach_nothing(policy: str):
    table = equipped(1)
    row = sequence(policy)
    table.take(row)
    before = memory(table, row)
    table.observe([row], [0], [0])
    for name, value in memory(table, row).items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("drafter", ["model", "ngram"])
@pytest.mark.parametrize("policy", EVERY)
def test_lossless_on_the_toys(policy: str, drafter: str):
    pair = different(3)
    if (reason := toy_engine(pair).info.refusals[drafter].get(policy)) is not None:
        assert drafter == "ngram" and "head" in reason  # heads are of a draft model
        return
    # Worlds in one engine would see each other through what is shared.
    size = {"width": 1, "tokens": 3} if policy in SHARING else {"width": 128, "tokens": 4}
    check(Case(pair, SamplingParams(max_tokens=size["tokens"]), spec(drafter, policy), width=size["width"]))
    seeded = requests(
        SamplingParams(temperature=0.8, max_tokens=12), [spec(drafter, policy)], (0, 1, 2, 0, 1)
    )
    check_identity(toy_engine(pair), pair, seeded)


def test_a_name_is_registered_once():
    with pytest.raises(ValueError, match="twice"):
        register("static")(type(policies()["static"]))
    assert "no_such_policy" not in policies()


def test_a_reset_that_forgets_a_tensor_is_refused():
    state = State({"sl": torch.zeros(1), "rate": torch.zeros(1)})
    with pytest.raises(KeyError, match="rate"):
        state.reset(0, {"sl": 1})


def test_signals_are_named_once():
    """What a policy may need is what the drafters hand over."""
    assert get_origin(Need) is Literal
    assert set(get_args(Need)) <= set(signals(1, [0.5]).__dataclass_fields__)


@pytest.mark.parametrize("policy", EVERY)
def test_a_verdict_tells_and_then_asks(policy: str) -> None:
    """What a GPU captures: told and asked at once, among rows of no policy, as told and then asked."""
    captured, plain = equipped(3), equipped(3)
    rows, same = ([sequence(policy, name=str(i)) for i in range(2)] for _ in range(2))
    for table, some in ((captured, rows), (plain, same)):
        iterate(table, some, [0.9, 0.4], [True, False])
        for row in some:
            if row.slot < 0:
                table.take(row)
    if not plain.learns(same[0]):
        return
    slots = torch.tensor([*(row.slot for row in rows), captured.spare_slot])
    numbers = torch.tensor([captured.number(policy)] * 2 + [-1])
    drafted, accepted = [3, 2], [3, 1]
    limits = captured.verdict(
        [policy], slots, numbers, torch.tensor([*drafted, 0]), torch.tensor([*accepted, 0])
    )
    plain.observe(same, drafted, accepted)
    assert limits[:2].tolist() == plain.limits(same)
