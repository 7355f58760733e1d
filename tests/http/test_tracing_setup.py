"""Whether requests are traced, by flag and variables; what is asked for and cannot be had."""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest
from pydantic import ValidationError
from typer.testing import CliRunner

from server import cli, tracing
from server.settings import Settings


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)


def test_off_unless_configured() -> None:
    assert tracing.connect(Settings(target="tiny"), str) is None


@pytest.mark.parametrize(
    ("flag", "variables", "expected"),
    [
        ("http://c:1", {}, "http://c:1/v1/traces"),
        ("http://c:1/", {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://d:2"}, "http://c:1/v1/traces"),
        (None, {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://d:2/base/"}, "http://d:2/base/v1/traces"),
        (None, {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "https://d:2/own"}, "https://d:2/own"),
        (None, {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://d:2", "OTEL_TRACES_EXPORTER": "none"}, None),
        ("http://c:1", {"OTEL_SDK_DISABLED": "true"}, None),
        (None, {"OTEL_EXPORTER_OTLP_ENDPOINT": ""}, None),
    ],
)
def test_where_spans_go(
    monkeypatch: pytest.MonkeyPatch, flag: str | None, variables: dict[str, str], expected: str | None
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert tracing.endpoint(Settings(target="tiny", otlp_endpoint=flag)) == expected


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "d:2"}, "http or https URL"),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://[d"}, "http or https URL"),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://d:2", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, "'grpc'"),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://d:2", "OTEL_TRACES_EXPORTER": "zipkin"}, "'zipkin'"),
    ],
)
def test_what_is_not_spoken_is_refused(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], words: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(tracing.CannotTrace, match=words):
        tracing.endpoint(Settings(target="tiny"))


def test_a_variable_that_cannot_be_used_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "-1")
    with pytest.raises(tracing.CannotTrace, match=r"OTEL_.*max_queue_size"):
        tracing.connect(Settings(target="tiny", otlp_endpoint="http://c:1"), str)


@pytest.mark.parametrize("missing", ["opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http"])
def test_asked_for_and_not_installed_is_told(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    monkeypatch.setattr(tracing, "find_spec", lambda name: None if name == missing else find_spec(name))
    with pytest.raises(tracing.CannotTrace, match=r"pip install -e .\.\[tracing\]"):
        tracing.endpoint(Settings(target="tiny", otlp_endpoint="http://c:1"))


@pytest.mark.parametrize("wrong", ["c:4317", "ftp://c", "http://", "http://c:x"])
def test_a_collector_must_be_a_url(wrong: str) -> None:
    with pytest.raises(ValidationError, match="otlp_endpoint"):
        Settings(target="tiny", otlp_endpoint=wrong)


def test_serve_says_in_one_line_why_it_cannot_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "find_spec", lambda name: None)
    result = CliRunner().invoke(cli.app, ["serve", "--port", "0", "--otlp-endpoint", "http://c:1"])
    assert result.exit_code == 1
    (line,) = result.stderr.strip().splitlines()
    assert "pip install -e '.[tracing]'" in line and "http://c:1" in line
