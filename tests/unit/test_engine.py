"""The engine around tiny random models: whatever runs beside, before or behind a request, its tokens stay."""

import copy
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from engine.config import EngineConfig
from engine.core import Engine
from engine.models.load import early_exit
from engine.models.reference import ReferenceRunner
from engine.parts import ConfigError, assemble
from engine.speculation.control import PolicyTable
from engine.speculation.noise import GumbelNoise
from engine.types import (
    GenerateRequest,
    InvalidRequest,
    SamplingParams,
    SpeculationParams,
    StepStats,
    TokenEvent,
    TokenLogprob,
)

VOCAB, BLOCK, CONTEXT, NO_EOS = 64, 4, 96, 63
MIN_BLOCKS = CONTEXT // BLOCK + 1  # holds one sequence of the whole context


# ---- models and engines


@cache
def llama(seed: int, vocab: int = VOCAB, layers: int = 3) -> LlamaForCausalLM:
    """A random model; users take a copy, since a runner changes its model."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        initializer_range=0.4,
        eos_token_id=2,
    )
    config._attn_implementation = "eager"
    return LlamaForCausalLM(config).eval().requires_grad_(False)


@cache
def near() -> LlamaForCausalLM:
    """The target with a little noise: a draft that is often right."""
    model = copy.deepcopy(llama(0))
    torch.manual_seed(9)
    for parameter in model.parameters():
        parameter.add_(0.03 * torch.randn_like(parameter))
    return model


@cache
def gpt2(positions: int) -> GPT2LMHeadModel:
    """A draft whose learned positions end early: one token too many is an error, not a guess."""
    torch.manual_seed(4)
    config = GPT2Config(
        vocab_size=VOCAB,
        n_embd=32,
        n_layer=1,
        n_head=2,
        n_positions=positions,
        bos_token_id=1,
        eos_token_id=2,
    )
    config._attn_implementation = "eager"
    return GPT2LMHeadModel(config).eval().requires_grad_(False)


DRAFTS: dict[str, Callable[[], PreTrainedModel]] = {
    "same": lambda: llama(0),
    "near": near,
    "other": lambda: llama(1, layers=1),
    "exit": lambda: early_exit(copy.deepcopy(llama(0)), 1),
}


def make_engine(
    draft: PreTrainedModel | str | None = None,
    *,
    target: PreTrainedModel | None = None,
    blocks: int = 4 * MIN_BLOCKS,
    context: int = CONTEXT,
    vocab: int = VOCAB,
    eos: Iterable[int] = (),
    **config: Any,
) -> Engine:
    runner = ReferenceRunner(copy.deepcopy(target or llama(0)), BLOCK)
    model = DRAFTS[draft]() if isinstance(draft, str) else draft
    drafter = None if model is None else ReferenceRunner(copy.deepcopy(model), BLOCK)
    runner.allocate(blocks)
    if drafter is not None:
        drafter.allocate(blocks)
    settings: dict[str, Any] = {"max_num_seqs": 8, "token_budget": 4096, "policy": "static"} | config
    made = EngineConfig(target="tiny", draft="tiny-draft", block_size=BLOCK, **settings)
    parts = assemble(
        made, runner, drafter, blocks=blocks, max_model_len=context, vocab=vocab, eos_ids=tuple(eos)
    )
    return Engine(made, parts)


# ---- requests and results


@dataclass
class Result:
    prompt: tuple[int, ...]
    events: list[TokenEvent] = field(default_factory=list)

    @property
    def tokens(self) -> list[int]:
        return [token for event in self.events for token in event.token_ids]

    @property
    def logprobs(self) -> list[TokenLogprob]:
        return [entry for event in self.events for entry in event.logprobs or ()]

    @property
    def finish(self) -> str | None:
        return self.events[-1].finish_reason

    def total(self, name: str) -> int:
        return sum(getattr(event, name) for event in self.events)


def run(
    engine: Engine, requests: Iterable[GenerateRequest], stats: list[StepStats] | None = None
) -> dict[str, Result]:
    """Serves all to their ends. Every request must end once, and leave nothing behind."""
    results = {request.id: Result(request.prompt_ids) for request in requests}
    for request in requests:
        engine.add(request)
    while engine.has_work():
        events, step = engine.step()
        if stats is not None:
            stats.append(step)
        for event in events:
            assert results[event.id].events[-1:] == [] or results[event.id].finish is None
            results[event.id].events.append(event)
    assert all(result.finish is not None for result in results.values())
    nothing_is_held(engine)
    return results


def nothing_is_held(engine: Engine) -> None:
    assert engine._blocks.used_blocks == 0
    for table in engine._tables.values():
        if isinstance(table, PolicyTable):  # what governs trees has no slots
            assert sorted(table._free) == list(range(engine._config.max_num_seqs))
    assert not engine._scheduler.running and not engine._scheduler.waiting


def static(sl: int, drafter: str | None = None) -> SpeculationParams:
    return SpeculationParams(drafter=drafter, policy="static", options={"sl": sl})


def ask(
    name: str, prompt: Iterable[int], speculation: SpeculationParams | None = None, **params: Any
) -> GenerateRequest:
    settings = {"temperature": 0.0, "max_tokens": 20} | params
    return GenerateRequest(
        id=name,
        prompt_ids=tuple(prompt),
        params=SamplingParams(**settings),
        speculation=speculation or static(4),
    )


def prompt(length: int, seed: int = 0) -> list[int]:
    source = random.Random(1000 * seed + length)
    return [source.randrange(3, NO_EOS) for _ in range(length)]


SPECULATIONS = [
    static(4),
    static(1),
    SpeculationParams(policy="heuristic"),
    SpeculationParams(policy="confidence", options={"signal": "joint", "threshold": 0.3}),
    SpeculationParams(policy="static", options={"sl": 8}, max_sl=3),
    SpeculationParams(drafter="ngram", policy="heuristic"),
    static(0),
]
KINDS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.8, "seed": 1},
    {"temperature": 1.0, "seed": 2, "top_p": 0.9, "presence_penalty": 0.5, "frequency_penalty": 0.3},
    {"repetition_penalty": 1.3, "logit_bias": {5: 3.0}},
    {"temperature": 1.0, "seed": 3, "top_k": 8, "min_p": 0.05, "sampling_method": "coupled"},
]


def mixed(speculate: bool, **params: Any) -> list[GenerateRequest]:
    """Greedy and seeded requests with prompts on and off block edges; two begin alike."""
    prompts = [prompt(1), prompt(8), prompt(21), prompt(30), [*prompt(30)[:20], *prompt(5, 2)]]
    requests = []
    for i in range(10):
        kind = KINDS[i % len(KINDS)] | params
        speculation = SPECULATIONS[i % len(SPECULATIONS)] if speculate else SpeculationParams(drafter="none")
        requests.append(ask(f"r{i}", prompts[(i + i // 5) % 5], speculation, **kind))
    return requests


@cache
def alone() -> dict[str, list[int]]:
    """The mixed requests one at a time, without drafts or cache."""
    engine = make_engine(prefix_cache=False)
    return {r.id: run(engine, [r])[r.id].tokens for r in mixed(speculate=False)}


# ---- the plain forward of the models


@torch.no_grad()
def plain_logits(tokens: list[int], model: PreTrainedModel | None = None) -> torch.Tensor:
    """[T, V], by transformers' own eager attention."""
    logits: torch.Tensor = (model or llama(0))(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]
    return logits


def plain_greedy(
    start: list[int], count: int, banned: Callable[[int], Iterable[int]] = lambda n: ()
) -> list[int]:
    """`banned(n)`: what the n-th generated token must not be."""
    tokens = list(start)
    for n in range(count):
        logits = plain_logits(tokens)[-1]
        logits[list(banned(n))] = float("-inf")
        tokens.append(int(logits.argmax()))
    return tokens[len(start) :]


def check_acceptance(result: Result, draft: PreTrainedModel) -> None:
    """Of each greedy draft must stand what the draft's plain forward agrees on: its KV is right."""
    text = [*result.prompt, *result.tokens]
    guesses = plain_logits(text, draft)[:, :VOCAB].argmax(-1).tolist()
    at = len(result.prompt)
    for event in result.events:
        agreed = 0
        while (
            agreed < min(event.drafted, len(event.token_ids))
            and guesses[at + agreed - 1] == text[at + agreed]
        ):
            agreed += 1
        assert event.accepted == agreed, f"at {at}: {event}"
        at += len(event.token_ids)


# ---- what must not change the output


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


SETTINGS: dict[str, dict[str, Any]] = {
    "as they come": {},
    "no prefix cache": {"prefix_cache": False},
    "small chunks": {"token_budget": 16},
    "one at a time": {"max_num_seqs": 1},
    "three at a time": {"max_num_seqs": 3, "token_budget": 24},
    "smallest pool": {"blocks": MIN_BLOCKS},
    "smallest pool, small chunks, no cache": {
        "blocks": MIN_BLOCKS,
        "token_budget": 16,
        "prefix_cache": False,
    },
}


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


# ---- where a sequence ends


@cache
def long_text() -> list[int]:
    return plain_greedy(prompt(10), 40)


def first_seen(after: int) -> int:
    """An index > after at which long_text has a token that it did not have before."""
    text = long_text()
    return next(i for i in range(after + 1, len(text)) if text[i] not in text[:i])


@pytest.mark.parametrize("kind", ["eos", "stop_token_ids"])
@pytest.mark.parametrize("sl", [0, 1, 3, 7])
def test_eos_inside_an_accepted_block_cuts_there(kind: str, sl: int):
    at = first_seen(2)
    stop = long_text()[at]
    engine = make_engine("same", eos=(stop,) if kind == "eos" else ())
    params: dict[str, Any] = {"max_tokens": 40} | ({} if kind == "eos" else {"stop_token_ids": (stop,)})
    result = run(engine, [ask("r", prompt(10), static(sl), logprobs=0, **params)])["r"]
    assert result.tokens == long_text()[: at + 1]
    assert (result.finish, result.events[-1].stop_token_id) == ("stop", stop)
    assert len(result.logprobs) == at + 1
    emitted, drafted = 1, []
    while emitted < at + 1:  # the draft is the target: everything stands, up to the end
        drafted.append(min(sl, at + 1 - emitted))
        emitted += sl + 1
    assert [event.accepted for event in result.events[1:]] == drafted
    assert [event.drafted for event in result.events[1:]] == [sl] * len(drafted)


@pytest.mark.parametrize("sl", [0, 3, 7])
def test_ignore_eos_goes_on(sl: int):
    stop = long_text()[first_seen(2)]
    engine = make_engine("same", eos=(stop,))
    result = run(engine, [ask("r", prompt(10), static(sl), max_tokens=30, ignore_eos=True)])["r"]
    assert (result.tokens, result.finish) == (long_text()[:30], "length")
    assert result.events[-1].stop_token_id is None


@pytest.mark.parametrize("draft", ["same", "near", "other"])
@pytest.mark.parametrize("sl", [0, 1, 5])
def test_min_tokens_keeps_eos_and_stop_ids_away(draft: str, sl: int):
    ends = [long_text()[0], long_text()[first_seen(2)], long_text()[first_seen(8)]]
    engine = make_engine(draft, eos=ends[:2])
    request = ask("r", prompt(10), static(sl), max_tokens=25, min_tokens=9, stop_token_ids=(ends[2],))
    result = run(engine, [request])["r"]
    expected = plain_greedy(prompt(10), 25, lambda n: ends if n < 9 else ())
    cut = next((i + 1 for i, token in enumerate(expected) if token in ends), 25)
    assert cut > 9
    assert result.tokens == expected[:cut]


@pytest.mark.parametrize("draft", ["same", "other", None])
def test_max_tokens_is_exact_at_every_lookahead(draft: str | None):
    engine = make_engine(draft)
    requests = [
        ask(f"{sl}/{most}", prompt(10), static(sl), max_tokens=most)
        for sl in (0, 1, 2, 5, 8)
        for most in (0, 1, 2, 3, 8, 9, 20)
    ]
    for name, result in run(engine, requests).items():
        most = int(name.partition("/")[2])
        assert (result.tokens, result.finish) == (long_text()[:most], "length"), name
        assert result.total("accepted") + result.total("iterations") + 1 == max(most, 1), name
        assert all(len(event.token_ids) >= 1 for event in result.events if most), name


@pytest.mark.parametrize("draft", ["same", "near", None])
@pytest.mark.parametrize("length", [1, 31, 32, 33, CONTEXT - 1])
def test_the_context_can_be_filled_to_its_last_place(draft: str | None, length: int):
    engine = make_engine(draft, blocks=MIN_BLOCKS)
    room = CONTEXT - length
    request = ask("r", prompt(length), static(7), max_tokens=room)
    result = run(engine, [request])["r"]
    assert (len(result.tokens), result.finish) == (room, "length")
    assert result.tokens == plain_greedy(prompt(length), room)
    with pytest.raises(InvalidRequest, match="context"):
        engine.add(ask("r", prompt(length), static(7), max_tokens=room + 1))


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


# ---- log-probabilities


def check_logprobs(
    entries: Iterable[TokenLogprob], logits: torch.Tensor, tokens: list[int], top: int
) -> None:
    law = logits.log_softmax(-1)
    entries = list(entries)
    assert [entry.token_id for entry in entries] == tokens
    for row, entry in zip(law, entries, strict=True):
        assert entry.logprob == pytest.approx(float(row[entry.token_id]), abs=2e-4)
        best = row.topk(top) if top else None
        assert [token for token, _ in entry.top] == ([] if best is None else best.indices.tolist())
        values = [] if best is None else best.values.tolist()
        assert [value for _, value in entry.top] == pytest.approx(values, abs=2e-4)


@pytest.mark.parametrize("draft", [None, "near", "other"])
@pytest.mark.parametrize("settings", ["as they come", "smallest pool, small chunks, no cache"])
def test_logprobs_are_the_targets_own(draft: str | None, settings: str):
    kinds: list[dict[str, Any]] = [
        {},
        {"temperature": 0.7, "seed": 1, "top_p": 0.5, "presence_penalty": 1.0},
        {"temperature": 1.0, "sampling_method": "rejection"},
        {"logit_bias": {7: 5.0}},
    ]
    requests = [
        ask(f"{i}", prompt(5 + 9 * i), SPECULATIONS[i], logprobs=i % 3, **kind)
        for i, kind in enumerate(kinds)
    ]
    results = run(make_engine(draft, **SETTINGS[settings]), requests)
    for request in requests:
        result = results[request.id]
        logits = plain_logits([*result.prompt, *result.tokens])[len(result.prompt) - 1 : -1]
        top = request.params.logprobs
        assert top is not None
        check_logprobs(result.logprobs, logits, result.tokens, top)
        assert all(len(e.logprobs or ()) == len(e.token_ids) for e in result.events)


@pytest.mark.parametrize("draft", [None, "near"])
@pytest.mark.parametrize("most", [0, 1, 15])
@pytest.mark.parametrize("name", SETTINGS)
def test_prompt_logprobs_are_the_targets_own(draft: str | None, most: int, name: str):
    engine = make_engine(draft, **SETTINGS[name])
    lengths = (1, 2, 15, 16, 17, 18, 40, 60, 80)
    warm = [ask(f"w{n}", prompt(n), static(3), max_tokens=8) for n in lengths]
    asking = [ask(f"{n}", prompt(n), static(3), max_tokens=most, prompt_logprobs=n % 3) for n in lengths]
    results = run(engine, [*warm, *asking])
    if most == 15:
        assert (engine._scheduler.preemptions > 0) == ("blocks" in SETTINGS[name])
    for n in lengths:
        first, *others = results[f"{n}"].events
        assert first.prompt_logprobs is not None and first.prompt_logprobs[0] is None
        assert first.cached_tokens == 0
        check_logprobs(
            [entry for entry in first.prompt_logprobs[1:] if entry is not None],
            plain_logits(prompt(n))[:-1],
            prompt(n)[1:],
            n % 3,
        )
        assert all(event.prompt_logprobs is None for event in others)
        assert results[f"{n}"].tokens == plain_greedy(prompt(n), most)
        assert all(event.prompt_logprobs is None for event in results[f"w{n}"].events)


# ---- faults


def test_nan_logits_end_that_request_alone(monkeypatch: pytest.MonkeyPatch):
    engine = make_engine("near")
    right = engine._parts.target.forward
    passes = 0

    def broken(batch: Any) -> torch.Tensor:
        nonlocal passes
        logits = right(batch)
        seq = engine._sequences.get("bad")
        if seq is None or seq.table is None:
            return logits
        row = next(i for i, table in enumerate(batch.block_tables) if table is seq.table.blocks)
        passes += 1
        if passes == 4:
            start = sum(batch.query_lens[:row])
            logits_at = torch.tensor(batch.logits_at)
            mine = (logits_at >= start) & (logits_at < start + batch.query_lens[row])
            logits[mine] = float("nan")
        return logits

    monkeypatch.setattr(engine._parts.target, "forward", broken)
    bad = ask("bad", prompt(13, 7), static(2), max_tokens=30)
    results = run(engine, [*mixed(speculate=True)[:5], bad, *mixed(speculate=True)[5:]])
    fault = results.pop("bad")
    assert fault.finish == "error" and fault.events[-1].error is not None and "NaN" in fault.events[-1].error
    assert fault.events[-1].token_ids == ()
    assert {name: result.tokens for name, result in results.items()} == alone()


@cache
def poison() -> int:
    """A token that no mixed request has or is given."""
    used = {token for r in mixed(speculate=False) for token in (*r.prompt_ids, *alone()[r.id])}
    return next(token for token in range(VOCAB) if token not in used)


def with_poison(engine: Engine) -> Engine:
    """The target's embedding of that token becomes NaN, after the runner's own check."""
    runner = engine._parts.target
    assert isinstance(runner, ReferenceRunner)
    runner.model.get_input_embeddings().weight[poison()] = float("nan")
    return engine


@pytest.mark.parametrize("settings", ["as they come", "small chunks", "no prefix cache"])
def test_nan_in_the_kv_harms_no_later_owner_of_the_block(settings: str):
    """A token whose embedding is NaN: all KV behind it is NaN, and its blocks go to others."""
    engine = with_poison(make_engine(blocks=MIN_BLOCKS, **SETTINGS[settings]))
    bad = [ask(f"bad{i}", [*prompt(12, i), poison(), *prompt(12, i)], max_tokens=5) for i in range(6)]
    for _ in range(2):
        results = run(engine, [*bad[:3], *mixed(speculate=False)[:5], *bad[3:], *mixed(speculate=False)[5:]])
        for request in bad:
            result = results.pop(request.id)
            assert (result.finish, result.tokens) == ("error", [])
        assert {name: result.tokens for name, result in results.items()} == alone()
    last = run(engine, [ask("bad", bad[0].prompt_ids)])["bad"]
    assert last.finish == "error"
    tables = engine._blocks.match(bad[0].prompt_ids, "", 25)
    assert tables.committed <= 12  # no block that holds NaN is cached
    engine._blocks.release(tables)


def test_a_nan_prefill_caches_nothing():
    engine = with_poison(make_engine())
    start = [*prompt(20), poison()]
    assert run(engine, [ask("bad", start)])["bad"].finish == "error"
    assert engine._blocks.match(start, "", 21).committed == 0


@pytest.mark.parametrize("temperature", [1e-6, 1e-20, 1e-40])
def test_a_tiny_temperature_is_served_or_refused(temperature: float):
    engine = make_engine()
    try:
        engine.add(ask("r", prompt(5), temperature=temperature, seed=1))
    except InvalidRequest as error:
        assert error.param == "temperature"
        return
    engine.abort("r")
    result = run(engine, [ask("r", prompt(5), temperature=temperature, seed=1)])["r"]
    assert (result.finish, result.tokens) == ("length", plain_greedy(prompt(5), 20))


def test_an_open_id_cannot_be_used_twice():
    engine = make_engine()
    engine.add(ask("r", prompt(5)))
    with pytest.raises(InvalidRequest, match="already open"):
        engine.add(ask("r", prompt(6)))
    engine.abort("r")
    engine.abort("r")
    engine.add(ask("r", prompt(6)))
    engine.abort("r")
    assert not engine.has_work()
    nothing_is_held(engine)


# ---- many at once


def random_request(name: str, source: random.Random) -> GenerateRequest:
    methods = [
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 0.7, "seed": source.randrange(99), "top_p": 0.9},
        {"temperature": 1.0, "seed": source.randrange(99), "sampling_method": "rejection", "top_k": 9},
        {"temperature": 0.0, "frequency_penalty": 0.5, "min_tokens": 1},
    ]
    options = SpeculationParams(
        drafter=source.choice([None, "model", "ngram", "none"]),
        policy=source.choice([None, "static", "heuristic", "confidence"]),
        max_sl=source.choice([None, 0, 1, 5]),
    )
    start = prompt(source.choice((4, 8, 12, 12, 16)), source.randrange(3))
    extra = prompt(source.randrange(12), source.randrange(99))
    return GenerateRequest(
        id=name,
        prompt_ids=(*start, *extra),
        params=SamplingParams(
            max_tokens=source.randrange(1, 13),
            logprobs=source.choice([None, None, 2]),
            prompt_logprobs=source.choice([None, None, None, 1]),
            ignore_eos=source.random() < 0.3,
            stop_token_ids=source.choice([(), (7, 8)]),
            **source.choice(methods),  # type: ignore[arg-type]
        ),
        speculation=options,
        priority=source.choice((0, 0, 0, 1, -1)),
        cache_salt=source.choice(("", "", "a")),
    )


def test_a_thousand_requests_leave_nothing_behind():
    """Random parameters, drafters, policies, priorities and cancellations on a tiny pool."""
    source = random.Random(3)
    context, blocks = 44, 16
    engine = make_engine("near", blocks=blocks, context=context, eos=(2, 40), token_budget=24, max_num_seqs=3)
    open_ids: set[str] = set()
    ended: dict[str, str] = {}
    made = 0
    while made < 1000 or engine.has_work():
        while made < 1000 and len(open_ids) < 12 and source.random() < 0.7:
            request = random_request(f"{made}", source)
            engine.add(request)
            open_ids.add(request.id)
            made += 1
        if open_ids and source.random() < 0.15:
            gone = source.choice(sorted(open_ids))
            engine.abort(gone)
            open_ids.remove(gone)
            ended[gone] = "abort"
        if not engine.has_work():
            continue
        events, stats = engine.step()
        assert stats.kv_blocks_used <= blocks
        assert stats.running == len(engine._scheduler.running) <= 3
        for event in events:
            assert event.id in open_ids, f"{event.id} has already ended: {ended.get(event.id)}"
            if event.finish_reason is not None:
                assert event.finish_reason in ("stop", "length")
                open_ids.remove(event.id)
                ended[event.id] = event.finish_reason
    assert not open_ids and len(ended) == 1000
    assert {"abort", "stop", "length"} == set(ended.values())
    assert engine._scheduler.preemptions > 0
    nothing_is_held(engine)


@pytest.mark.parametrize("budget", [16, 4096])
@pytest.mark.parametrize("draft", [None, "near"])
def test_sixteen_requests_interleave(draft: str | None, budget: int):
    engine = make_engine(draft, blocks=16 * 12, max_num_seqs=16, token_budget=budget)
    for i in range(16):
        engine.add(ask(f"{i}", prompt(12, i), static(2), max_tokens=24))
    order: list[tuple[str, bool]] = []
    while engine.has_work():
        order += [(event.id, event.finish_reason is not None) for event in engine.step()[0]]
    first_end = next(i for i, (_, last) in enumerate(order) if last)
    assert {name for name, _ in order[:first_end]} == {f"{i}" for i in range(16)}
    assert sum(last for _, last in order) == 16


@pytest.mark.parametrize("draft", [None, "near"])
def test_step_statistics_add_up(draft: str | None):
    engine = make_engine(draft, blocks=2 * MIN_BLOCKS, token_budget=32)
    requests = [r for r in mixed(speculate=True)]
    stats: list[StepStats] = []
    results = run(engine, requests, stats)
    for name in ("drafted", "accepted"):
        assert sum(getattr(step, name) for step in stats) == sum(r.total(name) for r in results.values())
    assert sum(step.emitted for step in stats) == sum(len(r.tokens) for r in results.values()) == 200
    assert sum(step.prefill_tokens for step in stats) > 0
    for step in stats:
        assert step.rows <= 8 and step.running + step.waiting <= len(requests)
        assert 0 <= step.accepted <= step.drafted
        assert 0 < step.draft_seconds + step.verify_seconds <= step.step_seconds
        assert 0 <= step.kv_blocks_used <= step.kv_blocks_total == 2 * MIN_BLOCKS
        assert step.prefix_hits <= step.prefix_queries
    assert (stats[-1].running, stats[-1].waiting, stats[-1].kv_blocks_used) == (0, 0, 0)
    for result in results.values():
        first, *others = result.events
        assert (first.iterations, first.drafted, len(first.token_ids)) == (0, 0, 1)
        assert all(event.iterations == 1 for event in others)
        # a draft token that is the last one wanted has no token after it
        assert all(len(e.token_ids) - e.accepted == 1 for e in others[:-1])


def test_the_pass_of_the_first_token_is_prefill_even_if_one_token_is_left_of_the_prompt():
    engine = make_engine("near", token_budget=16)
    stats: list[StepStats] = []
    result = run(engine, [ask("r", prompt(33), static(3), max_tokens=9)], stats)["r"]
    assert [event.iterations for event in result.events] == [0] + [1] * (len(result.events) - 1)
    assert sum(step.prefill_tokens for step in stats) == 33


def test_passes_after_a_preemption_count_as_iterations():
    """Else the mean of emitted tokens per iteration would grow with every preemption."""
    engine = make_engine(blocks=MIN_BLOCKS)
    results = run(engine, mixed(speculate=False))
    assert engine._scheduler.preemptions > 0
    assert {result.total("iterations") for result in results.values()} == {19}
