"""Buffers and graphs of the draft loop for one number of rows; `loop.py` says how it works."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence as Seq
from collections.abc import Set
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from engine.long_work import long_work
from engine.models.decode_data import META, MOST, write_meta
from engine.models.fused import FusedRunner
from engine.models.kernels.advance import MOST_SL, REASONS, advance
from engine.models.kernels.attention import Places
from engine.models.kernels.choose import Chooser, Laws
from engine.models.runner import Batch, Chunk
from engine.sequence import Sequence
from engine.speculation.control import PolicyTable
from engine.speculation.drafters.base import Drafted, Drafts, RowDraft
from engine.speculation.drafters.inputs import NARROW, WIDE, parts
from engine.speculation.noise import coupled_state, draws_state
from engine.speculation.policy import Need, Signals

_MIXES = 16  # of policies, for which a lane keeps graphs
log = logging.getLogger(__name__)


class Lane:
    """Buffers and graphs for `size` rows, a power of two.

    The host's inputs are one int32 buffer on either side, copied at once; `rows` names its parts.
    """

    def __init__(
        self,
        runner: FusedRunner,
        vocab: int,
        table: PolicyTable,
        blocks: int,
        most_sl: int,
        pool: Any,
        size: int,
    ) -> None:
        self._runner, self.table, self._size = runner, table, size
        self.device = runner.device
        self._vocab, self._most_sl, self._pool = vocab, most_sl, pool
        self._compact = runner.kernel is not None and size <= runner.decodes
        self._chooser = Chooser(size, vocab, runner.device)
        words = META + size * (2 * len(WIDE) + len(NARROW) + blocks)
        self._words = torch.zeros(words, dtype=torch.int32, device=runner.device)
        self._host = torch.zeros(words, dtype=torch.int32).pin_memory()
        self._inputs = {name: tensor.numpy() for name, tensor in parts(self._host, size, blocks).items()}
        device, int32 = runner.device, torch.int32
        answer = torch.zeros(4 + size * (2 + MOST_SL), dtype=int32, device=device)
        self._answer, self._answer_host = answer, torch.zeros_like(answer, device="cpu").pin_memory()
        self._ticket = torch.zeros(1, dtype=int32).pin_memory()
        self._seen, self._replays = self._ticket.numpy(), 0
        self.rows = parts(self._words, size, blocks) | {
            "progress": answer[:4],
            "length": answer[4 : 4 + size],
            "reason": answer[4 + size : 4 + 2 * size],
            "drafted": answer[4 + 2 * size :],
        }
        for name in ("ids", "positions", "slots", "starts", "lengths"):
            self.rows[name] = torch.zeros(size, dtype=int32, device=device)
        self.rows["slots"].fill_(runner.spare_slot)
        begins = torch.arange(size, dtype=int32, device=device)
        self._places = Places(self.rows["starts"], begins, self.rows["lengths"], self.rows["tables"], 1)
        self._logits: Tensor | None = None  # where the graphs read them
        states = (MOST if self._compact else size), runner.hidden_size
        self._hidden = torch.zeros(states, dtype=torch.float32, device=device)
        self._graphs: dict[tuple[tuple[str, ...], bool], _Graphs] = {}
        self._full = False
        self._kept: Tensor | None = None  # bfloat16[size, most_sl, vocab], what rejecting rows sampled from
        self._first_most = 8 if 2 * size <= 8 else MOST  # tokens: each row's newest, and one before
        self._side = torch.cuda.Stream(device)

    # ---- the device's part

    def _step(self, names: tuple[str, ...], rejects: bool) -> None:
        """Choose, signal, ask, advance, tell the host, run the model: what a graph captures."""
        rows, needs = self.rows, self.table.needs_of(names)
        assert self._logits is not None
        laws = None
        if rejects:
            assert self._kept is not None
            laws = Laws(self._kept, rows["rejecting"], rows["progress"][1:2])
        choice = self._chooser(
            self._logits, rows["place"], rows["state"], rows["key"], rows["temperature"],
            signals=bool(needs), top="top" in needs, laws=laws,
        )  # fmt: skip
        keep = rows["alive"] != 0
        if needs:
            rows["joint"].mul_(choice.prob)
            signals = Signals(
                step=rows["progress"][1].long() + 1,
                token=choice.token.long(),
                position=rows["generated"] + rows["progress"][1],
                alive=keep,
                prob=choice.prob,
                largest=choice.largest,
                top=choice.top,
                entropy=choice.entropy,
                joint=rows["joint"],
                hidden=self._hidden.index_select(0, rows["place"]) if "hidden" in needs else None,
            )
            keep = self.table.decide(names, rows["slot"], rows["policy"], signals)
        advance(
            choice.token, choice.fine, keep, rows, most=MOST, compact=self._compact,
            block_size=self._runner.block_size, spare_slot=self._runner.spare_slot,
        )  # fmt: skip
        main = torch.cuda.current_stream()
        self._side.wait_stream(main)
        with torch.cuda.stream(self._side):  # beside the model's pass, not before it
            self._answer_host.copy_(self._answer, non_blocking=True)
            self._ticket.copy_(rows["progress"][:1], non_blocking=True)
        self._forward(needs, self._size)
        main.wait_stream(self._side)

    def _forward(self, needs: Set[Need], most: int) -> None:
        """The model's pass over what `advance` left; `most`: the tokens there may be."""
        if self._compact:
            self._logits = self._runner.decode(self.rows["meta"], self.rows["tables"], most)
            if "hidden" in needs:
                assert self._runner.kernel is not None
                self._hidden[:most].copy_(self._runner.kernel.normed(most))
            return
        rows = self.rows
        logits, normed = self._runner.run(rows["ids"], rows["positions"], rows["slots"], self._places)
        if self._logits is None:
            self._logits = torch.empty_like(logits)
        self._logits.copy_(logits)
        if "hidden" in needs:
            self._hidden.copy_(normed)

    def graph(self, names: tuple[str, ...], rejects: bool) -> _Graphs:
        """Captured at first use; run once before, with no row alive, so that all is compiled."""
        key = names, rejects
        if key not in self._graphs:
            self._graphs[key] = self._capture(*key)
            if len(self._graphs) > _MIXES:
                del self._graphs[next(iter(self._graphs))]
            self._replays = int(self.rows["progress"][0])
        self._graphs[key] = self._graphs.pop(key)  # the one used last comes last
        return self._graphs[key]

    @long_work()
    def _capture(self, names: tuple[str, ...], rejects: bool) -> _Graphs:
        needs = self.table.needs_of(names)
        if self._logits is None:
            self._forward(needs, self._size)
        self._words.zero_()
        self._answer[1:].zero_()
        self.rows["slot"].fill_(self.table.spare_slot)
        self._step(names, rejects)
        torch.cuda.synchronize(self._runner.device)
        first, again = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(again, pool=self._pool):
            self._step(names, rejects)
        with torch.cuda.graph(first, pool=self._pool):
            if self._compact:
                self._answer[1:].zero_()
                self._forward(needs, self._first_most)
            self._step(names, rejects)
        return _Graphs(first, again)

    # ---- the host's part

    def keeps(self) -> bool:
        """Whether there is memory for the logits that rejecting rows sample from."""
        if self._kept is None and not self._full:
            shape = self._size, self._most_sl, self._vocab
            try:
                self._kept = torch.empty(shape, dtype=torch.bfloat16, device=self._runner.device)
            except torch.OutOfMemoryError:
                self._full = True
                log.warning("no memory for the draft loop of %d rejecting rows: the host drafts", self._size)
        return self._kept is not None

    def begin(self, rows: Seq[Sequence], limits: Seq[int]) -> Drafts:
        names = self.table.asked({row.policy for row in rows})
        graphs = self.graph(names, not all(row.coupled for row in rows))
        starts = [row.draft_kv_len for row in rows]
        lags = [row.tokens[start:] for row, start in zip(rows, starts, strict=True)]
        here = self._compact and sum(map(len, lags)) <= self._first_most
        self._fill(rows, limits)
        if here:  # the first graph begins with what the draft has not seen: the newest token, and before it
            write_meta(self._inputs["meta"], starts, lags)
            self._inputs["place"][: len(rows)] = np.cumsum([len(lag) for lag in lags]) - 1
        else:
            chunks = [Chunk(lag, at, row.blocks) for lag, at, row in zip(lags, starts, rows, strict=True)]
            logits = self._runner.forward(Batch.pack(chunks, self._runner.block_size))
            assert self._logits is not None
            self._logits[: len(rows)].copy_(logits)
            if "hidden" in self.table.needs_of(names):
                hidden = self._runner.hidden
                assert hidden is not None
                self._hidden[: len(rows)].copy_(hidden)
        self._words.copy_(self._host, non_blocking=True)
        for row in rows:
            row.draft_kv_len = len(row.tokens)
        if here:
            graphs.first.replay()
        else:
            self._answer[1:].zero_()
            graphs.again.replay()
        self._replays += 1
        return lambda: self._finish(graphs.again, rows)

    def _fill(self, rows: Seq[Sequence], limits: Seq[int]) -> None:
        """Everything the graph reads that the host knows. Rows beyond these are not alive."""
        to, n = self._inputs, len(rows)
        to["alive"][:n], to["alive"][n:] = 1, 0
        to["slot"][n:] = self.table.spare_slot
        to["joint"][:] = 1.0
        to["meta"][:2] = 0
        to["place"][:n], to["place"][n:] = np.arange(n), 0
        to["temperature"][n:] = 0
        for i, (row, limit) in enumerate(zip(rows, limits, strict=True)):
            to["position"][i], to["rejecting"][i] = len(row.tokens), not row.coupled
            to["state"][i] = coupled_state(row.seed) if row.coupled else draws_state(row.seed)
            to["key"][i] = len(row.tokens) if row.coupled else row.draws
            to["generated"][i], to["limit"][i] = row.generated, min(limit, self._most_sl)
            to["slot"][i], to["policy"][i] = row.slot, self.table.number(row.policy)
            to["temperature"][i] = row.params.temperature
            blocks = row.blocks
            to["tables"][i, : len(blocks)] = blocks

    def _finish(self, graph: torch.cuda.CUDAGraph, rows: Seq[Sequence]) -> Drafted:
        answer = self._answer_host.numpy()
        times: list[float] = []
        while True:
            self._wait()
            times.append(time.perf_counter())
            if answer[2] == 0:
                break
            graph.replay()
            self._replays += 1
        size = self._size
        drafted = answer[4 + 2 * size :].reshape(size, MOST_SL)
        drafts = []
        for i, row in enumerate(rows):
            length = int(answer[4 + i])
            row.draft_kv_len += max(length - 1, 0)
            tokens = drafted[i, :length].tolist()
            kept = None
            if not row.coupled:
                row.draws += length
                assert self._kept is not None
                kept = self._kept.view(-1, self._vocab), i * self._most_sl, row.params.temperature
            draft = RowDraft(tokens, kept=kept, stop_reason=REASONS[answer[4 + size + i]])
            draft.unsound = draft.stop_reason == "drafter"  # its law was not finite
            drafts.append(draft)
        # The host may have come late to the first answer; from the second on it waits for the device.
        steady = len(times) - 2
        return Drafted(drafts, [(self._size, (times[-1] - times[1]) / steady)] if steady > 0 else [])

    def _wait(self) -> None:
        """Until the newest replay has told its answer. A fault on the device is raised here."""
        spins = 0
        while (int(self._seen[0]) - self._replays) & 0xFFFFFFFF:  # the device counts in 32 bits
            spins += 1
            if spins % 1000 == 0:
                torch.cuda.current_stream().query()  # raises after a fault
                if spins > 1000_000:
                    time.sleep(0.001)


class _Graphs(NamedTuple):
    """Of a draft's first token, with the pass before it, and of every later one."""

    first: torch.cuda.CUDAGraph
    again: torch.cuda.CUDAGraph
