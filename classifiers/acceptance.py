"""From two laws along a text to acceptance, tokens per target pass and predicted speed-up.

A text of T tokens is the target's own. At each of its positions a draft token would have been
accepted with a known probability, given that it was reached:

- greedy: 1 if the draft's choice is the text's token, else 0;
- coupled (arXiv 2408.07978): the same, both choosing with one noise;
- rejection (arXiv 2211.17192): min(1, q(x) / p(x)). Of a text x ~ p made by rejection sampling, x
  was an accepted draft token with joint probability min(p(x), q(x)) and a resampled one with
  max(p(x) - q(x), 0), which add up to p(x): given the text, acceptances are independent and have
  these probabilities.

So every iteration of a static SL can be computed along a text made without any draft. For greedy
and coupled texts the result is what would have happened; for rejection it is the expectation, free
of bias in the mean over texts x ~ p.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import zip_longest

import torch
from torch import Tensor


def greedy_match(draft: Tensor, tokens: Tensor) -> Tensor:
    """bool[T]: whether the draft's likeliest token, of logits [T, V], is the text's, int64[T]."""
    return draft.argmax(-1) == tokens


def coupled_match(draft: Tensor, tokens: Tensor, noise: Tensor, temperature: float = 1.0) -> Tensor:
    """bool[T]: whether argmax(log q + g) is the text's token; `noise` g float64[T, V], logits [T, V].

    The text must be the target's choice under the same noise.
    """
    return (draft.float() / temperature + noise).argmax(-1) == tokens


def acceptance_probability(target: Tensor, draft: Tensor, tokens: Tensor, temperature: float = 1.0) -> Tensor:
    """float32[T]: min(1, q(x) / p(x)) of the text's tokens int64[T], from logits [T, V] of both.

    Logits of -inf are a probability of 0; the text's own tokens must have p > 0.
    """
    at = tokens[:, None]
    logp = (target.float() / temperature).log_softmax(-1).gather(-1, at)
    logq = (draft.float() / temperature).log_softmax(-1).gather(-1, at)
    return (logq - logp).clamp(max=0).exp()[:, 0]


def overlap(target: Tensor, draft: Tensor, temperature: float = 1.0) -> Tensor:
    """float32[T]: sum of min(p, q) = 1 - TV, the acceptance of one sampled token; logits [T, V]."""
    p = (target.float() / temperature).softmax(-1)
    q = (draft.float() / temperature).softmax(-1)
    return torch.minimum(p, q).sum(-1)


@dataclass(frozen=True)
class Iterations:
    """Sums over the iterations of one static SL; expectations where acceptance was a probability.

    `lengths[j]`: iterations that accepted j tokens. `emitted` are accepted tokens and the target's own.
    """

    drafted: float = 0.0
    emitted: float = 0.0
    lengths: tuple[float, ...] = ()

    @property
    def passes(self) -> float:
        """Iterations, which is passes of the target."""
        return sum(self.lengths)

    @property
    def accepted(self) -> float:
        """Draft tokens that became text."""
        return sum(j * count for j, count in enumerate(self.lengths))

    @property
    def acceptance(self) -> float | None:
        """Accepted over drafted; None if nothing was drafted."""
        return self.accepted / self.drafted if self.drafted else None

    @property
    def mean_emitted(self) -> float | None:
        """Tokens per target pass (mean accepted length); None without a pass."""
        return self.emitted / self.passes if self.lengths and self.passes else None

    def __add__(self, other: Iterations) -> Iterations:
        lengths = zip_longest(self.lengths, other.lengths, fillvalue=0.0)
        return Iterations(
            self.drafted + other.drafted, self.emitted + other.emitted, tuple(a + b for a, b in lengths)
        )


def static(accept: Tensor, sl: int, *, room: int | None = None) -> Iterations:
    """The iterations that emit a text, at static SL `sl` >= 0.

    `accept` bool or float [T]: the chance of acceptance at each position, the first iteration
    beginning at the first. `room` >= T: tokens the request allowed from there on; a text that ended
    by itself leaves some over, and drafts that ran past its end count as drafted. Default T: the last
    drafts are cut to what is left, as the engine cuts them.
    """
    chances: list[float] = accept.to(torch.float64).tolist()
    total = len(chances)
    room = total if room is None else room
    begins = [1.0, *[0.0] * total]  # the chance that an iteration begins at each position
    lengths = [0.0] * (sl + 1)
    drafted = 0.0
    for start in range(total):
        if begins[start] == 0.0:
            continue
        limit = min(sl, room - start - 1)
        drafted += begins[start] * limit
        reach, last = begins[start], min(limit, total - start)
        for j in range(last):
            falls = reach * (1.0 - chances[start + j])
            lengths[j] += falls
            begins[start + j + 1] += falls
            reach *= chances[start + j]
        lengths[last] += reach
        begins[min(start + last + 1, total)] += reach
    return Iterations(drafted, float(total), tuple(lengths))


def prefix_acceptance(accept: Tensor, sl: int) -> Tensor:
    """float64[sl]: the chance that the first 1, 2, ... `sl` draft tokens all stand, averaged over every
    position that has as many after it; NaN where the text is shorter. Independent of where iterations begin.

    `accept` [T] as in `static`. 1 + its sum is the tokens per pass of an iteration begun anywhere.
    """
    chances = accept.to(torch.float64)
    reach = torch.ones_like(chances)
    means = []
    for j in range(sl):
        # after j + 1 rounds, reach[t] is the product over t .. t + j
        reach = reach[: max(0, len(chances) - j)] * chances[j:]
        means.append(reach.mean())
    return torch.stack(means)


@dataclass(frozen=True)
class Costs:
    """Seconds at one batch size and context: `draft` of one draft step, `verify[j]` of a target pass over
    j + 1 tokens."""

    draft: float
    verify: tuple[float, ...]

    @property
    def ratio(self) -> float:
        """One draft step over one pass of the target alone, c."""
        return self.draft / self.verify[0]

    def iteration(self, sl: int) -> float:
        """An iteration at SL `sl` over a pass of the target alone: 1 at SL=0."""
        return (sl * self.draft + self.verify[sl]) / self.verify[0]


def speedup(mean_emitted: float, sl: int, costs: Costs) -> float:
    """Tokens per time over those without a draft: tokens per pass over the cost of an iteration."""
    return mean_emitted / costs.iteration(sl)


def ceiling(sl: int, costs: Costs) -> float:
    """`speedup` of a draft that is always right."""
    return speedup(sl + 1, sl, costs)


def oracle(iterations: Iterations, costs: Costs) -> float | None:
    """Speed-up if every iteration drafted exactly what it accepted, of `static` at the largest SL allowed.

    None without a pass.
    """
    spent = sum(count * costs.iteration(j) for j, count in enumerate(iterations.lengths))
    return iterations.emitted / spent if spent else None


def best(speedups: Seq[float]) -> tuple[int, float]:
    """The static SL that is predicted fastest, and its speed-up; `speedups[k - 1]` is SL k's. SL=0 is 1.0."""
    sl = max(range(len(speedups) + 1), key=lambda k: speedups[k - 1] if k else 1.0)
    return sl, speedups[sl - 1] if sl else 1.0
