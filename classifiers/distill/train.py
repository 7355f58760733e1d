"""Training the draft: matrices by Muon, the rest by AdamW; forward KL, then a total-variation finish."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from classifiers.distill.generate import SAMPLED
from classifiers.distill.losses import finish_loss, kl_loss
from classifiers.distill.options import DistillOptions
from classifiers.distill.student import head_linear
from classifiers.distill.teacher import Teacher, hidden_states
from classifiers.distill.text import Text, layout

_CHUNK = 8192  # positions whose laws are held at once
_WARM_UP = 0.02  # of the steps
_DECAY_FROM = 0.4  # of the steps: the learning rates fall linearly to 0 from here


class Trainer:
    """One step at a time; `state` and `restore` carry a run over a kill."""

    def __init__(
        self, options: DistillOptions, student: PreTrainedModel, teacher: Teacher, text: Text
    ) -> None:
        self._options, self._student, self._teacher, self._text = options, student, teacher, text
        self._rows = max(1, options.batch_tokens // text.tokens.shape[1])
        self.tokens_per_step = self._rows * text.tokens.shape[1]
        self.steps = max(1, options.train_tokens // self.tokens_per_step)
        self.step = 0
        named = list(student.named_parameters())
        matrices = [each for name, each in named if ".layers." in name and each.ndim == 2]
        others = [each for name, each in named if not (".layers." in name and each.ndim == 2)]
        muon = torch.optim.Muon(matrices, lr=options.matrix_lr, weight_decay=0.01)
        fused = student.device.type == "cuda"
        adam = torch.optim.AdamW(
            others, lr=options.other_lr, betas=(0.9, 0.98), weight_decay=0.0, fused=fused
        )
        self._optimizers: tuple[torch.optim.Optimizer, ...] = (muon, adam)
        self._bases = (options.matrix_lr, options.other_lr)
        on_gpu, finish = student.device.type == "cuda", options.finish_temperatures
        self._compile: Any = torch.compile if on_gpu else lambda function: function
        self._hidden = self._compile(hidden_states)
        self._loss = {
            False: self._compile(self._chunk_loss(())),
            True: self._compile(self._chunk_loss(finish)),
        }
        self._autocast: Any = (
            functools.partial(torch.autocast, "cuda", torch.bfloat16) if on_gpu else contextlib.nullcontext
        )

    @property
    def finishing(self) -> bool:
        return self.step >= self._options.finish_from * self.steps

    def train_step(self) -> Tensor:
        """One step; the mean loss per position, float32[], on the device."""
        rows = self._text.batch(self.step, self._rows, self._options.seed)
        flags = self._text.flags[rows]
        positions, mask = layout(flags)
        at = (flags[:, :-1] & SAMPLED).bool()
        at = F.pad(at, (0, 1)).flatten().nonzero()[:, 0]  # positions whose next token is an answer's
        with self._autocast():
            hidden = self._hidden(self._student, self._text.tokens[rows].long(), positions, mask)
        taught = self._teacher.hidden(rows).flatten(0, 1)
        leaf = hidden.detach().flatten(0, 1).requires_grad_()
        total = torch.zeros((), device=leaf.device)
        function = self._loss[self.finishing]
        size = min(_CHUNK, self.tokens_per_step)
        for chunk in torch.split(at, size):
            weights = F.pad(torch.ones(len(chunk), device=leaf.device), (0, size - len(chunk)))
            padded = F.pad(chunk, (0, size - len(chunk)))  # one shape for the compiler
            with self._autocast():
                loss = function(leaf[padded], taught[padded], weights) / max(1, len(at))
            loss.backward()
            total += loss.detach()
        if leaf.grad is not None:  # None: no answer in these rows
            hidden.backward(leaf.grad.view_as(hidden))
        torch.nn.utils.clip_grad_norm_(self._student.parameters(), 1.0)
        for optimizer, base in zip(self._optimizers, self._bases, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = base * self._rate()
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        return total

    def _rate(self) -> float:
        """The share of the learning rates at this step: up, level, down to 0."""
        done = (self.step + 1) / self.steps
        return min(1.0, done / _WARM_UP, max(0.0, (1 - done) / (1 - _DECAY_FROM)) + 1e-4)

    def _chunk_loss(self, temperatures: tuple[float, ...]) -> Any:
        """The loss of a chunk of positions: KL, or the finish's at these temperatures."""
        linear, teacher = head_linear(self._student), self._teacher

        def loss(hidden: Tensor, taught: Tensor, weights: Tensor) -> Tensor:
            target = F.linear(taught, teacher.weight, teacher.bias)
            draft = F.linear(hidden, linear.weight)[:, : target.shape[1]]
            if not temperatures:
                return kl_loss(target, draft, weights)
            return finish_loss(target, draft, weights, temperatures)

        return loss

    def state(self) -> dict[str, Tensor]:
        """Everything that a resumed run needs, flat, on the CPU."""
        flat = {f"model.{name}": each for name, each in self._student.state_dict().items()}
        for number, optimizer in enumerate(self._optimizers):
            for parameter, values in optimizer.state_dict()["state"].items():
                for name, value in values.items():
                    flat[f"optimizer.{number}.{parameter}.{name}"] = torch.as_tensor(value)
        return {name: each.detach().to("cpu", copy=True).contiguous() for name, each in flat.items()}

    def restore(self, step: int, flat: dict[str, Tensor]) -> None:
        """The counterpart of `state`."""
        self.step = step
        own = {name.removeprefix("model."): each for name, each in flat.items() if name.startswith("model.")}
        self._student.load_state_dict(own)
        for number, optimizer in enumerate(self._optimizers):
            whole = optimizer.state_dict()
            whole["state"] = {}
            for name, value in flat.items():
                if name.startswith(f"optimizer.{number}."):
                    _, _, parameter, key = name.split(".", 3)
                    whole["state"].setdefault(int(parameter), {})[key] = value
            optimizer.load_state_dict(whole)
