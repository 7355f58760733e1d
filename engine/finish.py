"""What of a verified row is the request's: where its output ends, and its log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence as Seq

from torch import Tensor

from engine import logprobs
from engine.scheduler import PlanRow
from engine.types import FinishReason, TokenLogprob


def cut(row: PlanRow, eos_ids: Seq[int]) -> tuple[list[int], FinishReason | None, int | None]:
    """The row's new tokens, up to EOS, a stop id, max_tokens or the grammar's end; why it ends, and the
    id that ended it. "error": its masks leave no token to go on with.
    """
    if not row.samples:
        return [], None, None
    params, constraint = row.seq.params, row.seq.constraint
    tokens = [*(row.draft.tokens[k] for k in row.path), row.next_token]
    room = params.max_tokens - row.seq.generated
    ends = {*params.stop_token_ids} if params.ignore_eos else {*params.stop_token_ids, *eos_ids}
    for k in range(min(len(tokens), room) + 1):
        if constraint is not None:
            state = constraint.at(row.seq, tokens[:k]).state
            if state == "over":
                return tokens[:k], "stop", None
            if state != "open" and k < room:
                return tokens[:k], "error", None
        if k < min(len(tokens), room) and tokens[k] in ends:
            return tokens[: k + 1], "stop", tokens[k]
    return tokens[:room], "length" if len(tokens) >= room else None, None


def score_output(row: PlanRow, logits: Tensor, new: list[int]) -> tuple[TokenLogprob, ...] | None:
    """Log-probabilities of the row's new tokens, if the request asks for them."""
    top = row.seq.params.logprobs
    if top is None:
        return None
    verified = logits[len(logits) - len(row.draft.tokens) - 1 :]
    places = [0, *(k + 1 for k in row.path)][: len(new)]
    return tuple(logprobs.gather(verified[places], new, top))


def score_prompt(row: PlanRow, logits: Tensor) -> None:
    """Log-probabilities of the prompt tokens that this pass predicts, if the request asks for them.

    Called before the row moves on. After a preemption the tokens scored before are not scored again.
    """
    seq, top = row.seq, row.seq.params.prompt_logprobs
    if top is None or seq.kv_len >= seq.prompt_len:
        return
    if not seq.prompt_logprobs:
        seq.prompt_logprobs.append(None)  # nothing predicts the first token
    first = len(seq.prompt_logprobs)  # the next prompt token to score; the logits at first - 1 predict it
    last = min(seq.kv_len + row.tokens, seq.prompt_len - 1)
    if first <= last:
        scored = logits[first - 1 - seq.kv_len : last - seq.kv_len]
        seq.prompt_logprobs.extend(logprobs.gather(scored, seq.tokens[first : last + 1], top))
