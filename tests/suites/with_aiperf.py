"""aiperf: a small load over each route; its counts are the server's."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from counted import assert_agree, counters, run
from served import KEY, MODEL, ROOT, WEIGHTS, Session

session = Session("aiperf", "aiperf")
REQUESTS, PROMPT, OUTPUT = 8, 24, 12


FIXED = {"structured_outputs": {"choice": ["sea"]}}  # three tokens at most


def load(kind: str, *more: str, ends: bool = False) -> None:
    """`ends`: answers end by themselves, instead of being cut after OUTPUT tokens."""
    before = counters()
    with tempfile.TemporaryDirectory() as folder:
        options = {
            "--model": MODEL,
            "--url": ROOT,
            "--api-key": KEY,
            "--endpoint-type": kind,
            "--tokenizer": WEIGHTS,
            "--concurrency": "2",
            "--request-count": str(REQUESTS),
            "--prompt-input-tokens-mean": str(PROMPT),
            "--prompt-input-tokens-stddev": "0",
            "--prompt-output-tokens-mean": str(OUTPUT),
            "--prompt-output-tokens-stddev": "0",
            "--extra-inputs": json.dumps(FIXED if ends else {"ignore_eos": True}),
            "--ui": "none",
            "--output-artifact-dir": folder,
        }
        words = [word for option in options.items() for word in option]
        run(["aiperf", "profile", *words, "--use-server-token-count", *more])
        report = json.loads(Path(folder, "profile_export_aiperf.json").read_text())
    assert report["request_count"]["avg"] == REQUESTS and not report.get("error_request_count")
    told = {
        "requests": report["request_count"]["avg"],
        "prompt tokens": report["total_usage_prompt_tokens"]["avg"],
        "output tokens": report["total_usage_completion_tokens"]["avg"],
        "accepted tokens": report["total_usage_accepted_prediction_tokens"]["avg"],
    }
    assert ends or told["output tokens"] == REQUESTS * OUTPUT
    assert_agree(before, told)
    session.note(f"{kind} {' '.join(more)}: {told}, as /metrics")


@session.check("chat")
def streamed_chat_counts_agree() -> None:
    load("chat", "--streaming")


@session.check("chat")
def usage_on_every_chunk_agrees() -> None:
    load("chat", "--streaming", "--per-chunk-usage")


@session.check("chat")
def whole_chat_counts_agree() -> None:
    load("chat")


@session.check("completions")
def streamed_completions_counts_agree() -> None:
    load("completions", "--streaming")


@session.check("responses")
def streamed_responses_counts_agree() -> None:
    # aiperf reads the usage of response.completed, and none of response.incomplete
    load("responses", "--streaming", ends=True)


@session.check("responses")
def whole_responses_counts_agree() -> None:
    load("responses")


if __name__ == "__main__":
    session.finish()
