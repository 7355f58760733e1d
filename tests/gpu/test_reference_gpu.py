"""The reference runner and the engine on a GPU, with tiny random models."""

import copy
import random
from functools import cache

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from engine.config import EngineConfig
from engine.core import Engine
from engine.models.load import early_exit
from engine.models.reference import ReferenceRunner
from engine.models.runner import Batch, Chunk
from engine.parts import assemble
from engine.types import GenerateRequest, SamplingParams, SpeculationParams

pytestmark = pytest.mark.gpu

VOCAB, BLOCK, BLOCKS, CONTEXT = 64, 16, 64, 128
SIZE = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def config(name: str) -> PreTrainedConfig:
    if name == "mistral":
        return MistralConfig(**SIZE, sliding_window=9)
    if name == "gemma2":
        return Gemma2Config(**SIZE, head_dim=16, sliding_window=9)
    if name == "gpt2":
        return GPT2Config(
            vocab_size=VOCAB,
            n_embd=64,
            n_layer=3,
            n_head=4,
            n_positions=CONTEXT,
            initializer_range=0.2,
            bos_token_id=1,
            eos_token_id=2,
        )
    return LlamaConfig(**SIZE)


@cache
def model(name: str, dtype: torch.dtype) -> PreTrainedModel:
    """On the GPU; users take a copy, since a runner changes its model."""
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(config(name), attn_implementation="eager")
    return made.eval().requires_grad_(False).to("cuda", dtype)


def prompt(length: int) -> tuple[int, ...]:
    source = random.Random(length)
    return tuple(source.randrange(3, VOCAB) for _ in range(length))


@torch.inference_mode()
def own_logits(of: PreTrainedModel, ids: tuple[int, ...] | list[int]) -> torch.Tensor:
    logits: torch.Tensor = of(input_ids=torch.tensor([ids], device="cuda"), use_cache=False).logits[0]
    return logits.float()


# bf16 keeps 8 bits: of logits of a few units, a few hundredths.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 0.1)])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt2"])
def test_logits_are_the_models_own(name: str, dtype: torch.dtype, tolerance: float):
    rows, chunk = [prompt(n) for n in (70, 33, 41)], 7
    expected = [own_logits(model(name, dtype), row) for row in rows]
    runner = ReferenceRunner(copy.deepcopy(model(name, dtype)), BLOCK)
    runner.allocate(BLOCKS)
    assert runner.device.type == "cuda" and runner.dtype == dtype
    assert runner._pool is not None
    for tensor in (*runner._pool.keys.values(), *runner._pool.values.values()):
        tensor.fill_(float("nan"))
    free = random.Random(0).sample(range(BLOCKS), BLOCKS)
    tables = [[free.pop() for _ in range(5)] for _ in rows]
    got: list[list[torch.Tensor]] = [[] for _ in rows]
    for start in range(0, 70, chunk):
        active = [r for r, row in enumerate(rows) if start < len(row)]
        chunks = [Chunk(rows[r][start : start + chunk], start, tables[r]) for r in active]
        chunks = [Chunk(c.tokens, c.start, c.blocks, len(c.tokens)) for c in chunks]
        logits = runner.forward(Batch.pack(chunks, BLOCK))
        for r, part in zip(active, logits.split([len(c.tokens) for c in chunks]), strict=True):
            got[r].append(part.float())
    for want, parts in zip(expected, got, strict=True):
        limit = tolerance * max(1.0, float(want.abs().max()))
        assert float((torch.cat(parts) - want).abs().max()) <= limit


def make_engine(dtype: torch.dtype, draft: bool = True) -> Engine:
    runner = ReferenceRunner(copy.deepcopy(model("llama", dtype)), BLOCK)
    drafter = ReferenceRunner(early_exit(copy.deepcopy(model("llama", dtype)), 2), BLOCK) if draft else None
    for each in (runner, drafter):
        if each is not None:
            each.allocate(BLOCKS)
    settings = EngineConfig(target="tiny", draft="self:2", policy="static", max_num_seqs=8, token_budget=32)
    parts = assemble(
        settings, runner, drafter, blocks=BLOCKS, max_model_len=CONTEXT, vocab=VOCAB, eos_ids=(),
        dtype=str(dtype).removeprefix("torch."),
    )  # fmt: skip
    return Engine(settings, parts)


SPECULATIONS = [
    SpeculationParams(drafter="model", policy="static", options={"sl": 4}),
    SpeculationParams(drafter="ngram", policy="heuristic"),
    SpeculationParams(drafter="model", policy="confidence", options={"signal": "joint", "threshold": 0.2}),
    SpeculationParams(drafter="none"),
    SpeculationParams(drafter="model", policy="heuristic"),
]


def serve(engine: Engine, params: SamplingParams) -> tuple[dict[str, list[int]], int]:
    """Texts by request, and how many tokens were drafted."""
    tokens: dict[str, list[int]] = {}
    drafted = 0
    for n in range(5, 65, 6):
        engine.add(
            GenerateRequest(
                id=f"{n}",
                prompt_ids=prompt(n),
                params=params,
                speculation=SPECULATIONS[n % len(SPECULATIONS)],
            )
        )
    while engine.has_work():
        for event in engine.step()[0]:
            assert event.error is None
            tokens.setdefault(event.id, []).extend(event.token_ids)
            drafted += event.drafted
    assert engine._blocks.used_blocks == 0
    return tokens, drafted


def test_greedy_drafts_in_fp32_change_nothing():
    texts, drafted = serve(make_engine(torch.float32), SamplingParams(temperature=0.0, max_tokens=40))
    assert drafted > 0 and len(texts) == 10
    for name, text in texts.items():
        ids = list(prompt(int(name)))
        for _ in range(40):
            ids.append(int(own_logits(model("llama", torch.float32), ids)[-1].argmax()))
        assert text == ids[int(name) :]


def test_a_seed_gives_the_same_text_with_and_without_drafts():
    params = SamplingParams(
        temperature=0.9, seed=4, top_p=0.9, presence_penalty=0.4, logprobs=2, max_tokens=40
    )
    engine = make_engine(torch.float32)
    with_drafts, drafted = serve(engine, params)
    assert drafted > 0
    plain = make_engine(torch.float32)
    for name, text in with_drafts.items():
        plain.add(
            GenerateRequest(
                id=name,
                prompt_ids=prompt(int(name)),
                params=params,
                speculation=SpeculationParams(drafter="none"),
            )
        )
        alone: list[int] = []
        while plain.has_work():
            alone += [token for event in plain.step()[0] for token in event.token_ids]
        assert alone == text


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_bf16_serves_to_the_end(temperature: float):
    """No identity is promised in bf16: every request gets all of its tokens."""
    params = SamplingParams(temperature=temperature, max_tokens=40, logprobs=1)
    texts, drafted = serve(make_engine(torch.bfloat16), params)
    assert drafted > 0
    assert all(len(text) == 40 for text in texts.values()) and len(texts) == 10
