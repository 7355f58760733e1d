"""llm, the command line: models of extra-openai-models.yaml."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from served import (
    BASE_URL,
    CITY_SCHEMA,
    KEY,
    LONG,
    LONG_TOKENS,
    MODEL,
    QUESTION,
    Session,
    assert_at_work,
    assert_idle,
    is_city,
)

session = Session("llm (CLI)", "llm")
LLM = str(Path(sys.executable).with_name("llm"))
HOME = tempfile.mkdtemp(prefix="llm-")
GREEDY = ("-o", "temperature", "0", "-o", "max_tokens", "24")
MODELS = f"""
- {{model_id: chat, model_name: {MODEL}, api_base: "{BASE_URL}", api_key_name: served,
    supports_schema: true, supports_tools: true}}
- {{model_id: plain, model_name: {MODEL}, api_base: "{BASE_URL}", api_key_name: served, completion: true}}
- {{model_id: answers, model_name: {MODEL}, api_base: "{BASE_URL}", api_key_name: served, responses: true}}
- {{model_id: nobody, model_name: gpt-9, api_base: "{BASE_URL}", api_key_name: served}}
- {{model_id: stranger, model_name: {MODEL}, api_base: "{BASE_URL}", api_key_name: wrong}}
"""
Path(HOME, "extra-openai-models.yaml").write_text(MODELS)
ENVIRONMENT = {**os.environ, "LLM_USER_PATH": HOME}


def run(*arguments: str, fails: bool = False) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [LLM, *arguments],
        env=ENVIRONMENT,
        text=True,
        capture_output=True,
        timeout=120,
        stdin=subprocess.DEVNULL,
    )
    assert (done.returncode != 0) == fails, f"{arguments}: {done.returncode}: {done.stderr}{done.stdout}"
    return done


for name, key in (("served", KEY), ("wrong", "not-the-key")):
    run("keys", "set", name, "--value", key)


@session.check("plain")
def chat_and_completions_answer() -> None:
    assert run("-m", "chat", *GREEDY, "--no-stream", QUESTION).stdout.strip()
    assert "Paris" in run("-m", "plain", *GREEDY, "--no-stream", "The capital of France is").stdout


@session.check("plain")
def a_conversation_goes_on() -> None:
    run("-m", "chat", *GREEDY, "-s", "Be short.", QUESTION)
    run("-c", *GREEDY, "And one more?")
    (last,) = json.loads(run("logs", "-n", "1", "--json").stdout)
    assert last["input_tokens"] > 40


@session.check("plain")
def seeds_repeat_and_differ() -> None:
    warm = ("-o", "temperature", "1", "-o", "max_tokens", "24", "-o", "seed")
    texts = [run("-m", "chat", *warm, seed, QUESTION).stdout for seed in ("7", "7", "8")]
    assert texts[0] == texts[1] != texts[2]


@session.check("streaming")
def stream_equals_the_answer() -> None:
    for model in ("chat", "plain"):
        ask = ("-m", model, *GREEDY, QUESTION)
        assert run(*ask).stdout == run(*ask, "--no-stream").stdout


@session.check("usage")
def counts_are_shown() -> None:
    for how in ((), ("--no-stream",)):
        shown = run("-m", "chat", "-o", "max_tokens", "9", "-u", *how, QUESTION).stderr
        assert "9 output" in shown, shown


@session.check("tools")
def tools_go_along() -> None:
    # the command line cannot require a call, and so small a model calls nothing by itself
    code = "def get_weather(city: str) -> str:\n    'The weather of a city'\n    return '21 degrees'"
    done = run("-m", "chat", *GREEDY, "--functions", code, "--td", "--chain-limit", "3", QUESTION)
    assert done.stdout.strip() or "get_weather" in done.stderr


@session.check("structured")
def a_schema_is_kept() -> None:
    for how in ((), ("--no-stream",)):
        ask = ("-m", "chat", "-o", "temperature", "0", "-o", "max_tokens", "200", *how)
        assert is_city(json.loads(run(*ask, "--schema", json.dumps(CITY_SCHEMA), QUESTION).stdout))


@session.check("errors")
def errors_are_printed() -> None:
    assert "401" in run("-m", "stranger", QUESTION, fails=True).stderr
    assert "404" in run("-m", "nobody", QUESTION, fails=True).stderr
    shown = run("-m", "chat", "-o", "max_tokens", "100000", QUESTION, fails=True).stderr
    assert "400" in shown and "max_tokens" in shown


@session.check("cancellation")
def ctrl_c_stops_the_work() -> None:
    ask = [LLM, "-m", "chat", "-o", "max_tokens", str(LONG_TOKENS), LONG]
    with subprocess.Popen(ask, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None and process.stdout.read(1)
        assert_at_work()
        process.send_signal(signal.SIGINT)
        process.stdout.read()
    assert_idle()


@session.check("responses")
def the_responses_api_answers() -> None:
    whole = run("-m", "chat", *GREEDY, "--no-stream", QUESTION).stdout
    for how in ((), ("--no-stream",)):
        assert run("-m", "answers", *GREEDY, *how, QUESTION).stdout == whole


if __name__ == "__main__":
    session.finish()
