"""TETRIS (arXiv 2502.15197): one pot of draft tokens for the batch, given to the likeliest prefixes."""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar

import msgspec
import torch
from torch import Tensor

from engine.speculation.policy import Equipment, Need, Signals, State, StopPolicy, register

_PRIOR, _WEIGHT = 0.8, 2.0  # what a row's acceptance is taken for before it drafts, as so many tokens
_NEVER = -1e4  # a log-probability below that of any draft
_TIE = 1e-6


class TetrisOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`share`: tokens that the row brings to the pot; `max_sl`: the most that it may take."""

    share: Annotated[
        int,
        msgspec.Meta(
            ge=1, le=64, description="draft tokens that the row brings to the batch's pot in an iteration"
        ),
    ] = 5
    max_sl: Annotated[
        int, msgspec.Meta(ge=0, le=64, description="the most that the row may draft in an iteration")
    ] = 20


@register("tetris")
class Tetris(StopPolicy):
    """Rows that draft together share as many tokens as they brought, by probability of the prefix.

    The paper drafts K tokens for every row, sorts all (row, position) pairs by the product of their
    tokens' probabilities, verifies the first C and drops the rest. Dropping a token for its own
    probability biases sampled output: tokens that the draft thinks unlikely would be dropped, and then
    drawn from the target instead, more often than its law has it. Here nothing is dropped: a sampled
    token is always submitted, and the pot only decides who samples *one more*. Whether a row draws
    token k + 1 depends on its tokens 1 to k and on other rows', all drawn before it, never on token
    k + 1; given all of that, token k + 1 is accepted or corrected exactly as it would be without a
    pot, so the output keeps the target's law (and coupled sampling cannot be biased at all).

    The score is what is expected of a prefix, not what was drawn: the product of the *largest*
    probability at each step. Multiplying the drawn tokens' own (`joint`) would be unbiased too, but
    at temperature 1 it would rate a row by its luck: a token of small q is accepted as readily as one
    of large q when the laws agree.

    What is still to be drawn is not known, so the sort is over predictions. A row at log-score s
    after k tokens is taken to lose l = (s + 2 log .8)/(k + 2) with each further one, and has token k + d
    at s + d l. Row i draws token k + 1 if fewer than `left` of all rows' tokens to come stand before
    it, `left` what remains of the pot: TETRIS's first C of those. Of equal ones the earlier row's
    come first. With one row that is SL = `share`.
    """

    name: ClassVar[str]
    Options: ClassVar[type[msgspec.Struct]] = TetrisOptions
    needs: ClassVar[frozenset[Need]] = frozenset({"largest"})
    shares: ClassVar[bool] = True  # a row's answer depends on those that draft beside it

    def allocate(self, slots: int, device: torch.device, equipment: Equipment) -> State:
        return _TetrisState(slots, device)

    def reset(self, state: State, slot: int, options: Any) -> None:
        state.reset(slot, {"own": 0.0})
        state.tensors["own"][slot, :2] = torch.tensor([options.share, options.max_sl])

    def limit(self, state: State) -> Tensor:
        return state["own"][:, 1].long()

    def keep_drafting(self, signals: Signals, state: State) -> Tensor:
        assert isinstance(state, _TetrisState) and signals.largest is not None
        drew = signals.alive if state.mine is None else signals.alive & state.mine
        others = ~drew  # carry values without meaning
        share, max_sl, score, left = state["own"].unbind(1)
        first = signals.step == 1
        score = (signals.largest.log() + score.masked_fill(first, 0)).masked_fill(others, _NEVER)
        score = score.nan_to_num(_NEVER)  # a row whose draft broke down takes no other's share
        pot, left = share.masked_fill(others, 0).sum(), left.masked_fill(others, 0).amax()
        left = torch.where(first, pot, left) - drew.sum()
        state.tensors["own"][:, 2:][state.rows] = torch.stack([score, left.expand_as(score)], dim=1)
        size = len(score)
        return _before(score, signals.step, max_sl, state.ties[:size, :size]) < left


class _TetrisState(State):
    """`own` [slots, 4]: share, max_sl, the log-score, and what is left of the pot, the same in every row
    that drafts; so that drafts of two drafters at a time have two pots. `ties`: a little before row i.
    """

    def __init__(self, slots: int, device: torch.device) -> None:
        super().__init__({"own": torch.zeros(slots, 4, dtype=torch.float32, device=device)})
        # A captured graph may have more rows than there are slots: up to the next power of two.
        self.ties = torch.full((2 * slots, 2 * slots), _TIE, device=device).tril(-1)


def _before(score: Tensor, step: Tensor, max_sl: Tensor, ties: Tensor) -> Tensor:
    """float32[B]: how many tokens to come, of all rows, stand before the row's next one.

    `score` float32[B] log-scores after `step` tokens, `_NEVER` for rows that have stopped; `ties` [B, B].
    Of two rows at least one stands before the other, so fewer than n + 1 rows have fewer than n before them.
    """
    loss = (score + _WEIGHT * math.log(_PRIOR)) / (step + _WEIGHT)  # below 0
    following = score + loss
    # Row j's token k + 1 + m stands before i's next if following_j + m loss_j > following_i: so many m.
    count = (following[:, None] - following) / loss  # [i, j]
    room = (max_sl - step).clamp(min=1)
    return torch.minimum((count + ties).ceil().clamp(min=0), room).sum(1)
