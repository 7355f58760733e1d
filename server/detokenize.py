"""Token ids to text as they come: whole characters only, and stop strings found across tokens."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from server.tools.text import held_back

_CONTEXT = 8  # prompt tokens that tell the decoder whether the first space is part of the text


class TextStream:
    """The text of one choice. Fed token by token, so that blocks of any size give the same result.

    `text` is all that was decoded; `starts[i]` its length before token i. What may still become a
    stop string is in `text` but not below `safe`. A stop string cuts `text` and `starts`: a token
    stays if any text before the cut is its own, or if it comes before such a token. Of several
    stop strings the one that is complete first counts, as if characters came one at a time.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        skip_special_tokens: bool = True,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        min_tokens: int = 0,
        prompt_ids: Sequence[int] = (),
    ) -> None:
        """`prompt_ids`: tokens that the text continues; their own text is not part of it.

        `min_tokens`: a stop string counts only if it begins after the text of that many tokens.
        """
        self.text = ""
        self.starts: list[int] = []
        self.stopped = False
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._stop, self._include_stop = tuple(stop), include_stop
        self._min_tokens = min_tokens
        self._floor: int | None = None if min_tokens else 0  # stop strings begin here or later
        self._searched = 0  # no stop string ends at or below
        self._ended = False
        self._restart()
        for token_id in prompt_ids[-_CONTEXT:]:
            self._decode(token_id)

    def _restart(self) -> None:
        self._stream = DecodeStream(skip_special_tokens=self._skip)
        self._before: list[int] = []  # tokens of the last piece, the context of the next
        self._pending: list[int] = []  # tokens whose text is not out

    @property
    def safe(self) -> int:
        """Characters of `text` that no stop string can take back."""
        if self._ended or self.stopped or self._floor is None:
            return len(self.text)
        open_text = self.text[self._floor :]
        return len(self.text) - max((held_back(open_text, stop) for stop in self._stop), default=0)

    @property
    def safe_tokens(self) -> int:
        """Tokens that no stop string can take back."""
        if self._ended or self.stopped:
            return len(self.starts)
        return bisect_left(self.starts, self.safe)

    @property
    def final_tokens(self) -> int:
        """Of these, the tokens whose text is all out: that of the last one may be held back in part."""
        if self._ended or self.stopped:
            return len(self.starts)
        safe = self.safe
        count = bisect_left(self.starts, safe)
        return count - 1 if count and self._end(count - 1) > safe else count

    def text_of(self, token: int) -> str:
        """The text that this token added: none where only a later one makes a character whole."""
        return self.text[self.starts[token] : self._end(token)]

    def _end(self, token: int) -> int:
        return self.starts[token + 1] if token + 1 < len(self.starts) else len(self.text)

    def push(self, token_id: int, *, silent: bool = False) -> bool:
        """Adds a token; a `silent` one (the EOS that ended it) has no text. True: a stop string ended it."""
        self.starts.append(len(self.text))
        if not silent:
            self.text += self._decode(token_id)
        self._search()
        if self._floor is None and len(self.starts) >= self._min_tokens:
            self._floor = self._searched = len(self.text)
        return self.stopped

    def finish(self) -> bool:
        """No more tokens: bytes held back become text. True if that completed a stop string."""
        if self.starts and self._pending and not self.stopped:
            self.text += self._pending_text()
            self._search()
        self._ended = True
        return self.stopped

    def _decode(self, token_id: int) -> str:
        self._pending.append(token_id)
        piece = self._stream.step(self._tokenizer, token_id)
        if piece is None:
            return ""
        self._before, self._pending = self._pending, []
        return piece

    def _pending_text(self) -> str:
        """Text of the pending tokens, incomplete characters as U+FFFD, in the context of those before."""
        head = self._tokenizer.decode(self._before, skip_special_tokens=self._skip)
        whole = self._tokenizer.decode(self._before + self._pending, skip_special_tokens=self._skip)
        return whole.removeprefix(head)

    def _search(self) -> None:
        if self._floor is None or not self._stop:
            return
        found: tuple[int, int] | None = None  # (end, start); the first to end, of these the longest
        for stop in self._stop:
            start = self.text.find(stop, max(self._floor, self._searched - len(stop) + 1))
            if start >= 0 and (found is None or (start + len(stop), start) < found):
                found = (start + len(stop), start)
        self._searched = len(self.text)
        if found is not None:
            self._cut(found[0] if self._include_stop else found[1])

    def _cut(self, length: int) -> None:
        self.text = self.text[:length]
        del self.starts[bisect_left(self.starts, length) :]
        self.stopped = True
