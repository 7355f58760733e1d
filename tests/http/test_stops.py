"""Where a text ends: stop strings across tokens and blocks, EOS, stop ids, half characters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import pytest
from fake_engine import FakeEngine
from http_support import events_of, joined
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from server.detokenize import TextStream
from server.logprobs import TokenTable

Ids = Callable[[str], list[int]]


async def both(client: httpx.AsyncClient, **fields: Any) -> tuple[dict[str, Any], list[Any]]:
    """The answer whole, and as stream; both must say the same."""
    body = {"model": "tiny", "prompt": "hello", "max_tokens": 60, "logprobs": 0, "return_token_ids": True}
    whole = (await client.post("/v1/completions", json=body | fields)).json()
    options = {"stream": True, "stream_options": {"include_usage": True}}
    *chunks, last, done = events_of(await client.post("/v1/completions", json=body | options | fields))
    choices = [chunk["choices"][0] for chunk in chunks]
    only = whole["choices"][0]
    assert "".join(choice["text"] for choice in choices) == only["text"]
    assert joined(choice["token_ids"] for choice in choices) == only["token_ids"]
    assert choices[-1]["finish_reason"] == only["finish_reason"]
    assert last["usage"] == whole["usage"]
    assert chunks[-1]["speculation"] == whole["speculation"]
    assert done == "[DONE]"
    return whole, choices


@pytest.mark.parametrize("block", [1, 2, 3, 5, 16])
async def test_stop_string_across_tokens_and_blocks(
    client: httpx.AsyncClient, engine: FakeEngine, ids: Ids, block: int
) -> None:
    engine.block = block
    engine.answer = ids("ab stopper at the end") * 2
    kept = ids("ab ")
    whole, choices = await both(client, stop=["zzz", "stopper"])
    choice = whole["choices"][0]
    assert choice["text"] == "ab " and choice["finish_reason"] == "stop"
    assert not any("s" in part["text"] for part in choices)  # no part of it leaks
    assert choice["token_ids"] == kept and len(choice["logprobs"]["tokens"]) == len(kept)
    assert whole["usage"]["completion_tokens"] == len(kept)
    assert whole["speculation"]["accepted"] <= len(kept) - 1
    assert whole["speculation"]["mean_emitted"] <= len(kept) - 1
    assert engine.aborts == 2  # the engine must not go on


async def test_accepted_is_cut_with_the_tokens(
    client: httpx.AsyncClient, engine: FakeEngine, ids: Ids
) -> None:
    engine.block = 8
    engine.answer = ids("x") + ids("q!rstuvw") + ids("later")
    whole, _ = await both(client, stop="!")
    assert whole["choices"][0]["text"] == "xq"
    assert (whole["speculation"]["iterations"], whole["speculation"]["accepted"]) == (1, 1)
    details = whole["usage"]["completion_tokens_details"]
    assert details == {"accepted_prediction_tokens": 1, "rejected_prediction_tokens": 7}


async def test_include_stop(client: httpx.AsyncClient, engine: FakeEngine, ids: Ids) -> None:
    engine.answer = ids("ab stopper")
    whole, _ = await both(client, stop="stop", include_stop_str_in_output=True)
    assert whole["choices"][0]["text"] == "ab stop"


async def test_what_could_have_been_a_stop_comes_in_the_end(
    client: httpx.AsyncClient, engine: FakeEngine, ids: Ids
) -> None:
    engine.answer = ids("go st")
    whole, choices = await both(client, stop="stop")
    assert whole["choices"][0]["text"] == "go st" and whole["choices"][0]["finish_reason"] == "length"
    assert choices[-1]["text"].endswith("st")


async def test_stop_right_away_leaves_nothing(
    client: httpx.AsyncClient, engine: FakeEngine, ids: Ids
) -> None:
    engine.answer = ids("stop it")
    whole, _ = await both(client, stop="stop")
    assert whole["choices"][0]["text"] == "" and whole["usage"]["completion_tokens"] == 0


async def test_min_tokens_holds_for_stop_strings(
    client: httpx.AsyncClient, engine: FakeEngine, ids: Ids
) -> None:
    engine.answer = ids("a.b.c.d.")
    whole, _ = await both(client, stop=".", min_tokens=4)
    assert whole["choices"][0]["text"] == "a.b.c" and whole["usage"]["completion_tokens"] == 5


async def test_eos_has_no_text_but_counts(client: httpx.AsyncClient, engine: FakeEngine, ids: Ids) -> None:
    engine.answer = [*ids("one"), 0, *ids("two")]
    whole, _ = await both(client, skip_special_tokens=False)
    assert whole["choices"][0]["text"] == "one"
    assert whole["choices"][0]["token_ids"] == [*ids("one"), 0]
    whole, _ = await both(client, skip_special_tokens=False, include_stop_str_in_output=True)
    assert whole["choices"][0]["text"] == "one<|end|>"
    whole, _ = await both(client, ignore_eos=True)
    assert whole["choices"][0]["text"] == "onetwo"


async def test_stop_token_ids(client: httpx.AsyncClient, engine: FakeEngine, ids: Ids) -> None:
    engine.answer = ids("x!y")
    whole, _ = await both(client, stop_token_ids=ids("!"))
    assert whole["choices"][0]["text"] == "x" and whole["choices"][0]["finish_reason"] == "stop"
    whole, _ = await both(client, stop_token_ids=ids("!"), include_stop_str_in_output=True)
    assert whole["choices"][0]["text"] == "x!"


@pytest.mark.parametrize("block", [1, 2, 7])
async def test_half_characters_are_held_back(
    client: httpx.AsyncClient, engine: FakeEngine, ids: Ids, block: int
) -> None:
    engine.block = block
    engine.answer = ids("a€😀é!")
    _, choices = await both(client)
    assert "".join(choice["text"] for choice in choices) == "a€😀é!"
    assert not any("\ufffd" in choice["text"] for choice in choices)


async def test_a_half_character_at_the_end_is_flushed(
    client: httpx.AsyncClient, engine: FakeEngine, ids: Ids
) -> None:
    engine.answer = ids("ok€")[:-1]
    whole, _ = await both(client)
    assert whole["choices"][0]["text"] == "ok\ufffd"


@pytest.fixture(scope="module")
def spaced() -> Tokenizer:
    """In the manner of SentencePiece: spaces are marks on words, unknown bytes have tokens of their own."""
    words = ["\u2581hello", "\u2581world", "<0xC3>", "<0xA9>", "!"]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def test_a_space_before_the_first_word_stays_if_the_text_continues(spaced: Tokenizer) -> None:
    def text(prompt_ids: list[int]) -> str:
        stream = TextStream(spaced, prompt_ids=prompt_ids)
        for token_id in (1, 4, 1, 2, 3):
            stream.push(token_id)
        stream.finish()
        return stream.text

    assert text([]) == "world! worldé"
    assert text([0]) == " world! worldé"


def test_single_tokens_of_a_byte_fallback_tokenizer(spaced: Tokenizer) -> None:
    table = TokenTable(PreTrainedTokenizerFast(tokenizer_object=spaced))
    assert [table.bytes(i) for i in range(5)] == [b" hello", b" world", b"\xc3", b"\xa9", b"!"]
    assert [table.key(1), table.key(2), table.text(2)] == [" world", "bytes:\\xc3", "\ufffd"]
    assert table.bytes(99) == b""


def read(tokenizer: PreTrainedTokenizerFast, token_ids: list[int], **options: Any) -> TextStream:
    stream = TextStream(tokenizer.backend_tokenizer, **options)
    shown = ""
    for token_id in token_ids:
        over = stream.push(token_id)
        assert stream.text.startswith(shown)  # what was safe is never taken back
        shown = stream.text[: stream.safe]
        if over:
            return stream
    stream.finish()
    assert stream.text.startswith(shown)
    return stream


@given(data=st.data(), skip=st.booleans())
def test_pieces_equal_the_decoded_whole(
    tokenizer: PreTrainedTokenizerFast, data: st.DataObject, skip: bool
) -> None:
    token_ids = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=24))
    stream = read(tokenizer, token_ids, skip_special_tokens=skip)
    assert stream.text == tokenizer.backend_tokenizer.decode(token_ids, skip_special_tokens=skip)
    assert stream.starts == sorted(stream.starts) and len(stream.starts) == len(token_ids)


@given(text=st.text("ab€", max_size=20), stops=st.lists(st.text("ab€", min_size=1, max_size=4), max_size=4))
def test_stops_are_found_as_if_characters_came_one_by_one(
    tokenizer: PreTrainedTokenizerFast, text: str, stops: list[str]
) -> None:
    token_ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    expected = text
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            expected = text[: end - max(map(len, found))]
            break
    stream = read(tokenizer, token_ids, stop=stops)
    assert stream.text == expected
    assert stream.stopped == (expected != text)
