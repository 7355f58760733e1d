"""Masks of one request: lists of tokens, words never completed, ends; and where drafts stop for them."""

from __future__ import annotations

import pytest
import torch
from lossless.masked import Rules, compiled, masked_engine, vocabulary
from lossless.toys import different, run, tokens_of, twins

from engine.constraints import Constraint, constraint_of, tokens_allowed
from engine.grammar import Grammars
from engine.sampling import Place, plain, scaled_logits, unadjusted
from engine.sequence import Sequence
from engine.speculation.drafters.base import Drafted, RowDraft
from engine.speculation.drafters.model import ModelDrafter
from engine.types import GenerateRequest, InvalidRequest, SamplingParams, SpeculationParams, TokenSet
from engine.validate import token_set
from engine.words import allows

VOCAB, EOS = 70, 69
INF = float("inf")


def sequence(
    output: tuple[int, ...] = (),
    regex: str | None = None,
    allowed: tuple[int, ...] | None = None,
    **params: object,
) -> Sequence:
    """With five letters and EOS behind them where there is a regex, else over the whole vocabulary."""
    vocab, eos = (6, 5) if regex is not None else (VOCAB, EOS)
    grammar = None if regex is None else compiled(regex, vocab, eos)
    listed = None if allowed is None else token_set(allowed, "allowed_token_ids", vocab)
    asked = SamplingParams(grammar=grammar, allowed_token_ids=listed, **params)  # type: ignore[arg-type]
    grammars = Grammars(vocabulary(6, 5), (5,))
    seq = Sequence(
        request=GenerateRequest(id="r", prompt_ids=(1, 2), params=asked),
        seed=0,
        coupled=True,
        drafter="none",
        policy="static",
        options=None,
        max_sl=8,
        constraint=constraint_of(asked, grammars, (eos,), vocab),
    )
    seq.tokens.extend(output)
    if seq.constraint is not None:
        seq.constraint.commit(output)
    return seq


def constraint(seq: Sequence) -> Constraint:
    assert seq.constraint is not None
    return seq.constraint


def open_(seq: Sequence, *drafted: int) -> set[int]:
    outlook = constraint(seq).at(seq, drafted)
    assert outlook.state == "open"
    vocab = 6 if seq.params.grammar is not None else VOCAB
    return {token for token in range(vocab) if allows(outlook.words, token)}


def test_a_request_without_masks_has_no_constraint():
    assert sequence().constraint is None and plain(sequence())
    assert not plain(sequence(allowed=(1,))) and unadjusted(sequence(allowed=(1,)))


def test_allowed_tokens():
    assert open_(sequence(allowed=(0, 31, 32, 63, 64, EOS))) == {0, 31, 32, 63, 64, EOS}
    assert open_(sequence(allowed=(3, EOS), min_tokens=1)) == {3}
    assert open_(sequence(allowed=(3, EOS), min_tokens=1), 3) == {3, EOS}


@pytest.mark.parametrize("last", [0, 31, 32, 63, 69])
def test_words_are_not_completed_across_output_and_draft(last: int):
    every = {*range(VOCAB)}
    word = (7, 8, last)
    assert open_(sequence(bad_words=(word,))) == every
    assert open_(sequence((7,), bad_words=(word,)), 8) == every - {last}
    assert open_(sequence((7, 8), bad_words=(word,))) == every - {last}
    assert open_(sequence((5, 7, 8), bad_words=(word, (9,)))) == every - {last, 9}
    assert open_(sequence(bad_words=(word,)), 7, 8) == every - {last}
    assert open_(sequence(bad_words=(word,)), 8, 7) == every


def test_the_prompt_begins_no_bad_word():
    assert open_(sequence(bad_words=((2, 3),))) == {*range(VOCAB)}  # the prompt ends with 2


def test_the_end_of_a_grammar():
    for params in ({}, {"ignore_eos": True}, {"min_tokens": 9}, {"ignore_eos": True, "min_tokens": 9}):
        assert (
            constraint(sequence((0, 1), "ab", **params)).at(sequence((0, 1), "ab", **params), ()).state
            == "over"
        )
    seq = sequence((0,), "ab*")
    assert open_(seq) == {1, 5}
    assert open_(sequence((0,), "ab*", ignore_eos=True)) == {1}
    assert open_(sequence((0,), "ab*", min_tokens=2)) == {1}
    assert open_(sequence((0,), "ab*", min_tokens=2), 1) == {1, 5}
    assert constraint(seq).at(seq, (5,)).state == "closed"
    seq = sequence((0,), "ab*", allowed=(0, 2))  # complete, and nothing that may go on
    assert constraint(seq).at(seq, ()).state == "over"
    seq = sequence((0,), "abc*", allowed=(0, 2))
    assert constraint(seq).at(seq, ()).state == "stuck"


@pytest.mark.parametrize(
    ("drafted", "kept"),
    [((0, 1, 1), 3), ((0, 2, 1), 2), ((1, 1, 1), 1), ((0, 1, 5, 1), 3), ((0, 3, 3), 2), ((0, 1, 4, 0), 3)],
)
def test_drafts_are_trimmed_behind_the_first_forbidden_token(drafted: tuple[int, ...], kept: int):
    seq = sequence((), "ab*d?")
    laws = [torch.full((6,), float(k)) for k in range(len(drafted))]
    draft = RowDraft(list(drafted), laws)
    constraint(seq).trim(seq, draft)
    assert draft.tokens == [*drafted[:kept]] and [float(law[0]) for law in draft.laws] == [*range(kept)]


def test_places_beyond_reach_have_no_mask_when_verifying_and_no_law_when_drafting():
    seq = sequence((), "ab")
    logits = torch.arange(24.0, dtype=torch.float64).reshape(4, 6)
    places = [Place(seq, []), Place(seq, [0]), Place(seq, [0, 1]), Place(seq, [0, 3])]
    verified = scaled_logits(logits, places, (5,))
    assert torch.equal(verified[2:], logits[2:])
    assert verified[0].isfinite().nonzero().flatten().tolist() == [0]
    assert verified[1].isfinite().nonzero().flatten().tolist() == [1]
    drafted = scaled_logits(logits, places, (5,), drafting=True)
    assert torch.equal(drafted[:2], verified[:2]) and bool((drafted[2:] == -INF).all())
    assert torch.equal(scaled_logits(logits, places, (5,), masks=False), logits)
    assert torch.equal(logits, torch.arange(24.0, dtype=torch.float64).reshape(4, 6))  # not changed


def test_rows_without_masks_keep_their_logits_beside_others():
    logits = torch.randn(2, VOCAB, generator=torch.Generator().manual_seed(0))
    mixed = scaled_logits(logits, [Place(sequence(), []), Place(sequence(allowed=(3,)), [])], (EOS,))
    assert torch.equal(mixed[0], logits[0])
    assert mixed[1].isfinite().nonzero().flatten().tolist() == [3]


def test_bits_become_a_mask():
    words = [constraint(sequence(allowed=ids)).at(sequence(), ()).words for ids in ((0, 69), (33,))]
    mask = tokens_allowed(words, VOCAB, torch.device("cpu"))
    assert mask.shape == (2, VOCAB) and mask.nonzero().tolist() == [[0, 0], [0, 69], [1, 33]]


def test_other_rows_keep_the_devices_loop(monkeypatch: pytest.MonkeyPatch):
    """With a loop, rows with masks draft under them on the host only if that is asked for."""
    taken: list[list[str]] = []

    class Loop:
        def takes(self, rows: list[Sequence]) -> bool:
            return True

        def begin(self, rows: list[Sequence], limits: list[int]) -> object:
            taken.append([row.id for row in rows])
            return lambda: Drafted([RowDraft(stop_reason="drafter") for _ in rows])

    rules = Rules(4, 3, "[abc]*")
    for masked, expected in ((True, {"free"}), (False, {"free", "bound"})):
        taken.clear()
        engine = masked_engine(twins(4), 3, mask_drafts=masked)
        drafter = engine._parts.drafters["model"]
        assert isinstance(drafter, ModelDrafter)
        drafter._loop = Loop()  # type: ignore[assignment]
        asked = SpeculationParams(drafter="model", policy="static", options={"sl": 2})
        kind = {"seed": 1, "max_tokens": 6, "ignore_eos": True}
        requests = [
            GenerateRequest(id="bound", prompt_ids=(0, 1), params=rules.params(**kind), speculation=asked),
            GenerateRequest(id="free", prompt_ids=(0, 1), params=SamplingParams(**kind), speculation=asked),  # type: ignore[arg-type]
        ]
        events = run(engine, requests)
        assert {name for names in taken for name in names} == expected
        assert (sum(event.drafted for event in events["bound"]) > 0) == masked
        alone = run(masked_engine(twins(4), 3), requests)
        assert all(tokens_of(events[r.id]) == tokens_of(alone[r.id]) for r in requests)


def test_a_head_of_fewer_tokens_drafts_what_it_can():
    """The draft knows two of the letters, and stops where the grammar wants another."""
    pair = different(4)
    whole = pair.draft
    assert whole is not None
    few = type(pair)(4, pair.target, lambda context: [*whole(context)[:2], -INF, -INF])
    rules = Rules(4, 3, "(ab|c)*")
    for seed in range(6):
        texts = set()
        for drafter in ("none", "model"):
            asked = GenerateRequest(
                id="r",
                prompt_ids=(0, 1, 2),
                params=rules.params(seed=seed, max_tokens=9),
                speculation=SpeculationParams(drafter=drafter, policy="static", options={"sl": 4}),
            )
            texts.add(tokens_of(run(masked_engine(few, 3), [asked])["r"]))
        assert len(texts) == 1


def test_the_ngram_drafter_proposes_nothing_that_is_forbidden():
    rules = Rules(4, 3, "(abc)*")
    asked = GenerateRequest(
        id="r",
        prompt_ids=(0, 1, 0, 1, 0, 1),
        params=rules.params(seed=1, max_tokens=12, ignore_eos=True),
        speculation=SpeculationParams(drafter="ngram", policy="static", options={"sl": 5}),
    )
    events = run(masked_engine(different(4), 3), [asked])["r"]
    assert tokens_of(events) == (0, 1, 2) * 4
    assert sum(event.drafted for event in events) == sum(event.accepted for event in events) > 0


def test_what_is_no_mask_is_refused():
    engine = masked_engine(different(4), 3)
    for params, param in (
        ({"allowed_token_ids": TokenSet(b"\0")}, "allowed_token_ids"),
        ({"allowed_token_ids": TokenSet(b"\x11")}, "allowed_token_ids"),
        ({"allowed_token_ids": (1,)}, "allowed_token_ids"),
        ({"allowed_token_ids": TokenSet(b"\x08"), "min_tokens": 1}, "allowed_token_ids"),
        ({"bad_words": ((),)}, "bad_words"),
        ({"bad_words": ((0, 9),)}, "bad_words"),
        ({"bad_words": ((0,),) * 3000}, "bad_words"),
        ({"grammar": "root"}, "grammar"),
    ):
        with pytest.raises(InvalidRequest) as caught:
            engine.add(GenerateRequest(id="r", prompt_ids=(0,), params=SamplingParams(**params)))  # type: ignore[arg-type]
        assert caught.value.param == param, params
