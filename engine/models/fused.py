"""The fused runner: a lean decoder of our own for the Llama family, over the weights transformers loads.

Matrix products are cuBLAS's; what lies between them, and attention, are Triton kernels
(`kernels/`). A pass over at most 16 tokens in bfloat16 is one launch of `DecodeKernel` instead.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from collections.abc import Sequence as Seq
from contextlib import nullcontext
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from engine.kv.pool import KVPool, LayerShape
from engine.models import decode, selfcheck
from engine.models.decode_data import META, MOST, sees_all, write_meta
from engine.models.decoder import Matrix, extract, unsupported
from engine.models.graphs import PassGraphs
from engine.models.kernels.attention import Places, attend
from engine.models.kernels.pointwise import add_norm, gate, rotate_and_store
from engine.models.offload import LayerStream, lent
from engine.models.quantize import QuantizedWeight, weight_only_linear
from engine.models.runner import Batch, Chunk
from engine.models.selfcheck import UnsupportedModel
from engine.models.staging import Staging

_PROMPT = 1024  # tokens: more than graphs are made for

log = logging.getLogger(__name__)


def linear(x: Tensor, weight: Matrix, bias: Tensor | None) -> Tensor:
    """x [N, K] -> [N, rows of the weight]."""
    if isinstance(weight, QuantizedWeight):
        return weight_only_linear(x, weight, bias)
    return F.linear(x, weight, bias)


def _itself(x: Tensor) -> Tensor:
    return x


class FusedRunner:
    """A `Runner` for the Llama family. `allocate` makes the pool, as with the reference runner."""

    def __init__(self, model: PreTrainedModel, block_size: int, stream: LayerStream | None = None) -> None:
        """Checks itself against the model. `stream`: of the model's layers, if they are offloaded.

        Raises UnsupportedModel.
        """
        if (reason := unsupported(model)) is not None:
            raise UnsupportedModel(reason)
        self.streamed = stream is not None
        with nullcontext() if stream is None else lent(model, stream):
            expected = selfcheck.own_logits(model)
        self.decoder, self.block_size = extract(model, stream), block_size
        self.context = int(model.config.max_position_embeddings)
        d = self.decoder
        self.shapes = {i: LayerShape(d.kv_heads, d.head_dim, d.head_dim) for i in range(len(d.layers))}
        self._hidden: Callable[[], Tensor | None] = lambda: None
        self.hidden_size = d.hidden
        self._pool: KVPool | None = None
        self._whole: Tensor | None = None
        self._staging = Staging(d.device)
        self.graphs: PassGraphs | None = None
        self._programs = 1
        if d.device.type == "cuda":
            self._programs = 2 * torch.cuda.get_device_properties(d.device).multi_processor_count
        self.kernel: decode.DecodeKernel | None = None
        self.decodes = MOST  # tokens, at most, that go to the kernel
        self.kernel_refused = decode.why_not(d, block_size)
        if self.kernel_refused is None:
            try:
                self.kernel = decode.DecodeKernel(d)
                self.kernel.compile()
            except (RuntimeError, ImportError) as error:  # no such compiler, or a device without room for it
                self.kernel, self.kernel_refused = None, str(error)
        if self.kernel_refused is not None and d.device.type == "cuda" and not self.streamed:
            log.warning("%s decodes by graphs of kernels: %s", type(model).__name__, self.kernel_refused)
        exact = d.dtype in (torch.float32, torch.float64)
        selfcheck.check(self, type(model).__name__, block_size, expected, exact)
        self._pool = None

    @property
    def vocab_size(self) -> int:
        return self.decoder.vocab

    @property
    def hidden(self) -> Tensor | None:
        return self._hidden()

    @property
    def device(self) -> torch.device:
        return self.decoder.device

    @property
    def dtype(self) -> torch.dtype:
        return self.decoder.dtype

    def allocate(self, blocks: int) -> None:
        """Makes the KV pool, with a block more, where padding writes."""
        self.spare_slot = blocks * self.block_size
        self._pool = KVPool(self.shapes, blocks + 1, self.block_size, self.dtype, self.device)
        if self.kernel is not None:
            self.kernel.attach(self._pool)
        if self.device.type == "cuda" and not self.streamed:  # a pass waits for copies, not for launches
            width = -(-self.context // self.block_size) + 1
            self.graphs = PassGraphs(self.layers, self.head, self.spare_slot, width, self.device)
            if self.kernel is not None:
                self.decodes = self._faster(blocks)

    @torch.inference_mode()
    def move(self, pairs: Seq[tuple[int, int]]) -> None:
        assert self._pool is not None
        self._pool.move(pairs)

    @torch.inference_mode()
    def warm(self, rows: int, longest: int) -> None:
        """Captures ahead what passes over up to `rows` rows of up to `longest` tokens will need."""
        if self.graphs is not None:
            self.graphs.warm(rows, longest, self.decodes if self.kernel is not None else 0)
        blocks = -(-_PROMPT // self.block_size)  # compiles what reading long ones needs
        if self._pool is not None and self.context >= _PROMPT and blocks <= self._pool.blocks:
            self._forward(Batch.pack([Chunk([0] * _PROMPT, 0, list(range(blocks)), 1)], self.block_size))

    @torch.inference_mode()
    def _faster(self, blocks: int) -> int:
        """The most tokens for which the kernel beats a graph of kernels: 16, or 8.

        Measured, for a verification of 16 tokens after as much context as fits, up to 1k.
        """
        if blocks < 16:  # the self-check's pool
            return MOST
        assert self.graphs is not None
        table = list(range(min(blocks, 66, self.context // self.block_size)))
        start = (len(table) - 1) * self.block_size
        batch = Batch.pack([Chunk([0] * min(16, self.block_size), start, table, 16)], self.block_size)
        seconds = []
        graphs = self.graphs
        runs: list[Callable[[], object]] = [lambda: self._decode(batch, 16), lambda: graphs.forward(batch)]
        for run in runs:
            for _ in range(3):
                run()
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            for _ in range(5):
                run()
            end.record()
            end.synchronize()
            seconds.append(begin.elapsed_time(end))
        return MOST if seconds[0] <= seconds[1] else 8

    @torch.inference_mode()
    def forward(self, batch: Batch) -> Tensor:
        """Writes the batch's KV and returns logits [M, vocab_size], valid until the next pass."""
        rows, tokens = len(batch.query_lens), sum(batch.query_lens)
        short = self.kernel is not None and max(tokens, rows) <= self.decodes
        if self.kernel is not None and short and sees_all(batch.branches, batch.starts):
            logits, hidden = self._decode(batch, tokens), functools.partial(self.kernel.normed, tokens)
        elif self.graphs is not None and self.graphs.takes(batch):
            found, normed = self.graphs.forward(batch)
            if found is None:
                return self._headed(normed, batch.on_device(self.device).logits_at)
            logits, hidden = found, functools.partial(_itself, normed)
        else:
            return self._forward(batch)
        self._hidden = hidden
        if len(batch.logits_at) < tokens:
            at = batch.on_device(self.device).logits_at
            logits, self._hidden = logits[at], lambda: hidden()[at]
        return logits

    def _decode(self, batch: Batch, tokens: int) -> Tensor:
        ids, rows = iter(batch.ids), len(batch.query_lens)
        tables = batch.padded_tables()
        words = np.zeros(META + len(tables), dtype=np.int32)
        tokens_of = [[next(ids) for _ in range(q)] for q in batch.query_lens]
        write_meta(words, batch.starts, tokens_of, batch.branches)
        words[META:] = tables
        there = self._staging.words(words)
        return self.decode(there[:META], there[META:].view(rows, -1), tokens)

    def _forward(self, batch: Batch) -> Tensor:
        """Kernel by kernel: long prompts."""
        lengths, rows = batch.query_lens, len(batch.query_lens)
        begins = [0, *accumulate(lengths[:-1])]
        words = self._staging.words([*batch.starts, *begins, *lengths, *batch.padded_tables()])
        by_row, tables = words[: 3 * rows].view(3, rows), words[3 * rows :].view(rows, -1)
        inputs = batch.on_device(self.device)
        fold = self.decoder.heads // self.decoder.kv_heads
        longest = max(*lengths, -(-64 // fold))  # short prompts are to compile no kernel of their own
        places = Places(by_row[0], by_row[1], by_row[2], tables, longest)
        if batch.branched:
            trunks, sees, masks = batch.sights()
            told = self._staging.words([*trunks, *sees])
            places.positions, places.trunks, places.sees = inputs.positions, told[:rows], told[rows:]
            places.masks = torch.tensor(masks, dtype=torch.int64).to(self.device)
        normed = self.layers(inputs.ids, inputs.positions, inputs.slots, places)
        return self._headed(normed, inputs.logits_at)

    def _headed(self, normed: Tensor, at: Tensor) -> Tensor:
        normed = normed[at]
        self._hidden = functools.partial(_itself, normed)
        return self.head(normed)

    def decode(self, meta: Tensor, tables: Tensor, most: int) -> Tensor:
        """A pass of at most 16 tokens in one launch; float32[most, vocab_size]. See DecodeKernel."""
        assert self.kernel is not None
        if not self.kernel.embeds:
            ids = meta[8 + 4 * MOST : 8 + 5 * MOST]
            self.kernel.hidden.copy_(self.decoder.embed(ids.long()))
        self.kernel.launch(meta, tables, most)
        logits = self.kernel.logits[:most]
        if self.kernel.known == self.vocab_size:
            return logits
        if self._whole is None:  # what the head does not know stays -inf
            self._whole = logits.new_full((MOST, self.vocab_size), float("-inf"))
        return self._whole[:most].index_copy_(1, self.decoder.head.ids, logits)  # type: ignore[arg-type]

    def layers(self, ids: Tensor, positions: Tensor, slots: Tensor, places: Places) -> Tensor:
        """[N, hidden]: the normed output of the last layer. ids, positions, slots int[N]."""
        assert self._pool is not None
        d = self.decoder
        hidden = self.decoder.embed(ids).float()
        delta: Tensor | None = None
        for i, layer in enumerate(d.layers):
            x = add_norm(hidden, delta, layer.norm_in, d.eps)
            qkv = linear(x, layer.qkv, layer.qkv_bias).view(-1, d.heads + 2 * d.kv_heads, d.head_dim)
            keys, values = self._pool.keys[i], self._pool.values[i]
            rotate_and_store(qkv, keys, values, positions, slots, d, layer)
            attended = attend(
                qkv,
                keys,
                values,
                places,
                heads=d.heads,
                scaling=d.scaling,
                window=layer.window,
                block_size=self.block_size,
                programs=self._programs,
            )
            delta = linear(attended, layer.out, layer.out_bias)
            x = add_norm(hidden, delta, layer.norm_mid, d.eps)
            inner = gate(linear(x, layer.gate_up, layer.gate_up_bias))
            delta = linear(inner, layer.down, layer.down_bias)
        return add_norm(hidden, delta, d.norm, d.eps)

    def run(self, ids: Tensor, positions: Tensor, slots: Tensor, places: Places) -> tuple[Tensor, Tensor]:
        """logits [N, vocab_size] and the head's input [N, hidden] of every token."""
        normed = self.layers(ids, positions, slots, places)
        return self.head(normed), normed

    def head(self, normed: Tensor) -> Tensor:
        """[M, hidden] -> logits [M, vocab_size]."""
        logits: Tensor = self.decoder.head(normed)
        return logits
