"""Target passes of at most 16 tokens with their verdict, on a GPU: one graph replay, one wait.

For rows whose next token is the target's own choice (coupled, without penalties, filters, masks). Launched
piece by piece, a pass costs the host 0.3 ms in which the device has nothing to do; here the host writes the
batch into one pinned buffer, replays a graph (copy, pass, choice, agreement with the drafts, answer), and
reads the answer when it is there. The answer stays on the device too, where policies can be told of it.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq

import numpy as np
import torch
from torch import Tensor

from engine.kv.blocks import BlockTable
from engine.long_work import long_work
from engine.models.decode_data import META, MOST, write_meta
from engine.models.fused import FusedRunner
from engine.models.graphs import bucket
from engine.models.kernels.agree import agree
from engine.models.kernels.choose import Chooser
from engine.sampling import plain
from engine.sequence import Sequence
from engine.speculation.drafters.base import RowDraft, Verdict, agreed
from engine.speculation.noise import coupled_state


class TargetLane:
    """`vocab`: ids at or above it are padding and never chosen. `answer` int32[4, 16] on the device, of the
    pass begun last, by row: draft tokens of a chain that stand, the next token, whether the logits were sound;
    by token the target's choice behind it, -1 where there is none."""

    def __init__(self, runner: FusedRunner, vocab: int) -> None:
        device = runner.device
        self._runner, self._vocab = runner, vocab
        # META, then by token: states and keys of the noise int64, temperatures float32.
        words = META + 5 * MOST
        self._host = torch.zeros(words, dtype=torch.int32).pin_memory()
        self._words = torch.zeros(words, dtype=torch.int32, device=device)
        self._to = self._host.numpy()
        wide = self._words[META : META + 4 * MOST].view(torch.int64).view(2, MOST)
        self._noise = wide[0], wide[1], self._words[META + 4 * MOST :].view(torch.float32)
        here = self._to[META : META + 4 * MOST].view(np.int64).reshape(2, MOST)
        self._states, self._keys = here[0], here[1]
        self._heat = self._to[META + 4 * MOST :].view(np.float32)
        width = -(-runner.context // runner.block_size) + 1
        self._tables = torch.zeros(MOST, width, dtype=torch.int32, device=device)
        self._tables_host = torch.zeros(MOST, width, dtype=torch.int32).pin_memory()
        self._lines = self._tables_host.numpy()
        self._held: list[tuple[BlockTable | None, int]] = [(None, 0)] * MOST  # what each line shows
        self._places = torch.arange(MOST, dtype=torch.int32, device=device)
        self.answer = torch.zeros(4, MOST, dtype=torch.int32, device=device)
        self._answer_host = torch.zeros(4, MOST, dtype=torch.int32).pin_memory()
        self._done = torch.cuda.Event()
        self._captured: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    def takes(self, rows: Seq[Sequence], drafts: Seq[RowDraft]) -> bool:
        """Whether it can: all rows lack but their newest token, and are plain."""
        tokens = len(rows) + sum(len(draft.tokens) for draft in drafts)
        return tokens <= self._runner.decodes and all(
            row.coupled and plain(row) and not draft.laws
            for row, draft in zip(rows, drafts, strict=True)
        )

    @torch.inference_mode()
    def warm(self) -> None:
        """Captures the graphs of all sizes."""
        for size in (1, 2, 4, 8, 16):
            if size <= self._runner.decodes:
                self._graph(size)

    def begin(self, rows: Seq[Sequence], drafts: Seq[RowDraft]) -> tuple[Tensor, Callable[[], Verdict]]:
        """Queues the pass over every row's newest and draft tokens.

        Returns logits float[tokens, vocab], valid until the next pass, and what waits for the verdict.
        """
        tokens = [[row.tokens[-1], *draft.tokens] for row, draft in zip(rows, drafts, strict=True)]
        total = sum(map(len, tokens))
        graph, logits = self._graph(bucket(total))
        self._done.synchronize()  # the host's buffers may still be read
        self._fill(rows, drafts, tokens)
        graph.replay()
        self._done.record()
        return logits[:total], lambda: self._verdict(drafts)

    def _fill(self, rows: Seq[Sequence], drafts: Seq[RowDraft], tokens: list[list[int]]) -> None:
        starts = [len(row.tokens) - 1 for row in rows]
        branches = [draft.branches(start) for draft, start in zip(drafts, starts, strict=True)]
        write_meta(self._to, starts, tokens, branches)
        at, changed = 0, 0
        for i, (row, draft) in enumerate(zip(rows, drafts, strict=True)):
            end = at + len(draft.tokens) + 1
            if row.params.temperature > 0:
                self._states[at:end] = coupled_state(row.seed)
                self._keys[at:end] = [len(row.tokens) + depth for depth in draft.depths()]
            self._heat[at:end] = row.params.temperature
            at = end
            count = len(row.blocks)
            table, shown = self._held[i]
            if table is not row.table:
                shown = 0
            if shown != count:  # a table only grows
                self._lines[i, shown:count] = row.blocks[shown:]
                self._held[i], changed = (row.table, count), i + 1
        if changed:
            self._tables[:changed].copy_(self._tables_host[:changed], non_blocking=True)

    def _graph(self, size: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        if size not in self._captured:
            self._captured[size] = self._capture(size)
        return self._captured[size]

    @long_work()
    def _capture(self, size: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        chooser = Chooser(size, self._vocab, self._runner.device)
        self._to[:META] = 0
        self._step(size, chooser)  # compiles; a pass of no tokens
        torch.cuda.synchronize(self._runner.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = self._step(size, chooser)
        return graph, logits[:, : self._vocab]

    def _step(self, size: int, chooser: Chooser) -> Tensor:
        """What a graph captures, for at most `size` tokens."""
        self._words.copy_(self._host, non_blocking=True)
        meta = self._words[:META]
        logits = self._runner.decode(meta, self._tables, size)
        states, keys, heat = (each[:size] for each in self._noise)
        choice = chooser(logits, self._places[:size], states, keys, heat)
        agree(meta, choice.token, choice.fine, self.answer)
        self._answer_host.copy_(self.answer, non_blocking=True)
        return logits

    def _verdict(self, drafts: Seq[RowDraft]) -> Verdict:
        self._done.synchronize()
        accepted, next_token, sound, chosen = self._answer_host.tolist()
        verdict = Verdict.of(len(drafts))
        at = 0
        for i, draft in enumerate(drafts):
            end = at + len(draft.tokens) + 1
            if draft.parents is None:
                verdict.path[i], verdict.next_token[i] = range(accepted[i]), next_token[i]
            else:
                verdict.path[i], verdict.next_token[i] = agreed(draft, chosen[at:end])
            verdict.failed[i], at = not sound[i], end
        return verdict
