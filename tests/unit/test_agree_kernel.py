"""The kernel that compares a pass's choices with the drafts, in Triton's interpreter, against `agreed`."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from engine.models.decode_data import META, MOST, write_meta
from engine.models.kernels.agree import agree
from engine.speculation.drafters.base import RowDraft, agreed

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
rows_of_drafts = st.lists(
    st.lists(st.integers(0, 2), min_size=1, max_size=MOST), min_size=1, max_size=MOST
).filter(lambda rows: sum(map(len, rows)) <= MOST)


@given(rows_of_drafts, st.lists(st.integers(0, 2), min_size=MOST, max_size=MOST), st.sets(st.integers(0, 15)))
@settings(max_examples=60, deadline=None)
def test_as_the_host_compares(rows: list[list[int]], chosen: list[int], broken: set[int]) -> None:
    """Few different tokens, so that drafts stand; NaN anywhere in a row makes it unsound, and only it."""
    words = np.full(META, 7, dtype=np.int32)  # what was there before means nothing
    write_meta(words, [20 + i for i in range(len(rows))], rows)
    fine = torch.tensor([at not in broken for at in range(MOST)], device=DEVICE).to(torch.int8)
    answer = torch.full((4, MOST), -9, dtype=torch.int32, device=DEVICE)
    here = torch.tensor(chosen, dtype=torch.int32, device=DEVICE)
    agree(torch.from_numpy(words).to(DEVICE), here, fine, answer)
    at = 0
    for row, tokens in enumerate(rows):
        mine, places = chosen[at : at + len(tokens)], range(at, at + len(tokens))
        path, token = agreed(RowDraft(tokens[1:]), mine)
        sound = not broken & set(places)
        assert answer[:3, row].tolist() == [len(path), token, sound]
        at += len(tokens)
    assert (answer[:3, len(rows) :] == -9).all()
    told = [-1 if i in broken else chosen[i] for i in range(at)]
    assert answer[3].tolist() == told + [-9] * (MOST - at)


def test_words_of_a_batch() -> None:
    """Against the layout as decode_state.cuh has it: tokens of a row are chained."""
    words = np.zeros(META, dtype=np.int32)
    write_meta(words, [5, 9], [[40, 41, 42], [50]])
    assert words[:2].tolist() == [4, 2]
    start, begin, length, line, ids, positions, masks = words[8:].reshape(7, MOST)
    assert start[:2].tolist() == [5, 9] and begin[:2].tolist() == [0, 3]
    assert length[:2].tolist() == [3, 1] and line[:2].tolist() == [0, 1]
    assert ids[:4].tolist() == [40, 41, 42, 50] and positions[:4].tolist() == [5, 6, 7, 9]
    assert masks[:4].tolist() == [0b1, 0b11, 0b111, 0b1]
