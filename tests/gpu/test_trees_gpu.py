"""Trees on a GPU: the kernel for short passes, captured graphs and the lane, against what float32 gives."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import test_fused_gpu as fused_gpu
import torch
from test_fused_gpu import BLOCK, BLOCKS, VOCAB, engine, make, poisoned, texts

from engine.models.reference import ReferenceRunner
from engine.models.runner import Batch, Branches, Chunk
from engine.speculation.drafters.base import RowDraft
from engine.speculation.goodput_tree import Rest
from engine.types import SamplingParams, SpeculationParams

pytestmark = pytest.mark.gpu


def tree(drafter: str, **options: object) -> SpeculationParams:
    return SpeculationParams(drafter=drafter, options=options)


TREES = [
    tree("dyspec", budget=8, max_depth=4),
    tree("dyspec", budget=64, max_depth=8),
    tree("dyspec", budget=12, growth="greedy"),
    tree("opt_tree", budget=15, max_depth=6),
    tree("goodput_tree", budget=32),
]


def parents(source: random.Random, nodes: int) -> list[int]:
    """Depth first: a node follows the one before it, or one of that one's ancestors."""
    found: list[int] = []
    for k in range(nodes):
        way, at = [-1], k - 1
        while at >= 0:
            way.append(at)
            at = found[at]
        found.append(source.choice(way))
    return found


def passes(runner: Any, lengths: list[int], nodes: list[int]) -> torch.Tensor:
    """Prefill, then every row's newest token and a tree (none: a chain of three): the logits of these."""
    source = random.Random(7)
    free = source.sample(range(BLOCKS), BLOCKS)
    chunks = []
    for n, size in zip(lengths, nodes, strict=True):
        row = [source.randrange(3, VOCAB) for _ in range(n)]
        new = [source.randrange(3, VOCAB) for _ in range(size or 3)]
        table = [free.pop() for _ in range((n + len(new)) // BLOCK + 1)]
        draft = RowDraft(new, parents=parents(source, size) if size else None)
        if n > 1:
            runner.forward(Batch.pack([Chunk(row[:-1], 0, table, 0)], BLOCK))
        chunks.append(Chunk([row[-1], *new], n - 1, table, len(new) + 1, draft.branches(n - 1)))
    return runner.forward(Batch.pack(chunks, BLOCK)).float().clone()


SHORT = [([40], [15]), ([300, 5], [7, 6]), ([17, 33, 1], [4, 0, 3])]
LONG = [([40], [64]), ([300, 5, 64], [64, 20, 0]), ([30] * 8, [24] * 8), ([100, 9], [31, 1])]


@pytest.mark.parametrize("name", ["llama 64", "qwen2 128, seven"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_of_trees_are_what_float32_gives(name: str, dtype: torch.dtype) -> None:
    from engine.models.fused import FusedRunner

    exact = poisoned(ReferenceRunner(make(name, torch.float32), BLOCK))
    plain = poisoned(ReferenceRunner(make(name, dtype), BLOCK))
    fused = poisoned(FusedRunner(make(name, dtype), BLOCK))
    for lengths, nodes in SHORT + LONG:
        want = passes(exact, lengths, nodes)
        noise = (passes(plain, lengths, nodes) - want).norm() / want.norm()
        for _ in range(2):  # captured, and captured before
            off = (passes(fused, lengths, nodes) - want).norm() / want.norm()
            assert off <= 1.5 * noise + (1e-4 if dtype == torch.float32 else 3e-3), (
                f"{lengths} x {nodes}: {off}"
            )


def test_a_layer_attends_nodes_of_earlier_passes() -> None:
    """As a draft reads a tree; in bf16 past the kernel, which knows branches only within a pass."""
    from engine.models.fused import FusedRunner

    found = []
    for runner in (
        ReferenceRunner(make("llama 64", torch.float32), BLOCK),
        FusedRunner(make("llama 64", torch.bfloat16), BLOCK),
    ):
        poisoned(runner)
        source = random.Random(3)
        row = [source.randrange(3, VOCAB) for _ in range(50)]
        table = list(range(10, 20))
        runner.forward(Batch.pack([Chunk(row, 0, table, 0)], BLOCK))
        logits = []
        seen: list[int] = []
        for depth, size in enumerate((4, 6, 30)):
            before, above = len(seen), len(seen) - (0, 4, 6)[depth]
            for k in range(size):
                up = seen[above + k % (before - above)] if before else 0
                seen.append(up | 1 << (before + k))
            branches = Branches(50, [50 + depth] * size, [50] * size, seen[before:])
            chunk = Chunk(
                [source.randrange(3, VOCAB) for _ in range(size)], 50 + before, table, size, branches
            )
            logits.append(runner.forward(Batch.pack([chunk], BLOCK)).float().clone())
        found.append(torch.cat(logits))
    assert (found[1] - found[0]).norm() / found[0].norm() <= 3e-2


@pytest.mark.parametrize("params", [
    SamplingParams(temperature=0, max_tokens=60, ignore_eos=True),
    SamplingParams(temperature=0.8, seed=11, max_tokens=60),
    SamplingParams(temperature=1.0, seed=3, top_p=0.9, presence_penalty=0.5, max_tokens=40),
], ids=["greedy", "seeded", "filtered"])  # fmt: skip
def test_text_is_the_targets_whatever_tree_in_float32(params: SamplingParams) -> None:
    made = engine(torch.float32)
    alone, *_ = texts(made, params, [SpeculationParams(drafter="none")])
    for speculation in TREES:
        found, drafted, accepted = texts(made, params, [speculation])
        assert found == alone, speculation
        assert drafted > 0 and accepted > 0, speculation
    assert texts(made, params, TREES + fused_gpu.SPECULATIONS)[0] == alone
    assert not made._governing.faults.total


@pytest.mark.parametrize("temperature", [0.0, 0.8], ids=["greedy", "seeded"])
def test_text_is_the_targets_where_trees_and_chains_take_turns(
    temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = itertools.count()
    monkeypatch.setattr(Rest, "rests", lambda rest, pays: next(turns) % 3 > 0)
    made = engine(torch.float32)
    params = SamplingParams(temperature=temperature, seed=5, max_tokens=60, ignore_eos=True)
    alone, *_ = texts(made, params, [SpeculationParams(drafter="none")])
    found, drafted, accepted = texts(made, params, [tree("goodput_tree", budget=24)])
    assert found == alone and drafted > 0 and accepted > 0
    assert texts(made, params, TREES + fused_gpu.SPECULATIONS)[0] == alone
    assert not made._governing.faults.total


@pytest.mark.parametrize("temperature", [0.0, 0.7], ids=["greedy", "seeded"])
def test_the_lane_walks_trees_as_the_verifier_does(temperature: float) -> None:
    """In bf16: a random target's ties part texts, so each pass is judged again by the verifier."""
    params = SamplingParams(
        temperature=temperature, seed=9 if temperature else None, max_tokens=50, ignore_eos=True
    )
    made = engine(torch.bfloat16)
    lane, same = made._lane, 0
    assert lane is not None
    begin = lane.begin

    def checked(rows: Any, drafts: Any) -> Any:
        logits, wait = begin(rows, drafts)

        def verdict() -> Any:
            nonlocal same
            found = wait()
            again = made._parts.verifier.verify(rows, drafts, logits)
            assert [list(path) for path in found.path] == [list(path) for path in again.path]
            assert found.next_token == again.next_token and found.failed == again.failed
            same += any(draft.parents is not None for draft in drafts)
            return found

        return logits, verdict

    lane.begin = checked  # type: ignore[method-assign]
    for speculation in TREES:
        texts(made, params, [speculation], rows=1)
    assert same > 20 and not made._governing.faults.total
