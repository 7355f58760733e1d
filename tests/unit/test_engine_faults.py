"""NaN and bad requests in the engine end their own request, and no other."""

from functools import cache
from typing import Any

import pytest
import torch
from msgspec.structs import replace
from tiny_engine import (
    MIN_BLOCKS,
    SETTINGS,
    VOCAB,
    alone,
    ask,
    make_engine,
    mixed,
    nothing_is_held,
    plain_greedy,
    prompt,
    run,
    static,
)

from engine.core import Engine
from engine.models.reference import ReferenceRunner
from engine.speculation.drafters.base import Drafted, RowDraft
from engine.types import InvalidRequest, SpeculationParams


def test_nan_logits_end_that_request_alone(monkeypatch: pytest.MonkeyPatch):
    engine = make_engine("near")
    right = engine._parts.target.forward
    passes = 0

    def broken(batch: Any) -> torch.Tensor:
        nonlocal passes
        logits = right(batch)
        seq = engine._sequences.get("bad")
        if seq is None or seq.table is None:
            return logits
        row = next(i for i, table in enumerate(batch.block_tables) if table is seq.table.blocks)
        passes += 1
        if passes >= 4:
            start = sum(batch.query_lens[:row])
            logits_at = torch.tensor(batch.logits_at)
            mine = (logits_at >= start) & (logits_at < start + batch.query_lens[row])
            logits[mine] = float("nan")
        return logits

    monkeypatch.setattr(engine._parts.target, "forward", broken)
    bad = ask("bad", prompt(13, 7), static(2), max_tokens=30)
    results = run(engine, [*mixed(speculate=True)[:5], bad, *mixed(speculate=True)[5:]])
    fault = results.pop("bad")
    assert fault.finish == "error" and fault.events[-1].error is not None and "NaN" in fault.events[-1].error
    assert fault.events[-1].token_ids == ()
    assert {name: result.tokens for name, result in results.items()} == alone()


@cache
def poison() -> int:
    """A token that no mixed request has or is given."""
    used = {token for r in mixed(speculate=False) for token in (*r.prompt_ids, *alone()[r.id])}
    return next(token for token in range(VOCAB) if token not in used)


def with_poison(engine: Engine) -> Engine:
    """The target's embedding of that token becomes NaN, after the runner's own check."""
    runner = engine._parts.target
    assert isinstance(runner, ReferenceRunner)
    runner.model.get_input_embeddings().weight[poison()] = float("nan")
    return engine


@pytest.mark.parametrize("settings", ["as they come", "small chunks", "no prefix cache"])
def test_nan_in_the_kv_harms_no_later_owner_of_the_block(settings: str):
    """A token whose embedding is NaN: all KV behind it is NaN, and its blocks go to others."""
    engine = with_poison(make_engine(blocks=MIN_BLOCKS, **SETTINGS[settings]))
    bad = [ask(f"bad{i}", [*prompt(12, i), poison(), *prompt(12, i)], max_tokens=5) for i in range(6)]
    for _ in range(2):
        results = run(engine, [*bad[:3], *mixed(speculate=False)[:5], *bad[3:], *mixed(speculate=False)[5:]])
        for request in bad:
            result = results.pop(request.id)
            assert (result.finish, result.tokens) == ("error", [])
        assert {name: result.tokens for name, result in results.items()} == alone()
    last = run(engine, [ask("bad", bad[0].prompt_ids)])["bad"]
    assert last.finish == "error"
    tables = engine._blocks.match(bad[0].prompt_ids, "", 25)
    assert tables.committed <= 12  # no block that holds NaN is cached
    engine._blocks.release(tables)


def test_a_nan_prefill_caches_nothing():
    engine = with_poison(make_engine())
    start = [*prompt(20), poison()]
    assert run(engine, [ask("bad", start)])["bad"].finish == "error"
    assert engine._blocks.match(start, "", 21).committed == 0


@pytest.mark.parametrize("drafter", ["model", "dyspec"])
def test_nan_behind_a_draft_token_that_falls_harms_nobody(drafter: str, monkeypatch: pytest.MonkeyPatch):
    """Masked attention carries it to the positions before, and its KV stays in the row's blocks."""
    engine = with_poison(make_engine("near"))
    drafts = 0

    def begin(rows: Any, limits: Any, table: Any) -> Any:
        nonlocal drafts
        drafts += len(rows)
        wide = {"parents": [-1, -1], "read": [-1, -1]} if drafter == "dyspec" else {}
        return lambda: Drafted([RowDraft([poison(), 5][:most], **wide) for most in limits])

    monkeypatch.setattr(engine._parts.drafters[drafter], "begin", begin)
    asked = [replace(r, speculation=SpeculationParams(drafter=drafter)) for r in mixed(speculate=False)]
    results = run(engine, asked)
    assert {name: result.tokens for name, result in results.items()} == alone()
    assert all(result.finish == "length" for result in results.values()) and drafts > len(asked)


@pytest.mark.parametrize("temperature", [1e-6, 1e-20, 1e-40])
def test_a_tiny_temperature_is_served_or_refused(temperature: float):
    engine = make_engine()
    try:
        engine.add(ask("r", prompt(5), temperature=temperature, seed=1))
    except InvalidRequest as error:
        assert error.param == "temperature"
        return
    engine.abort("r")
    result = run(engine, [ask("r", prompt(5), temperature=temperature, seed=1)])["r"]
    assert (result.finish, result.tokens) == ("length", plain_greedy(prompt(5), 20))


def test_an_open_id_cannot_be_used_twice():
    engine = make_engine()
    engine.add(ask("r", prompt(5)))
    with pytest.raises(InvalidRequest, match="already open"):
        engine.add(ask("r", prompt(6)))
    engine.abort("r")
    engine.abort("r")
    engine.add(ask("r", prompt(6)))
    engine.abort("r")
    assert not engine.has_work()
    nothing_is_held(engine)
