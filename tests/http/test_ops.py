"""Models, policies, version, metrics, settings, CORS."""

from __future__ import annotations

from collections.abc import Callable

import httpx
import pytest
from fake_engine import FakeEngine
from fastapi import FastAPI
from http_support import running
from prometheus_client.parser import text_string_to_metric_families
from pydantic import ValidationError
from test_bad_input import GOOD

from engine.speculation.policy import policies
from server.settings import Settings


async def samples(client: httpx.AsyncClient) -> dict[tuple[str, ...], float]:
    """Values by (name, label values in the order of their names)."""
    text = (await client.get("/metrics")).text
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


async def test_models(make_app: Callable[..., FastAPI]) -> None:
    async with running(make_app(served_model_name=["tiny", "org/tiny"])) as client:
        page = (await client.get("/v1/models")).json()
        assert [model["id"] for model in page["data"]] == ["tiny", "org/tiny"]
        one = (await client.get("/v1/models/org/tiny")).json()
        assert one == page["data"][1]
        assert one["object"] == "model" and one["max_model_len"] == 96
        response = await client.post("/v1/completions", json=GOOD | {"model": "org/tiny"})
        assert response.json()["model"] == "org/tiny"


async def test_policies(client: httpx.AsyncClient) -> None:
    page = (await client.get("/v1/policies")).json()
    assert page["drafters"] == ["ngram", "none"]
    assert {policy["name"] for policy in page["policies"]} == set(policies())
    assert page["default"] == {"drafter": "ngram", "policy": "heuristic", "options": {}}


async def test_version(client: httpx.AsyncClient) -> None:
    assert (await client.get("/version")).json().keys() == {"version"}


async def test_metrics_count(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    await client.post("/v1/completions", json=GOOD | {"max_tokens": 60, "n": 2})
    await client.get("/v1/secret-path")
    values = await samples(client)
    tokens = len(engine.answer)
    iterations = -(-(tokens - 1) // engine.block)
    by = ("ngram", "static")

    def phase(name: str) -> tuple[str, ...]:
        return "ngram", name, "static"

    assert values["disco_requests_total", "stop"] == 2
    assert values["disco_generated_tokens_total",] == 2 * tokens
    assert values["disco_prompt_tokens_total",] == 2 * len(engine.requests[0].prompt_ids)
    assert values["disco_time_to_first_token_seconds_count",] == 2
    assert values["disco_inter_token_latency_seconds_count",] == 2 * (tokens - 1)
    assert values["disco_request_seconds_count",] == 2
    assert values["disco_iterations_total", *by] == 2 * iterations
    assert values["disco_draft_tokens_total", *by] == 2 * iterations * engine.block
    assert values["disco_accepted_tokens_total", *by] == 2 * (tokens - 1 - iterations)
    assert values["disco_emitted_tokens_total", *by] == 2 * (tokens - 1)
    assert values["disco_lookahead_sum", *by] == 2 * iterations * engine.block
    assert values["disco_iteration_seconds_total", *phase("draft")] == 0.25 * 2 * iterations
    assert values["disco_iteration_seconds_total", *phase("verify")] == 0.5 * 2 * iterations
    assert values["disco_stop_reason_total", *by, "policy"] == 2 * iterations
    assert (values["disco_requests_running",], values["disco_requests_waiting",]) == (1, 2)
    assert values["disco_kv_usage_ratio",] == 0.25
    assert values["disco_preemptions_total",] == 3  # told as a sum since start: not added up again
    assert values["disco_http_requests_total", "/v1/completions", "200"] == 1
    assert values["disco_http_requests_total", "unmatched", "404"] == 1
    assert not any("secret" in str(key) for key in values)


async def test_metric_names(client: httpx.AsyncClient) -> None:
    text = (await client.get("/metrics")).text
    names = [family.name for family in text_string_to_metric_families(text)]
    assert names and all(name.startswith("disco_") and ":" not in name for name in names)


async def test_two_apps_do_not_share_metrics(make_app: Callable[..., FastAPI]) -> None:
    async with running(make_app()) as one, running(make_app()) as two:
        await one.post("/v1/completions", json=GOOD)
        assert (await samples(one))["disco_requests_total", "stop"] == 1
        assert (await samples(two))["disco_requests_total", "stop"] == 0


async def test_cors_only_if_asked(make_app: Callable[..., FastAPI]) -> None:
    headers = {"origin": "http://page", "access-control-request-method": "POST"}
    async with running(make_app()) as client:
        response = await client.options("/v1/completions", headers=headers)
        assert "access-control-allow-origin" not in response.headers
    async with running(make_app(cors_origin=["http://page"])) as client:
        response = await client.options("/v1/completions", headers=headers)
        assert response.headers["access-control-allow-origin"] == "http://page"


def test_settings_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISCO_TARGET", "org/model")
    monkeypatch.setenv("DISCO_API_KEY", "key-1, key-2")
    monkeypatch.setenv("DISCO_POLICY", "static")
    monkeypatch.setenv("DISCO_POLICY_OPTIONS", '{"sl": 3}')
    settings = Settings()
    assert settings.served_model_name == ["org/model"]
    assert [key.get_secret_value() for key in settings.api_key] == ["key-1", "key-2"]
    assert "key-1" not in repr(settings)
    config = settings.engine_config()
    assert (config.target, config.draft, config.policy) == ("org/model", "ngram", "static")
    assert config.policy_options == {"sl": 3}
    assert Settings(target="other").served_model_name == ["other"]
    assert Settings(served_model_name=["a", "b"]).served_model_name == ["a", "b"]


@pytest.mark.parametrize(
    "wrong",
    [{"port": 70000}, {"max_num_seqs": 0}, {"dtype": "int8"}, {"nonsense": 1}, {"tool_format": "nope"}],
)
def test_settings_refuse(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        Settings.model_validate(wrong)


@pytest.mark.parametrize("kind", ["text/plain", "application/openmetrics-text"])
@pytest.mark.parametrize("version", ["x", "1.x", "2.x", "", "=", "0.0.4", "1.0.0", "99"])
async def test_metrics_of_any_version(client: httpx.AsyncClient, kind: str, version: str) -> None:
    response = await client.get("/metrics", headers={"accept": f"{kind}; version={version}"})
    assert response.status_code == 200 and "disco_engine_up 1.0" in response.text
