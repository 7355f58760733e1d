"""Made-up traces whose acceptance is a known function of what the draft shows."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from classifiers.step_costs import StepCosts
from classifiers.traces import Branches, Bushes, Counts, Identity, Manifest, Prompts, Source, Steps, Trace
from classifiers.train import train
from classifiers.train_options import TrainOptions
from engine.speculation.features import TOP, VERSION
from engine.speculation.heads import Kind
from engine.speculation.tree import MOST_CHILDREN

DRAFT, TARGET = "d" * 64, "a" * 64
HIDDEN = 6
K = 12
COSTS = StepCosts(1e-3, ((1, 10e-3), (9, 12e-3)))
QUIET = Console(quiet=True)


def _top(largest: np.ndarray, source: np.random.Generator) -> np.ndarray:
    rest = np.sort(source.dirichlet(np.ones(TOP), len(largest)), axis=1)[:, ::-1][:, : TOP - 1]
    top = np.concatenate([largest[:, None], rest * (1 - largest)[:, None]], axis=1)
    return -np.sort(-top, axis=1).astype(np.float32)


def _entropy(top: np.ndarray) -> np.ndarray:
    return (-(top * np.log(np.maximum(top, 1e-12))).sum(1)).astype(np.float32)


def _order(top: np.ndarray) -> np.ndarray:
    return np.pad(top, ((0, 0), (0, MOST_CHILDREN - TOP)))


def _bushes(match: np.ndarray, rank: np.ndarray, source: np.random.Generator) -> Bushes:
    """Of every step the likeliest wrong token, and one more behind it."""
    count = len(match)
    top = _top(source.beta(2, 3, 2 * count).clip(0.15, 0.999), source)
    return Bushes(
        step=np.repeat(np.arange(count), 2).astype(np.int32),
        parent=np.tile([-1, 0], count).astype(np.int32),
        rank=np.stack([np.where(rank == 0, 1, 0), np.zeros(count)], 1).reshape(-1).astype(np.int32),
        order=_order(top),
        top=top,
        entropy=_entropy(top),
    )


def toy_trace(
    prompts: int = 24, tokens: int = 40, seed: int = 0, *, branch_hidden: bool = True, telling: bool = True
) -> Trace:
    """Two categories. The draft is accepted with the probability that it gives its token (`telling`: so
    its largest probability tells all there is to tell; else acceptance is a coin of .7).

    `hidden[0]` is the log-odds of acceptance, with noise; after a wrong token it is low.
    """
    source = np.random.default_rng(seed)
    count = prompts * tokens
    prompt, pos = np.repeat(np.arange(prompts), tokens), np.tile(np.arange(tokens), prompts)
    easy = prompt % 2 == 0
    largest = np.where(easy, source.beta(6, 1, count), source.beta(2, 2, count)).clip(0.15, 0.999)
    odds = largest if telling else np.full(count, 0.7)
    match = source.random(count) < odds
    token = source.integers(0, 50, count)
    top = _top(largest, source)
    # The state at a place was made by feeding the token before it, here always the target's: accepted or not.
    hidden = source.normal(0, 1, (count, HIDDEN))
    hidden[:, 0] = np.log(odds / (1 - odds)) + source.normal(0, 0.3, count)
    hidden[:, 1] = 2.0
    at = np.flatnonzero(~match & (pos >= 1))
    length = np.minimum(K, tokens - 2 - pos[at]).clip(0)
    there = np.arange(K) < length[:, None]
    away = source.beta(2, 3, (len(at), K)).clip(0.15, 0.999)
    away_top = _top(away.reshape(-1), source).reshape(len(at), K, TOP) * there[..., None]
    away_hidden = source.normal(0, 1, (len(at), K, HIDDEN))
    away_hidden[:, :, 1] = -2.0
    rank = np.where(match, 0, source.integers(-1, TOP, count)).astype(np.int32)
    rank[~match & (rank == 0)] = 1
    steps = Steps(
        prompt=prompt.astype(np.int32),
        pos=pos.astype(np.int32),
        token=token.astype(np.int32),
        drafted=np.where(match, token, token + 1).astype(np.int32),
        match=match,
        top=top,
        entropy=_entropy(top),
        entropy_top=_entropy(top),
        prob=top[:, 0].copy(),
        accept=match.astype(np.float32),
        hidden=hidden.astype(np.float16),
        order=_order(top),
        rank=rank,
    )
    flat = away_top.reshape(-1, TOP)
    branches = Branches(
        step=at.astype(np.int32),
        length=length.astype(np.int32),
        drafted=source.integers(0, 50, (len(at), K)).astype(np.int32),
        top=away_top.astype(np.float32),
        entropy=_entropy(flat).reshape(len(at), K),
        entropy_top=_entropy(flat).reshape(len(at), K),
        prob=away_top[..., 0].astype(np.float32),
        hidden=away_hidden.astype(np.float16) if branch_hidden else None,
    )
    manifest = Manifest(
        feature_version=VERSION,
        target=Identity("toy-target", TARGET),
        draft=Identity("toy-draft", DRAFT),
        data=(Source("made-up", "0" * 64, prompts),),
        mode="greedy",
        tokens=tokens,
        branch=K,
        hidden=HIDDEN,
        vocab=52,
        counts=Counts(prompts, count, len(at)),
    )
    listed = Prompts(
        category=[("easy", "hard")[i % 2] for i in range(prompts)],
        name=[f"p{i}" for i in range(prompts)],
        finish=["length"] * prompts,
        tokens=np.full(prompts, 2, np.int32),
        ids=np.stack([np.arange(prompts), np.arange(prompts) + seed * 1000], 1).reshape(-1).astype(np.int32),
    )
    return Trace(manifest, listed, steps, branches, _bushes(match, rank, source))


def taught(recorded: Path, out: Path, kind: Kind = "disco", **options: Any) -> Path:
    """The JSON of a head that was quickly taught on the trace in `recorded`."""
    quick: dict[str, Any] = {"epochs": 6, "widths": (8,) if kind in ("disco", "c2t") else ()}
    told = {"traces": (recorded,), "kind": kind, "out": out, "costs": COSTS, **quick, **options}
    return train(TrainOptions(**told), QUIET)


def ending(model: Path, to: Path, ends: Sequence[int]) -> Path:
    """A copy of the model that ends at any of these tokens."""
    shutil.copytree(model, to)
    for name in ("config.json", "generation_config.json"):
        told = json.loads((to / name).read_text())
        (to / name).write_text(json.dumps(told | {"eos_token_id": list(ends)}))
    return to
