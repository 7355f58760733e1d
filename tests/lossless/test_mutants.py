"""Faults put into the shipped code: each must fail the check that is there to find it."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from typing import Any

import pytest
import torch
from lossless.branches import Case, check
from lossless.chi_square import ALPHA, output_p_value
from lossless.contract import check_next_request, check_reset_on_reuse
from lossless.coupled import check_identity, requests, spec
from lossless.peek import PEEK_PAIR, registered
from lossless.toys import different, toy_engine, twins
from torch import Tensor

import engine.core
import engine.passes
import engine.speculation.verifier
from engine.core import Engine
from engine.models.runner import Chunk
from engine.scheduler import PlanRow
from engine.sequence import Sequence, TokenCounts
from engine.speculation.control import PolicyTable
from engine.speculation.drafters.base import Drafted
from engine.speculation.drafters.model import ModelDrafter
from engine.speculation.noise import GumbelNoise, RandomSource, uniform
from engine.speculation.verifier import Verifier, Walk
from engine.types import GenerateRequest, SamplingParams, TokenEvent

PAIR = different(3)
Patch = pytest.MonkeyPatch
STATIC = Case(PAIR, SamplingParams(max_tokens=4), spec(sl=2))


def must_fail(case: Case) -> None:
    with pytest.raises(AssertionError):
        check(case)


def test_the_cases_pass_without_a_fault():
    check(STATIC)
    check(CONFIDENT)
    check(PENALISED)
    check(SHORT)
    all_of_the_draft_stands()


# ---- sampling

CONFIDENT = Case(PAIR, SamplingParams(max_tokens=4), spec(policy="confidence", threshold=0.4))


def test_a_policy_that_drops_a_sampled_token(monkeypatch: Patch):
    shipped = ModelDrafter.draft

    def draft(self: ModelDrafter, *given: Any) -> Drafted:
        drafts = shipped(self, *given)
        for one in drafts.rows:
            if one.stop_reason == "policy":
                one.tokens.pop()
                one.laws.pop()
        return drafts

    monkeypatch.setattr(ModelDrafter, "draft", draft)
    must_fail(CONFIDENT)


def _residual(monkeypatch: Patch, mutant: Callable[[Tensor, Tensor | None, int], Tensor]) -> None:
    """In place of the law that is drawn from behind a rejected token."""
    monkeypatch.setattr(engine.speculation.verifier, "residual", mutant)


def test_a_residual_that_is_not_normalised(monkeypatch: Patch):
    def residual(p: Tensor, q: Tensor | None, token: int) -> Tensor:
        assert q is not None
        return (p - q).clamp(min=0)

    _residual(monkeypatch, residual)
    must_fail(STATIC)


@pytest.mark.parametrize("drafter", ["model", "ngram"])
def test_a_rejected_token_is_replaced_from_p(monkeypatch: Patch, drafter: str):
    _residual(monkeypatch, lambda p, q, token: p)
    must_fail(Case(PAIR, SamplingParams(max_tokens=4), spec(drafter, sl=2)))


def test_the_bonus_comes_from_the_draft(monkeypatch: Patch):
    shipped = Walk.step

    def step(self: Walk, stood: bool) -> None:
        q = self._q
        shipped(self, stood)
        if stood and q is not None and len(self.path) == len(self._draft.tokens):
            self.law = q

    monkeypatch.setattr(Walk, "step", step)
    must_fail(STATIC)


def _acceptance(monkeypatch: Patch, change: Callable[[Tensor], Tensor]) -> None:
    """The verifier accepts with `change(min(1, p/q))`."""

    class Changed:
        def __init__(self, source: RandomSource) -> None:
            self.categorical, self.ordered, self._source = source.categorical, source.ordered, source

        def bernoulli(self, probs: Tensor, owners: Seq[Sequence]) -> Tensor:
            return self._source.bernoulli(change(probs), owners)

    shipped = Verifier.__init__

    def init(self: Verifier, eos: Seq[int], noise: GumbelNoise, random: RandomSource) -> None:
        shipped(self, eos, noise, Changed(random))

    monkeypatch.setattr(Verifier, "__init__", init)


@pytest.mark.parametrize("drafter", ["model", "ngram"])
def test_every_draft_token_is_accepted(monkeypatch: Patch, drafter: str):
    _acceptance(monkeypatch, torch.ones_like)
    must_fail(Case(PAIR, SamplingParams(max_tokens=4), spec(drafter, sl=2)))


def test_accepted_only_where_p_is_at_least_q(monkeypatch: Patch):
    _acceptance(monkeypatch, lambda probs: (probs >= 1).to(probs.dtype))
    must_fail(STATIC)


class PositionDraws:
    """Rejection draws keyed by position: one stream for drafting, one for accepting, one for the rest."""

    def __init__(self, stream: int) -> None:
        self._stream = stream
        self._calls: dict[tuple[str, int], int] = {}  # by request and length: draws in this iteration

    def _uniforms(self, owners: Seq[Sequence], stream: int) -> Tensor:
        values = []
        for owner in owners:
            key = (f"{stream}/{owner.id}", len(owner.tokens))
            ahead = self._calls[key] = self._calls.get(key, -1) + 1
            values.append(uniform(owner.seed * 8 + stream, len(owner.tokens) + ahead))
        return torch.tensor(values, dtype=torch.float64)

    def categorical(self, laws: Tensor, owners: Seq[Sequence]) -> Tensor:
        draws = self._uniforms(owners, self._stream)[:, None]
        return torch.searchsorted(laws.cumsum(-1), draws, right=True)[:, 0].clamp(max=laws.shape[-1] - 1)

    def bernoulli(self, probs: Tensor, owners: Seq[Sequence]) -> Tensor:
        return self._uniforms(owners, 2) < probs


@pytest.mark.parametrize("policy", ["static", "peek"])
def test_rejection_draws_keyed_by_position(policy: str):
    """A static lookahead forgives it; a policy that saw what a position will draft again does not."""

    def build(rows: int) -> Engine:
        engine = toy_engine(PEEK_PAIR, blocks=rows * 8, rows=rows)
        engine._parts.drafters["model"].random = PositionDraws(0)  # type: ignore[attr-defined]
        engine._parts.verifier._random = PositionDraws(1)
        return engine

    options = {"sl": 2} if policy == "static" else {}
    with registered():
        asked = [
            GenerateRequest(
                id=str(seed),
                prompt_ids=(0, 1, 2),
                params=SamplingParams(seed=seed, max_tokens=4, sampling_method="rejection"),
                speculation=spec("model", policy, **options),
            )
            for seed in range(4000)
        ]
        biased = output_p_value(build, PEEK_PAIR, asked) < ALPHA
    assert biased == (policy == "peek")


# ---- KV and state


def _after_commit(monkeypatch: Patch, change: Callable[[Sequence, bool], None]) -> None:
    """`change(seq, all_accepted)` behind the commit of every row that drafted and goes on."""
    shipped = Engine._commit

    def commit(self: Engine, row: PlanRow, *given: Any) -> TokenEvent | None:
        event = shipped(self, row, *given)
        if row.draft.tokens and row.seq.status == "running":
            change(row.seq, row.accepted == len(row.draft.tokens))
        return event

    monkeypatch.setattr(Engine, "_commit", commit)


def all_of_the_draft_stands() -> None:
    """No law can show stale draft KV, since q is what was drawn from; a draft that is the target does."""

    def stand(events: list[TokenEvent]) -> None:
        assert all(event.accepted == event.drafted for event in events)

    check(Case(twins(3), SamplingParams(max_tokens=5), spec(sl=1)), stand)


def test_stale_draft_kv_after_full_acceptance(monkeypatch: Patch):
    def too_far(seq: Sequence, all_accepted: bool) -> None:
        if all_accepted:
            seq.draft_kv_len = seq.kv_len

    _after_commit(monkeypatch, too_far)
    with pytest.raises(AssertionError):
        all_of_the_draft_stands()


@pytest.mark.parametrize("offset", [-1, 1])
def test_target_kv_rolled_back_wrong_by_one(monkeypatch: Patch, offset: int):
    """After a rejection the newest token is fed one position off."""
    wrong: dict[int, tuple[Seq[int], bool]] = {}  # by a table's identity, and the table to keep it its own

    def mark(seq: Sequence, all_accepted: bool) -> None:
        wrong[id(seq.blocks)] = (seq.blocks, not all_accepted)

    def chunk(tokens: Seq[int], start: int, blocks: Seq[int], *rest: Any) -> Chunk:
        return Chunk(tokens, start + offset * wrong.get(id(blocks), (blocks, False))[1], blocks, *rest)

    _after_commit(monkeypatch, mark)
    monkeypatch.setattr(engine.passes, "Chunk", chunk)
    must_fail(Case(PAIR, SamplingParams(max_tokens=4), spec(sl=2), block_size=16))


def test_target_kv_of_a_rejected_token_is_kept(monkeypatch: Patch):
    """The row believes that nothing is pending, which the scheduler does not."""

    def keep(seq: Sequence, all_accepted: bool) -> None:
        seq.kv_len += not all_accepted

    _after_commit(monkeypatch, keep)
    must_fail(STATIC)


@pytest.mark.parametrize("policy", ["heuristic", "confidence", "static"])
def test_state_leaks_to_the_next_request_of_a_slot(monkeypatch: Patch, policy: str):
    def take(self: PolicyTable, seq: Sequence) -> None:
        seq.slot = self._free.pop()
        if seq.slot not in self.__dict__.setdefault("used", set()):
            self._policies[seq.policy].reset(self._states[seq.policy], seq.slot, seq.options)
        self.__dict__["used"].add(seq.slot)

    check_reset_on_reuse(policy)
    monkeypatch.setattr(PolicyTable, "take", take)
    with pytest.raises(AssertionError):
        check_reset_on_reuse(policy)
    if policy == "heuristic":  # the others learn nothing, and a request with its own options sees its own
        with pytest.raises(AssertionError):
            check_next_request(policy)


# ---- what depends on the drafted tokens

PENALISED = Case(PAIR, SamplingParams(max_tokens=4, presence_penalty=0.5, frequency_penalty=0.5), spec(sl=2))
SHORT = Case(PAIR, SamplingParams(max_tokens=4, min_tokens=3), spec(sl=2), eos=(1,))


def test_penalties_without_the_drafted_tokens(monkeypatch: Patch):
    monkeypatch.setattr(TokenCounts, "after", lambda self, drafted: (self.output, self.seen))
    must_fail(PENALISED)


def test_min_tokens_without_the_drafted_tokens(monkeypatch: Patch):
    shipped = engine.speculation.verifier.Place
    monkeypatch.setattr(engine.speculation.verifier, "Place", lambda seq, drafted: shipped(seq, []))
    must_fail(SHORT)


# ---- coupled noise


class Shifted(GumbelNoise):
    """The draft's noise is that of the position after: it agrees less, and changes nothing."""

    def __call__(self, seeds: Seq[int], positions: Seq[int]) -> Tensor:
        return super().__call__(seeds, [at + 1 for at in positions])


def test_noise_shifted_between_draft_and_target_changes_nothing():
    engine = toy_engine(PAIR, blocks=512, rows=64)
    engine._parts.drafters["model"].noise = Shifted(3, torch.device("cpu"))  # type: ignore[attr-defined]
    check_identity(engine, PAIR, requests(SamplingParams(max_tokens=12), prompt=(0, 1, 2, 0, 1)))


def test_noise_that_depends_on_the_lookahead(monkeypatch: Patch):
    shipped = Verifier._coupled

    def coupled(
        self: Verifier, chosen: list[int], starts: list[int], rows: Any, drafts: Any, *given: Any
    ) -> None:
        noise, ahead = self._noise, sum(len(draft.tokens) for draft in drafts)
        self._noise = lambda seeds, positions: noise(seeds, [at + ahead for at in positions])  # type: ignore[assignment]
        shipped(self, chosen, starts, rows, drafts, *given)
        self._noise = noise

    monkeypatch.setattr(Verifier, "_coupled", coupled)
    asked = requests(SamplingParams(max_tokens=12), [spec(sl=2)], prompt=(0, 1, 2, 0, 1))
    for request in asked:
        with pytest.raises(AssertionError):
            check_identity(toy_engine(PAIR, rows=1), PAIR, [request])
