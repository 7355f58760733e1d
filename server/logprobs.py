"""Log-probabilities in OpenAI's two shapes, and what a single token looks like in them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel
from transformers import PreTrainedTokenizerBase

from engine.types import TokenLogprob

UNLIKELY = -9999.0
"""OpenAI's value for a token of (almost) no probability; JSON has no infinity."""

_FALLBACK = re.compile(r"<0x([0-9A-F]{2})>")


def fast_tokenizer(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """The `tokenizers` object inside. Raises ValueError for a tokenizer that is pure Python."""
    inner = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(inner, Tokenizer):
        raise ValueError(
            f"{type(tokenizer).__name__} is no fast tokenizer (tokenizer.json), which serving needs"
        )
    return inner


class TokenTable:
    """The bytes and the text of single tokens, special ones included."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        inner = fast_tokenizer(tokenizer)
        self._tokenizer = inner
        self._added = {i: str(token.content) for i, token in inner.get_added_tokens_decoder().items()}
        self._byte_level = isinstance(inner.decoder, ByteLevel)
        self._byte_fallback = "ByteFallback" in repr(inner.decoder)
        self._byte_of = _bytes_of_characters()
        self._keys: dict[int, str] = {}  # of the ids asked for: scoring asks for the same ones over and over

    def bytes(self, token_id: int) -> bytes:
        """The bytes that the token stands for; none for an id that the tokenizer does not have."""
        if token_id in self._added:
            return self._added[token_id].encode()
        token = self._tokenizer.id_to_token(token_id)
        if token is None:
            return b""
        if self._byte_level and all(character in self._byte_of for character in token):
            return bytes(self._byte_of[character] for character in token)
        if self._byte_fallback and (match := _FALLBACK.fullmatch(token)):
            return bytes([int(match[1], 16)])
        return token.replace("\u2581", " ").encode()  # SentencePiece's mark of a space

    def text(self, token_id: int) -> str:
        """The token as text; half a character shows as U+FFFD."""
        return self.bytes(token_id).decode("utf-8", "replace")

    def key(self, token_id: int) -> str:
        """The token as OpenAI's completions name it: text, or `bytes:\\xe2\\x82` for half a character."""
        known = self._keys.get(token_id)
        return self._keys.setdefault(token_id, self._key(token_id)) if known is None else known

    def _key(self, token_id: int) -> str:
        raw = self.bytes(token_id)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _bytes_of_characters() -> dict[str, int]:
    """Byte-level BPE writes each byte as one printable character: the 94 + 94 printable Latin-1
    ones as themselves, the others, in order, from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(rest)}


def completion_logprobs(
    table: TokenTable,
    ids: Sequence[int],
    logprobs: Sequence[TokenLogprob | None],
    offsets: Sequence[int],
    *,
    top: int | None = None,
    as_ids: bool = False,
) -> dict[str, Any]:
    """The shape of /v1/completions. The token itself is always among its `top_logprobs`.

    `logprobs[i]` is None for the first token of a prompt. `offsets` in characters of the choice's text.
    `top`: how many of the likely tokens to tell, if not all. `as_ids`: name tokens by their ids.
    """
    name = token_id_name if as_ids else table.key
    tops: list[dict[str, float] | None] = []
    for logprob in logprobs:
        if logprob is None:
            tops.append(None)
            continue
        likely = {name(token): max(value, UNLIKELY) for token, value in logprob.top[:top]}
        tops.append(likely | {name(logprob.token_id): max(logprob.logprob, UNLIKELY)})
    return {
        "tokens": [name(token_id) for token_id in ids],
        "token_logprobs": [None if lp is None else max(lp.logprob, UNLIKELY) for lp in logprobs],
        "top_logprobs": tops,
        "text_offset": list(offsets),
    }


def token_id_name(token_id: int) -> str:
    """A token as vLLM's `return_tokens_as_token_ids` names it."""
    return f"token_id:{token_id}"


def prompt_logprobs(
    table: TokenTable, logprobs: Sequence[TokenLogprob | None], top: int
) -> list[dict[str, dict[str, Any]] | None]:
    """vLLM's `prompt_logprobs`: for each token of the prompt, by token id, its own and the `top` likeliest.

    `rank` counts from 1; it is null for a token that is not among the likeliest. The first is None.
    """
    return [None if logprob is None else _ranked(table, logprob, top) for logprob in logprobs]


def _ranked(table: TokenTable, logprob: TokenLogprob, top: int) -> dict[str, dict[str, Any]]:
    def entry(token_id: int, value: float, rank: int | None) -> dict[str, Any]:
        return {"logprob": max(value, UNLIKELY), "rank": rank, "decoded_token": table.text(token_id)}

    likely = {
        str(token): entry(token, value, rank) for rank, (token, value) in enumerate(logprob.top[:top], 1)
    }
    own = str(logprob.token_id)
    return {own: likely.pop(own, None) or entry(logprob.token_id, logprob.logprob, None)} | likely


def chat_logprobs(
    table: TokenTable, logprobs: Sequence[TokenLogprob], *, as_ids: bool = False
) -> dict[str, Any]:
    """The shape of /v1/chat/completions. `as_ids`: name tokens by their ids."""
    return {"content": [_chat_token(table, logprob, as_ids) for logprob in logprobs], "refusal": None}


def _chat_token(table: TokenTable, logprob: TokenLogprob, as_ids: bool) -> dict[str, Any]:
    def entry(token_id: int, value: float) -> dict[str, Any]:
        raw = table.bytes(token_id)
        name = token_id_name(token_id) if as_ids else table.text(token_id)
        return {"token": name, "logprob": max(value, UNLIKELY), "bytes": list(raw)}

    top = [entry(token_id, value) for token_id, value in logprob.top]
    return {**entry(logprob.token_id, logprob.logprob), "top_logprobs": top}
