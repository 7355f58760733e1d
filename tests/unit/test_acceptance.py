"""Acceptance along a text, held to exact enumeration of rejection sampling on a toy pair."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from fractions import Fraction

import pytest
import torch

from classifiers.acceptance import (
    Costs,
    Iterations,
    acceptance_probability,
    best,
    ceiling,
    coupled_match,
    greedy_match,
    oracle,
    overlap,
    prefix_acceptance,
    speedup,
    static,
)
from engine.speculation.noise import GumbelNoise

V = 3
Law = tuple[Fraction, ...]


def law(*weights: int) -> Law:
    return tuple(Fraction(w, sum(weights)) for w in weights)


# The next token's law by the last token; the draft never proposes token 2 after token 1.
P = (law(5, 3, 2), law(1, 6, 3), law(4, 4, 2))
Q = (law(2, 7, 1), law(3, 7, 0), law(1, 1, 8))
FIRST = 0


def laws(texts: tuple[int, ...], model: tuple[Law, ...]) -> torch.Tensor:
    """Logits [T, V] along a text begun after FIRST."""
    rows = [model[token] for token in (FIRST, *texts[:-1])]
    return torch.tensor([[float(x) for x in row] for row in rows], dtype=torch.float64).log()


def run(last: int, left: int, sl: int) -> Iterator[tuple[Fraction, int, int, int, tuple[int, ...]]]:
    """Every way in which rejection sampling emits `left` tokens after `last`.

    (probability, passes, drafted, accepted, text), by the rule itself: draft min(sl, left - 1)
    tokens from q, accept each with min(1, p/q), resample from the residual, or a bonus from p.
    """
    if left == 0:
        yield Fraction(1), 0, 0, 0, ()
        return
    k = min(sl, left - 1)
    for draft in itertools.product(range(V), repeat=k):
        chance, before = Fraction(1), last
        for token in draft:
            chance *= Q[before][token]
            before = token
        if chance == 0:
            continue
        reach, before = chance, last
        for j in range(k + 1):
            p, q = P[before], Q[before]
            if j == k:
                outcomes: Law = p
                falls = Fraction(1)
            else:
                falls = 1 - min(Fraction(1), p[draft[j]] / q[draft[j]])
                rest = [max(a - b, Fraction(0)) for a, b in zip(p, q, strict=True)]
                outcomes = tuple(x / sum(rest) for x in rest) if falls else p
            for token, share in enumerate(outcomes):
                weight = reach * falls * share
                if weight:
                    for w, passes, drafted, accepted, text in run(token, left - j - 1, sl):
                        emitted = (*draft[:j], token, *text)
                        yield weight * w, passes + 1, drafted + k, accepted + j, emitted
            if j < k:
                reach *= 1 - falls
                before = draft[j]


@pytest.mark.parametrize("sl", [1, 2, 3])
def test_rejection_along_texts_of_the_target_is_exact_in_the_mean(sl: int) -> None:
    length = 4
    true = [Fraction(0)] * 3
    emitted: dict[tuple[int, ...], Fraction] = {}
    for weight, *counts, text in run(FIRST, length, sl):
        true = [a + weight * c for a, c in zip(true, counts, strict=True)]
        emitted[text] = emitted.get(text, Fraction(0)) + weight
    mean = [0.0] * 3
    for text in itertools.product(range(V), repeat=length):
        p = math.prod(P[a][b] for a, b in zip((FIRST, *text), text, strict=False))
        assert emitted.get(text, 0) == p  # the enumeration is lossless itself
        accept = acceptance_probability(laws(text, P), laws(text, Q), torch.tensor(text))
        found = static(accept, sl)
        for i, value in enumerate((found.passes, found.drafted, found.accepted)):
            mean[i] += float(p) * value
    assert mean == pytest.approx([float(x) for x in true], rel=1e-6)


@pytest.mark.parametrize("j", [1, 2, 3])
def test_the_chance_that_j_draft_tokens_all_stand(j: int) -> None:
    true = sum(  # over what is drafted: q times the chances of acceptance
        math.prod(min(P[a][b], Q[a][b]) for a, b in zip((FIRST, *text), text, strict=False))
        for text in itertools.product(range(V), repeat=j)
    )
    mean = 0.0
    for text in itertools.product(range(V), repeat=j):
        p = math.prod(P[a][b] for a, b in zip((FIRST, *text), text, strict=False))
        accept = acceptance_probability(laws(text, P), laws(text, Q), torch.tensor(text))
        mean += float(p) * float(prefix_acceptance(accept, j)[-1])
    assert mean == pytest.approx(float(true), rel=1e-6)


def test_overlap_is_one_minus_total_variation_and_the_mean_chance() -> None:
    for state in range(V):
        rows = laws((state, 0), P)[1:], laws((state, 0), Q)[1:]
        tv = sum(abs(a - b) for a, b in zip(P[state], Q[state], strict=True)) / 2
        assert float(overlap(*rows)) == pytest.approx(float(1 - tv), rel=1e-6)
        chances = [float(acceptance_probability(*rows, torch.tensor([x]))) for x in range(V)]
        assert sum(float(p) * a for p, a in zip(P[state], chances, strict=True)) == pytest.approx(
            float(1 - tv), rel=1e-6
        )


def test_laws_are_compared_at_the_temperature() -> None:
    target, draft = torch.tensor([[0.0, math.log(3)]]), torch.tensor([[0.0, 0.0]])
    assert float(acceptance_probability(target, draft, torch.tensor([1]), 0.5)) == pytest.approx(0.5 / 0.9)
    assert float(overlap(target, draft, 0.5)) == pytest.approx(0.1 + 0.5)


def test_a_draft_that_knows_few_tokens_gives_zeros_and_no_nan() -> None:
    target = torch.tensor([[1.0, 2.0, 3.0]] * 3)
    draft = torch.tensor([[float("-inf"), 0.0, float("-inf")]] * 3)
    tokens = torch.tensor([0, 1, 2])
    assert acceptance_probability(target, draft, tokens).tolist() == [0.0, 1.0, 0.0]
    assert overlap(target, draft)[0] == pytest.approx(float(target[0].softmax(-1)[1]))
    assert greedy_match(draft, tokens).tolist() == [False, True, False]
    noise = GumbelNoise(3, torch.device("cpu"))([5] * 3, [7, 8, 9])
    assert coupled_match(draft, tokens, noise).tolist() == [False, True, False]


def test_coupled_choices_of_one_law_agree_and_follow_the_noise_and_temperature() -> None:
    logits = torch.randn(200, 11, generator=torch.Generator().manual_seed(1))
    noise = GumbelNoise(11, torch.device("cpu"))([3] * 200, list(range(200)))
    chosen = (logits.double() + noise).argmax(-1)
    assert bool(coupled_match(logits, chosen, noise).all())
    assert not bool(coupled_match(logits, chosen, noise.roll(1, 0)).all())
    assert not bool(coupled_match(logits, chosen, noise, temperature=0.2).all())


def match(text: str) -> torch.Tensor:
    return torch.tensor([c == "1" for c in text])


def replay(matches: torch.Tensor, sl: int, room: int) -> tuple[int, int, list[int]]:
    """(passes, drafted, accepted lengths), one iteration after another."""
    at, drafted, lengths = 0, 0, []
    while at < len(matches):
        k = min(sl, room - at - 1)
        drafted += k
        j = 0
        while j < k and at + j < len(matches) and bool(matches[at + j]):
            j += 1
        lengths.append(j)
        at += j + 1
    return len(lengths), drafted, lengths


@pytest.mark.parametrize("sl", range(9))
@pytest.mark.parametrize("spare", [0, 1, 3, 20])
def test_static_is_the_replay_of_iterations(sl: int, spare: int) -> None:
    generator = torch.Generator().manual_seed(sl)
    for total in (1, 2, 7, 40):
        matches = torch.rand(total, generator=generator) < 0.7
        passes, drafted, lengths = replay(matches, sl, total + spare)
        found = static(matches, sl, room=total + spare)
        assert (found.passes, found.drafted, found.accepted) == (passes, drafted, sum(lengths))
        assert found.emitted == total
        assert list(found.lengths) == [lengths.count(j) for j in range(sl + 1)]


def test_static_by_hand() -> None:
    found = static(match("110111"), 2)  # 1 1 [0], then 1 1 [1]
    assert found == Iterations(drafted=4, emitted=6, lengths=(0, 0, 2))
    assert (found.acceptance, found.mean_emitted) == (1.0, 3.0)
    found = static(match("0110"), 3)  # [0], then 1 1 [0]
    assert found == Iterations(drafted=5, emitted=4, lengths=(1, 0, 1, 0))
    assert (found.acceptance, found.mean_emitted) == (0.4, 2.0)
    # An end token inside the draft: the two tokens drafted past it are drafted, never accepted.
    assert static(match("11"), 4, room=9) == Iterations(drafted=4, emitted=2, lengths=(0, 0, 1, 0, 0))


def test_nothing_to_emit_and_nothing_drafted() -> None:
    empty = static(match(""), 3)
    assert (empty.passes, empty.acceptance, empty.mean_emitted) == (0, None, None)
    alone = static(match("111"), 0)
    assert (alone.passes, alone.acceptance, alone.mean_emitted) == (3, None, 1.0)
    assert Iterations().mean_emitted is None and Iterations().acceptance is None


def test_sums_of_texts() -> None:
    total = sum((static(match(text), 2) for text in ("110", "0")), Iterations())
    assert total == Iterations(drafted=2, emitted=4, lengths=(1, 0, 1))


def test_prefix_acceptance_is_the_same_wherever_iterations_begin() -> None:
    assert prefix_acceptance(match("1101"), 3).tolist() == pytest.approx([3 / 4, 1 / 3, 0])
    assert prefix_acceptance(torch.tensor([0.5, 0.8]), 2).tolist() == pytest.approx([0.65, 0.4])
    assert math.isnan(float(prefix_acceptance(match("1"), 2)[1]))


def test_predicted_speedup() -> None:
    costs = Costs(draft=1.0, verify=(10.0, 11.0, 12.0))
    assert costs.ratio == 0.1
    assert [costs.iteration(k) for k in range(3)] == [1.0, 1.2, 1.4]
    assert speedup(1.0, 0, costs) == 1.0
    assert speedup(2.1, 2, costs) == pytest.approx(1.5)
    assert ceiling(2, costs) == pytest.approx(3 / 1.4)
    # One iteration accepts nothing and drafts nothing, one accepts both: 4 tokens in 1.0 + 1.4 passes.
    assert oracle(static(match("0110"), 2), costs) == pytest.approx(4 / 2.4)
    assert oracle(Iterations(), costs) is None


def test_the_oracle_is_at_least_every_static_lookahead() -> None:
    costs = Costs(draft=2.0, verify=tuple(10.0 + j for j in range(9)))
    matches = torch.rand(300, generator=torch.Generator().manual_seed(2)) < 0.6
    top = oracle(static(matches, 8), costs)
    assert top is not None
    for k in range(1, 9):
        found = static(matches, k)
        assert found.mean_emitted is not None
        assert speedup(found.mean_emitted, k, costs) < top


def test_best_prefers_no_draft_where_none_pays() -> None:
    assert best([0.9, 0.8]) == (0, 1.0)
    assert best([1.2, 1.4, 1.3]) == (2, 1.4)
    assert best([]) == (0, 1.0)
