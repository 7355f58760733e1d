"""guidellm: a small load over each route; its counts are the server's."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from counted import assert_agree, counters, run
from served import KEY, MODEL, ROOT, WEIGHTS, Session

session = Session("guidellm", "guidellm")
REQUESTS, PROMPT, OUTPUT = 8, 24, 12


def load(route: str, stream: bool) -> None:
    before = counters()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        backend = (
            f"kind=openai_http,target={ROOT},model={MODEL},api_key={KEY},"
            f"request_format={route},stream={str(stream).lower()}"
        )
        options = [
            ("--backend", backend),
            ("--profile", "kind=concurrent,streams=2"),
            ("--constraint", f"kind=max_requests,count={REQUESTS}"),
            ("--tokenizer", f"kind=huggingface_auto,model={WEIGHTS}"),
            ("--data", f"kind=synthetic_text,prompt_tokens={PROMPT},output_tokens={OUTPUT}"),
            ("--output", f"kind=json,path={report}"),
        ]
        run(["guidellm", "run", *(word for option in options for word in option), "--disable-progress"])
        (benchmark,) = json.loads(report.read_text())["benchmarks"]
    metrics = benchmark["metrics"]
    assert metrics["request_totals"] == {
        "successful": REQUESTS,
        "errored": 0,
        "incomplete": 0,
        "total": REQUESTS,
    }
    told = {
        "requests": metrics["request_totals"]["total"],
        "prompt tokens": metrics["prompt_token_count"]["successful"]["total_sum"],
        "output tokens": metrics["output_token_count"]["successful"]["total_sum"],
    }
    assert told["output tokens"] == REQUESTS * OUTPUT
    assert_agree(before, told)
    session.note(f"{route}, {'streamed' if stream else 'whole'}: {told}, as /metrics")


@session.check("chat")
def streamed_chat_counts_agree() -> None:
    load("/v1/chat/completions", stream=True)


@session.check("chat")
def whole_chat_counts_agree() -> None:
    load("/v1/chat/completions", stream=False)


@session.check("completions")
def streamed_completions_counts_agree() -> None:
    load("/v1/completions", stream=True)


@session.check("responses")
def streamed_responses_counts_agree() -> None:
    load("/v1/responses", stream=True)


if __name__ == "__main__":
    session.finish()
