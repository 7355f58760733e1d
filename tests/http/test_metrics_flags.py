"""What is served of the metrics, where and under which names; and that docs/operations.md has them all."""

from __future__ import annotations

import asyncio
import re
import shutil
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI
from http_support import running
from prometheus_client.parser import text_string_to_metric_families
from pydantic import ValidationError
from test_bad_input import GOOD

from server.metrics_port import also_on
from server.settings import Settings

MakeApp = Callable[..., FastAPI]
DOCUMENTED = Path(__file__).parents[2] / "docs" / "operations.md"


async def told(client: httpx.AsyncClient) -> str:
    await client.post("/v1/completions", json=GOOD | {"max_tokens": 9, "n": 2})
    await client.post("/v1/completions", json=GOOD | {"max_tokens": 9, "stop": ["the"]})
    return (await client.get("/metrics")).text


def values(text: str) -> dict[tuple[str, ...], float]:
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


async def test_every_metric_is_documented(make_app: MakeApp) -> None:
    text = DOCUMENTED.read_text()
    named = set(re.findall(r"`(disco_\w+|vllm:\w+)", text))
    async with running(make_app(metrics_compat="vllm")) as client:
        families = list(text_string_to_metric_families(await told(client)))
    exposed = {f"{each.name}_total" if each.type == "counter" else each.name for each in families}
    assert exposed <= named, exposed - named
    stale = {name for name in named - exposed if not re.search(r"_(bucket|sum|count)$", name)}
    assert not stale


async def test_labels_of_every_sample(make_app: MakeApp) -> None:
    async with running(make_app(metrics_label=["replica=a", "zone=b=c"])) as client:
        families = list(text_string_to_metric_families(await told(client)))
    samples = [sample for family in families for sample in family.samples]
    assert samples and all(
        (sample.labels["replica"], sample.labels["zone"]) == ("a", "b=c") for sample in samples
    )
    assert not [sample.name for sample in samples if sample.name.endswith("_created")]


@pytest.mark.parametrize(
    "wrong",
    ["replica", "replica=", "=a", "1a=b", "__a=b", "a-b=c", "policy=x", "le=1", "model_name=x", "a=\udcff"],
)
def test_labels_that_cannot_be(wrong: str) -> None:
    with pytest.raises(ValidationError, match="metrics_label"):
        Settings(metrics_label=[wrong])
    with pytest.raises(ValidationError, match="twice"):
        Settings(metrics_label=["a=b", "a=c"])


def test_labels_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISCO_METRICS_LABEL", "replica=a, zone=b")
    assert Settings().metrics_label == ["replica=a", "zone=b"]


async def test_vllms_names_are_a_view_of_ours(make_app: MakeApp) -> None:
    async with running(make_app(metrics_compat="vllm", served_model_name=["tiny", "other"])) as client:
        found = values(await told(client))
    for theirs, ours in (
        ("prompt_tokens_total", "prompt_tokens_total"),
        ("generation_tokens_total", "generated_tokens_total"),
        ("num_requests_running", "requests_running"),
        ("num_requests_waiting", "requests_waiting"),
        ("kv_cache_usage_perc", "kv_usage_ratio"),
        ("time_to_first_token_seconds_sum", "time_to_first_token_seconds_sum"),
        ("time_to_first_token_seconds_count", "time_to_first_token_seconds_count"),
        ("inter_token_latency_seconds_sum", "inter_token_latency_seconds_sum"),
        ("e2e_request_latency_seconds_count", "request_seconds_count"),
        ("request_queue_time_seconds_count", "request_queue_seconds_count"),
    ):
        assert found[f"vllm:{theirs}", "tiny"] == found[f"disco_{ours}",], theirs
    by = ("ngram", "static")
    assert found["vllm:spec_decode_num_drafts_total", "tiny"] == found["disco_iterations_total", *by] > 0
    assert found["vllm:spec_decode_num_draft_tokens_total", "tiny"] == found["disco_draft_tokens_total", *by]
    accepted = found["disco_accepted_tokens_total", *by]
    assert found["vllm:spec_decode_num_accepted_tokens_total", "tiny"] == accepted > 0
    per_position = {
        key[2]: value for key, value in found.items() if key[0].endswith("accepted_tokens_per_pos_total")
    }
    assert sum(per_position.values()) == accepted and min(per_position) == "0"
    # labels in the order of their names: finished_reason, model_name
    assert (
        found["vllm:request_success_total", "length", "tiny"] == found["disco_requests_total", "length"] == 2
    )
    buckets = [key[0] for key in found if key[0] == "vllm:time_to_first_token_seconds_bucket"]
    assert len(buckets) == sum(key[0] == "disco_time_to_first_token_seconds_bucket" for key in found)


async def test_a_port_of_its_own(make_app: MakeApp) -> None:
    app = make_app(metrics_label=["replica=a"], read_seconds=1)
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    async with running(app) as own, also_on(listener, app.state.context), httpx.AsyncClient() as client:
        await told(own)
        answer = await client.get(f"{url}/metrics")
        assert answer.status_code == 200 and 'disco_engine_up{replica="a"} 1.0' in answer.text
        assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
        open_metrics = {"accept": "application/openmetrics-text; version=1.0.0"}
        assert (await client.get(f"{url}/metrics", headers=open_metrics)).text.endswith("# EOF\n")
        assert (await client.get(f"{url}/v1/models")).status_code == 404
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /metrics HTTP/1.1\r\nHost: a\r\n")  # and no more: it is not waited for forever
        assert (await asyncio.wait_for(reader.read(), 10)).startswith(b"HTTP/1.1 408")
        writer.close()
    listener.close()
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", port), 1)


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
async def test_promtool_finds_nothing(make_app: MakeApp) -> None:
    async with running(make_app()) as client:
        text = await told(client)
    done = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, text=True)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


async def test_vllms_names_keep_their_colons_whatever_is_asked_for(make_app: MakeApp) -> None:
    """OpenMetrics would write them as underscores, and Prometheus asks for it."""
    asked = {"accept": "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5"}
    async with running(make_app(metrics_compat="vllm")) as client:
        answer = await client.get("/metrics", headers=asked)
    assert answer.headers["content-type"].startswith("text/plain")
    assert "\nvllm:num_requests_running{" in answer.text and "vllm_" not in answer.text


async def test_failures_are_told_before_the_first_one(make_app: MakeApp) -> None:
    async with running(make_app(max_num_seqs=7)) as client:
        found = values((await client.get("/metrics")).text)
    for route in ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/ready", "unmatched"):
        assert all(found["disco_http_requests_total", route, status] == 0 for status in ("500", "503"))
    assert found["disco_requests_limit",] == 7


def test_the_apis_port_is_not_the_metrics_port() -> None:
    with pytest.raises(ValidationError, match="metrics-port"):
        Settings(port=8000, metrics_port=8000)
    assert Settings(port=0, metrics_port=0).metrics_port == 0


@pytest.mark.parametrize("given", ["", ",", " , ", '[""]'])
def test_an_empty_key_does_not_open_the_server(monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    monkeypatch.setenv("DISCO_API_KEY", given)
    with pytest.raises(ValidationError, match="empty"):
        Settings()
