"""Runners over trees: every node's logits are those of the model's own pass over the way to it.

On a machine without a GPU the fused runner's kernels run in Triton's interpreter.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import test_reference_runner as reference
import torch
from test_fused_runner import shallow
from test_reference_runner import BLOCK, BLOCKS, TOLERANCE, VOCAB
from transformers import PreTrainedModel

from engine.models.reference import ReferenceRunner
from engine.models.runner import Batch, Branches, Chunk
from engine.speculation.drafters.base import RowDraft

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CONFIGS = {name: reference.CONFIGS[name] for name in ("llama", "qwen2, sliding", "mistral, sliding")}
PARENTS = [-1, 0, 1, 1, 0, -1, 5, 5, 7, 8, 9]  # depth first: the deepest way is 5, 7, 8, 9, 10
PROMPT = 13


def fused(model: PreTrainedModel) -> Any:
    pytest.importorskip("triton")
    from engine.models.fused import FusedRunner

    return FusedRunner(model, BLOCK)


def plain(model: PreTrainedModel) -> Any:
    return ReferenceRunner(model, BLOCK)


RUNNERS: dict[str, Callable[[PreTrainedModel], Any]] = {"reference": plain, "fused": fused}


def ways(tokens: list[int]) -> list[list[int]]:
    return RowDraft(tokens, parents=PARENTS).before()


def row(seed: int) -> tuple[list[int], list[int], list[int]]:
    """A prompt, a tree, and scattered blocks for both and more."""
    source = random.Random(seed)
    prompt = [source.randrange(3, VOCAB) for _ in range(PROMPT + seed)]
    tree = [source.randrange(3, VOCAB) for _ in PARENTS]
    table = source.sample(range(seed * BLOCKS // 3, (seed + 1) * BLOCKS // 3), 8)
    return prompt, tree, table


def own(model: PreTrainedModel, tokens: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=torch.tensor([tokens], device=DEVICE), use_cache=False).logits[0, -1].float()


def close(got: torch.Tensor, want: list[torch.Tensor]) -> None:
    worst = (got.float() - torch.stack(want)).abs().max().item()
    assert worst <= TOLERANCE, f"{worst} off"


@pytest.mark.parametrize("kind", RUNNERS)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_tree_beside_a_chain_and_what_is_kept_of_it(name: str, kind: str) -> None:
    make = reference.make if kind == "reference" else lambda config: reference.make(shallow(config))
    model, runner = (make(CONFIGS[name]()).to(DEVICE) for _ in range(2))
    runner = RUNNERS[kind](runner)
    runner.allocate(BLOCKS)
    for pool in (*runner._pool.keys.values(), *runner._pool.values.values()):
        pool.fill_(float("nan"))
    (prompt, tree, table), (other, _, others) = row(0), row(1)
    draft, start = RowDraft(tree, parents=PARENTS), len(prompt) - 1
    for tokens, blocks in ((prompt, table), (other, others)):
        runner.forward(Batch.pack([Chunk(tokens[:-1], 0, blocks, 0)], BLOCK))
    chunks = [
        Chunk([prompt[-1], *tree], start, table, len(tree) + 1, draft.branches(start)),
        Chunk([other[-1], 7, 8], len(other) - 1, others, 3),
    ]
    got = runner.forward(Batch.pack(chunks, BLOCK)).clone()
    want = [own(model, prompt + way) for way in ways(tree)]
    want += [own(model, other + way) for way in ([], [7], [7, 8])]
    close(got, want)
    path = [5, 7, 8, 9]
    slots = [table[at // BLOCK] * BLOCK + at % BLOCK for at in range(start + 1, start + 1 + len(tree))]
    runner.move([(slots[k], slots[to]) for to, k in enumerate(path)])
    kept = prompt + [tree[k] for k in path]
    after = runner.forward(Batch.pack([Chunk([11], len(kept), table)], BLOCK))
    close(after, [own(model, [*kept, 11])])


@pytest.mark.parametrize("kind", RUNNERS)
def test_a_tree_read_layer_by_layer(kind: str) -> None:
    """As a draft reads it: nodes lie in the order of reading, and attend those of earlier passes."""
    name = "mistral, sliding"
    make = reference.make if kind == "reference" else lambda config: reference.make(shallow(config))
    model, runner = make(CONFIGS[name]()).to(DEVICE), RUNNERS[kind](make(CONFIGS[name]()).to(DEVICE))
    runner.allocate(BLOCKS)
    prompt, tree, table = row(0)
    depths = RowDraft(tree, parents=PARENTS).depths()[1:]
    runner.forward(Batch.pack([Chunk(prompt, 0, table, 0)], BLOCK))
    place: dict[int, int] = {}
    seen = {-1: 0}
    for depth in range(1, max(depths) + 1):
        layer = [k for k, at in enumerate(depths) if at == depth]
        before = len(place)
        for k in layer:
            place[k] = len(place)
            seen[k] = seen[PARENTS[k]] | 1 << place[k]
        trunk = len(prompt)
        branches = Branches(
            trunk, [trunk + depth - 1] * len(layer), [trunk] * len(layer), [seen[k] for k in layer]
        )
        chunk = Chunk([tree[k] for k in layer], trunk + before, table, len(layer), branches)
        got = runner.forward(Batch.pack([chunk], BLOCK))
        close(got, [own(model, prompt + ways(tree)[k + 1]) for k in layer])
