"""CUDA graphs of the fused runner's passes over more tokens than the decoding kernel takes.

Launched one by one, the three hundred kernels of a pass keep the host busy for as long as the
device, and longer where prompts are short. A graph is captured at the first pass of its size (rows,
tokens, longest row) and replayed with inputs copied to where it reads them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from engine.long_work import long_work
from engine.models.kernels.attention import Places
from engine.models.runner import Batch

_TOKENS = (16, 32, 48, 64, 96, 128, 192, 256, 384, 512)
_ROWS = (1, 4, 16, 32, 64)
_LONGEST = (1, 8, 32)
"""Few sizes, since a capture takes a tenth of a second; but attention splits the context by the rows that
a graph is made for, and few rows need it split."""
_PROMPT_TOKENS = (64, 128, 256, 384, 512)
_PROMPT_ROWS = (8, 64)
"""Of passes with longer rows, decoding ones beside them: what is no row and no token of one ends at once."""
_TREE_LONGEST = (8, 32, 72)
"""Of passes with trees, which have 64 nodes at most."""

SPARE = 2 * 2**30  # bytes that capturing ahead leaves free
log = logging.getLogger(__name__)

Layers = Callable[[Tensor, Tensor, Tensor, Places], Tensor]
"""(ids, positions, slots, places) -> the head's input [tokens, hidden]."""


def bucket(n: int, sizes: Seq[int] = (1, 2, 4, 8, 16, 32, 64)) -> int:
    """The smallest size that holds n."""
    return next(size for size in sizes if size >= n)


class _Key(NamedTuple):
    """What a graph is made for. `branched`: rows may be trees."""

    rows: int
    tokens: int
    longest: int
    branched: bool = False

    @property
    def decodes(self) -> bool:
        """Whether it gives logits."""
        return self.longest < _TOKENS[-1]


@dataclass
class _Captured:
    graph: torch.cuda.CUDAGraph
    words: Tensor  # int32, the inputs where the graph reads them
    host: Tensor  # pinned, the same
    copied: torch.cuda.Event


def _parts(words: Tensor, key: _Key, width: int) -> dict[str, Tensor]:
    """The inputs by name, in `words` int32[_size(key, width)]."""
    rows, tokens = key.rows, key.tokens
    sizes = {"masks": 2 * tokens, "sees": tokens, "trunks": rows} if key.branched else {}
    sizes |= dict.fromkeys(("ids", "positions", "slots"), tokens)
    sizes |= dict.fromkeys(("starts", "begins", "lengths"), rows)
    sizes["tables"] = rows * width
    found = dict(zip(sizes, words.split(list(sizes.values())), strict=True))
    found["tables"] = found["tables"].view(rows, width)
    if key.branched:
        found["masks"] = found["masks"].view(torch.int64)
    return found


def _size(key: _Key, width: int) -> int:
    return 3 * (key.tokens + key.rows) + key.rows * width + key.branched * (3 * key.tokens + key.rows)


class PassGraphs:
    """Graphs of passes of at most 512 tokens; `width`: blocks of the longest row.

    Decoding steps give logits too. Of a pass with prompts few tokens need them: it ends before the head.
    """

    def __init__(
        self,
        layers: Layers,
        head: Callable[[Tensor], Tensor],
        spare_slot: int,
        width: int,
        device: torch.device,
    ) -> None:
        self._layers, self._head = layers, head
        self._spare_slot, self._width, self._device = spare_slot, width, device
        self._longest = _LONGEST[-1]  # tokens of a row in a decoding step
        self._captured: dict[_Key, _Captured] = {}
        self._pool: Any = None  # the memory that the graphs share
        self._results: dict[str, Tensor] = {}  # of whichever graph ran last: one memory for all

    def takes(self, batch: Batch) -> bool:
        """Whether a graph can be as large as the batch."""
        return sum(batch.query_lens) <= _TOKENS[-1] and len(batch.query_lens) <= _ROWS[-1]

    def warm(self, rows: int, longest: int, beyond: int) -> None:
        """Captures what decoding up to `rows` rows of up to `longest` tokens, and prompts, will need.

        Passes of up to `beyond` tokens need none. A graph captured later is captured while requests wait.
        """
        self._longest = bucket(min(longest, _LONGEST[-1]), _LONGEST)
        for size in (*self._steps(rows, longest), *self._prompts(rows)):
            if torch.cuda.mem_get_info(self._device)[0] < SPARE:
                log.warning("little memory is left: graphs are captured when they are first needed")
                return
            if size.tokens > beyond:
                self._found(size)

    def _steps(self, rows: int, longest: int) -> Iterator[_Key]:
        least = 0
        for most in _LONGEST:
            likely = min(most, longest)
            for size in (size for size in _ROWS if size < 2 * rows and least < longest):
                for tokens in _TOKENS:
                    if size + least <= tokens <= max(bucket(min(size * likely, _TOKENS[-1]), _TOKENS), 16):
                        yield _Key(size, tokens, most)
            least = most

    def _prompts(self, rows: int) -> Iterator[_Key]:
        most = bucket(min(rows, _PROMPT_ROWS[-1]), _PROMPT_ROWS)
        return (_Key(size, n, _TOKENS[-1]) for size in _PROMPT_ROWS if size <= most for n in _PROMPT_TOKENS)

    def forward(self, batch: Batch) -> tuple[Tensor | None, Tensor]:
        """Logits (None with prompts) and the head's input of the tokens, valid until the next pass."""
        key, total = self._key(batch), sum(batch.query_lens)
        found = self._found(key)
        found.copied.synchronize()  # what was copied last must have left the host's buffer
        self._fill(found.host, batch, key)
        found.words.copy_(found.host, non_blocking=True)
        found.copied.record()
        found.graph.replay()
        return self._results["logits"][:total] if key.decodes else None, self._results["normed"][:total]

    def _key(self, batch: Batch) -> _Key:
        rows, total, longest = len(batch.query_lens), sum(batch.query_lens), max(batch.query_lens)
        if batch.branched and longest <= _TREE_LONGEST[-1]:
            return _Key(bucket(rows, _ROWS), bucket(total, _TOKENS), bucket(longest, _TREE_LONGEST), True)
        if longest <= self._longest:
            return _Key(bucket(rows, _ROWS), bucket(total, _TOKENS), bucket(longest, _LONGEST))
        return _Key(bucket(rows, _PROMPT_ROWS), bucket(total, _PROMPT_TOKENS), _TOKENS[-1], batch.branched)

    def _found(self, key: _Key) -> _Captured:
        if key not in self._captured:
            self._captured[key] = self._capture(key)
        return self._captured[key]

    def _fill(self, host: Tensor, batch: Batch, key: _Key) -> None:
        to = {name: part.numpy() for name, part in _parts(host, key, self._width).items()}
        n, total = len(batch.query_lens), sum(batch.query_lens)
        to["ids"][total:], to["positions"][total:], to["slots"][total:] = 0, 0, self._spare_slot
        to["lengths"][n:] = 0
        to["ids"][:total] = batch.ids
        to["positions"][:total], to["slots"][:total] = batch.places()
        to["starts"][:n], to["lengths"][:n] = batch.starts, batch.query_lens
        to["begins"][:n] = [0, *accumulate(batch.query_lens[:-1])]
        for row, blocks in enumerate(batch.block_tables):
            to["tables"][row, : len(blocks)] = blocks
        if key.branched:
            to["trunks"][:n], to["sees"][:total], to["masks"][:total] = batch.sights()

    @long_work()
    def _capture(self, key: _Key) -> _Captured:
        words = torch.zeros(_size(key, self._width), dtype=torch.int32, device=self._device)
        inputs = _parts(words, key, self._width)
        inputs["slots"].fill_(self._spare_slot)
        for name, result in self._run(inputs, key).items():  # compiles what is not compiled yet
            self._results.setdefault(name, result.new_empty(_TOKENS[-1], result.shape[1]))
        torch.cuda.synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            for name, result in self._run(inputs, key).items():
                self._results[name][: key.tokens].copy_(result)
        self._pool = graph.pool()
        host = torch.zeros_like(words, device="cpu").pin_memory()
        return _Captured(graph, words, host, torch.cuda.Event())

    def _run(self, inputs: dict[str, Tensor], key: _Key) -> dict[str, Tensor]:
        places = Places(inputs["starts"], inputs["begins"], inputs["lengths"], inputs["tables"], key.longest)
        if key.branched:
            places.positions, places.trunks = inputs["positions"], inputs["trunks"]
            places.sees, places.masks = inputs["sees"], inputs["masks"]
        normed = self._layers(inputs["ids"], inputs["positions"], inputs["slots"], places)
        return {"normed": normed, "logits": self._head(normed)} if key.decodes else {"normed": normed}
