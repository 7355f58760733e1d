"""From raw logits to the law p (and the draft's q): one function for target and draft alike.

Order: repetition, frequency and presence penalties, logit_bias, the masks (min_tokens,
allowed_token_ids, bad_words, grammar), temperature, top_k, top_p, min_p. Penalties and masks depend
on the tokens drafted before the position as well.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.constraints import tokens_allowed
from engine.sequence import Sequence, TokenCounts
from engine.types import SamplingParams

_TINY = 1e-3  # below it, a logit over the temperature could overflow


@dataclass(frozen=True)
class Place:
    """One position to sample at: after `seq.tokens` and then `drafted`."""

    seq: Sequence
    drafted: list[int]


def scaled_logits(
    logits: Tensor,
    places: Seq[Place],
    eos_ids: Seq[int],
    *,
    drafting: bool = False,
    masks: bool = True,
    heat: Seq[float] | None = None,
) -> Tensor:
    """float[M, V] whose softmax is the law at each place; -inf where the law is 0.

    Greedy rows keep their adjusted logits unscaled and unfiltered: only their argmax matters. Where a
    request's masks leave nothing, there is no law: nobody asks for it when verifying, and the masks are
    left out; all is -inf when `drafting`, so that no draft goes on there.
    Without `masks` only min_tokens' is applied: a draft may propose what it likes. `heat`: temperatures,
    above 0, to use in place of the requests' own; filters are still those of the requests that sample.
    `logits` [M, V] is not changed. The result is float32, or float64 for float64 logits.
    """
    out = logits.to(torch.promote_types(logits.dtype, torch.float32))
    adjusted = [i for i, place in enumerate(places) if _adjusts(place)]
    if adjusted:
        out = out.clone() if out is logits else out
        for i in adjusted:
            _adjust(out[i], places[i], eos_ids)
    masked = [i for i, place in enumerate(places) if masks and place.seq.constraint is not None]
    if masked:
        out = out.clone() if out is logits else out
        _mask(out, masked, places, drafting)
    params = [place.seq.params for place in places]
    heat = [p.temperature for p in params] if heat is None else heat
    if not any(heat):
        return out
    temperature = torch.tensor([t or 1.0 for t in heat], dtype=out.dtype, device=out.device)
    if any(0 < t < _TINY for t in heat):  # from the maximum down: what overflows is a law of 0
        out = out - out.amax(-1, keepdim=True)
    out = out / temperature[:, None].clamp(min=torch.finfo(out.dtype).tiny)
    filtered = [i for i, p in enumerate(params) if p.temperature > 0 and (p.top_k or p.top_p < 1 or p.min_p)]
    if filtered:
        out[filtered] = _filter(out[filtered], [params[i] for i in filtered])
    return out


def unadjusted(seq: Sequence) -> bool:
    """Whether the law is softmax(logits / temperature) or the argmax, but for what filters and masks cut."""
    params = seq.params
    adjusted = _penalised(params) or bool(params.logit_bias) or seq.generated < params.min_tokens
    return not adjusted and not 0 < params.temperature < _TINY


def plain(seq: Sequence) -> bool:
    """Whether it is that without filters and masks."""
    params = seq.params
    filtered = params.temperature > 0 and (params.top_k or params.top_p < 1 or params.min_p)
    return unadjusted(seq) and not filtered and seq.constraint is None


def _penalised(params: SamplingParams) -> bool:
    return params.presence_penalty != 0 or params.frequency_penalty != 0 or params.repetition_penalty != 1


def _adjusts(place: Place) -> bool:
    params = place.seq.params
    short = place.seq.generated + len(place.drafted) < params.min_tokens
    return _penalised(params) or bool(params.logit_bias) or short


def _adjust(row: Tensor, place: Place, eos_ids: Seq[int]) -> None:
    """Penalties, logit_bias and the min_tokens mask, in place on float[V]."""
    seq, params = place.seq, place.seq.params
    if _penalised(params):
        if seq.counts is None:
            at = seq.prompt_len
            seq.counts = TokenCounts(seq.tokens[:at], seq.tokens[at:], row.shape[0], row.device)
        output, seen = seq.counts.after(place.drafted)
        counts = output.to(row.dtype)
        if params.repetition_penalty != 1:
            penalised = torch.where(row > 0, row / params.repetition_penalty, row * params.repetition_penalty)
            row.copy_(torch.where(seen, penalised, row))
        row -= params.frequency_penalty * counts + params.presence_penalty * counts.clamp(max=1)
    if params.logit_bias:
        ids = torch.tensor(list(params.logit_bias), dtype=torch.int64, device=row.device)
        row[ids] += torch.tensor(list(params.logit_bias.values()), dtype=row.dtype, device=row.device)
    if seq.generated + len(place.drafted) < params.min_tokens:
        row[[*eos_ids, *params.stop_token_ids]] = float("-inf")


def _mask(out: Tensor, masked: Seq[int], places: Seq[Place], drafting: bool) -> None:
    """Masks of grammars and token lists, in place on float[M, V]."""
    at, words = [], []
    for i in masked:
        constraint = places[i].seq.constraint
        assert constraint is not None
        outlook = constraint.at(places[i].seq, places[i].drafted)
        if outlook.state == "open" or drafting:
            at.append(i)
            words.append(outlook.words if outlook.state == "open" else constraint.nothing)
    if at:
        allowed = tokens_allowed(words, out.shape[1], out.device)
        if len(at) == len(out):
            out.masked_fill_(~allowed, float("-inf"))
        else:
            out[at] = out[at].masked_fill_(~allowed, float("-inf"))


def _filter(logits: Tensor, params: Seq[SamplingParams]) -> Tensor:
    """top_k, top_p and min_p on scaled logits [F, V]; what is cut becomes -inf. Ties at the k-th stay."""
    device, vocab = logits.device, logits.shape[-1]
    if any(p.top_k for p in params):
        ks = torch.tensor([min(p.top_k or vocab, vocab) for p in params], device=device)
        widest = max(min(p.top_k, vocab) for p in params)
        kth = logits.topk(widest, dim=-1).values.gather(1, ks.clamp(max=widest)[:, None] - 1)
        kth = torch.where(ks[:, None] < vocab, kth, float("-inf"))
        logits = logits.masked_fill(logits < kth, float("-inf"))
    if any(p.top_p < 1 for p in params):
        probs, order = logits.softmax(-1).sort(dim=-1, descending=True, stable=True)
        top_p = torch.tensor([p.top_p for p in params], dtype=probs.dtype, device=device)
        before = probs.cumsum(-1) - probs
        cut = (before >= top_p[:, None]) & (top_p < 1)[:, None]
        cut[:, 0] = False
        logits = logits.masked_fill(torch.zeros_like(cut).scatter(1, order, cut), float("-inf"))
    if any(p.min_p for p in params):
        probs = logits.softmax(-1)
        floor = torch.tensor([p.min_p for p in params], dtype=probs.dtype, device=device)[:, None]
        logits = logits.masked_fill(probs < floor * probs.amax(-1, keepdim=True), float("-inf"))
    return logits
