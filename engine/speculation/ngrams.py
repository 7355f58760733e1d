"""Which token followed before: the lookup behind the n-gram drafter (prompt lookup decoding)."""

from __future__ import annotations

from collections import Counter

MAX_MATCH = 16  # longest suffix that is compared
MAX_CANDIDATES = 64  # most recent occurrences that are looked at


class NgramIndex:
    """Every bigram of a growing token list, by position, so that a suffix is found in O(1).

    `tokens` is the caller's list, read and never changed; `update` after it has grown.
    """

    def __init__(self, tokens: list[int], min_match: int = 2) -> None:
        if min_match not in (1, 2):
            raise ValueError("min_match is 1 or 2")
        self._tokens = tokens
        self._min = min_match
        self._ends: dict[tuple[int, ...], list[int]] = {}  # n-gram -> positions after it
        self._indexed = 0
        self.update()

    def update(self) -> None:
        """Indexes what was appended. The newest n-gram ends where nothing follows yet: not indexed."""
        for end in range(max(self._indexed, self._min), len(self._tokens)):
            self._ends.setdefault(tuple(self._tokens[end - self._min : end]), []).append(end)
        self._indexed = max(self._indexed, len(self._tokens))

    def next(self, drafted: list[int]) -> tuple[int, Counter[int]] | None:
        """The likeliest token after tokens + drafted, and the counts of what followed the longest match.

        Among the occurrences that match the longest suffix the most frequent follower wins, the
        most recent one on a tie. None if the suffix did not occur before.
        """
        suffix = (self._tokens[-MAX_MATCH:] + drafted)[-MAX_MATCH:]
        ends = self._ends.get(tuple(suffix[-self._min :]))
        if ends is None or len(suffix) < self._min:
            return None
        best = 0
        followers: list[int] = []
        for end in reversed(ends[-MAX_CANDIDATES:]):
            length = self._match(end, suffix)
            if length > best:
                best, followers = length, []
            if length == best:
                followers.append(self._tokens[end])
        counts = Counter(followers)  # insertion order is recency: max() keeps the most recent on ties
        return max(counts, key=counts.__getitem__), counts

    def _match(self, end: int, suffix: list[int]) -> int:
        length = self._min
        while length < len(suffix) and length < end and self._tokens[end - 1 - length] == suffix[-1 - length]:
            length += 1
        return length
