"""The engine: tokens in, tokens out. `Engine.step` is the whole way of one iteration."""

from __future__ import annotations

import secrets
import time
from pathlib import Path

import torch
from torch import Tensor

from engine.config import EngineConfig
from engine.constraints import constraint_of, unburdened
from engine.finish import cut, score_output, score_prompt
from engine.flight import Flight, event_of
from engine.measure import measured
from engine.models.runner import Batch, Chunk
from engine.parts import Parts, build
from engine.scheduler import PlanRow, Scheduler
from engine.sequence import Sequence
from engine.speculation.control import PolicyTable
from engine.speculation.costs import EngineCosts
from engine.speculation.drafters.base import Drafter, Drafts
from engine.speculation.memory import Memory
from engine.speculation.policy import options_of
from engine.types import GenerateRequest, InvalidRequest, StepStats, TokenEvent
from engine.validate import validate


class Engine:
    """One target, at most one draft model, one KV pool. Not thread-safe: one thread owns it."""

    def __init__(self, config: EngineConfig, parts: Parts | None = None) -> None:
        """Loads what `config` names, unless `parts` are given."""
        self._parts = parts if parts is not None else build(config)
        self.info = self._parts.info
        self._config = config
        self._blocks = self._parts.blocks
        device = self._parts.target.device
        self._tables = {
            name: PolicyTable(config.max_num_seqs, device, equipment)
            for name, equipment in self._parts.equipment.items()
        }
        self._scheduler = Scheduler(
            self._blocks, config.max_num_seqs, self._parts.token_budget, on_preempt=self._put_aside
        )
        state = config.policy_state
        self._memory = None if state is None else Memory(Path(state), self._tables, self._parts.pair)
        self._sequences: dict[str, Sequence] = {}
        self.costs = (
            measured(self._parts, config.max_num_seqs)
            if parts is None or device.type == "cuda"
            else EngineCosts()
        )
        self._drafting = dict.fromkeys(self._parts.drafters, True)  # whether any row did lately
        self._arrivals = 0
        self._flight: Flight | None = None
        self._overlaps = device.type == "cuda"
        self._parts.target.warm(config.max_num_seqs, config.max_sl + 1 if self._parts.drafters else 1)
        for name, drafter in self._parts.drafters.items():
            self._tables[name].check(config.policy, options_of(config.policy, config.policy_options))
            drafter.warm(self._tables[name], config.policy, config.max_num_seqs)
            self._tables[name].warm(config.policy, config.max_num_seqs)

    # ---- requests

    def add(self, request: GenerateRequest) -> None:
        """Queues a request. Raises InvalidRequest."""
        validate(request, self.info)
        if request.id in self._sequences:
            raise InvalidRequest(f"a request with id {request.id!r} is already open", "id")
        params, asked = request.params, request.speculation
        drafter = asked.drafter or self.info.default_drafter
        policy = asked.policy or self.info.default_policy
        default = self.info.default_options if policy == self.info.default_policy else {}
        options = options_of(policy, default if asked.options is None else asked.options)
        if asked.options is not None and drafter in self._tables:
            self._tables[drafter].check(policy, options)
        constraint = constraint_of(
            params, self._parts.grammars, self.info.eos_token_ids, self.info.vocab_size
        )
        seq = Sequence(
            request=unburdened(request),
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
        seq = self._sequences.get(request_id)
        if seq is not None:
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
        if self._overlaps and self._sequences:
            self._flight = self._begin()
        events = [event_of(row, flight) for row in rows if row.samples or row.failed]
        if self._memory is not None:
            self._memory.keep(idle=not self._sequences)
        return events, self._stats(rows, events, flight, seconds)

    def _begin(self) -> Flight:
        """Plans an iteration and queues what can be queued without an answer of the device."""
        begin = time.perf_counter()
        rows = self._scheduler.plan(self._limits)
        flight = Flight(rows, begin, self._begin_drafts(rows))
        if rows and not flight.drafts:
            flight.drafted = time.perf_counter()
            flight.logits = self._run_target(rows)
        return flight

    def _finish(self, flight: Flight) -> list[PlanRow]:
        """Waits for the drafts, verifies, commits: the rows, but for those that were aborted meanwhile."""
        for chosen, wait in flight.drafts:
            drafted = wait()
            for row, draft in zip(chosen, drafted.rows, strict=True):
                draft.stop_reason = draft.stop_reason or row.sl_reason
                row.draft = draft
                if row.seq.constraint is not None:
                    row.seq.constraint.trim(row.seq, draft)
            for count, seconds in drafted.steps:
                self.costs.drafts[chosen[0].seq.drafter].observe(count, count, seconds)
        rows = [row for row in flight.rows if row.seq.status == "running"]
        if rows:
            if flight.logits is None:
                flight.drafted = time.perf_counter()
                flight.logits = self._run_target(rows)
            self._verify(rows, flight.logits)
            flight.verified = time.perf_counter()
            for row in rows:
                self._commit(row)
            self._observe_costs(rows, flight)
        return rows

    def _limits(self, decoding: list[Sequence]) -> list[tuple[int, str | None]]:
        """What each decoding row may draft: the policy's wish, within caps and the room that is left."""
        wishes: dict[str, int] = {}
        for name, table in self._tables.items():
            mine = [seq for seq in decoding if seq.drafter == name]
            if mine:
                table.load.refresh(self.costs.drafts[name], self.costs.verify, len(decoding), _mix(decoding))
                for seq in mine:
                    if seq.slot < 0:
                        table.take(seq)
                asked = table.limits(mine)
                wishes |= zip([seq.id for seq in mine], asked, strict=True)
                self._drafting[name] = any(map(min, asked, [seq.max_sl for seq in mine]))
        limits: list[tuple[int, str | None]] = []
        for seq in decoding:
            if seq.id not in wishes:
                limits.append((0, None))
                continue
            # A draft of k emits up to k + 1 tokens and writes KV for the newest token and all k.
            room = min(
                seq.params.max_tokens - seq.generated - 1,
                self.info.max_model_len - len(seq.tokens) - 1,
                self._parts.drafters[seq.drafter].room(seq),
            )
            bounds = (wishes[seq.id], "policy"), (seq.max_sl, "cap"), (max(room, 0), "room")
            limits.append(min(bounds, key=lambda bound: bound[0]))
        return limits

    def _begin_drafts(self, rows: list[PlanRow]) -> list[tuple[list[PlanRow], Drafts]]:
        """A chain for every row that may draft; what lags too far is read instead."""
        for row in rows:
            row.draft.stop_reason = row.sl_reason
        begun = []
        for name, drafter in self._parts.drafters.items():
            mine = [row for row in rows if row.decodes and row.seq.drafter == name]
            lagging = [row.seq for row in mine if row.sl_reason == "room" and drafter.lags(row.seq)]
            drafter.read([(seq, len(seq.tokens) - 1) for seq in lagging], self._parts.token_budget)
            chosen = [row for row in mine if row.sl > 0]
            if chosen:
                limits = [row.sl for row in chosen]
                begun.append((chosen, drafter.begin([row.seq for row in chosen], limits, self._tables[name])))
        return begun

    def _run_target(self, rows: list[PlanRow]) -> Tensor:
        """One pass over pending and draft tokens; float[M, vocab], of which every row gets its part."""
        prompts = self._prompts_to_read(rows)  # policies may be asked: before the device is busy
        chunks = []
        for row in rows:
            seq = row.seq
            tokens = seq.tokens[seq.kv_len : seq.kv_len + row.tokens] + row.draft.tokens
            scored = seq.params.prompt_logprobs is not None and seq.kv_len < seq.prompt_len
            # A chunk that does not sample gives its last logits all the same: they are checked for NaN.
            wanted = len(tokens) if scored else len(row.draft.tokens) + 1
            chunks.append(Chunk(tokens, seq.kv_len, seq.blocks, wanted))
        batch = Batch.pack(chunks, self._blocks.block_size)
        logits = self._parts.target.forward(batch)[:, : self.info.vocab_size]
        for row, part in zip(rows, logits.split_with_sizes([chunk.logits for chunk in chunks]), strict=True):
            row.logits = part
        for drafter, begun in prompts:
            drafter.read(begun, self._parts.token_budget)
        return logits

    def _prompts_to_read(self, rows: list[PlanRow]) -> list[tuple[Drafter, list[tuple[Sequence, int]]]]:
        """What drafters read beside the target, for those rows that will draft by all that is known."""
        found = []
        for name, drafter in self._parts.drafters.items():
            mine = [
                row
                for row in rows
                if not row.decodes and row.seq.drafter == name
                if row.seq.max_sl > 0 and row.seq.params.max_tokens > 2 and self._drafts(row.seq)
            ]
            if mine:
                found.append((drafter, [(row.seq, row.seq.kv_len + row.tokens) for row in mine]))
        return found

    def _drafts(self, seq: Sequence) -> bool:
        """Whether its policy lets it draft; one that learns, if it let any row lately."""
        table = self._tables[seq.drafter]
        if table.learns(seq):
            return self._drafting[seq.drafter]
        if seq.slot < 0:
            table.take(seq)
        return table.limits([seq]) != [0]

    def _verify(self, rows: list[PlanRow], logits: Tensor) -> None:
        """Verdicts for the rows that sample; the others are only checked for NaN."""
        sampling = [row for row in rows if row.samples]
        if len(sampling) < len(rows):
            for row in rows:
                row.failed = not row.samples and bool(_tail(row, 1).isnan().any())
        if not sampling:
            return
        tails = [_tail(row, len(row.draft.tokens) + 1) for row in sampling]
        if sum(map(len, tails)) < len(logits):
            logits = torch.cat(tails)
        seqs, drafts = [row.seq for row in sampling], [row.draft for row in sampling]
        verdict = self._parts.verifier.verify(seqs, drafts, logits)
        for i, row in enumerate(sampling):
            row.accepted, row.next_token = verdict.accepted[i], verdict.next_token[i]
            row.failed = verdict.failed[i]
        for name, table in self._tables.items():
            learning = [
                row
                for row in sampling
                if row.decodes and row.seq.drafter == name and not row.failed and table.learns(row.seq)
            ]
            if learning:
                drafted, accepted = [r.draft.drafted for r in learning], [r.accepted for r in learning]
                table.observe([row.seq for row in learning], drafted, accepted)

    def _observe_costs(self, rows: list[PlanRow], flight: Flight) -> None:
        """Only of iterations without prefill: what verifying alone took, and what they gave."""
        if all(row.decodes for row in rows):
            emitted = sum(len(row.new) for row in rows)
            for table in self._tables.values():
                seconds = flight.verified - flight.begin
                table.load.observe(len(rows), emitted, seconds, _mix([row.seq for row in rows]))
            drafts = [len(row.draft.tokens) for row in rows]
            self.costs.verify.observe(len(rows), len(rows) + sum(drafts), flight.verified - flight.drafted)

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
        if seq.drafter in self._tables:
            self._tables[seq.drafter].give_back(seq)
        del self._sequences[seq.id]

    def _put_aside(self, seq: Sequence) -> None:
        if seq.drafter in self._tables:
            self._tables[seq.drafter].put_aside(seq)

    def _stats(
        self, rows: list[PlanRow], events: list[TokenEvent], flight: Flight, seconds: float
    ) -> StepStats:
        return StepStats(
            rows=len(rows),
            prefill_tokens=sum(row.tokens for row in rows if not row.decodes),
            emitted=sum(len(event.token_ids) for event in events),
            drafted=sum(row.draft.drafted for row in rows),
            accepted=sum(event.accepted for event in events),
            draft_seconds=flight.drafted - flight.begin if rows else 0.0,
            verify_seconds=flight.verified - flight.drafted if rows else 0.0,
            step_seconds=seconds,
            running=len(self._scheduler.running),
            waiting=len(self._scheduler.waiting),
            kv_blocks_used=self._blocks.used_blocks,
            kv_blocks_total=self._blocks.num_blocks,
            prefix_queries=self._blocks.queries,
            prefix_hits=self._blocks.hits,
            preemptions=self._scheduler.preemptions,
        )


def _mix(seqs: list[Sequence]) -> frozenset[str]:
    """Who stops the drafts of these rows."""
    return frozenset("none" if seq.drafter == "none" else seq.policy for seq in seqs)


def _tail(row: PlanRow, count: int) -> Tensor:
    """The row's last `count` logits."""
    assert row.logits is not None
    return row.logits[-count:]
