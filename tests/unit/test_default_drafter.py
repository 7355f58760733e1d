"""Who drafts for requests that name nobody: checked before any model is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from engine.config import EngineConfig
from engine.core import Engine
from engine.pairing import ConfigError, default_drafter, default_options
from engine.types import GenerateRequest, InvalidRequest, SamplingParams, SpeculationParams
from server import cli


def config(**fields: Any) -> EngineConfig:
    return EngineConfig(**{"target": "t", "draft": "self:2", **fields})


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"drafter": "oak"}, "unknown drafter 'oak'; known: model, ngram, none, "),
        ({"drafter": "dyspec", "draft": "ngram"}, "draft 'ngram' is no model"),
        ({"drafter": "model", "draft": "none"}, "draft 'none' is no model"),
        ({"drafter": "dyspec", "policy_options": {"sl": 3}}, "no option 'sl'"),
        ({"drafter": "dyspec", "policy_options": {"budget": 0}}, "budget"),
        ({"drafter": "ngram", "policy": "static", "policy_options": {"budget": 4}}, "no option 'budget'"),
        ({"drafter": "dyspec", "policy": "magic"}, "unknown policy 'magic'"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        default_options(config(**fields))


def test_who_it_is() -> None:
    some = ("model", "ngram", "dyspec")
    assert default_drafter(config(), some, {}) == "model"
    assert default_drafter(config(), ("ngram",), {}) == "ngram"
    assert default_drafter(config(), (), {}) == "none"
    assert default_drafter(config(drafter="dyspec"), some, {}) == "dyspec"
    assert default_drafter(config(drafter="none"), some, {}) == "none"
    with pytest.raises(ConfigError, match="'c2t' cannot draft here: no head"):
        default_drafter(config(drafter="c2t"), some, {"c2t": "no head"})


@pytest.mark.parametrize("command", [["serve", "--port", "0"], ["generate", "hello"]])
def test_a_command_says_it_in_one_line(command: list[str], tiny_llama: Path) -> None:
    flags = ["--target", str(tiny_llama), "--draft", "self:2", "--drafter"]
    for more, words in (
        (["oak"], "unknown drafter 'oak'"),
        (["dyspec", "--policy-options", '{"budget": 65}'], "options of drafter 'dyspec'"),
    ):
        result = CliRunner().invoke(cli.app, [*command, *flags, *more])
        assert result.exit_code == 1, result.output
        told = [line for line in result.stderr.splitlines() if line.startswith("disco-serve: ")]
        assert len(told) == 1 and words in told[0]


def test_its_options_are_of_requests_that_name_none(tiny_llama: Path) -> None:
    engine = Engine(
        config(
            target=str(tiny_llama), drafter="dyspec", policy="static", policy_options={"budget": 3},
            device="cpu", kv_blocks=64, max_num_seqs=4, threads=1,
        )
    )  # fmt: skip
    asked = {
        "default": SpeculationParams(),
        "own": SpeculationParams(options={"budget": 1}),
        "other": SpeculationParams(drafter="opt_tree"),
        "chain": SpeculationParams(drafter="model"),
    }
    for name, each in asked.items():
        params = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
        engine.add(GenerateRequest(id=name, prompt_ids=(1, 2, 3), params=params, speculation=each))
    most, told = dict.fromkeys(asked, 0), {}
    while engine.has_work():
        for event in engine.step()[0]:
            most[event.id] = max(most[event.id], event.drafted)
            told[event.id] = (event.drafter, event.policy)
    assert most["default"] == 3 and most["own"] == 1 and most["other"] > 3 and most["chain"] == 5
    assert told["default"] == told["own"] == ("dyspec", "none")
    assert (told["other"], told["chain"]) == (("opt_tree", "none"), ("model", "static"))
