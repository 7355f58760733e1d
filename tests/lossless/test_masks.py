"""Grammars, allowed_token_ids and bad_words change the target's law; speculation changes nothing of it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import msgspec
import pytest
import torch
from lossless.branches import assert_same_law, output_law
from lossless.chi_square import ALPHA, p_value
from lossless.coupled import EVERY_SPECULATION, spec
from lossless.law import ends, token_law
from lossless.masked import LETTERS, Rules, masked_engine, masked_law
from lossless.toys import different, disjoint, run, tokens_of, twins

import engine.speculation.verifier
from engine.constraints import SLOW, STUCK, Constraint
from engine.core import Engine
from engine.grammar import Matcher
from engine.speculation.drafters.base import RowDraft
from engine.speculation.drafters.model import ModelDrafter
from engine.speculation.noise import GumbelNoise, RandomSource
from engine.types import GenerateRequest, InvalidRequest, SamplingParams, SpeculationParams

PAIR = different(4)
EOS = 3
PROMPT = (0, 1, 2, 0, 1)

RULES = {
    "star": Rules(4, EOS, "a*b?c*"),
    "ends by itself": Rules(4, EOS, "(ab|ba|c)(ac|b)"),
    "empty or not": Rules(4, EOS, "(abc)?"),
    "any": Rules(4, EOS, "[abc]*"),
    "words": Rules(4, EOS, bad=((0, 1), (2,), (1, 1, 0))),
    "allowed": Rules(4, EOS, allowed=(0, 2)),
    "all": Rules(4, EOS, "[ab]*c[abc]*", allowed=(0, 1, 2, 3), bad=((0, 0), (2, 1))),
}
SPECULATIONS = (
    SpeculationParams(drafter="none"),
    *(spec(drafter, sl=sl) for drafter in ("model", "ngram") for sl in (1, 2)),
)


def _asked(
    rules: Rules, speculation: SpeculationParams, name: str = "r", **params: object
) -> GenerateRequest:
    return GenerateRequest(id=name, prompt_ids=PROMPT, params=rules.params(**params), speculation=speculation)


def check_law(
    rules: Rules, speculation: SpeculationParams, masked: bool = True, pair: object = PAIR, **params: object
) -> None:
    """Every branch of rejection sampling against the law under the rules."""
    asked = _asked(rules, speculation, **{"max_tokens": 4, "sampling_method": "rejection", **params})
    width = 64

    def build(random: RandomSource) -> Engine:
        return masked_engine(pair, EOS, random=random, mask_drafts=masked, rows=width, blocks=width * 6)  # type: ignore[arg-type]

    expected = masked_law(pair.target, PROMPT, asked.params, rules)  # type: ignore[attr-defined]
    assert_same_law(output_law(build, [asked], width), {(output,): p for output, p in expected.items()})


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("masked", [True, False], ids=["masked", "free"])
def test_the_law_of_unseeded_sampling(name: str, masked: bool):
    for speculation in SPECULATIONS if masked else (spec("model", sl=1), spec("model", sl=2)):
        check_law(RULES[name], speculation, masked)


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0.6, "top_k": 2},
        {"top_p": 0.7},
        {"min_p": 0.3},
        {"logit_bias": {0: 1.5, 2: -100.0}},
        {"presence_penalty": 0.5, "frequency_penalty": 0.25},
        {"min_tokens": 3},
        {"ignore_eos": True},
        {"ignore_eos": True, "min_tokens": 2},
        {"stop_token_ids": (2,)},
    ],
    ids=str,
)
def test_the_law_with_other_parameters(params: dict[str, object]):
    for name in ("star", "ends by itself", "all"):
        if name != "ends by itself" or "stop_token_ids" not in params:
            check_law(RULES[name], spec("model", sl=2), **params)


def test_the_law_of_pairs_that_never_or_always_agree():
    check_law(RULES["star"], spec("model", sl=2), pair=twins(4))
    # Where its target forbids a token as well, "any" always leaves one.
    check_law(RULES["any"], spec("model", sl=2), masked=False, pair=twins(4))


def _alone(rules: Rules, params: SamplingParams) -> tuple[int, ...]:
    """What the target alone says for the seed."""
    noise = GumbelNoise(PAIR.vocab, torch.device("cpu"))
    output: tuple[int, ...] = ()
    while len(output) < params.max_tokens and not rules.over(output, params):
        context = PROMPT + output
        open_ = rules.tokens(output, params)
        logits = [x if t in open_ else float("-inf") for t, x in enumerate(PAIR.target(context))]
        law = token_law(logits, PROMPT, output, params, (EOS,))
        gumbel = noise([params.seed or 0], [len(context)])[0].tolist()
        greedy = params.temperature == 0
        scores = [
            p if greedy or not p else torch.tensor(p).log().item() + g
            for p, g in zip(law, gumbel, strict=True)
        ]
        best = max((score, -t) for t, score in enumerate(scores) if law[t] > 0)[1]
        output += (-best,)
        if ends(output[-1], params, (EOS,)):
            break
    return output


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("masked", [True, False], ids=["masked", "free"])
@pytest.mark.parametrize(
    "kind",
    [
        {"temperature": 0.0},
        {"seed": 1},
        {"seed": 2, "temperature": 1.3, "top_p": 0.9, "presence_penalty": 0.4},
        {"seed": 3, "min_tokens": 2, "ignore_eos": True},
    ],
    ids=["greedy", "seeded", "filters", "min_tokens"],
)
def test_text_is_the_same_with_every_speculation(name: str, masked: bool, kind: dict[str, object]):
    rules = RULES[name]
    asked = [
        _asked(rules, speculation, str(i), **{"max_tokens": 7, **kind})
        for i, speculation in enumerate((*EVERY_SPECULATION, spec("model", sl=5), spec("ngram", sl=5)))
    ]
    events = run(masked_engine(PAIR, EOS, mask_drafts=masked, rows=64, blocks=1024), asked)
    expected = _alone(rules, asked[0].params)
    assert {tokens_of(own) for own in events.values()} == {expected}
    reasons = {own[-1].finish_reason for own in events.values()}
    ended = rules.over(expected, asked[0].params) or (expected[-1:] == (EOS,) and "ignore_eos" not in kind)
    assert reasons == {"stop" if ended else "length"}


def test_rows_without_masks_beside_rows_with_them():
    free = [
        GenerateRequest(
            id=f"free {i}",
            prompt_ids=PROMPT,
            params=SamplingParams(seed=5, max_tokens=12),
            speculation=speculation,
        )
        for i, speculation in enumerate(SPECULATIONS)
    ]
    bound = [
        _asked(RULES["all"], speculation, f"bound {i}", seed=5, max_tokens=12)
        for i, speculation in enumerate(SPECULATIONS)
    ]
    together = run(masked_engine(PAIR, EOS, rows=16), [*free, *bound])
    for own in (free, bound):
        apart = run(masked_engine(PAIR, EOS, rows=16), own)
        assert all(tokens_of(together[r.id]) == tokens_of(apart[r.id]) for r in own)
        assert len({tokens_of(apart[r.id]) for r in own}) == 1


def test_preempted_rows_resume_within_their_grammar():
    asked = [
        _asked(RULES["any"], spec("model", sl=3), str(seed), seed=seed, max_tokens=14, ignore_eos=True)
        for seed in range(4)
    ]
    tight = masked_engine(PAIR, EOS, rows=4, blocks=20)
    events = run(tight, asked)
    assert tight._scheduler.preemptions > 0
    for request in asked:
        assert tokens_of(events[request.id]) == tokens_of(
            run(masked_engine(PAIR, EOS), [request])[request.id]
        )


def test_a_grammars_end_ends_the_draft_and_the_output():
    """The draft is the target: what it is not asked for shows in what was drafted."""
    rules = Rules(4, EOS, "abcab")
    engine = masked_engine(twins(4), EOS)
    own = run(engine, [_asked(rules, spec("model", sl=7), temperature=0.0, max_tokens=20)])["r"]
    assert "".join(LETTERS[t] for t in tokens_of(own)) == "abcab"
    assert own[-1].finish_reason == "stop" and own[-1].stop_token_id is None
    # The first token is prefill's; of the four that follow, the last is drafted too, and none behind it.
    assert sum(event.drafted for event in own) == sum(event.accepted for event in own) == 4


def test_an_output_that_is_complete_before_it_begins():
    own = run(masked_engine(PAIR, EOS), [_asked(Rules(4, EOS, ""), spec("model", sl=3), max_tokens=5)])["r"]
    assert tokens_of(own) == () and [e.finish_reason for e in own] == ["stop"]


@pytest.mark.parametrize("sl", [0, 1, 5])
def test_a_request_whose_masks_leave_nothing_fails_by_name(sl: int):
    """After "ab" only "c" would do, which is not allowed: two tokens, whatever is drafted."""
    rules = Rules(4, EOS, "abc", bad=((1, 2),))
    for masked in (True, False):
        engine = masked_engine(PAIR, EOS, mask_drafts=masked)
        engine.add(_asked(rules, spec("model", sl=sl), seed=1, max_tokens=9))
        events = []
        while engine.has_work():
            events += engine.step()[0]
        assert tokens_of(events) == (0, 1)
        assert [e.finish_reason for e in events if e.finish_reason] == ["error"]
        assert events[-1].error == STUCK
        assert engine._blocks.used_blocks == 0


def test_a_grammar_that_is_slow_to_follow_ends_its_request_alone(monkeypatch: pytest.MonkeyPatch):
    engine = masked_engine(PAIR, EOS)
    free = GenerateRequest(
        id="free", prompt_ids=PROMPT, params=SamplingParams(seed=1, max_tokens=9, ignore_eos=True)
    )
    bound = _asked(RULES["any"], spec("model", sl=2), "bound", seed=1, max_tokens=9, ignore_eos=True)
    engine.add(free)
    engine.add(bound)
    events = engine.step()[0] + engine.step()[0]
    monkeypatch.setattr("engine.grammar.SLOWEST_SECONDS", -1.0)
    while engine.has_work():
        events += engine.step()[0]
    last = {event.id: event for event in events if event.finish_reason}
    assert (last["bound"].finish_reason, last["bound"].error) == ("error", SLOW)
    assert last["free"].finish_reason == "length"
    with pytest.raises(InvalidRequest, match="takes too long"):
        engine.add(_asked(RULES["any"], spec("model", sl=2), "again"))


def test_masks_that_leave_nothing_to_begin_with_are_refused():
    engine = masked_engine(PAIR, EOS)
    for rules, param in (
        (Rules(4, EOS, "ab", allowed=(1,)), "allowed_token_ids"),
        (Rules(4, EOS, allowed=(1, 2), bad=((1,), (2,))), "allowed_token_ids"),
        (Rules(4, EOS, bad=((0,), (1,), (2,), (3,))), "bad_words"),
    ):
        with pytest.raises(InvalidRequest) as caught:
            engine.add(_asked(rules, spec("model", sl=1)))
        assert caught.value.param == param
    assert not engine.has_work()


def test_a_grammar_of_another_vocabulary_is_refused():
    engine = masked_engine(PAIR, EOS)
    with pytest.raises(InvalidRequest, match="not one that was compiled for this model"):
        engine.add(_asked(Rules(6, 5, "ab"), spec("model", sl=1)))
    engine._parts.grammars = None
    with pytest.raises(InvalidRequest, match="not available"):
        engine.add(_asked(RULES["any"], spec("model", sl=1)))


def sampled(rules: Rules, count: int = 2000) -> float:
    """p-value of as many outputs by the shipped draws."""
    asked = [
        _asked(rules, spec("model", sl=2), str(seed), seed=seed, max_tokens=4, sampling_method="rejection")
        for seed in range(count)
    ]
    events = run(masked_engine(PAIR, EOS, rows=500, blocks=3000), asked)
    counts = Counter(tokens_of(own) for own in events.values())
    return p_value(counts, masked_law(PAIR.target, PROMPT, asked[0].params, rules))


@pytest.mark.parametrize("name", ["star", "words"])
def test_the_shipped_draws_have_the_law(name: str):
    assert sampled(RULES[name]) > ALPHA


# ---- faults that these checks must find


def test_a_draft_whose_law_is_not_the_one_it_drew_from_is_found(monkeypatch: pytest.MonkeyPatch):
    """Masked tokens, judged as if the draft had drawn them from its free law."""
    shipped = ModelDrafter._choose

    def choose(self: ModelDrafter, logits: torch.Tensor, rows: list[Any], drafts: list[RowDraft]) -> Any:
        tokens, able = shipped(self, logits, rows, drafts)
        for draft, law in zip(drafts, logits.softmax(-1), strict=True):
            if draft.laws:
                draft.laws[-1] = law
        return tokens, able

    monkeypatch.setattr(ModelDrafter, "_choose", choose)
    with pytest.raises(AssertionError):
        assert sampled(RULES["star"]) > ALPHA
    with pytest.raises(AssertionError):
        check_law(RULES["star"], spec("model", sl=1))


def test_a_mask_of_the_first_position_alone_is_found(monkeypatch: pytest.MonkeyPatch):
    shipped = engine.speculation.verifier.Place
    monkeypatch.setattr(engine.speculation.verifier, "Place", lambda seq, drafted: shipped(seq, []))
    with pytest.raises(AssertionError):
        check_law(RULES["star"], spec("model", sl=2))
    with pytest.raises(AssertionError):
        check_law(RULES["words"], spec("model", sl=2))


def test_a_matcher_that_is_not_rolled_back_is_found(monkeypatch: pytest.MonkeyPatch):
    def walk(self: Matcher, tokens: list[int]) -> bool:
        for token in tokens[len(self._walked) :]:  # what differs stays
            if self._here() is None or not self._matcher.accept_token(token):
                return False
            self._walked.append(token)
        return True

    monkeypatch.setattr(Matcher, "_walk", walk)
    with pytest.raises((AssertionError, IndexError)):
        check_law(RULES["star"], spec("model", sl=2), masked=False)


def test_masks_that_are_applied_to_the_draft_alone_are_found(monkeypatch: pytest.MonkeyPatch):
    shipped = engine.speculation.verifier.scaled_logits

    def free(*given: object, **named: object) -> torch.Tensor:
        return shipped(*given, **named, masks=False)  # type: ignore[arg-type]

    monkeypatch.setattr(engine.speculation.verifier, "scaled_logits", free)
    with pytest.raises(AssertionError):
        check_law(RULES["words"], spec("model", sl=1))


def test_a_draft_that_is_cut_before_the_forbidden_token_is_found(monkeypatch: pytest.MonkeyPatch):
    """A token that was sampled must be judged: without it the law of the others is another."""
    shipped = Constraint.trim

    def trim(self: Constraint, seq: object, draft: object) -> None:
        before = len(draft.tokens)  # type: ignore[attr-defined]
        shipped(self, seq, draft)  # type: ignore[arg-type]
        if len(draft.tokens) < before and draft.tokens:  # type: ignore[attr-defined]
            del draft.tokens[-1], draft.laws[-1]  # type: ignore[attr-defined]

    monkeypatch.setattr(Constraint, "trim", trim)
    with pytest.raises(AssertionError):
        check_law(RULES["all"], spec("model", sl=2), masked=False)


def test_requests_of_the_same_grammar_share_it_and_not_their_place():
    asked = [
        msgspec.structs.replace(_asked(RULES["star"], spec("model", sl=2), str(i), seed=i, max_tokens=8))
        for i in range(4)
    ]
    together = masked_engine(PAIR, EOS)
    events = run(together, asked)
    for request in asked:
        assert tokens_of(events[request.id]) == _alone(RULES["star"], request.params)
    assert len(together._parts.grammars._kept) == 1  # type: ignore[union-attr]


def test_disjoint_supports_and_a_grammar():
    """The draft proposes only what its target forbids, and the grammar forbids what both would say."""
    pair = disjoint(5)
    rules = Rules(5, 4, "[abcd]*")
    for sl in (1, 3):
        asked = _asked(rules, spec("model", sl=sl), seed=3, max_tokens=8)
        own = run(masked_engine(pair, 4, mask_drafts=False), [asked])["r"]
        plain = run(masked_engine(pair, 4), [msgspec.structs.replace(asked, speculation=SPECULATIONS[0])])[
            "r"
        ]
        assert tokens_of(own) == tokens_of(plain)
