"""The command line: flags over environment over defaults, errors in one line, tokens in colour."""

from __future__ import annotations

import io
import json
import socket
from collections.abc import AsyncIterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from engine.models.load import load_tokenizer
from engine.types import GenerateRequest, RequestFailed, TokenEvent
from server import cli
from server.flags import read_settings
from server.generate import encode_prompt, show
from server.settings import Settings

TINY = ["--threads", "1", "--kv-blocks", "32", "--device", "cpu"]


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, list(arguments))


def one_line(result: Result) -> str:
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    return lines[0]


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[Settings]:
    """What `serve` would run with: it stops short of running it."""
    import server.launch

    seen: list[Settings] = []
    monkeypatch.setattr(server.launch, "run", lambda settings, *listeners: seen.append(settings))
    return seen


def test_version() -> None:
    result = run("--version")
    assert result.exit_code == 0
    assert result.stdout == f"disco-serve {version('disco-serve')}\n"


def test_every_setting_is_a_flag_of_serve() -> None:
    assert {*cli._SERVER_FLAGS, *cli._ENGINE_FLAGS} == set(Settings.model_fields)


def test_defaults(served: list[Settings]) -> None:
    assert run("serve", "--port", "0").exit_code == 0
    assert served == [Settings(port=0)]


def test_flags_win_over_the_environment(served: list[Settings], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISCO_PORT", "0")
    monkeypatch.setenv("DISCO_MAX_SL", "3")
    monkeypatch.setenv("DISCO_DRAFT", "none")
    assert run("serve", "--max-sl", "5").exit_code == 0
    (settings,) = served
    assert (settings.port, settings.max_sl, settings.draft) == (0, 5, "none")


def test_all_kinds_of_flags_arrive(served: list[Settings]) -> None:
    result = run(
        "serve", "--port", "0", "--api-key", "one", "--api-key", "two", "--memory-fraction", "0.5",
        "--policy", "static", "--policy-options", '{"sl": 4}', "--no-prefix-cache", "--dtype", "float16",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    (settings,) = served
    assert [key.get_secret_value() for key in settings.api_key] == ["one", "two"]
    assert settings.memory_fraction == 0.5
    assert settings.policy_options == {"sl": 4}
    assert settings.prefix_cache is False
    assert settings.engine_config().dtype == "float16"


def test_policy_options_replace_those_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISCO_POLICY_OPTIONS", json.dumps({"threshold": 0.5}))
    assert read_settings({"policy_options": None}).policy_options == {"threshold": 0.5}
    assert read_settings({"policy_options": '{"sl": 4}'}).policy_options == {"sl": 4}


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--port", "99999"),
        ("--port", "x"),
        ("--max-sl", "-1"),
        ("--memory-fraction", "2"),
        ("--dtype", "int4"),
    ],
)
def test_a_bad_value_names_flag_and_variable(flag: str, value: str) -> None:
    result = run("serve", flag, value)
    assert result.exit_code == 2
    assert flag in one_line(result)
    assert f"DISCO_{flag[2:].upper().replace('-', '_')}" in one_line(result)


def test_a_bad_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISCO_PORT", "many")
    result = run("serve")
    assert result.exit_code == 2
    assert "DISCO_PORT" in one_line(result)


def test_policy_options_that_are_no_json() -> None:
    result = run("serve", "--policy-options", "{sl: 4}")
    assert result.exit_code == 2
    assert "--policy-options" in one_line(result)


def test_an_unknown_flag_is_refused() -> None:
    result = run("serve", "--no-such-flag")
    assert result.exit_code == 2
    assert "--no-such-flag" in result.stderr


def test_a_taken_port_is_told_in_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        result = run("serve", "--port", str(other.getsockname()[1]))
    assert result.exit_code == 1
    assert "cannot listen" in one_line(result)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--target", "./nothing-here"], "nothing-here"),
        (["--draft", "./nothing-here"], "nothing-here"),
        (["--policy", "nonsense"], "static"),
        (["--policy", "static", "--policy-options", '{"nonsense": 1}'], "nonsense"),
    ],
)
def test_what_cannot_be_served_is_told_in_one_line(arguments: list[str], said: str, tiny_llama: Path) -> None:
    result = run("generate", "hello", "--target", str(tiny_llama), *arguments)
    assert result.exit_code == 1
    assert said in one_line(result)


def test_generate_prints_text_and_statistics(tiny_llama: Path) -> None:
    result = run("generate", "hello", "--target", str(tiny_llama), "--draft", "self:4", "--max-tokens", "9",
                 "--policy", "static", "--policy-options", '{"sl": 2}', *TINY)  # fmt: skip
    assert result.exit_code == 0, result.stderr
    # a draft that is the target: every token drafted is accepted
    rows = {" ".join(line.split()) for line in result.stderr.splitlines()}
    assert "acceptance rate 1.000" in rows
    assert any(row.startswith("drafter, policy model, static") for row in rows)


def test_generate_says_the_same_with_and_without_a_draft(tiny_llama: Path) -> None:
    texts = {
        run("generate", "hello", "--target", str(tiny_llama), "--draft", draft, "--max-tokens", "12",
            "--temperature", "0.8", "--seed", "3", *TINY).stdout
        for draft in ("none", "self:1")
    }  # fmt: skip
    assert len(texts) == 1
    assert texts != {""}


def test_models_list_names_the_default() -> None:
    result = run("models", "list")
    assert result.exit_code == 0
    assert Settings().target in result.stdout


def test_models_pull_of_a_directory_is_that_directory(tiny_llama: Path) -> None:
    result = run("models", "pull", str(tiny_llama))
    assert (result.exit_code, result.stdout) == (0, f"{tiny_llama}\n")


def test_models_pull_of_nothing() -> None:
    result = run("models", "pull", "./nothing-here")
    assert result.exit_code == 1
    assert "nothing-here" in one_line(result)


async def scripted(*events: TokenEvent) -> AsyncIterator[TokenEvent]:
    for event in events:
        yield event


async def shown(tokenizer: Any, console: Console, *events: TokenEvent) -> list[tuple[str, str]]:
    request = GenerateRequest(id="x", prompt_ids=(3,))
    return (await show(scripted(*events), request, tokenizer, console)).rows()


def ids(tokenizer: Any, text: str) -> tuple[int, ...]:
    return tuple(tokenizer.encode(text, add_special_tokens=False))


async def test_the_accepted_tokens_of_an_event_are_coloured(tiny_llama: Path) -> None:
    tokenizer, out = load_tokenizer(str(tiny_llama)), io.StringIO()
    console = Console(file=out, force_terminal=True, color_system="standard", soft_wrap=True)
    await shown(
        tokenizer,
        console,
        TokenEvent(id="x", token_ids=ids(tokenizer, "A")),
        TokenEvent(id="x", token_ids=ids(tokenizer, "bcD"), iterations=1, drafted=4, accepted=2),
        TokenEvent(id="x", token_ids=ids(tokenizer, "E"), iterations=1, finish_reason="length"),
    )
    assert out.getvalue() == "A\x1b[32mb\x1b[0m\x1b[32mc\x1b[0mDE\n"


async def test_no_colour_in_a_pipe_and_no_text_of_the_end(tiny_llama: Path) -> None:
    tokenizer, out = load_tokenizer(str(tiny_llama)), io.StringIO()
    rows = await shown(
        tokenizer,
        Console(file=out, soft_wrap=True),
        TokenEvent(id="x", token_ids=ids(tokenizer, "A")),
        TokenEvent(
            id="x", token_ids=(*ids(tokenizer, "é!"), 2), stop_token_id=2, finish_reason="stop",
            policy="static", drafter="model", iterations=1, drafted=4, lookahead=4, accepted=3,
            stop_reason="cap",
        ),
    )  # fmt: skip
    assert out.getvalue() == "Aé!\n"
    told = dict(rows)
    assert told["tokens"] == "5 (stop)"
    assert told["acceptance rate"] == "0.750"
    assert told["mean emitted per iteration"] == "4.00"
    assert told["drafting stopped by"] == "cap 1"


async def test_an_engine_that_gives_up_is_an_error(tiny_llama: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_llama))
    with pytest.raises(RequestFailed, match="NaN"):
        await shown(
            tokenizer,
            Console(file=io.StringIO()),
            TokenEvent(id="x", finish_reason="error", error="NaN logits"),
        )


def test_chat_needs_a_template(tiny_llama: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_llama))
    assert encode_prompt(tokenizer, "hi", chat=None) == ids(tokenizer, "hi")
    result = run("generate", "hi", "--chat", "--target", str(tiny_llama))
    assert result.exit_code == 1
    assert "chat template" in one_line(result)


def test_chat_goes_through_the_template(tiny_llama: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_llama))
    tokenizer.chat_template = (
        "{% for m in messages %}<s>{{ m.role }}:{{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}>{% endif %}"
    )
    assert encode_prompt(tokenizer, "hi", chat=None) == ids(tokenizer, "<s>user:hi</s>>")
    assert encode_prompt(tokenizer, "hi", chat=False) == ids(tokenizer, "hi")


def test_a_metrics_port_that_is_taken_is_told_before_anything_is_loaded(served: list[Settings]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = run("serve", "--port", "0", "--metrics-port", str(port))
    assert result.exit_code == 1 and f"cannot listen on 127.0.0.1:{port}" in result.stderr
    assert served == []
    result = run(
        "serve", "--port", "0", "--metrics-port", "0", "--metrics-label", "a=b", "--metrics-compat", "vllm"
    )
    assert result.exit_code == 0, result.stderr
    assert (served[0].metrics_label, served[0].metrics_compat) == (["a=b"], "vllm")
    result = run("serve", "--metrics-label", "policy=x")
    assert (
        result.exit_code == 2 and "--metrics-label" in result.stderr and "our metrics' own" in result.stderr
    )
