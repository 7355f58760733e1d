"""Options that no state can hold are refused for their request alone."""

from __future__ import annotations

from typing import Any

import pytest
from lossless.toys import different, run, tokens_of, toy_engine

from engine.speculation.policies.svip import Svip
from engine.speculation.policy import State
from engine.types import GenerateRequest, InvalidRequest, SamplingParams, SpeculationParams


def asked(name: str, policy: str, options: dict[str, Any] | None = None) -> GenerateRequest:
    return GenerateRequest(
        id=name,
        prompt_ids=(1, 2, 3),
        params=SamplingParams(temperature=0, max_tokens=8),
        speculation=SpeculationParams(policy=policy, options=options),
    )


@pytest.mark.parametrize(("policy", "options"), [("svip", {"scale": 1e-300}), ("adaedl", {"gamma": 1e-320})])
def test_numbers_that_overflow_are_out_of_bounds(policy: str, options: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest) as raised:
        toy_engine(different(5)).add(asked("a", policy, options))
    assert raised.value.code == "invalid_option"


def test_what_a_policy_cannot_take_in_harms_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = toy_engine(different(5))
    alone = tokens_of(run(toy_engine(different(5)), [asked("good", "static")])["good"])
    engine.add(asked("good", "static"))
    shipped = Svip.reset

    def reset(self: Svip, state: State, slot: int, options: Any) -> None:
        if options.threshold == 7:
            raise RuntimeError("value cannot be converted without overflow")
        shipped(self, state, slot, options)

    monkeypatch.setattr(Svip, "reset", reset)
    with pytest.raises(InvalidRequest, match="cannot be computed with") as raised:
        engine.add(asked("bad", "svip", {"threshold": 7}))
    assert raised.value.param == "speculation.options"
    tokens: list[int] = []
    while engine.has_work():
        for event in engine.step()[0]:
            tokens.extend(event.token_ids)
    assert tuple(tokens) == alone
