"""Log-probabilities of prompts and answers are transformers' own, whatever drafts and whatever is cached."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from live_app import Live, live
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from engine.client_local import LocalEngine
from engine.config import EngineConfig

PATH = "/v1/completions"
CLOSE = 1e-3
VOCAB = 259  # the tokenizer's: the model's padding above it is no token, and has no mass
SPECULATION: dict[str, dict[str, Any]] = {
    "off": {"drafter": "none"},
    "model": {"drafter": "model", "policy": "static", "options": {"sl": 5}},
    "ngram": {"drafter": "ngram", "policy": "static", "options": {"sl": 3}},
}


@pytest.fixture(scope="module")
def app(tiny_llama: Path) -> Iterator[Live]:
    config = EngineConfig(
        target=str(tiny_llama), draft="self:2", policy="static", token_budget=48, kv_blocks=128, device="cpu"
    )
    with live(LocalEngine(config), AutoTokenizer.from_pretrained(tiny_llama)) as app:
        yield app


@pytest.fixture(scope="module")
def model(tiny_llama: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()


@torch.no_grad()
def log_softmax(model: PreTrainedModel, ids: list[int]) -> Tensor:
    """[len(ids) - 1, VOCAB]: row i is of token i + 1."""
    return model(torch.tensor([ids])).logits[0, :-1, :VOCAB].double().log_softmax(-1)


def prompts(count: int, longest: int) -> list[list[int]]:
    """As harnesses send them: of different lengths, some with a common beginning."""
    source = random.Random(7)
    shared = [source.randrange(3, 259) for _ in range(20)]
    own = [[source.randrange(3, 259) for _ in range(source.randint(1, longest - 20))] for _ in range(count)]
    return [shared + ids if i % 2 else ids for i, ids in enumerate(own)]


def check(logprobs: list[float | None], model: PreTrainedModel, ids: list[int]) -> None:
    assert logprobs[0] is None and len(logprobs) == len(ids)
    if len(ids) == 1:
        return
    expected = log_softmax(model, ids)[range(len(ids) - 1), ids[1:]]
    torch.testing.assert_close(torch.tensor(logprobs[1:], dtype=torch.float64), expected, atol=CLOSE, rtol=0)


@pytest.mark.parametrize("max_tokens", [0, 1])
@pytest.mark.parametrize("name", SPECULATION)
def test_echo_scores_a_batch(app: Live, model: PreTrainedModel, name: str, max_tokens: int) -> None:
    batch = prompts(24, 100)
    answer = app.ask(
        PATH, prompt=batch, echo=True, logprobs=1, max_tokens=max_tokens, temperature=0, seed=1234,
        return_token_ids=True, speculation=SPECULATION[name],
    )  # fmt: skip
    assert [choice["prompt_token_ids"] for choice in answer["choices"]] == batch
    for choice, prompt in zip(answer["choices"], batch, strict=True):
        ids = prompt + choice["token_ids"]
        assert len(choice["token_ids"]) == max_tokens
        check(choice["logprobs"]["token_logprobs"], model, ids)
        if len(ids) > 1:
            best = log_softmax(model, ids).max(-1).values.tolist()
            told = [max(top.values()) for top in choice["logprobs"]["top_logprobs"][1:]]
            assert told == pytest.approx(best, abs=CLOSE)
    assert answer["usage"]["prompt_tokens"] == sum(map(len, batch))


@pytest.mark.parametrize(
    "sampling", [{"temperature": 0}, {"temperature": 1.0, "seed": 3}, {"temperature": 0.8}]
)
@pytest.mark.parametrize("name", SPECULATION)
def test_answers_are_scored(app: Live, model: PreTrainedModel, name: str, sampling: dict[str, Any]) -> None:
    for prompt in prompts(3, 40):
        answer = app.ask(
            PATH, prompt=prompt, echo=True, logprobs=2, max_tokens=40, return_token_ids=True, ignore_eos=True,
            presence_penalty=0.5, speculation=SPECULATION[name], **sampling,
        )  # fmt: skip
        choice = answer["choices"][0]
        check(choice["logprobs"]["token_logprobs"], model, prompt + choice["token_ids"])


def test_speculation_drafts_in_these_tests(app: Live) -> None:
    answer = app.ask(PATH, prompt=[5, 6, 7] * 8, max_tokens=40, temperature=0, ignore_eos=True,
                     speculation=SPECULATION["model"])  # fmt: skip
    assert answer["speculation"]["accepted"] > 0
    assert answer["speculation"]["drafted"] > answer["speculation"]["accepted"]


def test_prompt_logprobs(app: Live, model: PreTrainedModel) -> None:
    prompt = prompts(2, 40)[1]
    choice = app.ask(PATH, prompt=prompt, prompt_logprobs=3, max_tokens=1)["choices"][0]
    assert choice["logprobs"] is None
    first, *rest = choice["prompt_logprobs"]
    assert first is None and len(rest) == len(prompt) - 1
    for token, told, expected in zip(prompt[1:], rest, log_softmax(model, prompt), strict=True):
        likely = expected.topk(3)
        own = told[str(token)]
        assert own["logprob"] == pytest.approx(expected[token].item(), abs=CLOSE)
        ranked = {entry["rank"]: entry["logprob"] for entry in told.values() if entry["rank"] is not None}
        assert ranked == pytest.approx(dict(enumerate(likely.values.tolist(), 1)), abs=CLOSE)
        assert len(told) == 3 + (own["rank"] is None)


def test_echo_and_prompt_logprobs_together(app: Live) -> None:
    prompt = prompts(2, 30)[1]
    choice = app.ask(
        PATH,
        prompt=prompt,
        echo=True,
        logprobs=1,
        prompt_logprobs=4,
        max_tokens=0,
        return_tokens_as_token_ids=True,
    )["choices"][0]
    tops = choice["logprobs"]["top_logprobs"][1:]
    assert {len(top) for top in tops} <= {1, 2} and len(tops) == len(prompt) - 1
    assert choice["logprobs"]["tokens"] == [f"token_id:{token}" for token in prompt]
    for token, told, top in zip(prompt[1:], choice["prompt_logprobs"][1:], tops, strict=True):
        assert told[str(token)]["logprob"] == top[f"token_id:{token}"]
        assert len(told) in (4, 5)
