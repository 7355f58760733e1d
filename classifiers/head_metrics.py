"""How well probabilities of acceptance are: of the *reject* class, by rank, and as probabilities.

Acceptance is the common case (91% of positions on some pairs), so that F1 of accept flatters whoever
always accepts; the figures here are of rejection unless they say otherwise.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Reals = NDArray[np.float64]
Bools = NDArray[np.bool_]
_BINS = 15


def auroc(probability: Reals, accepted: Bools) -> float:
    """Chance that an accepted place ranks above a rejected one, ties half; nan where one class is absent."""
    positive = int(accepted.sum())
    negative = len(accepted) - positive
    if positive == 0 or negative == 0:
        return float("nan")
    _, which, counts = np.unique(probability, return_inverse=True, return_counts=True)
    rank = np.cumsum(counts) - (counts - 1) / 2
    return float((rank[which][accepted].sum() - positive * (positive + 1) / 2) / (positive * negative))


def calibration_error(probability: Reals, accepted: Bools) -> float:
    """Expected calibration error over 15 bins of equal counts."""
    bins = curve(probability, accepted)
    total = sum(abs(each["predicted"] - each["accepted"]) * each["count"] for each in bins)
    return float(total) / max(len(accepted), 1)


def curve(probability: Reals, accepted: Bools) -> list[dict[str, Any]]:
    """Mean prediction and share accepted by bins of equal counts, ascending."""
    order = np.argsort(probability, kind="stable")
    return [
        {
            "predicted": float(probability[part].mean()),
            "accepted": float(accepted[part].mean()),
            "count": len(part),
        }
        for part in np.array_split(order, min(_BINS, max(len(order), 1)))
        if len(part)
    ]


def classes(accept: Bools, accepted: Bools) -> dict[str, float]:
    """Precision, recall and F1 of reject and of accept, where `accept` was said; 0 where nothing was."""
    found = {}
    for name, said, true in (("reject", ~accept, ~accepted), ("accept", accept, accepted)):
        right = float((said & true).sum())
        precision = right / max(float(said.sum()), 1.0)
        recall = right / max(float(true.sum()), 1.0)
        found[f"precision_{name}"], found[f"recall_{name}"] = precision, recall
        found[f"f1_{name}"] = 2 * precision * recall / max(precision + recall, 1e-12)
    return found


def best_threshold(probability: Reals, accepted: Bools) -> float:
    """The least probability to accept that gives the largest F1 of reject."""
    order = np.argsort(probability, kind="stable")
    values, rejected = probability[order], ~accepted[order]
    right = np.cumsum(rejected)  # if the first i + 1 were rejected
    f1 = 2 * right / (np.arange(1, len(values) + 1) + max(int(rejected.sum()), 1))
    last = np.append(values[1:] != values[:-1], True)  # equal values are told alike
    best = int(np.argmax(np.where(last, f1, -1.0)))
    above = values[best + 1 :]
    return float(above[0]) if len(above) else 1.0


def judge(probability: Reals, accepted: Bools, threshold: float) -> dict[str, float]:
    """All figures of one classifier on one set of places."""
    clipped = np.clip(probability, 1e-6, 1 - 1e-6)
    likelihood = np.where(accepted, np.log(clipped), np.log1p(-clipped))
    return {
        "auroc": auroc(probability, accepted),
        "ece": calibration_error(probability, accepted),
        "brier": float(np.mean((probability - accepted) ** 2)),
        "log_loss": float(-likelihood.mean()),
        **classes(probability >= threshold, accepted),
    }


def bootstrap(
    probability: Reals, accepted: Bools, prompt: NDArray[np.int64], threshold: float, draws: int, seed: int
) -> dict[str, tuple[float, float]]:
    """95% intervals of `judge`'s figures over draws of prompts with replacement."""
    source = np.random.default_rng(seed)
    owners = np.unique(prompt)
    places = [np.flatnonzero(prompt == owner) for owner in owners]
    found: dict[str, list[float]] = {}
    for _ in range(draws):
        at = np.concatenate([places[i] for i in source.integers(0, len(owners), len(owners))])
        for name, value in judge(probability[at], accepted[at], threshold).items():
            found.setdefault(name, []).append(value)
    return {name: interval(values) for name, values in found.items()}


def interval(values: list[float] | Reals) -> tuple[float, float]:
    """The middle 95%, nan left out."""
    known = np.asarray(values)[~np.isnan(values)]
    if len(known) == 0:
        return float("nan"), float("nan")
    low, high = np.percentile(known, [2.5, 97.5])
    return float(low), float(high)


def paired_ratio(above: Reals, below: Reals, draws: int) -> tuple[float, float, float]:
    """sum(above) / sum(below), both float64[P] by prompt: 2.5, 50 and 97.5 percentiles of a bootstrap."""
    at = np.random.default_rng(0).integers(0, len(above), (draws, len(above)))
    ratios = above[at].sum(1) / np.maximum(below[at].sum(1), 1e-12)
    low, middle, high = np.percentile(ratios, (2.5, 50, 97.5))
    return float(low), float(middle), float(high)
