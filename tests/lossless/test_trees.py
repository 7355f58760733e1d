"""Trees are exact: every branch against the target's own law, whatever runs beside them."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import pytest
import torch
from fixed_costs import fix_costs
from lossless.branches import Case, assert_same_law, check, output_law
from lossless.chi_square import ALPHA, output_p_value
from lossless.coupled import EVERY_TREE, requests, spec, tree
from lossless.law import sequence_law
from lossless.toys import Pair, broken, different, disjoint, run, toy_engine, twins
from lossless.tree_kinds import KINDS, PAIR, TOKENS, WIDTHS, asks
from torch import Tensor

import engine.core
import engine.speculation.drafters.tree
import engine.speculation.verifier
from engine.core import Engine
from engine.models.runner import Batch, Chunk
from engine.sequence import Sequence
from engine.speculation.control import PolicyTable
from engine.speculation.drafters.base import Drafted, Drafts, RowDraft
from engine.speculation.drafters.model import ModelDrafter
from engine.speculation.drafters.tree import TreeDrafter
from engine.speculation.goodput_tree import Rest
from engine.speculation.noise import RandomSource
from engine.speculation.tree import TreeOptions
from engine.types import GenerateRequest, SamplingParams, SpeculationParams

Patch = pytest.MonkeyPatch


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("budget", [2, 3, 4, 5, 6])
def test_every_branch(kind: str, budget: int):
    shapes = set[tuple[int, int]]()
    check(
        Case(PAIR, SamplingParams(max_tokens=3), asks(kind, budget, 2), width=WIDTHS.get(kind, 128)),
        lambda events: shapes.update((e.drafted, e.accepted) for e in events),
    )
    assert any(drafted > 2 or budget == 2 for drafted, _ in shapes)  # more than the depth: siblings
    assert {accepted for _, accepted in shapes} == {0, 1}


@pytest.mark.parametrize("kind", KINDS)
def test_a_vocabulary_of_four_and_depth(kind: str):
    params = SamplingParams(max_tokens=TOKENS.get(kind, 4), top_k=3)
    check(Case(different(4), params, asks(kind, 4, 3), width=WIDTHS.get(kind, 128)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0.6},
        {"top_p": 0.7},
        {"presence_penalty": 0.5, "frequency_penalty": 0.25, "repetition_penalty": 1.3},
        {"min_tokens": 2},
        {"temperature": 0.0},
    ],
    ids=str,
)
def test_sampling_parameters(kind: str, params: dict[str, object]):
    asked = asks(kind, 4, draft_temperature=1.3)
    eos = (1,) if "min_tokens" in params else ()
    tokens = TOKENS.get(kind, 4)
    sampling = SamplingParams(max_tokens=tokens, sampling_method="rejection", **params)
    check(Case(PAIR, sampling, asked, eos=eos, width=WIDTHS.get(kind, 128)))


@pytest.mark.parametrize("resting", [(True,), (True, False), (False, True), (True, True, False)], ids=str)
def test_every_branch_of_chains_and_trees_in_turn(resting: tuple[bool, ...], monkeypatch: Patch):
    """A goodput tree that rests gets a chain; each goes on in the other's KV."""
    turn = {"at": -1}

    def rests(rest: Rest, pays: bool) -> bool:
        turn["at"] += 1
        return resting[turn["at"] % len(resting)]

    def build(random: RandomSource) -> Engine:
        turn["at"] = -1
        made = toy_engine(PAIR, random=random)
        fix_costs(made)
        return made

    monkeypatch.setattr(Rest, "rests", rests)
    drafted = set[int]()
    request = GenerateRequest(
        id="", prompt_ids=(0, 1, 2), params=SamplingParams(max_tokens=4), speculation=asks("goodput", 4, 2)
    )
    found = output_law(build, [request], 1, lambda events: drafted.update(e.drafted for e in events))
    law = sequence_law(PAIR.target, request.prompt_ids, request.params)
    assert_same_law(found, {(tokens,): p for tokens, p in law.items()})
    assert drafted


@pytest.mark.parametrize("kind", ["layers", "greedy"])
def test_supports_that_do_not_meet_and_laws_that_are_none(kind: str):
    check(Case(disjoint(4), SamplingParams(max_tokens=3), asks(kind, 4)))
    check(Case(broken(3), SamplingParams(max_tokens=4), asks(kind, 4)))


@pytest.mark.parametrize("method", ["rejection", "coupled"])
def test_a_draft_of_the_target_is_accepted_down_to_a_leaf(method: str):
    """If nothing bounds the tree but its depth; what stood before was moved to where the draft reads it."""
    some = requests(
        SamplingParams(max_tokens=12, sampling_method=method),  # type: ignore[arg-type]
        [asks("layers", 64, 2, threshold=0.0)],
        prompt=(0, 1, 2),
        seeds=range(50),
    )
    full = [
        event
        for events in run(toy_engine(twins(3), blocks=3000, rows=50), some).values()
        for event in events
        if event.drafted == 12
    ]
    assert len(full) > 100 and all(event.accepted == 2 for event in full)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["rejection", "coupled"])
def test_the_draft_attends_what_was_accepted(kind: str, method: str):
    """Whatever was kept of a tree lies where the draft reads it, and nothing else is read."""
    pair, read = twins(3), list[tuple[int, ...]]()

    def draft(context: tuple[int, ...]) -> list[float]:
        read.append(context)
        return pair.target(context)

    for budget in (2, 3, 5, 12):
        engine = toy_engine(Pair(3, pair.target, draft), rows=1)
        for seed in range(12):
            params = SamplingParams(seed=seed, max_tokens=16, sampling_method=method)  # type: ignore[arg-type]
            asked = asks(kind, budget, depth=5)
            engine.add(GenerateRequest(id="a", prompt_ids=(0, 1, 2), params=params, speculation=asked))
            tokens = engine._sequences["a"].tokens
            while engine.has_work():
                read.clear()
                before = tuple(tokens)
                engine.step()
                for context in read:
                    common = min(len(context), len(before))
                    assert context[:common] == before[:common]


@pytest.mark.parametrize("block_size", [1, 3, 16])
def test_block_sizes(block_size: int):
    check(Case(PAIR, SamplingParams(max_tokens=4), asks("layers", 4), block_size=block_size))


def test_beside_a_chain_and_a_row_without_a_draft():
    asked = [asks("layers", 4), spec(sl=1), spec(sl=0)]
    prompts = [(0, 1, 2), (2, 1, 2, 1), (0, 0)]
    some = [
        GenerateRequest(id="", prompt_ids=prompt, params=SamplingParams(max_tokens=tokens), speculation=each)
        for prompt, each, tokens in zip(prompts, asked, (3, 2, 1), strict=True)
    ]

    def build(random: RandomSource) -> Engine:
        return toy_engine(PAIR, random=random, blocks=64 * 20, rows=192)

    laws = [sequence_law(PAIR.target, each.prompt_ids, each.params) for each in some]
    product = {
        (a, b, c): p * q * r
        for a, p in laws[0].items()
        for b, q in laws[1].items()
        for c, r in laws[2].items()
    }
    assert_same_law(output_law(build, some, width=64), product)


@pytest.mark.parametrize("resting", [True, False])
def test_nobody_uses_the_draft_while_its_loop_runs(resting: bool, monkeypatch: Patch):
    """On a GPU a chain that was begun still has its next logits where any other pass would write."""
    begun, shipped, forward = set[object](), ModelDrafter.begin, ModelDrafter.forward

    def begin(self: ModelDrafter, rows: list[Sequence], limits: list[int], table: PolicyTable) -> Drafts:
        assert not begun
        wait, mine = shipped(self, rows, limits, table), object()
        begun.add(mine)

        def waits() -> Drafted:
            begun.discard(mine)
            return wait()

        return waits

    def alone(self: ModelDrafter, chunks: list[Chunk]) -> Tensor:
        assert not begun
        return forward(self, chunks)

    monkeypatch.setattr(ModelDrafter, "begin", begin)
    monkeypatch.setattr(ModelDrafter, "forward", alone)
    monkeypatch.setattr(Rest, "rests", lambda rest, pays: resting)
    asked = [spec(sl=2), asks("goodput", 6), spec("model", "goodput"), asks("layers", 4), spec("ngram", sl=2)]
    made = toy_engine(PAIR, blocks=400)
    fix_costs(made)
    run(made, requests(SamplingParams(max_tokens=12), asked, prompt=(0, 1, 2, 0)))
    assert not made._governing.faults.total


def test_where_memory_runs_out_a_tree_is_judged_in_a_smaller_step():
    """How large it is depends on what was drawn: large ones must not be dropped."""

    def build(random: RandomSource) -> Engine:
        made = toy_engine(PAIR, random=random)
        shipped = made._parts.target.forward

        def forward(batch: Batch) -> Tensor:
            if len(batch.query_lens) > 1 and len(batch.ids) > 4 and batch.starts[0] > 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return shipped(batch)

        made._parts.target.forward = forward  # type: ignore[method-assign]
        return made

    some = [
        GenerateRequest(id="", prompt_ids=prompt, params=SamplingParams(max_tokens=n), speculation=each)
        for prompt, n, each in (
            ((0, 1, 2), 3, asks("layers", 4, 2)),
            ((2, 1, 0), 2, SpeculationParams(drafter="none")),
        )
    ]
    first, second = (sequence_law(PAIR.target, each.prompt_ids, each.params) for each in some)
    product = {(a, b): p * q for a, p in first.items() for b, q in second.items()}
    assert_same_law(output_law(build, some), product)


def test_a_tree_whose_draft_was_unsound_is_not_settled(monkeypatch: Patch):
    """Its draft KV is forgotten: what was moved would be where nobody knows, and cached."""
    settled, shipped = list[bool](), engine.speculation.drafters.tree.TreeDrafter.settle

    def settle(self: TreeDrafter, row: Sequence, draft: RowDraft, path: Seq[int]) -> None:
        settled.append(draft.unsound)
        shipped(self, row, draft, path)

    monkeypatch.setattr(engine.speculation.drafters.tree.TreeDrafter, "settle", settle)
    told = set[bool]()
    for seed in range(20):
        made = toy_engine(broken(4), blocks=200, block_size=1)
        some = requests(
            SamplingParams(max_tokens=6), [asks("layers", 8, 4)], prompt=(0, 1, 2, 1), seeds=[seed]
        )
        run(made, some)
        told.add(bool(made._governing.faults.total))
    assert True in told and not any(settled)


def _sampled(pair: Pair, asked: SpeculationParams, method: str, tokens: int) -> list[GenerateRequest]:
    return [
        GenerateRequest(
            id=str(seed),
            prompt_ids=tuple(at % pair.vocab for at in (0, 1, 2, 3, 0, 1)),
            params=SamplingParams(seed=seed, max_tokens=tokens, temperature=0.6, sampling_method=method),  # type: ignore[arg-type]
            speculation=asked,
        )
        for seed in range(3000)
    ]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["rejection", "coupled"])
def test_output_has_the_targets_law(kind: str, method: str):
    """The engine's own draws, of a vocabulary of eight."""
    pair = different(8)
    some = _sampled(pair, asks(kind, 8), method, 4)
    assert output_p_value(lambda rows: toy_engine(pair, blocks=rows * 14, rows=rows), pair, some) > ALPHA


def test_no_block_is_left_behind():
    """A thousand requests, some of which leave while their tree is being judged."""
    engine = toy_engine(PAIR, blocks=200, rows=8)
    asked = [
        GenerateRequest(
            id=str(i),
            prompt_ids=(i % 3, 1, 2)[: 1 + i % 3],
            params=SamplingParams(
                seed=i, max_tokens=1 + i % 7, sampling_method=("rejection", "coupled")[i % 2]
            ),  # type: ignore[arg-type]
            speculation=EVERY_TREE[i % len(EVERY_TREE)],
        )
        for i in range(1000)
    ]
    gone = set[str]()
    for start in range(0, 1000, 8):
        some = asked[start : start + 8]
        for request in some:
            engine.add(request)
        steps = 0
        while engine.has_work():
            engine.step()
            steps += 1
            if steps == 2:
                gone |= {request.id for request in some[::3]}
                for request in some[::3]:
                    engine.abort(request.id)
            for seq in engine._scheduler.running:
                assert isinstance(seq.options, TreeOptions)
                assert len(seq.blocks) <= -(-(len(seq.tokens) + seq.options.budget + 1) // 2) + 1
    assert engine._blocks.used_blocks == 0 and len(gone) > 300


def test_what_is_asked_of_a_tree_is_checked():
    for options, message in (
        ({"budget": 65}, "budget"),
        ({"max_depth": 0}, "max_depth"),
        ({"sl": 3}, "no option 'sl'"),
        ({"growth": "sideways"}, "growth"),
    ):
        with pytest.raises(engine.core.InvalidRequest, match=message):
            toy_engine(PAIR).add(
                GenerateRequest(id="a", prompt_ids=(0,), speculation=tree("dyspec", **options))
            )
    with pytest.raises(engine.core.InvalidRequest, match="no policy"):
        toy_engine(PAIR).add(
            GenerateRequest(
                id="a",
                prompt_ids=(0,),
                speculation=SpeculationParams(drafter="dyspec", policy="static", options={}),
            )
        )


def test_the_law_of_a_tree_without_its_siblings() -> None:
    """`taken` leaves a law; where nothing is left, the law itself."""
    law = engine.speculation.verifier.taken(torch.tensor([0.5, 0.25, 0.25]), 0)
    assert law.tolist() == [0.0, 0.5, 0.5]
    only: Tensor = torch.tensor([0.0, 1.0])
    assert engine.speculation.verifier.taken(only, 1).tolist() == [0.0, 1.0]
