"""The fused runner on a GPU: against the reference runner, and its engine against itself without drafts."""

import copy
import random
from typing import Any

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from engine.config import EngineConfig
from engine.core import Engine
from engine.models.load import early_exit
from engine.models.reference import ReferenceRunner
from engine.models.runner import Batch, Chunk
from engine.parts import assemble
from engine.types import GenerateRequest, SamplingParams, SpeculationParams

pytestmark = pytest.mark.gpu

VOCAB, BLOCK, BLOCKS, CONTEXT = 1003, 16, 320, 1200
SHAPES: dict[str, tuple[Any, Any]] = {
    "llama 64": (
        LlamaForCausalLM,
        LlamaConfig(
            hidden_size=320, intermediate_size=992, num_attention_heads=10, num_key_value_heads=5, head_dim=64
        ),
    ),
    "llama 128, no groups": (
        LlamaForCausalLM,
        LlamaConfig(hidden_size=256, intermediate_size=416, num_attention_heads=2, num_key_value_heads=2),
    ),
    "llama 64, more heads than multiprocessors in a batch": (
        LlamaForCausalLM,
        LlamaConfig(
            hidden_size=768,
            intermediate_size=416,
            num_attention_heads=12,
            num_key_value_heads=12,
            head_dim=64,
        ),
    ),
    "qwen2 128, seven": (
        Qwen2ForCausalLM,
        Qwen2Config(hidden_size=1792, intermediate_size=1120, num_attention_heads=14, num_key_value_heads=2),
    ),
    "qwen3": (
        Qwen3ForCausalLM,
        Qwen3Config(
            hidden_size=256, intermediate_size=416, num_attention_heads=6, num_key_value_heads=2, head_dim=128
        ),
    ),
}


def make(name: str, dtype: torch.dtype) -> PreTrainedModel:
    kind, config = SHAPES[name]
    config = copy.deepcopy(config)
    config.vocab_size, config.num_hidden_layers, config.max_position_embeddings = VOCAB, 3, CONTEXT
    config.bos_token_id, config.eos_token_id, config.pad_token_id = 1, 2, 0
    config.initializer_range = 0.06
    torch.manual_seed(0)
    model: PreTrainedModel = kind(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to("cuda", dtype)


def poisoned(runner: Any) -> Any:
    runner.allocate(BLOCKS)
    for tensors in (runner._pool.keys, runner._pool.values):
        for tensor in tensors.values():
            tensor.fill_(float("nan"))
    return runner


def passes(runner: Any, lengths: list[int], query: int | list[int]) -> torch.Tensor:
    """Prefill, then `query` tokens for every row, or so many for each: the logits of these."""
    source = random.Random(5)
    free = source.sample(range(BLOCKS), BLOCKS)
    news = query if isinstance(query, list) else [query] * len(lengths)
    rows = [[source.randrange(3, VOCAB) for _ in range(n + m)] for n, m in zip(lengths, news, strict=True)]
    tables = [[free.pop() for _ in range(len(row) // BLOCK + 1)] for row in rows]
    for row, table, n in zip(rows, tables, lengths, strict=True):
        if n:
            runner.forward(Batch.pack([Chunk(row[:n], 0, table, 0)], BLOCK))
    chunks = [
        Chunk(row[n:], n, table, len(row) - n) for row, table, n in zip(rows, tables, lengths, strict=True)
    ]
    logits = runner.forward(Batch.pack(chunks, BLOCK)).float().clone()
    again = runner.forward(Batch.pack(chunks, BLOCK)).float()
    assert torch.equal(logits, again), "the same pass twice gives different logits"
    return logits


CASES = [
    ([40, 5, 300, 17], 1),
    ([40, 5, 300, 17], 4),
    ([1000], 1),
    ([1000], 16),
    ([16], 8),
    ([7, 1], 8),
    ([30] * 16, 1),
]
MANY = [([20] * 30, 1), ([33] * 12, 5), ([9] * 64, 3)]
PROMPTS: list[tuple[list[int], int | list[int]]] = [
    ([0, 300, 40, 16], [150, 1, 5, 40]),
    ([0] * 9 + [64], [33] * 9 + [1]),
    ([0], [41]),
    ([200], [300]),
    ([0, 20], [600, 3]),  # more than graphs are made for
]


@pytest.mark.parametrize("name", SHAPES)
def test_the_decoding_kernel_gives_what_float32_gives(name: str) -> None:
    from engine.models.fused import FusedRunner

    exact = poisoned(ReferenceRunner(make(name, torch.float32), BLOCK))
    plain = poisoned(ReferenceRunner(make(name, torch.bfloat16), BLOCK))
    fused = poisoned(FusedRunner(make(name, torch.bfloat16), BLOCK))
    assert fused.kernel is not None, fused.kernel_refused
    for lengths, query in CASES:
        want = passes(exact, lengths, query)
        noise = (passes(plain, lengths, query) - want).norm() / want.norm()
        fused.kernel.logits.fill_(float("nan"))
        off = (passes(fused, lengths, query) - want).norm() / want.norm()
        assert off <= 1.5 * noise + 1e-3, f"{lengths} x {query}: {off} off, transformers in bf16 {noise}"


@pytest.mark.parametrize("name", ["llama 64", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_graphs_and_triton_give_what_float32_gives(name: str, dtype: torch.dtype) -> None:
    from engine.models.fused import FusedRunner

    exact = poisoned(ReferenceRunner(make(name, torch.float32), BLOCK))
    fused = poisoned(FusedRunner(make(name, dtype), BLOCK))
    for lengths, query in MANY if dtype == torch.bfloat16 else CASES + MANY + PROMPTS:
        want = passes(exact, lengths, query)
        off = (passes(fused, lengths, query) - want).norm() / want.norm()
        assert off <= (1e-4 if dtype == torch.float32 else 3e-2), f"{lengths} x {query}: {off} off"


def engine(dtype: torch.dtype, rows: int = 8) -> Engine:
    """The target and its first two layers, both fused."""
    from engine.models.fused import FusedRunner

    model = make("llama 64", dtype)
    draft = early_exit(model, 2)
    target_runner, draft_runner = FusedRunner(model, BLOCK), FusedRunner(draft, BLOCK)
    for runner in (target_runner, draft_runner):
        runner.allocate(BLOCKS)
    config = EngineConfig(target="t", draft="d", policy="static", max_num_seqs=rows, block_size=BLOCK)
    parts = assemble(
        config, target_runner, draft_runner, blocks=BLOCKS, max_model_len=CONTEXT, vocab=VOCAB, eos_ids=[2]
    )
    return Engine(config, parts)


def texts(
    engine: Engine, params: SamplingParams, speculations: list[SpeculationParams], rows: int = 8
) -> tuple[Any, ...]:
    """Tokens of so many requests, the events' drafted and accepted in sum."""
    source, found = random.Random(1), {}
    for i in range(rows):
        ids = tuple(source.randrange(3, VOCAB) for _ in range(source.randrange(3, 60)))
        found[str(i)] = []
        engine.add(
            GenerateRequest(
                id=str(i), prompt_ids=ids, params=params, speculation=speculations[i % len(speculations)]
            )
        )
    drafted = accepted = 0
    while engine.has_work():
        for event in engine.step()[0]:
            assert event.error is None, event.error
            found[event.id].extend(event.token_ids)
            drafted, accepted = drafted + event.drafted, accepted + event.accepted
    return found, drafted, accepted


SPECULATIONS = [
    SpeculationParams(policy="static", options={"sl": 1}),
    SpeculationParams(policy="static", options={"sl": 7}),
    SpeculationParams(policy="heuristic"),
    SpeculationParams(policy="confidence", options={"signal": "joint", "threshold": 0.3}),
    SpeculationParams(policy="confidence", options={"signal": "top", "threshold": 0.2}),
    SpeculationParams(drafter="ngram"),
    SpeculationParams(drafter="none"),
]


@pytest.mark.parametrize("params", [
    SamplingParams(temperature=0, max_tokens=60, ignore_eos=True),
    SamplingParams(temperature=0.8, seed=11, max_tokens=60),
    SamplingParams(temperature=1.0, seed=3, top_p=0.9, presence_penalty=0.5, max_tokens=40),
], ids=["greedy", "seeded", "filtered"])  # fmt: skip
def test_text_is_the_targets_whatever_drafts_in_float32(params: SamplingParams) -> None:
    made = engine(torch.float32)
    alone, *_ = texts(made, params, [SpeculationParams(drafter="none")])
    for speculation in SPECULATIONS[:-1]:
        found, drafted, accepted = texts(made, params, [speculation])
        assert found == alone, speculation
        if speculation.drafter != "ngram":  # random text seldom repeats itself
            assert drafted > 0 and accepted > 0, speculation
    assert texts(made, params, SPECULATIONS)[0] == alone


def test_the_device_drafts_what_the_host_drafts() -> None:
    """Token by token: the loop on the device against the one in Python. In bf16 the texts part at ties."""
    params = SamplingParams(temperature=0.7, seed=4, max_tokens=50, ignore_eos=True)
    speculation = SpeculationParams(policy="confidence", options={"signal": "joint", "threshold": 1e-5})
    drafts: list[list[list[int]]] = []
    for loops in (True, False):
        made = engine(torch.float32)
        drafter: Any = made._parts.drafters["model"]
        drafter.loops, drafter._loop = loops, drafter._loop if loops else None
        seen: list[list[int]] = []
        begin = drafter.begin

        def spy(*args: Any, begin: Any = begin, seen: list[list[int]] = seen) -> Any:
            wait = begin(*args)

            def waited() -> Any:
                found = wait()
                seen.extend(draft.tokens for draft in found.rows)
                return found

            return waited

        drafter.begin = spy
        texts(made, params, [speculation])
        drafts.append(seen)
    same = sum(a == b for a, b in zip(*drafts, strict=False))
    assert same >= 0.98 * len(drafts[0]), f"{same} of {len(drafts[0])} drafts alike"
    assert sum(map(len, drafts[0])) > 1.1 * len(drafts[0])  # some of more than one token


@pytest.mark.parametrize("temperature", [0.0, 0.7], ids=["greedy", "seeded"])
def test_passes_with_their_verdict_give_what_their_pieces_give(temperature: float) -> None:
    """In bf16, where the target has a lane: the same texts, drafts and verdicts without it."""
    params = SamplingParams(
        temperature=temperature, seed=9 if temperature else None, max_tokens=50, ignore_eos=True
    )
    made = engine(torch.bfloat16)
    lane, begun = made._lane, 0
    assert lane is not None
    begin = lane.begin

    def counting(*args: Any) -> Any:
        nonlocal begun
        begun += 1
        return begin(*args)

    lane.begin = counting  # type: ignore[method-assign]
    speculations = (
        SpeculationParams(drafter="none"),
        SpeculationParams(policy="static", options={"sl": 3}),
        SpeculationParams(policy="heuristic"),
        SpeculationParams(policy="bandit"),
    )
    for speculation in speculations:
        before = begun
        with_lane = texts(made, params, [speculation], rows=2)
        assert begun > before + 5, speculation
        made._lane = None
        made._blocks.reset_cache()
        assert speculation.policy == "bandit" or texts(made, params, [speculation], rows=2) == with_lane
        made._lane = lane
        made._blocks.reset_cache()


def test_an_aborted_row_does_not_harm_the_others() -> None:
    params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    made = engine(torch.float32)
    alone, *_ = texts(made, params, [SpeculationParams(drafter="none")])
    source = random.Random(1)
    for i in range(8):
        ids = tuple(source.randrange(3, VOCAB) for _ in range(source.randrange(3, 60)))
        made.add(GenerateRequest(id=str(i), prompt_ids=ids, params=params, speculation=SPECULATIONS[1]))
    found: dict[str, list[int]] = {str(i): [] for i in range(8)}
    steps = 0
    while made.has_work():
        for event in made.step()[0]:
            found[event.id].extend(event.token_ids)
        steps += 1
        if steps == 3:
            made.abort("2")
            made.abort("5")
    assert {k: v for k, v in found.items() if k not in "25"} == {
        k: v for k, v in alone.items() if k not in "25"
    }
