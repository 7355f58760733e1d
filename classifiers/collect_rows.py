"""The draft along a target's texts and on its own tokens after every mismatch: rows of a trace.

Models run through the engine's runners, signals through its feature code and samples through its
noise, so that what is recorded is what serving sees. Branches share the KV blocks of the text that
they leave, and recompute only the block in which they leave it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from classifiers.acceptance import acceptance_probability, overlap
from classifiers.collect_bushes import BushRecorder, Extent, columns
from classifiers.traces import Array, Branches, Bushes, Steps
from engine.models.runner import Batch, Chunk, Runner
from engine.speculation.features import TOP, signals
from engine.speculation.noise import GumbelNoise
from engine.types import RequestFailed

_LARGEST_HALF = float(np.finfo(np.float16).max)


@dataclass(frozen=True)
class Text:
    """What the target answered: greedy if `seed` is None, else its coupled sample at temperature 1.

    `finish`: "stop", the last token is an end token; or "length".
    """

    prompt_ids: tuple[int, ...]
    tokens: tuple[int, ...]
    finish: str
    seed: int | None


@dataclass(frozen=True)
class Plan:
    """How much is done at once: texts of a group, branches, tokens of a pass, positions that are judged."""

    texts: int
    branches: int
    tokens: int
    laws: int

    @classmethod
    def on(cls, device: torch.device, texts: int) -> Plan:
        if device.type == "cuda":
            return cls(texts, branches=64, tokens=4096, laws=256)
        return cls(texts, branches=32, tokens=512, laws=32)


class Recorder:
    """Writes blocks of both runners' KV pools, from block 0 on: whatever they held is lost."""

    def __init__(
        self,
        target: Runner,
        draft: Runner,
        plan: Plan,
        *,
        vocab: int,
        block_size: int,
        longest: int,
        tokens: int,
        branch: int,
        hidden: bool = False,
        target_hidden: bool = False,
        trees: Extent | None = None,
    ) -> None:
        """`longest`: tokens of the longest prompt and its text. `tokens`: the most a text may have."""
        self._target, self._draft, self._plan, self._vocab = target, draft, plan, vocab
        self._block_size, self._tokens, self._branch = block_size, tokens, branch
        self._hidden, self._target_hidden = hidden, target_hidden
        self._per_text = _per_text(longest, block_size, trees)
        self._per_branch = own_blocks(branch, block_size)
        self._noise = GumbelNoise(vocab, draft.device)
        bushes = BushRecorder(draft, vocab, block_size, tokens, self._noise, trees) if trees else None
        self._bushes = bushes

    @torch.inference_mode()
    def record(
        self,
        texts: Seq[Text],
        on_text: Callable[[int], None] = lambda _: None,
        on_branches: Callable[[int, int], None] = lambda _, __: None,
        on_bushes: Callable[[int], None] = lambda _: None,
    ) -> tuple[Steps, Branches, Bushes | None]:
        """The rows of at most `plan.texts` texts, `prompt` counted from 0.

        `on_text` hears how many texts are done; `on_branches` how many branches of how many; `on_bushes` at
        how many positions bushes are. Raises RequestFailed if a model's logits are NaN.
        """
        found: list[dict[str, Array]] = []
        for some in self._batches(texts):
            found.extend(self._force(texts, some))
            on_text(len(some))
        made = {name: np.concatenate([each[name] for each in found]) for name in found[0]}
        first = made.pop("first", None)  # tokens in the order of trees
        steps = Steps(**made)
        branches = self._continue(texts, steps, on_branches)
        if self._bushes is None or first is None:
            return steps, branches, None
        return steps, branches, self._bushes.record(texts, steps, first, self._blocks, on_bushes)

    def _blocks(self, text: int) -> range:
        return range(text * self._per_text, (text + 1) * self._per_text)

    # ---- along the target's texts

    def _batches(self, texts: Seq[Text]) -> Iterator[list[int]]:
        """Indices of texts that are forced in one pass."""
        some: list[int] = []
        size = 0
        for i, text in enumerate(texts):
            length = len(text.prompt_ids) + len(text.tokens)
            if some and size + length > self._plan.tokens:
                yield some
                some, size = [], 0
            some.append(i)
            size += length
        yield some

    def _force(self, texts: Seq[Text], some: list[int]) -> Iterator[dict[str, Array]]:
        """Columns of `Steps`, in slices, for the texts `some`."""
        chosen = [texts[i] for i in some]
        sampled = chosen[0].seed is not None
        q, states = self._along(self._draft, chosen, some), {"hidden": self._draft.hidden}
        p = None
        if sampled or self._target_hidden:
            p, states["target_hidden"] = self._along(self._target, chosen, some), self._target.hidden
        wanted = [
            name
            for name, asked in (("hidden", self._hidden), ("target_hidden", self._target_hidden))
            if asked
        ]
        places = [(i, pos) for i in some for pos in range(len(texts[i].tokens))]
        for start in range(0, len(places), self._plan.laws):
            at = slice(start, start + self._plan.laws)
            prompt, pos = (np.array(column, dtype=np.int32) for column in zip(*places[at], strict=True))
            token = np.array([texts[i].tokens[k] for i, k in places[at]], dtype=np.int32)
            seen = [(texts[i].seed, len(texts[i].prompt_ids) + k) for i, k in places[at]]
            drafted = self._choose(q[at], seen)
            row = {"prompt": prompt, "pos": pos, "token": token, **_signals(q[at], drafted)}
            row["match"] = row["drafted"] == token
            row["accept"] = row["match"].astype(np.float32)
            if sampled:
                assert p is not None
                # the draft's token this time: min(1, p / q), so that the laws change roles
                row["accept"] = acceptance_probability(q[at], p[at], drafted).cpu().numpy()
                row["overlap"] = overlap(p[at], q[at]).cpu().numpy()
            row |= {name: _half(states[name], at) for name in wanted}
            if self._bushes is not None:
                seeds = [seed for seed, _ in seen if seed is not None]
                row |= columns(q[at], self._noise(seeds, [k for _, k in seen]) if seeds else None, token)
            yield row

    def _along(self, runner: Runner, texts: Seq[Text], rows: Seq[int]) -> Tensor:
        """Logits [N, vocab] of the laws of all tokens of the texts; one pass, long prompts before it."""
        chunks = []
        for text, row in zip(texts, rows, strict=True):
            ids = (*text.prompt_ids, *text.tokens[:-1])
            blocks = self._blocks(row)
            begin = 0
            while len(text.prompt_ids) - begin > self._plan.tokens:  # a long prompt, in pieces
                piece = ids[begin : begin + self._plan.tokens]
                runner.forward(Batch.pack([Chunk(piece, begin, blocks, 0)], self._block_size))
                begin += self._plan.tokens
            chunks.append(Chunk(ids[begin:], begin, blocks, len(text.tokens)))
        return self._forward(runner, chunks)

    def _forward(self, runner: Runner, chunks: list[Chunk]) -> Tensor:
        return runner.forward(Batch.pack(chunks, self._block_size))[:, : self._vocab]

    def _choose(self, logits: Tensor, places: Seq[tuple[int | None, int]]) -> Tensor:
        """int64[B]: what the draft proposes at (seed, position in the text) by logits [B, V]."""
        scaled = logits.float()
        if places[0][0] is not None:
            seeds = [seed for seed, _ in places if seed is not None]
            scaled = scaled.to(torch.float64) + self._noise(seeds, [at for _, at in places])
        best, tokens = scaled.max(-1)
        if not bool(best.isfinite().all()):
            raise RequestFailed("the draft's logits are NaN or infinite")
        return tokens

    # ---- on the draft's own tokens

    def _continue(self, texts: Seq[Text], steps: Steps, on_branches: Callable[[int, int], None]) -> Branches:
        """A branch for every mismatch from position 1 on, and for every matched end token."""
        ends = np.array([len(text.tokens) - 1 if text.finish == "stop" else -1 for text in texts])
        ended = steps.pos == ends[steps.prompt]
        begins = np.flatnonzero((steps.pos >= 1) & (~steps.match | ended)).astype(np.int32)
        room = np.maximum(self._tokens - 2 - steps.pos[begins], 0)
        found = _empty(begins, np.minimum(room, self._branch).astype(np.int32), self._branch)
        if self._hidden:
            found["hidden"] = np.zeros((len(begins), self._branch, self._draft.hidden_size or 0), np.float16)
        for start in range(0, len(begins), self._plan.branches):
            rows = range(start, min(start + self._plan.branches, len(begins)))
            self._run(texts, steps, found, rows)
            on_branches(rows.stop, len(begins))
        return Branches(**found)

    def _run(self, texts: Seq[Text], steps: Steps, found: dict[str, Array], rows: range) -> None:
        """Fills these rows of the branches' columns."""
        chunks: dict[int, Chunk] = {}
        for number, row in enumerate(rows):
            if found["length"][row]:
                chunks[row] = self._leave(texts, steps, found, row, number)
        for k in range(self._branch):
            chunks = {row: chunk for row, chunk in chunks.items() if found["length"][row] > k}
            if not chunks:
                return
            logits = self._forward(self._draft, list(chunks.values()))
            seeds = [texts[steps.prompt[found["step"][row]]].seed for row in chunks]
            ends = [chunk.start + len(chunk.tokens) for chunk in chunks.values()]
            drafted = self._choose(logits, list(zip(seeds, ends, strict=True)))
            at = np.array(list(chunks))
            for name, column in _signals(logits, drafted).items():
                found[name][at, k] = column
            if self._hidden:
                found["hidden"][at, k] = _half(self._draft.hidden)
            for (row, chunk), token, end in zip(list(chunks.items()), drafted.tolist(), ends, strict=True):
                chunks[row] = Chunk([token], end, chunk.blocks)

    def _leave(self, texts: Seq[Text], steps: Steps, found: dict[str, Array], row: int, number: int) -> Chunk:
        """The first tokens of a branch: the end of the text before it that fills no block, and its own."""
        step = found["step"][row]
        i, pos = int(steps.prompt[step]), int(steps.pos[step])
        ids = (*texts[i].prompt_ids, *texts[i].tokens[:pos])
        whole, size = len(ids) // self._block_size, self._block_size
        text = i * self._per_text
        own = self._plan.texts * self._per_text + number * self._per_branch
        last = -(-(len(ids) + int(found["length"][row])) // size)  # as many blocks as are written
        blocks = [*range(text, text + whole), *range(own, own + last - whole)]
        return Chunk((*ids[whole * size :], int(steps.drafted[step])), whole * size, blocks)


def own_blocks(branch: int, block_size: int) -> int:
    """KV blocks that a branch may fill itself: a text's last, its wrong token, and its steps but one."""
    return -(-(block_size - 1 + branch) // block_size)


def _per_text(longest: int, block_size: int, trees: Extent | None) -> int:
    return -(-(longest + (0 if trees is None else trees.nodes)) // block_size)


def blocks_needed(plan: Plan, longest: int, branch: int, block_size: int, trees: Extent | None = None) -> int:
    """KV blocks that a recorder of this plan writes."""
    per_text = _per_text(longest, block_size, trees)
    return plan.texts * per_text + plan.branches * own_blocks(branch, block_size)


def _signals(logits: Tensor, drafted: Tensor) -> dict[str, Array]:
    """The columns that steps and branches share, of logits [B, V] and what was drafted, int64[B]."""
    found = signals(logits, drafted, {"prob", "top", "entropy"})
    top = found["top"]
    share = top / top.sum(-1, keepdim=True)
    entropy_top = -torch.special.xlogy(share, share).sum(-1)
    scalars = torch.stack([found["prob"], found["entropy"], entropy_top], -1)
    values = torch.cat([scalars, top], -1).cpu().numpy()
    return {
        "drafted": drafted.cpu().numpy().astype(np.int32),
        "prob": values[:, 0],
        "entropy": values[:, 1],
        "entropy_top": values[:, 2],
        "top": values[:, 3:],
    }


def _half(states: Tensor | None, rows: slice = slice(None)) -> Array:
    """float16; what half precision cannot hold becomes its largest number."""
    assert states is not None
    found: Array = states[rows].float().clamp(-_LARGEST_HALF, _LARGEST_HALF).half().cpu().numpy()
    return found


def _empty(begins: Array, length: Array, branch: int) -> dict[str, Array]:
    """Columns of `Branches`, of zeros."""
    shape = len(begins), branch
    floats = {name: np.zeros(shape, np.float32) for name in ("prob", "entropy", "entropy_top")}
    return {
        "step": begins,
        "length": length,
        "drafted": np.zeros(shape, np.int32),
        "top": np.zeros((*shape, TOP), np.float32),
        **floats,
    }
