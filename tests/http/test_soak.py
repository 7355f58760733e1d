"""The soak in miniature around a tiny model, and that it sees what it is there to see."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from http_support import listening
from suites.accounts import Ask
from suites.replies import Said
from transformers import PreTrainedTokenizerFast

from engine.client_local import LocalEngine
from engine.config import EngineConfig
from server.app import create_app
from server.settings import Settings

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import soak
from live import Served
from soaking import verdict
from soaking.load import Load, Outcome
from soaking.processes import Standing, Watch, slope
from soaking.questions import KINDS, Question, Sizes, pairs_of

SIZES = Sizes(tokens=12, left=1900, words=8, long_words=40, patience=0.3)


async def test_a_soak_in_miniature_holds(
    tmp_path: Path,
    make_tokenizer: Callable[..., PreTrainedTokenizerFast],
    make_llama: Callable[..., Path],
) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    target = str(make_llama(tmp_path, tokenizer, layers=2, context=2048))
    config = EngineConfig(target=target, draft="self:1", device="cpu", kv_blocks=300, max_num_seqs=12)
    app = create_app(Settings(target="tiny"), LocalEngine(config), tokenizer)
    plan = soak.Plan(
        clients=12, minutes=0.03, warm_up=0.005, catalogue=len(KINDS), deadline=60, limit=1e6, every=0.1,
        sizes=SIZES,
    )  # fmt: skip
    async with listening(app) as port:
        served = Served(f"http://127.0.0.1:{port}", "none", "tiny")
        await _until_ready(served.url)
        report = await soak.Soak(served, plan, Watch(os.getpid())).run()

    # memory, files, threads and processes are those of pytest, too, and of seconds
    of_pytest = ("resident", "file", "threads", "processes")
    ours = [held for held in report.held if not held.what.startswith(of_pytest)]
    assert [held for held in ours if not held.holds] == []
    assert {"resident memory, server", "file descriptors, server"} <= {held.what for held in report.held}
    stretches = report.figures["stretches"]
    assert stretches["soak"]["left"] > 0 and stretches["soak"]["compared"] > 0
    assert {"model/goodput", "ngram/static", "none/none"} <= set(report.figures["pairs"])
    assert json.dumps(report.figures)


async def _until_ready(url: str) -> None:
    async with asyncio.timeout(120), httpx.AsyncClient(base_url=url) as client:
        while (await client.get("/ready")).status_code != 200:
            await asyncio.sleep(0.05)


class Fake:
    """Answers with the next of `texts`; a number is an error of that status, None no answer at all."""

    def __init__(self, *texts: str | int | None) -> None:
        self._texts = iter(texts)

    async def __call__(self, request: httpx.Request) -> httpx.Response:
        text = next(self._texts)
        if text is None:
            await asyncio.sleep(60)
        if not isinstance(text, str):
            return httpx.Response(text or 200, json={"error": {"message": "on fire"}})
        choice: dict[str, Any] = {"index": 0, "text": text, "finish_reason": "length", "token_ids": [1]}
        usage = {"prompt_tokens": 1, "completion_tokens": 1}
        return httpx.Response(200, json={"choices": [choice], "usage": usage})


async def asked(*texts: str | int | None, question: Question) -> Outcome:
    """What a client sees that was told the first text alone and now gets the others."""
    async with httpx.AsyncClient(
        transport=httpx.MockTransport(Fake(*texts)), base_url="http://tiny"
    ) as client:
        load = Load(deadline=0.05)
        await load.learn(client, [question])
        left = iter([question] * (len(texts) - 1))
        return await load.run(client, lambda: next(left, None), 1)


def held(outcome: Outcome) -> dict[str, bool]:
    """What holds of it, but for what did not take part."""
    found = {each.what: each.holds for each in verdict.answers([outcome], [])}
    del found["kinds, drafters and policies that took part"]
    return found


PLAIN = Question("sampled", Ask("/v1/completions", {"prompt": "a"}), known=0)


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("same", set()),
        ("other", {"seeded answers that differ from those alone"}),
        (500, {"unexpected answers", "answers of 500 and above"}),
        (429, {"unexpected answers"}),
        (None, {"requests that hung"}),
    ],
)
async def test_what_is_wrong_with_an_answer_is_seen(text: str | int | None, wrong: set[str]) -> None:
    outcome = await asked("same", text, question=PLAIN)

    assert {what for what, holds in held(outcome).items() if not holds} == wrong


async def test_a_request_that_should_be_refused_and_is_not_is_seen() -> None:
    refused = Question("refused", PLAIN.ask, status=400)

    assert not (await asked(400, 400, question=refused)).faults
    assert len((await asked(400, "fine", question=refused)).faults) == 1


async def test_a_difference_is_told_with_both_answers() -> None:
    outcome = await asked("same", "same", "other", question=PLAIN)

    assert outcome.compared == {"sampled": 2}
    (differing,) = outcome.differing
    assert differing.alone == [Said("same", [1], "length")] and differing.now[0].text == "other"


def test_kinds_and_pairs_that_took_no_part_are_named() -> None:
    empty = next(each for each in verdict.answers([Outcome()], [("ngram", "static")]) if "part" in each.what)

    assert not empty.holds
    for name in (*KINDS, "ngram/static", "left", "refused"):
        assert name in empty.found


def test_counts_that_differ_are_told() -> None:
    outcome = Outcome()
    outcome.answers["/v1/completions", "200"] = 3
    counted = {("disco_http_requests_total", "/v1/completions", "200"): 3.0,
               ("disco_http_requests_total", "/v1/completions", "500"): 1.0,
               ("disco_http_requests_total", "/health", "200"): 9.0}  # fmt: skip
    found = verdict.agreeing("soak", verdict.books(outcome, counted, exact=False))

    assert not found.holds and found.found == "/v1/completions 500: 0 by the clients, 1 by /metrics"


@pytest.mark.parametrize(("by_the_server", "agrees"), [(1, False), (2, True), (3, True), (4, False)])
def test_whether_the_server_saw_what_was_left_at_once_is_open(by_the_server: int, agrees: bool) -> None:
    outcome = Outcome()
    outcome.answers["/v1/completions", "499"] = 2
    outcome.unsure["/v1/completions"] = 1
    counted = {("disco_http_requests_total", "/v1/completions", "499"): float(by_the_server)}

    assert verdict.agreeing("soak", verdict.books(outcome, counted, exact=False)).holds is agrees


def test_the_slope_is_that_of_least_squares() -> None:
    wave = [(60.0 * i, 500 + 2 * i + (-1) ** i) for i in range(30)]  # 120 MiB/h, and a wave
    found = slope(wave)

    assert found.per_hour == pytest.approx(120, abs=3 * found.error) and 0 < found.error < 5
    assert not verdict.flat("engine", found, 100).holds and verdict.flat("engine", found, 140).holds
    assert slope([(60.0 * i, 7.0) for i in range(9)]).per_hour == 0
    with pytest.raises(ValueError, match="2 points"):
        slope(wave[:2])


def test_what_comes_and_goes_is_not_growth() -> None:
    watch = Watch(os.getpid())
    watch.resident["engine"] = [(100.0 + i, 500.0 + (400 if i % 7 == 3 else 0)) for i in range(60)]

    assert watch.floors("engine", 110, 140, 10) == [(5, 500), (15, 500), (25, 500)]


def test_what_is_kept_open_is_seen() -> None:
    before = Standing({}, {"server": 20}, {"server": 8}, {"server": 1})
    after = Standing({}, {"server": 23}, {"server": 9}, {"server": 1, "others": 1})
    wrong = [each.what for each in verdict.nothing_kept(before, after, slack=2) if not each.holds]

    assert wrong == ["file descriptors, server", "processes, others"]


def test_pairs_are_all_that_the_server_may_combine() -> None:
    page = {"drafters": ["dyspec", "model", "ngram", "none"],
            "policies": [{"name": "static", "unavailable": {}},
                         {"name": "disco", "unavailable": {"ngram": "it has no head"}}],
            "trees": [{"name": "dyspec"}, {"name": "c2t"}]}  # fmt: skip
    assert pairs_of(page) == [
        ("dyspec", "none"), ("model", "static"), ("model", "disco"), ("ngram", "static"), ("none", "none")
    ]  # fmt: skip
