"""`disco-serve bench` as a command: what it sends to whom, what it prints and keeps, how it ends."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_openai import FakeOpenAI, serving
from typer.testing import CliRunner, Result

from server import cli
from server.bench import plot

SMALL = ("--concurrency", "1,2", "--requests", "4", "--output-tokens", "6", "--input-tokens", "9")


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeOpenAI]:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with serving() as fake:
        yield fake


def run(fake: FakeOpenAI, *arguments: str, small: bool = True) -> Result:
    given = ["bench", "--url", fake.url, *(SMALL if small else ()), *arguments]
    return CliRunner().invoke(cli.app, given)


def kept(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


# ---- the run


def test_a_run_prints_tables_and_keeps_json(fake: FakeOpenAI, tmp_path: Path) -> None:
    out = tmp_path / "new" / "bench.json"
    result = run(fake, "--json", str(out))

    assert result.exit_code == 0, result.output
    for part in ("good at", "TTFT", "ITL, between chunks", "TPOT", "E2E", "p90", "output tokens/s", "words"):
        assert part in result.stdout, part
    assert "level 2: 4 good, 0 failed" in result.stderr
    found = kept(out)
    assert found["form"] == 1 and found["server"]["kind"] == "somebody"
    assert found["versions"]["httpx"] and found["arguments"]["max_tokens"] == 6
    assert [level["concurrency"] for level in found["levels"]] == [1, 2]
    for level in found["levels"]:
        assert (level["good"], level["output_tokens"], level["counted_by"]) == (4, 24, "usage")
        assert level["ttft_ms"].keys() == {"mean", "p50", "p90", "p99"}
        assert "raw" not in level
    assert len(fake.sent) == (1 + 4) + (2 + 4)  # with a warm-up request a stream
    assert len({body["prompt"] for body in fake.sent}) == 11  # no level has its prompts cached


def test_nothing_but_openais_fields_is_sent_unless_asked(fake: FakeOpenAI) -> None:
    assert run(fake).exit_code == 0
    for body in fake.bodies:
        assert body.keys() == {"model", "prompt", "max_tokens", "temperature", "stream", "stream_options"}
        assert body["stream_options"] == {"include_usage": True}


def test_what_is_asked_for_is_sent(fake: FakeOpenAI, tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    result = run(
        fake, "--model", "speculates", "--endpoint", "chat", "--policy", "disco", "--drafter", "model",
        "--extra-body", '{"top_k": 3}', "--ignore-eos", "--per-token-itl", "--temperature", "0.5",
        "--json", str(out), "--raw",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    for body in fake.sent:
        assert body["speculation"] == {"drafter": "model", "policy": "disco"}
        assert (body["top_k"], body["ignore_eos"], body["temperature"]) == (3, True, 0.5)
        assert body["messages"][0]["role"] == "user"
    assert "speculation" in result.stdout and "model; disco" in result.stdout
    assert "ITL, between tokens" in result.stdout
    level = kept(out)["levels"][0]
    assert level["speculation"]["acceptance_rate"] == 0.6
    assert len(level["raw"]) == 4 and len(level["raw"][0]["gaps"]) == 4
    assert level["finish_reasons"] == {"length": 4}


def test_rates(fake: FakeOpenAI) -> None:
    result = run(fake, "--rate", "50,100")
    assert result.exit_code == 0, result.output
    assert "50/s" in result.stdout and "100/s" in result.stdout
    assert len(fake.sent) == 2 * (4 + 4)


def test_fields_that_the_server_refuses_are_left_out_and_told(fake: FakeOpenAI) -> None:
    fake.refuses = ("ignore_eos", "stream_options")
    result = run(fake, "--ignore-eos")
    assert result.exit_code == 0, result.output
    assert "refuses ignore_eos: it is not sent" in result.stdout
    assert "refuses stream_options: it is not sent" in result.stdout
    assert "counted by chunks" in result.stdout
    assert not any("ignore_eos" in body or "stream_options" in body for body in fake.sent)


def test_a_request_that_is_refused_in_any_form_is_told_at_once(fake: FakeOpenAI) -> None:
    fake.refuses = ("speculation",)
    result = run(fake, "--policy", "disco")
    assert result.exit_code == 1 and "extra field: speculation" in result.stderr
    assert fake.sent == []


@pytest.mark.parametrize("more", [(), ("--processes", "2")])
def test_failed_requests_are_counted_by_kind_and_fail_the_command(fake: FakeOpenAI, more: Any) -> None:
    result = run(fake, "--model", "fails every third", "--warmup", "0", *more)
    assert result.exit_code == 1
    assert re.search(r"x HTTP 500, for example: .*on fire", result.stdout.replace("\n", " "))
    assert "requests failed (--allow-errors takes that)" in result.stderr


def test_failures_can_be_allowed_but_are_not_hidden(fake: FakeOpenAI) -> None:
    result = run(fake, "--model", "errs in the middle", "--allow-errors")
    assert result.exit_code == 0
    assert "4 x error in stream" in result.stdout and "0 good" in result.stderr
    assert "error in stream in the warm-up" in result.stdout


def test_the_key_is_sent_and_never_shown(
    fake: FakeOpenAI, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.key, out = "sesame", tmp_path / "bench.json"
    assert "OPENAI_API_KEY" in (lost := run(fake)).stderr and lost.exit_code == 1
    given = run(fake, "--api-key", "sesame", "--json", str(out), "--raw")
    monkeypatch.setenv("OPENAI_API_KEY", "sesame")
    found = run(fake)
    assert (given.exit_code, found.exit_code) == (0, 0)
    assert {head["authorization"] for head in fake.heads} == {"Bearer sesame"}
    helped = CliRunner().invoke(cli.app, ["bench", "--help"])
    for text in (given.output, found.output, helped.output, out.read_text()):
        assert "sesame" not in text


@pytest.mark.parametrize("status", [401, 500])
def test_a_key_that_the_server_repeats_is_not_shown(fake: FakeOpenAI, tmp_path: Path, status: int) -> None:
    fake.status, out = status, tmp_path / "bench.json"
    result = run(fake, "--model", "repeats the key", "--api-key", "open-sesame", "--json", str(out), "--raw")
    assert result.exit_code == 1 and "(the API key)" in result.output
    assert "sesame" not in result.output + (out.read_text() if out.exists() else "")


def test_a_picture(fake: FakeOpenAI, tmp_path: Path) -> None:
    out = tmp_path / "new" / "bench.png"
    result = run(fake, "--plot", str(out))
    assert result.exit_code == 0, result.output
    assert out.read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_that_is_told_before_anything_is_measured(
    fake: FakeOpenAI, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(plot.PlotError):
        plot.check()
    result = run(fake, "--plot", str(tmp_path / "bench.png"))
    assert result.exit_code == 1 and "pip install -e '.[report]'" in result.stderr
    assert fake.bodies == []


@pytest.mark.parametrize("processes", ["1", "2"])
def test_ctrl_c_shows_what_was_measured(fake: FakeOpenAI, tmp_path: Path, processes: str) -> None:
    out = tmp_path / "bench.json"
    given = ["bench", "--url", fake.url, *SMALL[2:], "--concurrency", "2", "--requests", "100000"]
    command = [sys.executable, "-c", "from server.cli import main; main()", *given]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen(
        [*command, "--processes", processes, "--json", str(out)], stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background ignores it
    )  # fmt: skip
    while len(fake.sent) < 30 and process.poll() is None:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    stdout, stderr = process.communicate(timeout=60)

    assert process.returncode == 130, stderr
    assert "interrupted; 2 requests were under way" in stdout.replace("\n", " "), stdout
    assert "Traceback" not in stderr
    (level,) = kept(out)["levels"]
    assert level["interrupted"] and level["good"] > 10 and level["failed"] == 0


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--concurrency", "one"), 2, "numbers parted by commas"),
        (("--concurrency", "0"), 1, "streams must be at least 1"),
        (("--concurrency", "8"), 1, "idle"),
        (("--rate", "0"), 1, "rate"),
        (("--seconds", "0"), 1, "seconds"),
        (("--extra-body", "{"), 2, "not JSON"),
        (("--extra-body", "[]"), 2, "object"),
        (("--extra-body", '{"max_tokens": 3}'), 1, "max_tokens is set by flags"),
        (("--extra-body", '{"speculation": {}}', "--policy", "x"), 2, "--policy"),
        (("--raw",), 2, "--json"),
        (("--dataset", "not-there.jsonl"), 1, "not-there"),
        (("--url", "http://127.0.0.1:9/v1"), 1, "no server at"),
        (("--url", "ftp://127.0.0.1/v1"), 1, "http"),
        (("--url", "http://127.0.0.1:port"), 1, "url"),
        (("--url", "ROOT"), 1, "does the URL end in /v1?"),
        (("--api-key", "s\u00e9same"), 1, "the API key has characters"),
        (("--api-key", "sesame\nsesame"), 1, "the API key has characters"),
        (("--api-key", "sesame\x01"), 1, "the API key has characters"),
        (("--api-key", "sesame "), 1, "the API key has characters"),
        (("--api-key", ""), 1, "the API key has characters"),
        (("--url", "http://u:sesame@127.0.0.1:9/v1"), 1, "'http://127.0.0.1:9/v1' had a user or a password"),
        (("--url", "http://u:sesame@127.0.0.1:port/v1"), 1, "url 'http://127.0.0.1:port/v1'"),
        (("--url", "http://u:sesame/x@127.0.0.1:9/v1"), 1, "url 'http://127.0.0.1:9/v1'"),
        (("--url", "ftp://u:sesame@127.0.0.1/v1"), 1, "url 'ftp://127.0.0.1/v1'"),
        (("--timeout", "inf"), 1, "timeout must be"),
        (("--timeout", "nan"), 1, "timeout must be"),
        (("--timeout", "1e300"), 1, "timeout must be"),
        (("--extra-body", "[" * 100_000), 2, "not JSON"),
    ],
)
def test_what_cannot_work_is_one_line(
    fake: FakeOpenAI, arguments: tuple[str, ...], code: int, message: str
) -> None:
    given = [fake.url.removesuffix("/v1") if each == "ROOT" else each for each in arguments]
    result = run(fake, *given)
    assert result.exit_code == code, result.output
    assert message in result.stderr and len(result.stderr.strip().splitlines()) == 1
    assert "sesame" not in result.output
    assert fake.sent == []


@pytest.mark.parametrize(
    "cards", [b"[" * 100_000, b"\xff", b'{"data":[{"id":' + b"9" * 5000 + b"}]}", b'{"data":[{"id":[]},5]}']
)
def test_lists_of_models_that_are_none(fake: FakeOpenAI, cards: bytes) -> None:
    fake.cards = cards
    result = run(fake)
    assert result.exit_code == 1 and len(result.stderr.strip().splitlines()) == 1, result.output
    assert "models" in result.stderr


def test_what_a_server_says_does_nothing_to_the_terminal(fake: FakeOpenAI, tmp_path: Path) -> None:
    fake.models, fake.owner = ["full \x1b]0;x\x07[red]"], "\x1b[2J"
    result = run(fake, "--plot", str(tmp_path / "bench.png"))
    assert result.exit_code == 0, result.output
    assert "\x1b" not in result.output and "\\x1b[2J" in result.stdout and "\\x07[red]" in result.stdout


# ---- prompts


@pytest.mark.parametrize(("form", "extra"), [("vllm", 1), ("llama.cpp", 0)])
def test_synthetic_prompts_are_as_long_as_the_server_counts(fake: FakeOpenAI, form: str, extra: int) -> None:
    from fake_openai import count

    fake.tokenize = form
    result = run(fake)
    assert "11 synthetic ones of 9 tokens (by the server's /tokenize)" in result.stdout
    assert {count(body["prompt"]) + extra for body in fake.sent} == {9}


def test_a_length_that_cannot_be_counted_is_told(fake: FakeOpenAI) -> None:
    fake.tokenize, fake.longest = "vllm", 5
    result = run(fake)
    assert result.exit_code == 1 and "too long" in result.stderr
