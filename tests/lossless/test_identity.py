"""The default model, fp32: speculation changes no token of what transformers generates with the target alone.

A few prompts and configurations; acceptance.py beside it takes all of them (`make lossless`). For
every mismatch the gap between the two likeliest tokens is told where the texts part.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from prompts import FEW
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from engine.config import EngineConfig
from engine.core import Engine
from engine.speculation.policy import policies
from engine.speculation.tree import rules
from engine.types import GenerateRequest, SamplingParams, SpeculationParams

FEW_TOKENS = 16

GREEDY: dict[str, Any] = {"temperature": 0.0}
SEEDED: dict[str, dict[str, Any]] = {
    "T 0.7": {"temperature": 0.7, "seed": 1},
    "T 1.0, top_p 0.9": {"temperature": 1.0, "seed": 2, "top_p": 0.9},
    "T 1.0, penalties": {
        "temperature": 1.0,
        "seed": 3,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.3,
        "repetition_penalty": 1.1,
    },
}

POLICIES: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"static {sl}": ("static", {"sl": sl}) for sl in (0, 1, 3, 7)},
    "heuristic": ("heuristic", {}),
    **{
        f"confidence {signal}": ("confidence", {"signal": signal, "threshold": 0.4})
        for signal in ("token", "top", "joint")
    },
    "confidence online": ("confidence", {"online": True}),
    **{name: (name, {}) for name in ("adaedl", "svip", "ddd", "tetris", "bandit", "goodput")},
}
OF_HEADS: dict[str, tuple[str, dict[str, Any]]] = {
    "disco": ("disco", {}),
    "disco bold": ("disco", {"tau": 0.05, "max_sl": 16}),
    "specdec_pp": ("specdec_pp", {}),
    "specdec_pp bold": ("specdec_pp", {"h": 0.98, "max_sl": 16}),
}
"""With the heads that ship for the default pair: of its draft model only."""
TREES = {f"tree, {name}": SpeculationParams(drafter=name) for name in sorted(rules())} | {
    f"tree, {name}": SpeculationParams(drafter=rule, options=options)
    for name, rule, options in (
        ("dyspec greedy", "dyspec", {"growth": "greedy", "budget": 12}),
        ("dyspec bold", "dyspec", {"budget": 64, "max_depth": 12, "threshold": 0.005}),
        ("opt_tree deep", "opt_tree", {"budget": 12, "max_depth": 12, "width": 3, "delta": 0.0}),
    )
}
EVERY = {
    f"{drafter}, {name}": SpeculationParams(drafter=drafter, policy=policy, options=options)
    for drafter, named in (("ngram", POLICIES), ("model", POLICIES | OF_HEADS))
    for name, (policy, options) in named.items()
}
EVERY |= TREES | {"none": SpeculationParams(drafter="none")}
MIXED, MIXED_TREES = "mixed policies", "mixed with trees"


@dataclass
class Tally:
    """One configuration's comparison. `parted`: (prompt, index) of each first difference."""

    name: str
    positions: int
    parted: list[tuple[int, int]]
    drafted: int
    accepted: int

    def line(self) -> str:
        rate = f"{self.accepted / self.drafted:.2f}" if self.drafted else "-"
        return f"{self.name:<58} {self.positions:>9} {len(self.parted):>10} {self.drafted:>8} {rate:>10}"


HEADER = f"{'configuration':<58} {'positions':>9} {'mismatches':>10} {'drafted':>8} {'acceptance':>10}"


def config(where: Path) -> EngineConfig:
    """One engine for every drafter: requests choose."""
    return EngineConfig(
        target=str(where), draft="default", dtype="float32", device="cpu", max_model_len=256, max_num_seqs=8
    )


@pytest.fixture(scope="module")
def engine(smollm2: Path) -> Engine:
    return Engine(config(smollm2))


@cache
def target(where: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32).eval()


@cache
def encoded(where: Path, prompts: tuple[str, ...]) -> list[tuple[int, ...]]:
    tokenizer = AutoTokenizer.from_pretrained(where)
    return [tuple(tokenizer(prompt)["input_ids"]) for prompt in prompts]


@cache
def by_transformers(where: Path, prompts: tuple[str, ...], tokens: int) -> list[list[int]]:
    """What `generate` gives for the target alone; computed once a process."""
    texts = []
    for ids in encoded(where, prompts):
        inputs = torch.tensor([ids])
        out = target(where).generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,
        )
        texts.append(out[0, len(ids) :].tolist())
    return texts


def generate(
    engine: Engine,
    prompts: list[tuple[int, ...]],
    tokens: int,
    kind: dict[str, Any],
    speculations: list[SpeculationParams],
    batch: int,
) -> tuple[list[list[int]], int, int]:
    """Texts, drafted and accepted tokens, with `batch` requests in the engine at a time."""
    texts: list[list[int]] = [[] for _ in prompts]
    drafted = accepted = started = ended = 0
    while ended < len(prompts):
        while started < len(prompts) and started - ended < batch:
            params = SamplingParams(max_tokens=tokens, **kind)
            engine.add(
                GenerateRequest(
                    id=str(started),
                    prompt_ids=prompts[started],
                    params=params,
                    speculation=speculations[started % len(speculations)],
                )
            )
            started += 1
        for event in engine.step()[0]:
            assert event.error is None
            texts[int(event.id)].extend(event.token_ids)
            drafted += event.drafted
            accepted += event.accepted
            ended += event.finish_reason is not None
    assert engine._blocks.used_blocks == 0
    return texts, drafted, accepted


def first_difference(want: list[int], got: list[int]) -> int | None:
    if want == got:
        return None
    pairs = enumerate(zip(want, got, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(want), len(got)))


def compare(
    engine: Engine,
    name: str,
    prompts: list[tuple[int, ...]],
    expected: list[list[int]],
    tokens: int,
    kind: dict[str, Any],
    speculations: list[SpeculationParams],
    batch: int,
) -> Tally:
    engine._blocks.reset_cache()  # every configuration computes its own KV
    texts, drafted, accepted = generate(engine, prompts, tokens, kind, speculations, batch)
    parted = [
        (i, at)
        for i, (want, got) in enumerate(zip(expected, texts, strict=True))
        if (at := first_difference(want, got)) is not None
    ]
    return Tally(name, sum(map(len, expected)), parted, drafted, accepted)


def configurations(names: list[str]) -> Iterator[tuple[str, list[SpeculationParams], int]]:
    """Each alone at batch 1 and 8, then side by side in batches of 8: all of them, and trees with chains."""
    for batch in (1, 8):
        for name in names:
            yield f"{name}, batch {batch}", [EVERY[name]], batch
    yield f"{MIXED}, batch 8", list(EVERY.values()), 8
    yield f"{MIXED_TREES}, batch 8", BESIDE_TREES, 8


BESIDE_TREES = [
    *TREES.values(),
    *(EVERY[name] for name in ("model, static 3", "ngram, static 7", "model, static 0", "none")),
]


def explain(
    where: Path, tally: Tally, prompts: list[tuple[int, ...]], expected: list[list[int]]
) -> list[str]:
    """For each mismatch the gap between the target's two largest logits where the texts part."""
    lines = []
    for i, at in tally.parted:
        ids = torch.tensor([[*prompts[i], *expected[i][:at]]])
        with torch.inference_mode():
            top = target(where)(ids).logits[0, -1].topk(2).values
        lines.append(f"{tally.name}: prompt {i} parts at token {at}, top-2 gap {float(top[0] - top[1]):.3g}")
    return lines


def report(
    where: Path, tallies: list[Tally], prompts: list[tuple[int, ...]], expected: list[list[int]]
) -> None:
    print("\n" + HEADER, *(tally.line() for tally in tallies), sep="\n")
    wrong = [line for tally in tallies for line in explain(where, tally, prompts, expected)]
    assert not wrong, "\n".join(wrong)


SHORT = [
    ("ngram, heuristic", 1),
    ("model, static 3", 1),
    ("model, confidence joint", 8),
    ("model, disco", 8),
    ("model, specdec_pp bold", 8),
    ("model, goodput", 8),
    ("tree, dyspec", 1),
    ("tree, opt_tree deep", 8),
    (MIXED, 8),
    (MIXED_TREES, 8),
]


MIX = [EVERY[name] for name in ("ngram, static 7", "model, goodput", "model, disco", "model, tetris")]
TREE_MIX = [EVERY[name] for name in ("tree, dyspec", "model, static 0", "tree, opt_tree", "model, static 3")]
"""One for each of the few prompts: neighbours of other drafters and policies."""
NEIGHBOURS = {MIXED: MIX, MIXED_TREES: TREE_MIX}


@pytest.mark.parametrize(("name", "batch"), SHORT)
def test_greedy_is_transformers_generate(engine: Engine, smollm2: Path, name: str, batch: int):
    prompts, expected = encoded(smollm2, FEW), by_transformers(smollm2, FEW, FEW_TOKENS)
    kinds = NEIGHBOURS.get(name) or [EVERY[name]]
    tally = compare(engine, name, prompts, expected, FEW_TOKENS, GREEDY, kinds, batch)
    report(smollm2, [tally], prompts, expected)
    assert tally.drafted > 0 or "goodput" in name  # a busy machine may tell it that drafts do not pay


@pytest.mark.parametrize("kind", SEEDED)
def test_seeded_sampling_is_the_same_text(engine: Engine, smollm2: Path, kind: str):
    prompts = encoded(smollm2, FEW)
    plain, *_ = generate(engine, prompts, FEW_TOKENS, SEEDED[kind], [EVERY["none"]], 8)
    for kinds, batch in (
        (MIX, 8),
        (TREE_MIX, 8),
        ([EVERY["model, static 3"]], 1),
        ([EVERY["tree, dyspec"]], 1),
    ):
        count = len(prompts) if batch > 1 else 2
        tally = compare(engine, kind, prompts[:count], plain[:count], FEW_TOKENS, SEEDED[kind], kinds, batch)
        report(smollm2, [tally], prompts, plain)
        assert tally.drafted > 0


def test_a_difference_is_found_and_explained(smollm2: Path):
    """The comparison itself: one wrong token must fail it, with the gap told."""
    prompts, expected = encoded(smollm2, FEW), by_transformers(smollm2, FEW, FEW_TOKENS)
    assert first_difference([1, 2, 3], [1, 2, 4]) == 2
    assert first_difference([1, 2, 3], [1, 2]) == 2
    assert first_difference([1, 2], [1, 2]) is None
    tally = Tally("wrong", 64, [(1, 3)], 0, 0)
    with pytest.raises(AssertionError, match="prompt 1 parts at token 3, top-2 gap"):
        report(smollm2, [tally], prompts, expected)


def test_every_policy_is_compared():
    """Nor is a policy or a rule for trees that comes later forgotten here."""
    assert {speculation.policy for speculation in EVERY.values()} == {*policies(), None}
    assert {speculation.drafter for speculation in EVERY.values()} == {"model", "ngram", "none", *rules()}
