"""Fitting a head: AdamW under a seed, an epoch at a time, going on where a killed run left off."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from classifiers.head_data import DataError, Rows
from engine.speculation.heads import Calibration, Kind

Params = dict[str, Tensor]
_STEPS, _SMALLEST = 20, 16
"""Small traces are cut into this many batches, down to this size: a few steps an epoch teach nothing."""


@dataclass(frozen=True)
class Plan:
    """One fit. `width`: hidden units of an FFN; `depth`: residual blocks; `reject_weight`: w_rej.

    `batch`: the most rows of a step.
    """

    kind: Kind
    seed: int
    width: int = 32
    depth: int = 0
    reject_weight: float = 1.0
    epochs: int = 40
    batch: int = 256
    lr: float = 3e-3
    weight_decay: float = 1e-3


@dataclass(frozen=True)
class Fitted:
    """`weights`: as a head's file has them; `loss`: the least on validation, at `epoch`."""

    weights: Params
    loss: float
    epoch: int


def new_params(plan: Plan, features: int) -> Params:
    """Seeded; a residual head begins as a linear one."""
    source = torch.Generator().manual_seed(plan.seed)

    def normal(*shape: int, scale: float) -> Tensor:
        return torch.randn(*shape, generator=source) * scale

    found = {"b2": torch.zeros(1)}
    if plan.kind in ("disco", "c2t"):
        found["w1"] = normal(plan.width, features, scale=(2 / features) ** 0.5)
        found["b1"] = torch.zeros(plan.width)
        found["w2"] = normal(plan.width, scale=plan.width**-0.5)
    else:
        found["w2"] = torch.zeros(features)
    if plan.kind == "specdec_pp":
        found["block"] = normal(features, features, scale=0.1 * features**-0.5)
        found["bias"] = torch.zeros(features)
    return found


def raw_score(params: Mapping[str, Tensor], x: Tensor, depth: int) -> Tensor:
    """float32[N]: log-odds of scaled inputs x float32[N, F], before calibration."""
    if "w1" in params:
        x = F.linear(x, params["w1"], params["b1"]).relu()
    elif "block" in params:
        for _ in range(depth):
            x = x + F.silu(F.linear(x, params["block"], params["bias"]))
    return x @ params["w2"] + params["b2"]


def _loss(z: Tensor, label: Tensor, reject_weight: float) -> Tensor:
    """Cross-entropy with soft labels, the share of rejection weighted."""
    ratio = torch.tensor(1 / reject_weight)
    return reject_weight * F.binary_cross_entropy_with_logits(z, label, pos_weight=ratio)


def scales(x: Tensor) -> Params:
    """Mean, deviation and bounds of inputs float32[N, F]; a constant input is left as it is."""
    std = x.std(0, correction=0)
    return {
        "mean": x.mean(0),
        "std": torch.where(std > 1e-6, std, torch.ones_like(std)),
        "low": x.amin(0),
        "high": x.amax(0),
    }


def scaled(weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
    return (torch.clamp(x, weights["low"], weights["high"]) - weights["mean"]) / weights["std"]


def fit(
    plan: Plan, train: Rows, validation: Rows, checkpoint: Path | None, advance: Callable[[int], None]
) -> Fitted:
    """The parameters of the epoch that was best on `validation`. `advance` is told of epochs done.

    `checkpoint`: written after every epoch, gone on from if it is there. Raises DataError on labels
    that teach nothing.
    """
    for name, given in (("training", train), ("validation", validation)):
        if len(given.label) == 0 or float(given.label.min()) == float(given.label.max()):
            raise DataError(f"the {name} prompts have {len(given.label)} positions, all with one label")
    if not bool(train.inputs.isfinite().all()):
        raise DataError("the trace holds inputs that are not finite")
    scale = scales(train.inputs)
    run = _Run(plan, scaled(scale, train.inputs), train.label, checkpoint)
    x = scaled(scale, validation.inputs)
    advance(run.epoch)
    while run.epoch < plan.epochs:
        run.train_epoch()
        with torch.no_grad():
            run.judge(
                float(_loss(raw_score(run.params, x, plan.depth), validation.label, plan.reject_weight))
            )
        run.save()
        advance(1)
    return Fitted(scale | run.best, run.best_loss, run.best_epoch)


class _Run:
    """A fit at work: parameters, optimiser, and the best so far."""

    def __init__(self, plan: Plan, x: Tensor, label: Tensor, checkpoint: Path | None) -> None:
        self._plan, self._x, self._label, self._path = plan, x, label, checkpoint
        self.params = {name: value.requires_grad_() for name, value in new_params(plan, x.shape[1]).items()}
        self._adam = torch.optim.AdamW(self.params.values(), lr=plan.lr, weight_decay=plan.weight_decay)
        self.epoch, self.best_loss, self.best_epoch = 0, float("inf"), 0
        self.best: Params = {name: value.detach().clone() for name, value in self.params.items()}
        if checkpoint is not None and checkpoint.exists():
            self._restore(checkpoint)

    def train_epoch(self) -> None:
        plan, count = self._plan, len(self._label)
        # Seeded by the epoch, so that a run which was killed goes on as it would have.
        source = torch.Generator().manual_seed(plan.seed * 100_003 + self.epoch)
        order = torch.randperm(count, generator=source)
        batches = order.split(min(plan.batch, max(_SMALLEST, count // _STEPS)))
        for i, at in enumerate(batches):
            done = (self.epoch + i / len(batches)) / plan.epochs
            warm = min(1.0, (done * plan.epochs * len(batches) + 1) / (0.03 * plan.epochs * len(batches) + 1))
            rate = plan.lr * warm * 0.5 * (1 + float(torch.tensor(done * torch.pi).cos()))
            for group in self._adam.param_groups:
                group["lr"] = rate
            self._adam.zero_grad()
            z = raw_score(self.params, self._x[at], plan.depth)
            _loss(z, self._label[at], plan.reject_weight).backward()
            self._adam.step()
        self.epoch += 1

    def judge(self, loss: float) -> None:
        if loss < self.best_loss:
            self.best_loss, self.best_epoch = loss, self.epoch
            self.best = {name: value.detach().clone() for name, value in self.params.items()}

    def save(self) -> None:
        if self._path is None:
            return
        tensors: Params = {}
        for name, value in self.params.items():
            tensors[f"now.{name}"], tensors[f"best.{name}"] = value.detach(), self.best[name]
            moments = self._adam.state[value]
            for key in ("exp_avg", "exp_avg_sq", "step"):
                tensors[f"{key}.{name}"] = moments[key]
        told = {"epoch": self.epoch, "loss": self.best_loss.hex(), "best": self.best_epoch}
        part = self._path.with_suffix(".part")
        save_file(tensors, part, metadata={name: str(value) for name, value in told.items()})
        part.rename(self._path)

    def _restore(self, path: Path) -> None:
        with safe_open(path, "pt") as file:
            told = file.metadata()
        tensors = load_file(path)
        self.epoch, self.best_epoch = int(told["epoch"]), int(told["best"])
        self.best_loss = float.fromhex(told["loss"])
        for name, value in self.params.items():
            value.data = tensors[f"now.{name}"]
            self.best[name] = tensors[f"best.{name}"]
            self._adam.state[value] = {
                key: tensors[f"{key}.{name}"] for key in ("exp_avg", "exp_avg_sq", "step")
            }


def calibrate(z: Tensor, label: Tensor, method: str) -> Calibration:
    """Scaling of log-odds z float32[N] that makes them likeliest under the labels (Newton's method).

    "temperature": z / T; "platt": z / T + bias, which also undoes a weighted loss; "none".
    """
    if method == "none":
        return Calibration("none")
    ones = torch.ones_like(z, dtype=torch.float64)
    columns = torch.stack([z.double(), ones], 1)[:, : 2 if method == "platt" else 1]
    y, theta = label.double(), torch.tensor([1.0, 0.0], dtype=torch.float64)[: columns.shape[1]]
    ridge = 1e-3 * torch.eye(len(theta), dtype=torch.float64)
    start = theta.clone()

    def loss(at: Tensor) -> float:
        odds = columns @ at
        likely = -(y * F.logsigmoid(odds) + (1 - y) * F.logsigmoid(-odds)).sum()
        return float(likely + 0.5 * (at - start) @ ridge @ (at - start))

    for _ in range(50):
        p = (columns @ theta).sigmoid()
        gradient = columns.T @ (p - y) + ridge @ (theta - start)
        curvature = (columns * (p * (1 - p))[:, None]).T @ columns + ridge
        step = torch.linalg.solve(curvature, gradient)
        size = 1.0
        while loss(theta - size * step) > loss(theta) and size > 1e-6:
            size /= 2
        theta = theta - size * step
        if float(step.abs().max()) < 1e-9:
            break
    # A head that ranks the wrong way round must not be turned: then all log-odds shrink to the bias.
    inverse = max(float(theta[0]), 1e-3)
    return Calibration(
        "platt" if method == "platt" else "temperature",
        1 / inverse,
        float(theta[1]) if len(theta) > 1 else 0.0,
    )
