"""lm-eval: `local-completions` against the server, and `hf` on the same weights, over tasks/.

Runs in an environment that sees the project's torch and transformers, from this folder.
"""

from __future__ import annotations

import json
import os
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
os.environ["OPENAI_API_KEY"] = os.environ["SERVED_KEY"]

import lm_eval
from lm_eval.tasks import TaskManager
from served import BASE_URL, MODEL, WEIGHTS, Session

session = Session("lm-eval", "lm_eval")
SCORED = ("served_choices", "served_endings", "served_texts")
WRITTEN = "served_openings"
TOLERANCE = 1e-3  # of a loglikelihood, in nats


def evaluate(backend: str, batch_size: int, **arguments: Any) -> dict[str, Any]:
    """Every task's samples and scores by one backend."""
    return lm_eval.simple_evaluate(
        model=backend,
        model_args=arguments,
        tasks=[*SCORED, WRITTEN],
        task_manager=TaskManager(include_path="tasks", include_defaults=False),
        log_samples=True,
        bootstrap_iters=0,
        batch_size=batch_size,
    )


def responses(outcome: dict[str, Any], task: str) -> list[tuple[str, Any]]:
    """(document, response) in the tasks' order."""
    samples = sorted(outcome["samples"][task], key=lambda sample: sample["doc_id"])
    return [(json.dumps(sample["doc"]), answer) for sample in samples for (answer,) in sample["resps"]]


SERVED = evaluate(
    "local-completions",
    8,
    model=MODEL,
    base_url=f"{BASE_URL}/completions",
    tokenizer_backend="huggingface",
    tokenizer=WEIGHTS,
    tokenized_requests=True,
    num_concurrent=2,
    max_retries=1,
    max_length=2048,
)
HF = evaluate("hf", 1, pretrained=WEIGHTS, dtype="float32", device="cpu", max_length=2048)
differences: list[float] = []


def check_scores(task: str) -> None:
    ours, theirs = responses(SERVED, task), responses(HF, task)
    assert len(ours) == len(theirs) > 0
    for (document, mine), (same, other) in zip(ours, theirs, strict=True):
        assert document == same
        ours_is, theirs_is = [one if isinstance(one, tuple | list) else (one, None) for one in (mine, other)]
        differences.append(abs(float(ours_is[0]) - float(theirs_is[0])))
        assert differences[-1] <= TOLERANCE, f"{document}: {ours_is[0]} here, {theirs_is[0]} by hf"
        assert str(ours_is[1]) == str(theirs_is[1]), f"{document}: greedy {ours_is[1]}, {theirs_is[1]} by hf"


@session.check("loglikelihood")
def choices_as_hf() -> None:
    check_scores("served_choices")


@session.check("loglikelihood")
def endings_as_hf() -> None:
    check_scores("served_endings")


@session.check("loglikelihood")
def rolling_texts_as_hf() -> None:
    check_scores("served_texts")


@session.check("generation")
def greedy_texts_as_hf() -> None:
    ours, theirs = responses(SERVED, WRITTEN), responses(HF, WRITTEN)
    assert len(ours) == len(theirs) > 0 and any(text for _, text in ours)
    for (document, mine), (_, other) in zip(ours, theirs, strict=True):
        assert mine == other, f"{document}: {mine!r} here, {other!r} by hf"


@session.check("scores")
def the_table_is_the_same() -> None:
    for task in SCORED:
        for name, value in HF["results"][task].items():
            if isinstance(value, float):
                ours = SERVED["results"][task][name]
                assert abs(ours - value) <= 1e-3 * max(1.0, abs(value)), f"{task} {name}: {ours}, {value}"


if __name__ == "__main__":
    scores = {task: SERVED["results"][task] for task in SCORED}
    session.note(
        f"{len(differences)} loglikelihoods, largest difference {max(differences):.1e} nats; "
        f"accuracy {scores['served_choices']['acc,none']:.3f}"
    )
    session.finish()
