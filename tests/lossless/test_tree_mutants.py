"""Faults put into tree drafting and verification, each of which a losslessness test must find."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq

import pytest
import torch
from lossless.branches import Case, check
from lossless.coupled import EVERY_TREE, check_identity, requests, tree
from lossless.toys import run, toy_engine, twins
from lossless.tree_kinds import PAIR, asks

import engine.core
import engine.speculation.drafters.tree
import engine.speculation.verifier
from engine.kv.pool import KVPool, LayerShape
from engine.models.runner import Branches
from engine.speculation.drafters.base import RowDraft
from engine.types import GenerateRequest, SamplingParams

Patch = pytest.MonkeyPatch


def must_fail(case: Case) -> None:
    with pytest.raises(AssertionError):
        check(case)


CASE = Case(PAIR, SamplingParams(max_tokens=3), asks("layers", 4, 2))


def _told(monkeypatch: Patch, change: Callable[[RowDraft], None]) -> None:
    shipped = engine.speculation.drafters.tree._Tree.told

    def told(self: engine.speculation.drafters.tree._Tree) -> RowDraft:
        draft = shipped(self)
        if draft.laws and draft.parents is not None:
            change(draft)
        return draft

    monkeypatch.setattr(engine.speculation.drafters.tree._Tree, "told", told)


def test_siblings_sorted_by_probability(monkeypatch: Patch):
    def sort(draft: RowDraft) -> None:
        """The first two of the row's end, if both are leaves."""
        first = [k for k in draft.children()[0] if not draft.children()[k + 1]][:2]
        if len(first) == 2:
            a, b = first
            if draft.laws[a][draft.tokens[a]] < draft.laws[a][draft.tokens[b]]:
                draft.tokens[a], draft.tokens[b] = draft.tokens[b], draft.tokens[a]

    check(CASE)
    _told(monkeypatch, sort)
    must_fail(CASE)


def test_sampled_nodes_pruned_by_their_probability(monkeypatch: Patch):
    def prune(draft: RowDraft) -> None:
        last = len(draft.tokens) - 1
        if draft.laws[last][draft.tokens[last]] < 0.3:
            for each in (draft.tokens, draft.laws, draft.parents, draft.read):
                assert each is not None
                each.pop()

    _told(monkeypatch, prune)
    must_fail(CASE)


def test_a_sibling_judged_as_if_none_had_been_drawn_before_it(monkeypatch: Patch):
    monkeypatch.setattr(engine.speculation.verifier, "taken", lambda law, token: law)
    must_fail(CASE)


def test_a_sibling_judged_by_the_targets_first_law(monkeypatch: Patch):
    monkeypatch.setattr(engine.speculation.verifier, "residual", lambda p, q, token: p)
    must_fail(CASE)


LONG = requests(SamplingParams(max_tokens=40), EVERY_TREE, prompt=(0, 1, 2, 0, 1))


def identity_must_fail(asked: Seq[GenerateRequest] = LONG) -> None:
    with pytest.raises((AssertionError, IndexError)):
        check_identity(toy_engine(PAIR, blocks=800, rows=32), PAIR, asked)


def test_kv_of_the_accepted_way_is_not_moved(monkeypatch: Patch):
    check_identity(toy_engine(PAIR, blocks=800, rows=32), PAIR, LONG)
    monkeypatch.setattr("lossless.toys.ToyRunner.move", lambda self, pairs: None)
    identity_must_fail()


def test_kv_that_overlaps_is_read_before_it_is_written():
    shape = LayerShape(1, 2, 3)
    pool = KVPool({0: shape, 1: shape}, 2, 4, torch.float32, torch.device("cpu"))
    for each in (*pool.keys.values(), *pool.values.values()):
        each.copy_(torch.arange(8.0)[:, None, None].expand_as(each))
    pool.move([(3, 2), (2, 1), (5, 3), (7, 5)])
    for each in (*pool.keys.values(), *pool.values.values()):
        assert each[:, 0, 0].tolist() == [0, 2, 3, 5, 4, 7, 6, 7]


def _branches(monkeypatch: Patch, change: Callable[[Branches], Branches]) -> None:
    shipped = RowDraft.branches

    def changed(self: RowDraft, start: int) -> Branches | None:
        found = shipped(self, start)
        return None if found is None else change(found)

    monkeypatch.setattr(RowDraft, "branches", changed)


@pytest.mark.parametrize(
    "change",
    [
        lambda b: Branches(b.trunk, b.positions, b.sees, [(1 << i) - 1 for i in range(len(b.masks))]),
        lambda b: Branches(b.trunk, b.positions, [n - 1 for n in b.sees], b.masks),
        lambda b: Branches(b.trunk + 1, b.positions, b.sees, b.masks),
        lambda b: Branches(b.trunk, [b.trunk - 1 + i for i in range(len(b.masks))], b.sees, b.masks),
    ],
    ids=["all before it", "not the newest token", "another's bit", "slot is position"],
)
def test_a_node_that_attends_what_it_should_not(monkeypatch: Patch, change: Callable[[Branches], Branches]):
    _branches(monkeypatch, change)
    identity_must_fail()


def test_the_draft_reads_its_tree_wrong(monkeypatch: Patch):
    """Nothing is lost but acceptance: a draft that is the target knows."""

    def accepted() -> float:
        asked = requests(
            SamplingParams(max_tokens=30, temperature=0.0), [tree("dyspec", budget=8, max_depth=4)]
        )
        events = [e for own in run(toy_engine(twins(4)), asked).values() for e in own if e.iterations]
        return sum(e.accepted for e in events) / len(events)

    right = accepted()
    monkeypatch.setattr(
        engine.speculation.drafters.tree.TreeDrafter,
        "settle",
        lambda self, row, draft, path: setattr(row, "draft_kv_len", row.draft_kv_len + len(path)),
    )
    assert accepted() < right
