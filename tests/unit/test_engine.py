"""The engine around tiny random models: whatever runs beside, before or behind a request, its tokens stay."""

import copy
import random
from typing import Any

import pytest
import torch
from tiny_engine import (
    DRAFTS,
    KINDS,
    MIN_BLOCKS,
    SETTINGS,
    VOCAB,
    alone,
    ask,
    check_acceptance,
    gpt2,
    llama,
    make_engine,
    mixed,
    near,
    plain_greedy,
    plain_logits,
    prompt,
    run,
    static,
)
from transformers import LlamaForCausalLM

from engine.parts import ConfigError
from engine.speculation.noise import GumbelNoise
from engine.types import GenerateRequest, SamplingParams, SpeculationParams, StepStats


def test_without_drafts_it_is_the_plain_model():
    expected = alone()
    for request in mixed(speculate=False):
        kind, start = request.params, list(request.prompt_ids)
        if kind == SamplingParams(temperature=0.0, max_tokens=20):
            assert expected[request.id] == plain_greedy(start, 20)
        if kind == SamplingParams(temperature=0.8, seed=1, max_tokens=20):
            tokens = list(start)
            noise = GumbelNoise(VOCAB, torch.device("cpu"))
            for _ in range(20):
                law = (plain_logits(tokens)[-1] / 0.8).double()
                tokens.append(int((law + noise([1], [len(tokens)])[0]).argmax()))
            assert expected[request.id] == tokens[len(start) :]
    assert len({tuple(tokens) for tokens in expected.values()}) > 5


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("draft", [None, *DRAFTS])
def test_the_output_is_the_targets_alone(draft: str | None, settings: dict[str, Any]):
    engine = make_engine(draft, **settings)
    stats: list[StepStats] = []
    for temperature in ("cold", "warm"):
        results = run(engine, mixed(speculate=True), stats)
        assert {name: result.tokens for name, result in results.items()} == alone(), temperature
    assert (stats[-1].preemptions > 0) == ("blocks" in settings)
    assert (stats[-1].prefix_hits > 0) == (settings.get("prefix_cache", True))
    if draft is not None:
        assert sum(step.drafted for step in stats) > 0


@pytest.mark.parametrize("draft", DRAFTS)
def test_what_stands_of_a_draft_is_what_the_draft_model_says(draft: str):
    """Cold, warm, preempted or chunked: the draft's KV is never stale, short or another row's."""
    for settings in SETTINGS.values():
        engine = make_engine(draft, **settings)
        for temperature in ("cold", "warm"):
            requests = [
                ask(f"{i}", prompt(n), static(sl))
                for i, (n, sl) in enumerate([(3, 4), (18, 1), (30, 7), (30, 2), (40, 3)])
            ]
            for result in run(engine, requests).values():
                check_acceptance(result, DRAFTS[draft]())
                assert result.total("drafted") > 0, temperature


def test_a_block_written_without_a_draft_is_caught_up_before_it_is_drafted_from():
    engine = make_engine("near")
    start = prompt(40)
    silent = run(engine, [ask("silent", start, static(0), max_tokens=30)])["silent"]
    longer = [*start, *silent.tokens[:25]]
    again = run(engine, [ask("again", longer, static(4), max_tokens=20)])["again"]
    assert again.events[0].cached_tokens >= 60
    assert again.total("drafted") > 0
    check_acceptance(again, near())
    fresh = run(make_engine("near"), [ask("fresh", longer, static(4), max_tokens=20)])["fresh"]
    drafted = [(event.drafted, event.accepted) for event in fresh.events]
    assert [(event.drafted, event.accepted) for event in again.events] == drafted


def test_a_block_taken_over_from_a_drafting_request_counts_as_undrafted():
    engine = make_engine("near", blocks=MIN_BLOCKS)
    for i in range(3):  # leaves no fresh block
        run(engine, [ask("before", prompt(60, i), static(4), max_tokens=30)])
    start = prompt(40)
    silent = run(engine, [ask("silent", start, static(0), max_tokens=30)])["silent"]
    again = run(engine, [ask("again", [*start, *silent.tokens[:25]], static(4), max_tokens=20)])["again"]
    assert again.events[0].cached_tokens >= 60
    assert again.total("drafted") > 0
    check_acceptance(again, near())


def test_a_seeded_draft_that_is_the_target_is_always_right():
    """Both draw with the noise, the penalties and the filters of the position."""
    kinds = [kind for kind in KINDS if "seed" in kind]
    requests = [ask(f"{i}", prompt(9, i), static(4), **kind) for i, kind in enumerate(kinds)]
    for result in run(make_engine("same"), requests).values():
        assert result.total("drafted") == result.total("accepted") > 10


def test_a_long_prompt_is_caught_up_in_chunks_before_it_is_drafted_from():
    engine = make_engine("near", token_budget=16)
    start = prompt(50)
    result = run(engine, [ask("late", start, static(3), max_tokens=30)])["late"]
    silent = [event for event in result.events if event.iterations and not event.drafted]
    assert silent and silent[0].stop_reason == "room"  # the draft's KV was on its way
    check_acceptance(result, near())


def test_priorities_order_and_do_not_disturb():
    engine = make_engine("near", max_num_seqs=2)
    requests = [
        GenerateRequest(
            id=r.id, prompt_ids=r.prompt_ids, params=r.params, speculation=r.speculation, priority=-i
        )
        for i, r in enumerate(mixed(speculate=True))
    ]
    for request in requests:
        engine.add(request)
    begun: list[str] = []
    tokens: dict[str, list[int]] = {}
    while engine.has_work():
        for event in engine.step()[0]:
            begun += [event.id] if event.id not in begun else []
            tokens.setdefault(event.id, []).extend(event.token_ids)
    assert tokens == alone()
    assert begun[:2] == ["r9", "r8"]


# ---- odd drafts


def test_a_draft_with_a_short_context_stops_and_the_target_goes_on():
    engine = make_engine(gpt2(32))
    requests = [ask(f"{n}", prompt(n), static(4), max_tokens=35) for n in (3, 12, 30, 31, 32, 33, 50)]
    for name, result in run(engine, requests).items():
        assert result.tokens == plain_greedy(list(result.prompt), 35)
        at = len(result.prompt)
        for event in result.events:
            # the last draft token is never fed: the context bounds what stands before it
            assert event.drafted == 0 or at + event.drafted - 1 <= 32
            at += len(event.token_ids)
        late = [event for event in result.events[1:] if not event.drafted and event.iterations]
        assert late[-2].stop_reason == "room"
        assert (result.total("drafted") > 0) == (int(name) < 32)  # the first token comes without a draft


@pytest.mark.parametrize("width", [VOCAB - 4, VOCAB, VOCAB + 8])
@pytest.mark.parametrize("method", ["greedy", "coupled", "rejection"])
def test_padding_is_never_emitted(width: int, method: str):
    """The tokenizer knows 60 ids; target and draft pad the rest, and would love to say it."""
    vocab = 60

    def loud(model: LlamaForCausalLM) -> LlamaForCausalLM:
        made = copy.deepcopy(model)
        head = made.lm_head.weight
        if head.shape[0] > vocab:
            head[vocab] *= 50
            head[vocab + 1] = -head[vocab]
        return made

    target = loud(llama(0))
    assert int(plain_logits(prompt(9), target)[-1].argmax()) >= vocab
    engine = make_engine(loud(llama(2, vocab=width, layers=1)), target=target, vocab=vocab)
    params: dict[str, Any] = {} if method == "greedy" else {"temperature": 1.0, "sampling_method": method}
    source = random.Random(5)
    requests = [
        ask(f"{i}", [source.randrange(3, vocab) for _ in range(9)], static(4), seed=i, **params)
        for i in range(6)
    ]
    requests.append(ask("last", [vocab - 1, 5, vocab - 1], static(4), seed=1, **params))
    plain = make_engine(target=target, vocab=vocab)
    for name, result in run(engine, requests).items():
        assert len(result.tokens) == 20 and max(result.tokens) < vocab
        if method != "rejection":
            mine = next(r for r in requests if r.id == name)
            silent = ask(
                name, mine.prompt_ids, SpeculationParams(drafter="none"), seed=mine.params.seed, **params
            )
            assert run(plain, [silent])[name].tokens == result.tokens


def test_a_draft_that_lacks_tokens_of_the_target_is_refused():
    """Its embedding has no row for them: the first such token would end the engine."""
    with pytest.raises(ConfigError, match="vocabulary"):
        make_engine(llama(2, vocab=VOCAB - 8, layers=1))


def test_no_lookahead_never_runs_the_draft(monkeypatch: pytest.MonkeyPatch):
    engine = make_engine("near")

    def refuse(batch: Any) -> Any:
        raise AssertionError("the draft ran")

    monkeypatch.setattr(engine._parts.drafters["model"].runner, "forward", refuse)  # type: ignore[attr-defined]
    none, ngram = SpeculationParams(drafter="none"), static(4, "ngram")
    capped = SpeculationParams(policy="heuristic", max_sl=0)
    requests = [
        ask(f"{i}", prompt(30, i), kind, **params)
        for i, (kind, params) in enumerate(
            (kind, params)
            for kind in (none, ngram, static(0), capped)
            for params in ({}, {"temperature": 1.0})
        )
    ]
    results = run(engine, requests)
    assert {result.events[-1].drafter for result in results.values()} == {"none", "ngram", "model"}
    assert not engine._governing.faults.total
    run(engine, [ask("x", prompt(3), static(1))])
    assert engine._governing.faults.total["model"] == 1  # the draft ran
