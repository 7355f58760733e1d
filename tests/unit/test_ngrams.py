"""The n-gram index against a naive search over the whole list."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.speculation.ngrams import MAX_CANDIDATES, MAX_MATCH, NgramIndex

TOKENS = st.lists(st.integers(0, 3), max_size=120)
DRAFTED = st.lists(st.integers(0, 3), max_size=20)
MIN_MATCH = st.sampled_from([1, 2])


def naive(tokens: list[int], drafted: list[int], min_match: int) -> tuple[int, Counter[int]] | None:
    """Compares the suffix with what stands before every token, the most recent candidates only."""
    suffix = (tokens + drafted)[-MAX_MATCH:]
    found: list[tuple[int, int]] = []  # match length and follower, most recent first
    for end in range(len(tokens) - 1, 0, -1):
        length = 0
        while length < min(len(suffix), end) and tokens[end - 1 - length] == suffix[-1 - length]:
            length += 1
        if length >= min_match:
            found.append((length, tokens[end]))
    found = found[:MAX_CANDIDATES]
    if not found:
        return None
    longest = max(length for length, _ in found)
    followers = [token for length, token in found if length == longest]
    counts = Counter(followers)
    return max(followers, key=lambda token: counts[token]), counts  # the first of the most frequent


@settings(max_examples=300, deadline=None)
@given(TOKENS, DRAFTED, MIN_MATCH)
def test_it_finds_what_a_naive_search_finds(tokens: list[int], drafted: list[int], min_match: int):
    assert NgramIndex(tokens, min_match).next(drafted) == naive(tokens, drafted, min_match)


@settings(max_examples=100, deadline=None)
@given(st.lists(TOKENS, max_size=8), DRAFTED, MIN_MATCH)
def test_it_grows_with_its_list(pieces: list[list[int]], drafted: list[int], min_match: int):
    tokens: list[int] = []
    index = NgramIndex(tokens, min_match)
    for piece in pieces:
        tokens.extend(piece)
        index.update()
        index.update()  # nothing new is nothing twice
        assert index.next(drafted) == naive(tokens, drafted, min_match)


@settings(max_examples=100, deadline=None)
@given(TOKENS, DRAFTED, MIN_MATCH)
def test_it_changes_neither_list(tokens: list[int], drafted: list[int], min_match: int):
    before, drafted_before = list(tokens), list(drafted)
    NgramIndex(tokens, min_match).next(drafted)
    assert (tokens, drafted) == (before, drafted_before)


@pytest.mark.parametrize(
    ("tokens", "drafted", "min_match", "expected"),
    [
        ([], [], 2, None),
        ([1], [], 1, None),
        ([1, 2], [], 2, None),  # the suffix itself is no match: nothing follows it
        ([1, 2, 3, 1, 2], [], 2, 3),
        ([1, 2, 3, 9, 2], [], 1, 3),
        ([1, 2, 3, 9, 2], [], 2, None),
        ([1, 2, 3, 1], [2], 2, 3),  # the match ends in what is drafted
        ([4, 4, 4], [], 2, 4),  # a match that overlaps the suffix
        ([8, 1, 2, 5, 9, 1, 2, 6, 8, 1, 2], [], 2, 5),  # the longer match wins over the more recent
        ([1, 2, 5, 1, 2, 5, 1, 2, 6, 1, 2], [], 2, 5),  # with no longer match, the more frequent
        ([0, 1, 2, 5, 0, 1, 2, 6, 0, 1, 2], [], 2, 6),  # equally long and frequent: the most recent
    ],
)
def test_by_example(tokens: list[int], drafted: list[int], min_match: int, expected: int | None):
    found = NgramIndex(tokens, min_match).next(drafted)
    assert (None if found is None else found[0]) == expected


def test_counts_are_of_the_longest_match_alone():
    tokens = [1, 2, 7, 3, 1, 2, 7, 3, 1, 2, 8, 9, 1, 2, 6, 3, 1, 2]
    assert NgramIndex(tokens).next([]) == (8, Counter({7: 1, 8: 1}))


def test_the_minimum_is_one_or_two():
    for wrong in (0, 3):
        with pytest.raises(ValueError, match="1 or 2"):
            NgramIndex([1, 2, 3], wrong)
