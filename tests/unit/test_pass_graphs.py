"""Which graphs passes are captured as, and the layout of their inputs; capturing itself is the GPU's."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from engine.models.graphs import PassGraphs, _Key, _parts, _size
from engine.models.runner import Batch, Chunk
from engine.speculation.drafters.base import RowDraft

WIDTH = 5


def graphs() -> PassGraphs:
    made = PassGraphs(lambda *given: given[0], lambda x: x, 7777, WIDTH, torch.device("cpu"))
    made._longest = 8
    return made


def chunk(tokens: int, nodes: bool = False) -> Chunk:
    draft = RowDraft([3] * (tokens - 1), parents=[-1] * (tokens - 1))
    return Chunk([3] * tokens, 4, [9, 2], tokens, draft.branches(4) if nodes else None)


@pytest.mark.parametrize(
    ("chunks", "key"),
    [
        ([chunk(1)] * 20, _Key(32, 32, 1)),
        ([chunk(5)] * 4, _Key(4, 32, 8)),
        ([chunk(30), chunk(1)], _Key(8, 64, 512)),
        ([chunk(30, nodes=True), chunk(1)], _Key(4, 32, 32, True)),
        ([chunk(65, nodes=True)], _Key(1, 96, 72, True)),
        ([chunk(65, nodes=True), chunk(200)], _Key(8, 384, 512, True)),
    ],
)
def test_which_graph_a_batch_takes(chunks: list[Chunk], key: _Key) -> None:
    assert graphs()._key(Batch.pack(chunks, 16)) == key


def test_ahead_are_decoding_steps_and_prompts() -> None:
    made = [*graphs()._steps(64, 17), *graphs()._prompts(64)]
    assert all(isinstance(key, _Key) and not key.branched for key in made)
    assert {key.decodes for key in made} == {True, False}


def test_the_inputs_are_where_the_graph_reads_them() -> None:
    batch = Batch.pack([chunk(3, nodes=True), chunk(2)], 16)
    key = graphs()._key(batch)
    host = torch.full((_size(key, WIDTH),), -5, dtype=torch.int32)
    graphs()._fill(host, batch, key)
    found = {name: part.tolist() for name, part in _parts(host, key, WIDTH).items()}
    assert found["ids"][:6] == [3, 3, 3, 3, 3, 0] and found["slots"][5:] == [7777] * (key.tokens - 5)
    assert found["positions"][:5] == [4, 5, 5, 4, 5] and found["sees"][:5] == [5, 5, 5, 5, 6]
    assert found["masks"][:5] == [0, 1, 2, 0, 0] and found["trunks"][:2] == [5, 4]
    assert (
        found["starts"][:2] == [4, 4] and found["lengths"] == [3, 2, 0, 0] and found["begins"][:2] == [0, 3]
    )
    assert found["tables"][0][:2] == [9, 2]
