"""What the engine refuses, by field, and what it must not refuse."""

import math
from typing import Any, ClassVar

import msgspec
import pytest

from engine.speculation import policy
from engine.types import GenerateRequest, InvalidRequest, ModelInfo, SamplingParams, SpeculationParams
from engine.validate import validate

INFO = ModelInfo(
    target="t", draft=None, vocab_size=100, max_model_len=50, eos_token_ids=(0,), bos_token_id=None,
    dtype="float32", device="cpu", kv_blocks=8, block_size=16, drafters=("ngram", "none"),
    default_drafter="ngram", default_policy="probe", default_options={}, max_sl=8,
)  # fmt: skip


class ProbeOptions(msgspec.Struct, frozen=True):
    level: float = 0.5


class Probe:
    name: ClassVar[str] = "probe"
    Options = ProbeOptions


@pytest.fixture(autouse=True)
def probe(monkeypatch: pytest.MonkeyPatch) -> None:
    policy.policies()  # the real ones register first
    monkeypatch.setitem(policy._REGISTRY, "probe", Probe())


def request(
    prompt: Any = (1, 2, 3), speculation: dict[str, Any] | None = None, **params: Any
) -> GenerateRequest:
    return GenerateRequest(
        id="r",
        prompt_ids=prompt,
        params=SamplingParams(**params),
        speculation=SpeculationParams(**(speculation or {})),
    )


def refusal(asked: GenerateRequest) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        validate(asked, INFO)
    return caught.value


def test_what_is_within_bounds_passes():
    for params in (
        {},
        {"temperature": 0, "top_p": 0, "top_k": 10**6, "min_p": 1, "repetition_penalty": 10},
        {"temperature": 2.0, "top_p": 1, "presence_penalty": -2, "frequency_penalty": 2, "min_p": 0},
        {"repetition_penalty": 1e-3, "logit_bias": {0: -100, 99: 100.0}, "stop_token_ids": (0, 99)},
        {"seed": -(2**63)},
        {"seed": 2**64 - 1},
        {"max_tokens": 0},
        {"max_tokens": 47, "min_tokens": 47},
        {"logprobs": 0, "prompt_logprobs": 20, "sampling_method": "rejection"},
    ):
        validate(request(**params), INFO)
    validate(request(prompt=(0, 99)), INFO)
    for speculation in (
        {"drafter": "none"},
        {"drafter": "ngram", "policy": "probe", "options": {"level": 0.1}, "max_sl": 8},
        {"options": {"level": 1}},  # of the default policy
        {"max_sl": 0},
    ):
        validate(request(speculation=speculation), INFO)


NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("param", "value"),
    [
        *(("temperature", v) for v in (-1, -0.001, 2.001, NAN, INF, "1", True, None)),
        *(("top_p", v) for v in (-0.1, 1.01, NAN, 2)),
        *(("top_k", v) for v in (-1, 1.0, NAN, 2**63)),
        *(("min_p", v) for v in (-0.1, 1.1, NAN)),
        *(("presence_penalty", v) for v in (-2.1, 2.1, NAN, -INF)),
        *(("frequency_penalty", v) for v in (-2.1, 2.1, NAN, -INF)),
        *(("repetition_penalty", v) for v in (0, -1, 10.1, NAN, INF)),
        *(("logit_bias", v) for v in ({100: 1}, {-1: 1}, {5: 101}, {5: -101}, {5: NAN}, {5: INF}, {"5": 1})),
        *(("seed", v) for v in (-(2**63) - 1, 2**64, 1.5, NAN, True)),
        *(("max_tokens", v) for v in (-1, 1.0, NAN, None)),
        *(("min_tokens", v) for v in (-1, 17, NAN)),
        *(("stop_token_ids", v) for v in ((100,), (-1,), (1.0,))),
        *(("logprobs", v) for v in (-1, 21, True)),
        *(("prompt_logprobs", v) for v in (-1, 21)),
        ("sampling_method", "gumbel"),
        ("ignore_eos", 1),
    ],
)
def test_params_out_of_bounds_are_refused_by_name(param: str, value: Any):
    error = refusal(request(**{param: value}))
    assert error.param == param
    assert param in error.message


@pytest.mark.parametrize(
    ("prompt", "code"),
    [
        ((), "empty_prompt"),
        ((1, 100), "token_id_out_of_range"),
        ((-1, 1), "token_id_out_of_range"),
        ((10**400,), "token_id_out_of_range"),
        ((1.0,), None),
        ((True,), None),
        (("a", 1), None),
    ],
)
def test_bad_prompts_are_refused(prompt: Any, code: str | None):
    error = refusal(request(prompt=prompt))
    assert (error.param, error.code) == ("prompt", code)
    assert len(error.message) < 200


def test_a_request_longer_than_the_context_is_refused_with_all_numbers():
    validate(request(prompt=(1,) * 34), INFO)  # 34 + 16 == 50
    error = refusal(request(prompt=(1,) * 35))
    assert (error.param, error.code) == ("max_tokens", "context_length_exceeded")
    assert all(str(number) in error.message for number in (50, 51, 35, 16))
    error = refusal(request(prompt=(1,) * 51, max_tokens=0))
    assert (error.param, error.code) == ("prompt", "context_length_exceeded")


@pytest.mark.parametrize(
    ("speculation", "param", "named"),
    [
        ({"drafter": "model"}, "drafter", "ngram, none"),
        ({"policy": "oracle"}, "policy", "probe"),
        ({"policy": 3}, "policy", "3"),
        ({"policy": "probe", "options": {"levle": 1}}, "options.levle", "level"),
        ({"policy": "probe", "options": {"level": "high"}}, "options.level", "level"),
        ({"policy": "probe", "options": {"level": NAN}}, "options", "finite"),
        ({"policy": "probe", "options": {"level": [{"a": (INF,)}]}}, "options", "finite"),
        ({"options": {"sl": 1}}, "options.sl", "level"),
        ({"options": [1]}, "options", "object"),
        ({"max_sl": 9}, "max_sl", "8"),
        ({"max_sl": -1}, "max_sl", "8"),
        ({"max_sl": NAN}, "max_sl", "integer"),
    ],
)
def test_bad_speculation_is_refused_naming_what_is_valid(speculation: dict[str, Any], param: str, named: str):
    error = refusal(request(speculation=speculation))
    assert error.param == f"speculation.{param}"
    assert named in error.message


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("id", ""),
        ("id", 7),
        ("id", "\ud800"),
        ("cache_salt", "\udfff"),
        ("cache_salt", None),
        ("priority", 2**63),
        ("priority", 0.5),
        ("arrival", NAN),
        ("arrival", "now"),
    ],
)
def test_bad_envelopes_are_refused(field: str, value: Any):
    error = refusal(msgspec.structs.replace(request(), **{field: value}))
    assert error.param == field
