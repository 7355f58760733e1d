"""What `disco-serve distill-draft` can be told, checked."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

import msgspec

Weights = Literal["int8", "bfloat16", "float32"]


_COUNTS = (
    *("text_tokens", "rows", "length", "answer_tokens", "hidden", "layers", "heads", "kv_heads"),
    *("intermediate", "train_tokens", "batch_tokens", "eval_tokens", "eval_every"),
)


class DistillError(ValueError):
    """Something that the command was given cannot work; the message says what."""


class DistillOptions(msgspec.Struct, frozen=True, kw_only=True):
    """One distillation. Sizes are in tokens unless they say otherwise.

    The text: `text_tokens` in all, made `rows` documents at a time in rows of `length`. An answer
    ends at the target's end token or after `answer_tokens`. `temperatures` are drawn from for each
    document. `prompts` are files of user messages (one a line, or JSON lines with "prompt"), used
    for half of the documents; the others begin with the built-in openings.

    The draft: a Llama of `hidden` x `layers`, with an input embedding of rank `embed_rank` and a
    head over the `draft_vocab` most frequent tokens (None: full). `init` "pca" begins the
    embeddings with the target's principal components; "layers:0,1,29" copies these layers of the
    target with its embedding and head, and the shape options do not apply.

    The training: `train_tokens` passes, in steps of `batch_tokens`; forward KL, then from
    `finish_from` (a share of the steps) on total variation, at each of `finish_temperatures`.
    """

    target: str
    out: Path
    prompts: tuple[Path, ...] = ()
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"

    text_tokens: int = 20_000_000
    rows: int = 1024
    length: int = 512
    answer_tokens: int = 320
    temperatures: tuple[float, ...] = (0.0, 0.0, 0.6, 1.0)

    init: str = "pca"
    hidden: int = 320
    layers: int = 6
    heads: int = 5
    kv_heads: int = 1
    intermediate: int = 896
    embed_rank: int | None = 96
    draft_vocab: int | None = 12288
    weights: Weights = "bfloat16"

    train_tokens: int = 200_000_000
    batch_tokens: int = 32_768
    matrix_lr: float = 0.01
    other_lr: float = 0.006
    finish_from: float = 0.6
    finish_temperatures: tuple[float, ...] = (1.0, 0.3)

    eval_per_category: int | None = None
    eval_tokens: int = 128
    eval_every: int = 1000
    checkpoint_minutes: float = 3.0
    stop_after_minutes: float | None = None

    def check(self) -> None:
        """Raises DistillError, naming the first option that cannot work."""
        for name in _COUNTS:
            _require(getattr(self, name) >= 1, f"{flag(name)} must be at least 1")
        for name in ("embed_rank", "draft_vocab", "eval_per_category"):
            value = getattr(self, name)
            _require(value is None or value >= 1, f"{flag(name)} must be at least 1")
        _require(self.hidden % self.heads == 0, "--hidden must be a multiple of --heads")
        _require(self.hidden // self.heads % 2 == 0, "--hidden over --heads must be even (rotary positions)")
        _require(self.heads % self.kv_heads == 0, "--heads must be a multiple of --kv-heads")
        _require(self.length >= 16, "--length must be at least 16")
        _require(self.batch_tokens >= self.length, "--batch-tokens must be at least --length")
        _require(len(self.temperatures) > 0, "--temperatures needs at least one")
        _require(all(0 <= t <= 2 for t in self.temperatures), "--temperatures must be from 0 to 2")
        _require(len(self.finish_temperatures) > 0, "--finish-temperatures needs at least one")
        _require(all(0 < t <= 2 for t in self.finish_temperatures), "--finish-temperatures: over 0, up to 2")
        _require(0 <= self.finish_from <= 1, "--finish-from is a share, from 0 to 1")
        _require(self.matrix_lr > 0 and self.other_lr > 0, "learning rates must be positive")
        _require(
            self.init == "pca" or self.init.startswith("layers:"), f"--init {self.init!r}: pca or layers:I,J"
        )
        _require(
            self.dtype in ("auto", "float32", "bfloat16"), f"--dtype {self.dtype}: auto, float32 or bfloat16"
        )
        _require(
            self.weights in get_args(Weights), f"--weights {self.weights}: {', '.join(get_args(Weights))}"
        )
        plain = self.layer_numbers() is not None or (self.embed_rank is None and self.draft_vocab is None)
        _require(
            not (plain and self.weights == "int8"),
            "--weights int8 needs --embed-rank or --draft-vocab: a plain Llama is saved as others read it",
        )
        for path in self.prompts:
            _require(path.is_file(), f"--prompts {path}: no such file")

    def layer_numbers(self) -> tuple[int, ...] | None:
        """The target's layers that `init` names, or None for a fresh draft. Raises DistillError."""
        if self.init == "pca":
            return None
        words = self.init.removeprefix("layers:").split(",")
        _require(all(word.isdecimal() for word in words), f"--init {self.init!r}: layers:0,1,29 for example")
        return tuple(int(word) for word in words)


def flag(name: str) -> str:
    """The flag of an option."""
    return f"--{name.replace('_', '-')}"


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise DistillError(message)
