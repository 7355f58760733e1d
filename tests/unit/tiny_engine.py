"""Tiny random models, engines around them, and requests, for the tests of the engine."""

import copy
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from engine.config import EngineConfig
from engine.core import Engine
from engine.models.load import early_exit
from engine.models.reference import ReferenceRunner
from engine.parts import assemble
from engine.speculation.control import PolicyTable
from engine.types import (
    GenerateRequest,
    SamplingParams,
    SpeculationParams,
    StepStats,
    TokenEvent,
    TokenLogprob,
)

VOCAB, BLOCK, CONTEXT, NO_EOS = 64, 4, 96, 63
MIN_BLOCKS = CONTEXT // BLOCK + 1  # holds one sequence of the whole context

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
