"""The engine: tokens in, tokens out. `Engine.step` is the whole way of one iteration."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from engine import logprobs
from engine.config import EngineConfig
from engine.models.runner import Batch, Chunk
from engine.parts import Parts, build
from engine.scheduler import PlanRow, Scheduler
from engine.sequence import Sequence
from engine.speculation.control import PolicyTable
from engine.speculation.drafters.base import RowDraft
from engine.speculation.policy import Outcome, options_of
from engine.speculation.verifier import Verdict
from engine.types import FinishReason, GenerateRequest, InvalidRequest, StepStats, TokenEvent
from engine.validate import validate


@dataclass
class _Times:
    """Wall seconds of one step's halves."""

    draft: float = 0.0
    verify: float = 0.0


class Engine:
    """One target, at most one draft model, one KV pool. Not thread-safe: one thread owns it."""

    def __init__(self, config: EngineConfig, parts: Parts | None = None) -> None:
        """Loads what `config` names, unless `parts` are given."""
        self._parts = parts if parts is not None else build(config)
        self.info = self._parts.info
        self._config = config
        self._blocks = self._parts.blocks
        self._table = PolicyTable(config.max_num_seqs, self._parts.target.device)
        self._scheduler = Scheduler(
            self._blocks, config.max_num_seqs, self._parts.token_budget, on_preempt=self._table.put_aside
        )
        self._sequences: dict[str, Sequence] = {}
        self._arrivals = 0

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
        seq = Sequence(
            request=request,
            seed=secrets.randbits(64) if params.seed is None else params.seed,
            coupled=params.temperature == 0
            or params.sampling_method == "coupled"
            or (params.sampling_method == "auto" and params.seed is not None),
            drafter=drafter,
            policy=policy,
            options=options_of(policy, default if asked.options is None else asked.options),
            max_sl=self.info.max_sl if asked.max_sl is None else asked.max_sl,
            order=self._arrivals,
        )
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

    # ---- one iteration

    @torch.inference_mode()
    def step(self) -> tuple[list[TokenEvent], StepStats]:
        """Draft, verify, commit. Events of every row that got tokens or ended."""
        begin = time.perf_counter()
        rows = self._scheduler.plan(self._limits)
        drafts = self._draft(rows)
        drafted = time.perf_counter()
        logits, spans = self._run_target(rows, drafts)
        verdict = self._verify(rows, drafts, logits, spans)
        times = _Times(drafted - begin, time.perf_counter() - drafted)
        events = self._commit(rows, drafts, verdict, logits, spans, times)
        return events, self._stats(rows, drafts, events, times, time.perf_counter() - begin)

    def _limits(self, decoding: list[Sequence]) -> list[tuple[int, str | None]]:
        """What each decoding row may draft: the policy's wish, within caps and the room that is left."""
        speculating = [seq for seq in decoding if seq.drafter != "none"]
        wishes: dict[str, int] = {}
        if speculating:
            for seq in speculating:
                if seq.slot < 0:
                    self._table.take(seq)
            wishes = dict(zip([s.id for s in speculating], self._table.limits(speculating), strict=True))
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

    def _draft(self, rows: list[PlanRow]) -> list[RowDraft]:
        """A chain for every row that may draft. Rows without room may owe it to the drafter's own KV."""
        drafts = [RowDraft(stop_reason=row.sl_reason) for row in rows]
        for name, drafter in self._parts.drafters.items():
            mine = [i for i, row in enumerate(rows) if row.decodes and row.seq.drafter == name]
            drafter.catch_up(
                [rows[i].seq for i in mine if rows[i].sl_reason == "room"], self._parts.token_budget
            )
            chosen = [i for i in mine if rows[i].sl > 0]
            if chosen:
                made = drafter.draft([rows[i].seq for i in chosen], [rows[i].sl for i in chosen], self._table)
                for i, draft in zip(chosen, made, strict=True):
                    draft.stop_reason = draft.stop_reason or rows[i].sl_reason
                    drafts[i] = draft
        return drafts

    def _run_target(
        self, rows: list[PlanRow], drafts: list[RowDraft]
    ) -> tuple[Tensor, list[tuple[int, int]]]:
        """One pass over pending and draft tokens. Logits [M, vocab] and each row's span in them."""
        chunks, spans, at = [], [], 0
        for row, draft in zip(rows, drafts, strict=True):
            seq = row.seq
            tokens = seq.tokens[seq.kv_len : seq.kv_len + row.tokens] + draft.tokens
            wanted = len(draft.tokens) + 1  # a chunk's last logits are looked at for NaN only
            if seq.params.prompt_logprobs is not None and seq.kv_len < seq.prompt_len:
                wanted = len(tokens)
            chunks.append(Chunk(tokens, seq.kv_len, seq.blocks, wanted))
            spans.append((at, at + wanted))
            at += wanted
        logits = self._parts.target.forward(
            Batch.pack(chunks, self._blocks.block_size, self._parts.target.device)
        )
        return logits[:, : self.info.vocab_size], spans

    def _verify(
        self, rows: list[PlanRow], drafts: list[RowDraft], logits: Tensor, spans: list[tuple[int, int]]
    ) -> Verdict:
        """Verdicts of all rows; a prefill chunk that does not sample is only checked for NaN."""
        at = [
            j
            for (_, end), draft in zip(spans, drafts, strict=True)
            for j in range(end - len(draft.tokens) - 1, end)
        ]
        chosen = logits[at] if len(at) < logits.shape[0] else logits
        sampling = [i for i, row in enumerate(rows) if row.samples]
        verdict = Verdict([0] * len(rows), [0] * len(rows), [False] * len(rows))
        if len(sampling) < len(rows):
            nan: list[bool] = chosen.amax(-1).isnan().tolist()
            starts = _starts(drafts)
            verdict.failed = [nan[start] for start in starts]
            keep = [j for i in sampling for j in range(starts[i], starts[i] + len(drafts[i].tokens) + 1)]
            chosen = chosen[keep]
        if sampling:
            some = self._parts.verifier.verify(
                [rows[i].seq for i in sampling], [drafts[i] for i in sampling], chosen
            )
            for j, i in enumerate(sampling):
                verdict.accepted[i], verdict.next_token[i] = some.accepted[j], some.next_token[j]
                verdict.failed[i] = some.failed[j]
        self._observe(
            [rows[i].seq for i in sampling],
            [drafts[i] for i in sampling],
            [verdict.accepted[i] for i in sampling],
        )
        return verdict

    def _observe(self, seqs: list[Sequence], drafts: list[RowDraft], accepted: list[int]) -> None:
        chosen = [i for i, seq in enumerate(seqs) if seq.slot >= 0 and drafts[i].tokens]
        if chosen:
            device = self._parts.target.device
            outcome = Outcome(
                drafted=torch.tensor([len(drafts[i].tokens) for i in chosen], device=device),
                accepted=torch.tensor([accepted[i] for i in chosen], device=device),
            )
            self._table.observe([seqs[i] for i in chosen], outcome)

    # ---- what came of it

    def _commit(
        self,
        rows: list[PlanRow],
        drafts: list[RowDraft],
        verdict: Verdict,
        logits: Tensor,
        spans: list[tuple[int, int]],
        times: _Times,
    ) -> list[TokenEvent]:
        events = []
        for i, row in enumerate(rows):
            if verdict.failed[i]:
                self._end(row.seq)
                events.append(
                    TokenEvent(
                        id=row.seq.id,
                        finish_reason="error",
                        policy=row.seq.policy,
                        error="the model gave NaN or infinite logits for this request",
                    )
                )
                continue
            own = logits[spans[i][0] : spans[i][1]]
            event = self._commit_row(row, drafts[i], verdict.accepted[i], verdict.next_token[i], own, times)
            if event is not None:
                events.append(event)
        return events

    def _commit_row(
        self, row: PlanRow, draft: RowDraft, accepted: int, next_token: int, logits: Tensor, times: _Times
    ) -> TokenEvent | None:
        """Moves the row on: KV lengths, tokens, and the event if it sampled."""
        seq, params = row.seq, row.seq.params
        assert seq.table is not None
        self._score_prompt(row, logits)
        seq.kv_len += row.tokens + accepted
        seq.draft_kv_len = min(seq.draft_kv_len, seq.kv_len)
        new: list[int] = []
        finish: FinishReason | None = None
        stop_token: int | None = None
        if row.samples:
            new, finish, stop_token = self._cut(seq, [*draft.tokens[:accepted], next_token])
            seq.tokens.extend(new)
            if seq.counts is not None:
                seq.counts.add(new)
        done = min(seq.kv_len, len(seq.tokens))
        self._blocks.commit(seq.table, seq.tokens, done)
        self._blocks.commit_draft(seq.table, min(seq.draft_kv_len, done))
        if not row.samples:
            return None
        emitted_drafts = min(accepted, len(new))
        top = params.logprobs
        scored = logits[len(logits) - len(draft.tokens) - 1 :][: len(new)]
        event = TokenEvent(
            id=seq.id,
            token_ids=tuple(new),
            logprobs=None if top is None else tuple(logprobs.gather(scored, new, top)),
            prompt_logprobs=None
            if seq.started or params.prompt_logprobs is None
            else tuple(seq.prompt_logprobs),
            finish_reason=finish,
            stop_token_id=stop_token,
            policy=seq.policy if seq.drafter != "none" else "none",
            drafter=seq.drafter,
            iterations=int(row.decodes),
            drafted=len(draft.tokens),
            accepted=emitted_drafts,
            stop_reason=draft.stop_reason,
            draft_seconds=times.draft if draft.tokens else 0.0,
            verify_seconds=times.verify,
            cached_tokens=0 if seq.started else seq.cached_tokens,
        )
        seq.started = True
        if finish is not None:
            self._end(seq)
        return event

    def _cut(self, seq: Sequence, tokens: list[int]) -> tuple[list[int], FinishReason | None, int | None]:
        """What of the verified tokens is the sequence's: up to EOS, a stop id or max_tokens."""
        params = seq.params
        room = params.max_tokens - seq.generated
        ends = set(params.stop_token_ids) | (set() if params.ignore_eos else set(self.info.eos_token_ids))
        for k, token in enumerate(tokens[:room]):
            if token in ends:
                return tokens[: k + 1], "stop", token
        return tokens[:room], "length" if len(tokens) >= room else None, None

    def _score_prompt(self, row: PlanRow, logits: Tensor) -> None:
        """Log-probabilities of the prompt tokens that this chunk's logits predict."""
        seq, top = row.seq, row.seq.params.prompt_logprobs
        if top is None or seq.kv_len >= seq.prompt_len:
            return
        if not seq.prompt_logprobs:
            seq.prompt_logprobs.append(None)  # nothing predicts the first token
        first = len(seq.prompt_logprobs)  # the next prompt token to score; the logits at first - 1 predict it
        last = min(seq.kv_len + row.tokens, seq.prompt_len - 1)
        scored = logits[first - 1 - seq.kv_len : max(last - seq.kv_len, 0)]
        seq.prompt_logprobs.extend(logprobs.gather(scored, seq.tokens[first : last + 1], top))

    def _end(self, seq: Sequence) -> None:
        self._scheduler.remove(seq)
        self._table.give_back(seq)
        del self._sequences[seq.id]

    def _stats(
        self,
        rows: list[PlanRow],
        drafts: list[RowDraft],
        events: list[TokenEvent],
        times: _Times,
        seconds: float,
    ) -> StepStats:
        return StepStats(
            rows=len(rows),
            prefill_tokens=sum(row.tokens for row in rows if row.tokens > 1),
            emitted=sum(len(event.token_ids) for event in events),
            drafted=sum(len(draft.tokens) for draft in drafts),
            accepted=sum(event.accepted for event in events),
            draft_seconds=times.draft,
            verify_seconds=times.verify,
            step_seconds=seconds,
            running=len(self._scheduler.running),
            waiting=len(self._scheduler.waiting),
            kv_blocks_used=self._blocks.used_blocks,
            kv_blocks_total=self._blocks.num_blocks,
            prefix_queries=self._blocks.queries,
            prefix_hits=self._blocks.hits,
            preemptions=self._scheduler.preemptions,
        )


def _starts(drafts: list[RowDraft]) -> list[int]:
    starts, at = [], 0
    for draft in drafts:
        starts.append(at)
        at += len(draft.tokens) + 1
    return starts
