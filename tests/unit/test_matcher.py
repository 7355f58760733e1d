"""A sequence's place in its grammar: walked along drafts, taken back, and moved on."""

from __future__ import annotations

import random
import threading
import time

import numpy as np
import pytest
import xgrammar

from engine.grammar import Allowed, Grammars, Matcher
from engine.reading import Unread
from engine.types import CompiledGrammar, InvalidRequest
from engine.words import allows, words_of

TEXTS = [b"a", b"b", b"ab", b"c", b"\xffeos", b"\xffother", b""]
VOCAB = 40  # the model's, padded beyond the tokenizer's
EOS = 4
INFO = xgrammar.TokenizerInfo(TEXTS, xgrammar.VocabType.RAW, vocab_size=VOCAB, stop_token_ids=[EOS])


def compiled(regex: str) -> CompiledGrammar:
    grammar = xgrammar.GrammarCompiler(INFO, max_threads=1).compile_regex(regex)
    return CompiledGrammar(regex, grammar.serialize_json().encode())


def matcher(regex: str, eos: tuple[int, ...] = (EOS,)) -> Matcher:
    return Grammars(INFO, eos).matcher(compiled(regex))


def tokens(allowed: Allowed | None) -> set[int]:
    assert allowed is not None
    return {token for token in range(VOCAB) if allows(allowed.words, token)}


def test_what_may_follow():
    one = matcher("ab*c?")
    assert tokens(one.after([])) == {0, 2}
    assert tokens(one.after([0])) == {1, 3, EOS}
    assert tokens(one.after([2, 1])) == {1, 3, EOS}
    assert tokens(one.after([2, 3])) == {EOS}
    assert [one.after(drafted).complete for drafted in ([], [0], [2, 3])] == [False, True, True]  # type: ignore[union-attr]


def test_nothing_follows_what_is_forbidden_or_after_the_end(capfd: pytest.CaptureFixture[str]):
    one = matcher("ab*")
    for drafted in ([1], [0, 0], [0, 3, 1], [0, EOS, 1], [0, EOS], [5], [6], [VOCAB - 1]):
        assert one.after(drafted) is None
    assert tokens(one.after([0])) == {1, EOS}  # and it goes on as if it had not been asked
    assert capfd.readouterr().err == ""  # xgrammar is not asked for what its mask forbids


def test_the_order_of_questions_does_not_matter():
    drafted = [0, 1, 1, 3]
    forward, backward, mixed = matcher("ab*c?"), matcher("ab*c?"), matcher("ab*c?")
    expected = [tokens(forward.after(drafted[:k])) for k in range(5)]
    assert [tokens(backward.after(drafted[:k])) for k in (4, 3, 2, 1, 0)] == expected[::-1]
    mixed.after([2, 1, 1])
    mixed.after([0, 1, 3])
    assert [tokens(mixed.after(drafted[:k])) for k in (2, 0, 4, 1, 3)] == [
        expected[k] for k in (2, 0, 4, 1, 3)
    ]


@pytest.mark.parametrize("accepted", range(4))
def test_commit_takes_back_what_was_rejected(accepted: int):
    one, fresh = matcher("(a|b)*c"), matcher("(a|b)*c")
    drafted = [0, 1, 2]
    for k in range(4):
        one.after(drafted[:k])
    new = [*drafted[:accepted], 1]
    one.commit(new)
    fresh.commit(new)
    assert tokens(one.after([])) == tokens(fresh.after([])) == {0, 1, 2, 3}
    assert tokens(one.after([3])) == {EOS}
    one.commit([3])
    assert one.after([0]) is None and tokens(one.after([])) == {EOS}


def test_drafts_are_masked_once(monkeypatch: pytest.MonkeyPatch):
    """What was filled while drafting is not filled again to verify, nor what stands after the commit."""
    fills = []
    shipped = xgrammar.GrammarMatcher.fill_next_token_bitmask

    def fill(self: xgrammar.GrammarMatcher, words: np.ndarray) -> bool:
        fills.append(1)
        return bool(shipped(self, words))

    monkeypatch.setattr(xgrammar.GrammarMatcher, "fill_next_token_bitmask", fill)
    one = matcher("(a|b)*")
    for k in range(3):
        one.after([0, 1][:k])
    for k in range(3):
        one.after([0, 1][:k])
    one.commit([0, 1])
    one.after([])
    assert len(fills) == 3


def test_every_end_of_the_target_ends_a_text():
    assert tokens(matcher("a", (EOS, 5)).after([0])) == {EOS, 5}


def test_words_and_bits():
    for chosen in ([], [0], [31], [32, 63], [0, 1, 39]):
        words = words_of(chosen, VOCAB)
        assert words.dtype == np.int32 and words.shape == (2,)
        assert (
            [token for token in range(64) if allows(words, token)] == sorted(chosen)
            if chosen
            else not words.any()
        )


def test_grammars_are_kept_by_key_within_their_bound():
    kept = Grammars(INFO, (EOS,))
    first = compiled("a{1,50}b")
    kept.matcher(first)
    kept.matcher(CompiledGrammar(first.key, b"not read again"))
    tight = Grammars(INFO, (EOS,), most_bytes=1)
    tight.matcher(first)
    tight.matcher(compiled("b"))
    with pytest.raises(InvalidRequest):
        tight.matcher(CompiledGrammar(first.key, b"read again"))
    with pytest.raises(Unread) as caught:
        tight.matcher(CompiledGrammar(first.key, b""))
    assert caught.value.shelf is tight and caught.value.key == first.key
    tight.keep(first.key, tight.read(first.data))
    assert tokens(tight.matcher(CompiledGrammar(first.key, b"")).after([])) == {0, 2}


def test_others_go_on_while_a_large_one_is_read():
    """Reading lets go of the GIL: else it would hold up the engine from a thread as well."""
    source = random.Random(0)
    texts = [bytes(source.choices(range(256), k=source.randint(1, 8))) for _ in range(20000)]
    info = xgrammar.TokenizerInfo([b"\\xffeos", *texts], xgrammar.VocabType.RAW, stop_token_ids=[0])
    named = {f"p{i}": {"type": "string", "pattern": f"^[^a]{{1,30}}x{i}$"} for i in range(8)}
    schema = {"type": "object", "properties": named}
    grammar = xgrammar.GrammarCompiler(info, max_threads=1).compile_json_schema(schema)
    large = CompiledGrammar("large", grammar.serialize_json().encode())
    gaps, begin, kept = [], time.perf_counter(), Grammars(info, (0,))
    reading = threading.Thread(target=kept.read, args=(large.data,))
    reading.start()
    last = begin
    while reading.is_alive():
        time.sleep(0.0005)
        gaps.append(time.perf_counter() - last)
        last += gaps[-1]
    assert last - begin > 0.05 and max(gaps) < 0.7 * (last - begin)


@pytest.mark.parametrize("data", [b" ", b"{}", b"\xff", b'{"__VERSION__": "v0"}'])
def test_what_is_no_grammar_is_refused(data: bytes):
    with pytest.raises(InvalidRequest) as caught:
        Grammars(INFO, (EOS,)).matcher(CompiledGrammar("key", data))
    assert caught.value.param == "grammar"
