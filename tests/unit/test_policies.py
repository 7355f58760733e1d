"""Stop policies: a contract that every registered one keeps, and each one's own rule."""

from __future__ import annotations

from typing import Any, Literal, get_args, get_origin

import msgspec
import pytest
import torch
from lossless.branches import Case, check
from lossless.contract import (
    CPU,
    check_next_request,
    check_reset_on_reuse,
    iterate,
    memory,
    outcome,
    sequence,
    signals,
)
from lossless.coupled import check_identity, requests, spec
from lossless.toys import different, toy_engine

from engine.speculation.control import PolicyTable
from engine.speculation.policy import Need, State, describe, options_of, policies, register
from engine.types import InvalidRequest, SamplingParams

EVERY = sorted(policies())
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
    assert refused.value.param == "speculation.options"
    assert "no_such_option" in refused.value.message
    assert all(name in refused.value.message for name, _ in options_for(policy))


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
        assert refused.value.param == "speculation.options", value
        assert policy in refused.value.message


@pytest.mark.parametrize("policy", EVERY)
def test_defaults_are_valid_and_frozen(policy: str):
    options = options_of(policy, None)
    assert options == options_of(policy, {}) == options_of(policy, msgspec.structs.asdict(options))
    for name, _ in options_for(policy):
        with pytest.raises(AttributeError):
            setattr(options, name, 1)


@pytest.mark.parametrize("policy", EVERY)
def test_rows_do_not_read_each_other(policy: str):
    """Each row answers among others, in any order of the batch, as it answers alone."""
    together = PolicyTable(4, CPU)
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
        alone = PolicyTable(1, CPU)
        single = sequence(policy)
        alone.take(single)
        assert answers == [iterate(alone, [single], [p], [a])[0] for p, a in pattern]
        assert memory(together, row).keys() == memory(alone, single).keys()
        for name, value in memory(alone, single).items():
            assert torch.equal(memory(together, row)[name], value)


@pytest.mark.parametrize("policy", EVERY)
def test_a_slot_not_in_the_batch_is_left_alone(policy: str):
    table = PolicyTable(2, CPU)
    rows = [sequence(policy, name=str(i)) for i in range(2)]
    for row in rows:
        table.take(row)
    before = memory(table, rows[1])
    for probs, accept in PATTERNS[0]:
        iterate(table, rows[:1], [probs], [accept])
    for name, value in memory(table, rows[1]).items():
        assert torch.equal(value, before[name])


def test_policies_mixed_in_a_batch_answer_as_alone():
    table = PolicyTable(16, CPU)
    rows = [sequence(policy, name=policy) for policy in EVERY]
    for row in rows:
        table.take(row)
    for step in range(4):
        p, a = PATTERNS[0][step]
        mixed = iterate(table, rows, [p] * len(rows), [a] * len(rows))
        for row, answer in zip(rows, mixed, strict=True):
            alone = PolicyTable(1, CPU)
            single = sequence(row.policy)
            alone.take(single)
            expected = [iterate(alone, [single], [p], [a])[0] for p, a in PATTERNS[0][: step + 1]]
            assert answer == expected[-1]


@pytest.mark.parametrize("policy", EVERY)
def test_state_is_reset_when_a_slot_is_reused(policy: str):
    check_reset_on_reuse(policy)
    check_next_request(policy)


@pytest.mark.parametrize("policy", EVERY)
def test_memory_goes_with_a_preempted_row(policy: str):
    """Put aside, its slot used by another, taken again elsewhere: as if nothing had happened."""
    table, undisturbed = PolicyTable(2, CPU), PolicyTable(1, CPU)
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
    for p, a in PATTERNS[0][2:]:
        assert iterate(table, [row], [p], [a]) == iterate(undisturbed, [twin], [p], [a])


def test_a_row_preempted_again_before_it_drafts_keeps_its_memory():
    table = PolicyTable(1, CPU)
    row = sequence("heuristic")
    table.take(row)
    table.observe([row], outcome([5], [0]))
    table.put_aside(row)
    table.put_aside(row)
    table.take(row)
    assert table.limits([row]) == [4]


def test_a_row_preempted_before_it_drafted_has_nothing_to_put_aside():
    table = PolicyTable(1, CPU)
    row = sequence("heuristic")
    table.put_aside(row)
    assert row.policy_state is None
    table.take(row)
    assert table.limits([row]) == [5]


@pytest.mark.parametrize("policy", EVERY)
def test_limits_and_answers_are_well_formed(policy: str):
    table = PolicyTable(4, CPU)
    rows = [sequence(policy, name=str(i)) for i in range(3)]
    for row in rows:
        table.take(row)
    found, state = policies()[policy], table._states[policy]
    for step in range(40):
        state.rows = torch.tensor([row.slot for row in rows])
        limit = found.limit(state)
        assert limit.shape == (3,) and limit.dtype == torch.int64
        assert ((limit >= 0) & (limit <= LARGEST)).all()
        keep = found.keep_drafting(signals(1, [0.9, 0.5, 0.1]), state)
        assert keep.shape == (3,) and keep.dtype == torch.bool
        accept = [True, step % 2 == 0, False]
        iterate(table, rows, [0.9, 0.5, 0.1], accept)


@pytest.mark.parametrize("policy", EVERY)
def test_rows_that_drafted_nothing_teach_nothing(policy: str):
    table = PolicyTable(1, CPU)
    row = sequence(policy)
    table.take(row)
    before = memory(table, row)
    table.observe([row], outcome([0], [0]))
    for name, value in memory(table, row).items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("drafter", ["model", "ngram"])
@pytest.mark.parametrize("policy", EVERY)
def test_lossless_on_the_toys(policy: str, drafter: str):
    pair = different(3)
    check(Case(pair, SamplingParams(max_tokens=4), spec(drafter, policy)))
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


# ---- each one's rule


def taken(policy: str, **options: Any) -> tuple[PolicyTable, Any]:
    table, row = PolicyTable(1, CPU), sequence(policy, options)
    table.take(row)
    return table, row


@pytest.mark.parametrize("sl", [0, 1, 7, 64])
def test_static_never_changes(sl: int):
    table, row = taken("static", sl=sl)
    for p, accepted in PATTERNS[1]:
        assert iterate(table, [row], [p], [accepted]) == [[sl, *[True] * sl]]


def test_static_by_default_drafts_five():
    table, row = taken("static")
    assert table.limits([row]) == [5]


def test_heuristic_grows_by_two_and_shrinks_by_one():
    table, row = taken("heuristic")
    limits = []
    for accepted in (5, 7, 3, 0, 7):  # of 5, 7, 9, 8, 7
        limits += table.limits([row])
        table.observe([row], outcome([limits[-1]], [accepted]))
    assert limits == [5, 7, 9, 8, 7]
    assert table.limits([row]) == [9]


def test_heuristic_counts_what_was_drafted_and_not_what_it_wished():
    """Clamped to 2 tokens that both stand: all were accepted."""
    table, row = taken("heuristic", start=5)
    table.observe([row], outcome([2], [2]))
    assert table.limits([row]) == [7]


def test_heuristic_keeps_between_one_and_its_cap():
    table, row = taken("heuristic", start=2, max_sl=5)
    found = []
    for _ in range(4):
        found += table.limits([row])
        table.observe([row], outcome([found[-1]], [0]))
    assert found == [2, 1, 1, 1]
    for _ in range(4):
        found += table.limits([row])
        table.observe([row], outcome([found[-1]], [found[-1]]))
    assert found[4:] == [1, 3, 5, 5]


def test_heuristic_starts_within_its_cap():
    table, row = taken("heuristic", start=9, max_sl=4)
    assert table.limits([row]) == [4]


@pytest.mark.parametrize("max_sl", [0, 3, 64])
def test_confidence_wants_at_most_its_cap(max_sl: int):
    table, row = taken("confidence", max_sl=max_sl)
    assert table.limits([row]) == [max_sl]


@pytest.mark.parametrize("signal", ["token", "top", "joint"])
def test_confidence_stops_below_the_threshold_of_its_own_signal(signal: Literal["token", "top", "joint"]):
    table, row = taken("confidence", signal=signal, threshold=0.5)
    below = torch.nextafter(torch.tensor(0.5), torch.tensor(0.0))
    for value, keeps in ((0.75, True), (0.5, True), (below, False), (0.1, False)):
        found = signals(1, [0.5])
        # The two other signals say the opposite: they must not be read.
        for name in ("token", "top", "joint"):
            given = value if name == signal else (0.0 if keeps else 1.0)
            field = {"token": "prob", "top": "largest", "joint": "joint"}[name]
            setattr(found, field, torch.tensor([float(given)]))
        assert table.keep_drafting([row], found) == [keeps]


def test_confidence_thresholds_are_of_the_row():
    table = PolicyTable(2, CPU)
    rows = [sequence("confidence", {"threshold": t}, str(t)) for t in (0.2, 0.8)]
    for row in rows:
        table.take(row)
    assert table.keep_drafting(rows, signals(1, [0.5, 0.5])) == [True, False]
    assert table.keep_drafting(rows[::-1], signals(1, [0.5, 0.5])) == [False, True]


@pytest.mark.parametrize(("threshold", "keeps"), [(0.0, True), (1.0, False)])
def test_confidence_at_its_extremes(threshold: float, keeps: bool):
    table, row = taken("confidence", threshold=threshold)
    assert table.keep_drafting([row], signals(1, [0.999])) == [keeps]


def test_signals_are_named_once():
    """What a policy may need is what the drafters hand over."""
    assert get_origin(Need) is Literal
    assert set(get_args(Need)) <= set(signals(1, [0.5]).__dataclass_fields__)
