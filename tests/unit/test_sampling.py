"""From logits to the law, against transformers' own processors and OpenAI's formula."""

import pytest
import torch
from transformers import (
    LogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from engine.sampling import Place, scaled_logits
from engine.sequence import Sequence
from engine.types import GenerateRequest, SamplingParams

VOCAB, EOS = 50, (2, 7)
PROMPT, OUTPUT, DRAFTED = [5, 9, 9, 30], [30, 11, 30], [11, 42, 3]


def sequence(**params: object) -> Sequence:
    request = GenerateRequest(id="r", prompt_ids=tuple(PROMPT), params=SamplingParams(**params))  # type: ignore[arg-type]
    seq = Sequence(
        request=request, seed=0, coupled=True, drafter="none", policy="static", options=None, max_sl=8
    )
    seq.tokens.extend(OUTPUT)
    return seq


def raw(rows: int, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed))


def places(seq: Sequence) -> list[Place]:
    """The places of one verification: after 0, 1, ... of the drafted tokens."""
    return [Place(seq, DRAFTED[:k]) for k in range(len(DRAFTED) + 1)]


def by_transformers(logits: torch.Tensor, processors: list[LogitsProcessor]) -> torch.Tensor:
    """Each place on its own, after prompt, output and the tokens drafted before it."""
    done = []
    for k in range(len(DRAFTED) + 1):
        ids = torch.tensor([PROMPT + OUTPUT + DRAFTED[:k]])
        row = logits[k : k + 1].clone()
        for processor in processors:
            row = processor(ids, row)
        done.append(row)
    return torch.cat(done)


CASES: dict[str, tuple[dict[str, object], list[LogitsProcessor]]] = {
    "temperature": ({"temperature": 0.7}, [TemperatureLogitsWarper(0.7)]),
    "top_k": ({"top_k": 5}, [TopKLogitsWarper(5)]),
    "top_k over the vocabulary": ({"top_k": 500}, []),
    "top_k of one": ({"top_k": 1}, [TopKLogitsWarper(1)]),
    "top_p": ({"top_p": 0.8}, [TopPLogitsWarper(0.8)]),
    "top_p, small": ({"top_p": 0.05}, [TopPLogitsWarper(0.05)]),
    "min_p": ({"min_p": 0.1}, [MinPLogitsWarper(0.1)]),
    "repetition_penalty": ({"repetition_penalty": 1.7}, [RepetitionPenaltyLogitsProcessor(1.7)]),
    "repetition_penalty below one": ({"repetition_penalty": 0.6}, [RepetitionPenaltyLogitsProcessor(0.6)]),
    "min_tokens": (
        {"min_tokens": 5, "max_tokens": 9},
        [MinNewTokensLengthLogitsProcessor(len(PROMPT), 5, list(EOS), device="cpu")],
    ),
    "all, in order": (
        {
            "repetition_penalty": 1.3,
            "min_tokens": 4,
            "temperature": 0.6,
            "top_k": 20,
            "top_p": 0.9,
            "min_p": 0.02,
        },
        [
            RepetitionPenaltyLogitsProcessor(1.3),
            MinNewTokensLengthLogitsProcessor(len(PROMPT), 4, list(EOS), device="cpu"),
            TemperatureLogitsWarper(0.6),
            TopKLogitsWarper(20),
            TopPLogitsWarper(0.9),
            MinPLogitsWarper(0.02),
        ],
    ),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("seed", range(3))
def test_the_law_is_transformers(name: str, seed: int):
    params, processors = CASES[name]
    logits = raw(4, seed)
    got = scaled_logits(logits, places(sequence(**params)), EOS)
    want = by_transformers(logits, processors)
    assert torch.equal(got.isneginf(), want.isneginf())
    torch.testing.assert_close(got.softmax(-1), want.softmax(-1), atol=1e-6, rtol=1e-5)


def test_presence_and_frequency_are_openais():
    """mu[j] - c[j] * alpha_frequency - float(c[j] > 0) * alpha_presence, c over generated tokens."""
    logits = raw(4)
    seq = sequence(frequency_penalty=0.7, presence_penalty=-0.4)
    got = scaled_logits(logits, places(seq), EOS)
    for k in range(4):
        generated = OUTPUT + DRAFTED[:k]
        for token in range(VOCAB):
            count = generated.count(token)
            want = logits[k, token].item() - count * 0.7 - float(count > 0) * -0.4
            assert got[k, token].item() == pytest.approx(want, abs=1e-5)


def test_logit_bias_comes_after_penalties_and_before_the_temperature():
    logits = raw(1)
    seq = sequence(logit_bias={30: 4.0, 1: -100.0}, presence_penalty=1.0, temperature=0.5)
    got = scaled_logits(logits, [Place(seq, [])], EOS)
    want = logits.clone()
    want[0, [30, 11]] -= 1.0
    want[0, 30] += 4.0
    want[0, 1] -= 100.0
    torch.testing.assert_close(got, want / 0.5)


def test_logit_bias_cannot_lift_the_min_tokens_mask():
    seq = sequence(logit_bias={2: 100.0}, min_tokens=9, stop_token_ids=(8,))
    got = scaled_logits(raw(4), places(seq), EOS)
    assert got[:, [2, 7, 8]].isneginf().all()
    assert not got[:, [0, 1, 3, 4, 5, 6, 9]].isneginf().any()


def test_min_tokens_counts_the_drafted_ones():
    got = scaled_logits(raw(4), places(sequence(min_tokens=5)), EOS)  # 3 are generated
    assert got[:, 2].isneginf().tolist() == [True, True, False, False]


def test_ties_at_the_kth_place_stay():
    logits = torch.zeros(1, VOCAB)
    logits[0, :4] = torch.tensor([3.0, 2.0, 2.0, 2.0])
    got = scaled_logits(logits, [Place(sequence(top_k=2), [])], EOS)
    assert (~got.isneginf())[0].nonzero()[:, 0].tolist() == [0, 1, 2, 3]


def test_top_p_of_zero_keeps_one_token():
    got = scaled_logits(raw(1), [Place(sequence(top_p=0.0), [])], EOS)
    assert (~got.isneginf()).sum() == 1
    assert got.argmax() == raw(1).argmax()


def test_greedy_rows_are_adjusted_but_not_filtered():
    logits = raw(1)
    seq = sequence(temperature=0.0, top_k=1, top_p=0.1, min_p=0.9, presence_penalty=2.0)
    got = scaled_logits(logits, [Place(seq, [])], EOS)
    want = logits.clone()
    want[0, [30, 11]] -= 2.0
    torch.testing.assert_close(got, want)


def test_rows_of_a_batch_do_not_see_each_other():
    kinds: list[dict[str, object]] = [params for params, _ in CASES.values()] + [{"temperature": 0.0}]
    logits = raw(len(kinds))
    together = scaled_logits(logits, [Place(sequence(**kind), [11]) for kind in kinds], EOS)
    for i, kind in enumerate(kinds):
        alone = scaled_logits(logits[i : i + 1], [Place(sequence(**kind), [11])], EOS)
        torch.testing.assert_close(together[i : i + 1], alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_input_is_not_changed(dtype: torch.dtype):
    for params, _ in [*CASES.values(), ({"temperature": 0.0, "logit_bias": {3: 5.0}}, [])]:
        logits = raw(4).to(dtype)
        before = logits.clone()
        got = scaled_logits(logits, places(sequence(**params)), EOS)
        assert torch.equal(logits, before)
        assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_drafted_tokens_leave_no_trace_in_the_counts():
    """A draft that is rejected must not weigh on what follows."""
    seq = sequence(frequency_penalty=1.0, repetition_penalty=1.5)
    logits = raw(4)
    first = scaled_logits(logits, places(seq), EOS)
    assert torch.equal(scaled_logits(logits, places(seq), EOS), first)
    assert seq.counts is not None
    seq.tokens.extend([42, 42])
    seq.counts.add([42, 42])
    fresh = sequence(frequency_penalty=1.0, repetition_penalty=1.5)
    fresh.tokens.extend([42, 42])
    torch.testing.assert_close(
        scaled_logits(logits, places(seq), EOS), scaled_logits(logits, places(fresh), EOS)
    )


@pytest.mark.parametrize("temperature", [1e-6, 1e-30])
def test_a_tiny_temperature_is_a_law(temperature: float):
    law = scaled_logits(raw(1), [Place(sequence(temperature=temperature), [])], EOS).softmax(-1)
    assert law[0, raw(1).argmax()] == 1.0
    assert law.sum() == 1.0
