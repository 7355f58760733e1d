"""The engine: tokens in, tokens out. `Engine.step` is the whole way of one iteration."""

from __future__ import annotations

import secrets
import time
from pathlib import Path

import torch

from engine import pricing
from engine.config import EngineConfig
from engine.constraints import constraint_of
from engine.drafting import Drafting
from engine.finish import cut, score_output, score_prompt
from engine.flight import NO_MEMORY, Asked, Flight, event_of
from engine.governing import Governing
from engine.measure import measured
from engine.memory_faults import is_out_of_memory
from engine.models.runner import Batch
from engine.parts import Parts, build, target_lane
from engine.passes import chunk_of
from engine.rescue import Rescue
from engine.scheduler import PlanRow, Scheduler
from engine.sequence import Sequence
from engine.speculation.costs import EngineCosts
from engine.speculation.memory import Memory
from engine.types import GenerateRequest, InvalidRequest, StepStats, TokenEvent
from engine.validate import validate
from engine.verifying import Verifying

_SHORT = 16  # tokens: passes over rows of no more, prompts too, are readied at start


class Engine:
    """One target, at most one draft model, one KV pool. Not thread-safe: one thread owns it."""

    def __init__(self, config: EngineConfig, parts: Parts | None = None) -> None:
        """Loads what `config` names, unless `parts` are given."""
        self._parts = parts if parts is not None else build(config)
        self.info = self._parts.info
        self._config = config
        self._blocks = self._parts.blocks
        device = self._parts.target.device
        self._governing = Governing(config, self._parts)
        self._drafting = Drafting(config, self._parts, self._governing)
        self._verifying = Verifying(self._parts, self._drafting, self._governing)
        self._tables = self._governing.tables
        self._scheduler = Scheduler(
            self._blocks, config.max_num_seqs, self._parts.token_budget, on_preempt=self._governing.put_aside
        )
        state = config.policy_state
        self._memory = None if state is None else Memory(Path(state), self._tables, self._parts.pair)
        self._sequences: dict[str, Sequence] = {}
        if parts is None or device.type == "cuda":
            self._governing.costs = measured(self._parts, config.max_num_seqs)
        self._arrivals = 0
        self._generated = self._uncounted = 0  # tokens since start
        self._flight: Flight | None = None
        self._rescue = Rescue(self._again, self._give_up)
        self._overlaps = device.type == "cuda"
        longest = max(_SHORT, config.max_sl + 1 if self._parts.drafters else 1)
        self._parts.target.warm(config.max_num_seqs, longest)
        self._lane = target_lane(self._parts)
        for dtype in {torch.float32, getattr(torch, self.info.dtype)} if self._overlaps else ():
            logits = torch.zeros(2, self._parts.target.vocab_size, dtype=dtype, device=device)
            self._parts.verifier.warm(logits[:, : self.info.vocab_size])
        self._drafting.warm()

    @property
    def costs(self) -> EngineCosts:
        """What draft steps and verifications cost, kept current."""
        return self._governing.costs

    # ---- requests

    def add(self, request: GenerateRequest) -> None:
        """Queues a request. Raises InvalidRequest."""
        validate(request, self.info)
        if request.id in self._sequences:
            raise InvalidRequest(f"a request with id {request.id!r} is already open", "id")
        params, asked = request.params, request.speculation
        drafter = asked.drafter or self.info.default_drafter
        policy, options = self._governing.governed(drafter, asked)
        constraint = constraint_of(
            params, self._parts.grammars, self.info.eos_token_ids, self.info.vocab_size
        )
        seq = Sequence(
            request=request,
            seed=secrets.randbits(64) if params.seed is None else params.seed,
            coupled=params.temperature == 0
            or params.sampling_method == "coupled"
            or (params.sampling_method == "auto" and params.seed is not None),
            drafter=drafter,
            policy=policy,
            options=options,
            max_sl=self.info.max_sl if asked.max_sl is None else asked.max_sl,
            order=self._arrivals,
            constraint=constraint,
        )
        if constraint is not None and constraint.at(seq, ()).state == "stuck":
            given = (name for name in ("allowed_token_ids", "bad_words") if getattr(params, name))
            blamed = next(given, "grammar")
            raise InvalidRequest(constraint.failure, blamed, "no_token_allowed")
        self._arrivals += 1
        self._sequences[request.id] = seq
        self._scheduler.add(seq)

    def abort(self, request_id: str) -> None:
        """Forgets a request and frees what it held; an unknown id is no error (it may just have ended)."""
        self.cut(request_id, 0)

    def cut(self, request_id: str, n_tokens: int) -> None:
        """As `abort`, but the first `n_tokens` of its tokens count."""
        seq = self._sequences.get(request_id)
        if seq is not None:
            self._uncounted += seq.generated - n_tokens
            self._end(seq)

    def has_work(self) -> bool:
        return bool(self._sequences)

    def close(self) -> None:
        """Keeps what was learned; nothing is asked of the engine afterwards."""
        if self._memory is not None:
            self._memory.keep(idle=True, last=True)

    # ---- one iteration

    @torch.inference_mode()
    def step(self) -> tuple[list[TokenEvent], StepStats]:
        """Draft, verify, commit. Events of every row that got tokens or ended; none without work.

        On a GPU the next iteration is begun before this one's events are made and handed out.
        """
        flight, self._flight = self._flight or self._begin(), None
        rows = self._finish(flight)
        seconds = time.perf_counter() - flight.begin
        if rows:
            spent = flight.draft_seconds + flight.decide_seconds + flight.verify_seconds
            pricing.price(self.costs, rows, flight, seconds - spent)
        if self._overlaps and self._sequences:
            self._flight = self._begin()
        events = [event_of(row, flight) for row in rows if row.samples or row.failed]
        if self._memory is not None:
            self._memory.keep(idle=not self._sequences)
        return events, self._stats(rows, events, flight, seconds)

    def _begin(self) -> Flight:
        """Plans an iteration and queues what can be queued without an answer of the device."""
        begin, now = time.perf_counter(), time.monotonic()
        self._governing.seconds_asked()
        rows = self._scheduler.plan(self._governing.limits)
        for row in rows:
            row.seq.scheduled = row.seq.scheduled or now
        asked = Asked(planning=self._governing.seconds_asked())
        flight = Flight(rows, begin, time.perf_counter(), asked=asked)
        flight.read = [row.seq.draft_kv_len for row in rows]
        try:
            flight.drafts = self._drafting.begin(rows)
            if rows and not flight.drafts:
                self._run_target(rows, flight)
        except Exception as error:  # raised when it ends: the events of the iteration before go out first
            flight.error = error
        return flight

    def _finish(self, flight: Flight) -> list[PlanRow]:
        """The rows, but for those that were aborted meanwhile."""
        try:
            return self._land(flight)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        flight.error = None
        rows = self._rescue.land(flight)
        flight.verified, flight.at = time.perf_counter(), time.monotonic()
        return rows

    def _again(self, rows: list[PlanRow], flight: Flight) -> None:
        flight.taught = True  # there is nothing to teach
        self._run_target(rows, flight)
        self._verifying.verify(rows, flight)
        self._commit_all(rows)

    def _land(self, flight: Flight) -> list[PlanRow]:
        """Waits for the drafts, verifies, commits."""
        if flight.error is not None:
            raise flight.error
        self._drafting.finish(flight)
        rows = [row for row in flight.rows if row.seq.status == "running"]
        if rows:
            if flight.logits is None:
                self._run_target(rows, flight)
            self._verifying.verify(rows, flight)
            flight.verified, flight.at = time.perf_counter(), time.monotonic()
            flight.asked.verifying = self._governing.seconds_asked()
            self._commit_all(rows)
            pricing.observe(self.costs, [table.load for table in self._tables.values()], rows, flight)
        return rows

    def _run_target(self, rows: list[PlanRow], flight: Flight) -> None:
        """Queues one pass over pending and draft tokens; of its logits [M, vocab] every row gets its part."""
        flight.drafted, flight.passed = time.perf_counter(), rows
        flight.asked.drafting = self._governing.seconds_asked()
        seqs, drafts = [row.seq for row in rows], [row.draft for row in rows]
        if self._lane is not None and all(row.decodes for row in rows) and self._lane.takes(seqs, drafts):
            counts = [len(draft.tokens) + 1 for draft in drafts]
            flight.logits, flight.verdict = self._lane.begin(seqs, drafts)
            flight.taught = self._governing.teach_ahead(rows, self._lane.answer)
        else:
            # Policies may be asked: before the device is busy.
            prompts = [] if flight.rescued else self._drafting.prompts_to_read(rows)
            chunks = [chunk_of(row) for row in rows]
            counts = [chunk.logits for chunk in chunks]
            batch = Batch.pack(chunks, self._blocks.block_size)
            flight.logits = self._parts.target.forward(batch)[:, : self.info.vocab_size]
            self._drafting.read(prompts)
        for row, part in zip(rows, flight.logits.split_with_sizes(counts), strict=True):
            row.logits = part

    def _commit_all(self, rows: list[PlanRow]) -> None:
        for row in rows:
            try:
                self._commit(row)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                self._give_up(row)

    def _give_up(self, row: PlanRow) -> None:
        """There is no memory for the row, even alone."""
        row.failed, row.lost, row.new, row.finish = True, NO_MEMORY, [], None
        self._end(row.seq)

    def _commit(self, row: PlanRow) -> None:
        """Moves the row on: KV lengths, tokens, and its end if it has come."""
        seq = row.seq
        assert seq.table is not None and row.logits is not None
        if row.failed:
            self._end(seq)
            return
        score_prompt(row, row.logits)
        seq.kv_len += row.tokens + row.accepted
        seq.draft_kv_len = min(seq.draft_kv_len, seq.kv_len)
        row.new, row.finish, row.stop_token = cut(row, self.info.eos_token_ids)
        row.logprobs = score_output(row, row.logits, row.new) if row.samples else None
        seq.tokens.extend(row.new)
        if seq.counts is not None:
            seq.counts.add(row.new)
        if seq.constraint is not None and row.finish is None:
            seq.constraint.commit(row.new)
        done = min(seq.kv_len, len(seq.tokens))
        self._blocks.commit(seq.table, seq.tokens, done)
        self._blocks.commit_draft(seq.table, min(seq.draft_kv_len, done))
        row.first = row.samples and not seq.started
        seq.started = seq.started or row.samples
        if row.finish is not None:
            self._end(seq)

    def _end(self, seq: Sequence) -> None:
        self._scheduler.remove(seq)
        self._governing.give_back(seq)
        del self._sequences[seq.id]

    def _stats(
        self, rows: list[PlanRow], events: list[TokenEvent], flight: Flight, seconds: float
    ) -> StepStats:
        emitted = sum(len(event.token_ids) for event in events)
        self._generated += emitted
        return StepStats(
            rows=len(rows),
            prefill_tokens=sum(row.tokens for row in rows if not row.decodes),
            emitted=emitted,
            drafted=sum(row.draft.drafted for row in rows),
            accepted=sum(event.accepted for event in events),
            draft_seconds=flight.draft_seconds if rows else 0.0,
            decide_seconds=flight.decide_seconds if rows else 0.0,
            verify_seconds=flight.verify_seconds if rows else 0.0,
            step_seconds=seconds,
            running=len(self._scheduler.running),
            waiting=len(self._scheduler.waiting),
            kv_blocks_used=self._blocks.used_blocks,
            kv_blocks_total=self._blocks.num_blocks,
            prefix_queries=self._blocks.queries,
            prefix_hits=self._blocks.hits,
            preemptions=self._scheduler.preemptions,
            generated=self._generated,
            uncounted=self._uncounted,
            speculation_faults=dict(self._governing.faults.total),
        )
