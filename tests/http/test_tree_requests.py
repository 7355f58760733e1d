"""Requests whose drafts are trees, through HTTP: their answers are the target's, and say what was drafted."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from http_support import running
from live_app import Live, live
from template_families import HERMES
from test_bad_input import check_error
from test_passes import PATHS, TOLD, adds_up, text_of
from test_policy_choice import ready
from transformers import PreTrainedTokenizerFast

from engine.client_local import LocalEngine
from engine.config import EngineConfig
from engine.speculation.tree import describe_trees, rules
from server.app import create_app
from server.settings import Settings

TREES: list[dict[str, Any]] = [
    {"drafter": "dyspec", "options": {"budget": 12, "threshold": 0.03}},
    {"drafter": "dyspec", "options": {"growth": "greedy", "budget": 6, "draft_temperature": 2.0}},
    {"drafter": "opt_tree", "options": {"budget": 8, "delta": 0.0, "draft_temperature": 2.0}},
]
NAMES = ["dyspec", "dyspec greedy", "opt_tree"]
DEEP = {"drafter": "opt_tree", "options": {"budget": 12, "width": 4, "delta": 0.0}}
NONE = {"drafter": "none"}
SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "n": {"enum": [1, 22, 333]}},
    "required": ["ok", "n"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "note", "parameters": SCHEMA}}


def config(target: Path, **more: Any) -> EngineConfig:
    return EngineConfig(
        target=str(target), draft="self:2", policy="static", device="cpu", kv_blocks=256, max_num_seqs=8,
        max_sl=8, threads=1, **more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def app(
    make_llama: Callable[..., Path],
    make_tokenizer: Callable[..., PreTrainedTokenizerFast],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Live]:
    """A tiny model that chats; its tokens are bytes, so that a tool takes many."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = HERMES
    where = make_llama(tmp_path_factory.mktemp("chats"), tokenizer, layers=4, context=1024)
    with live(LocalEngine(config(where)), tokenizer) as app:
        yield app


def body(path: str, **fields: Any) -> dict[str, Any]:
    prompt = {"prompt": "a b c"} if path == PATHS[0] else {"messages": [{"role": "user", "content": "a b c"}]}
    return {"max_tokens": 16, "temperature": 0, "ignore_eos": True} | prompt | fields


def content(choice: dict[str, Any]) -> str:
    return str(choice["text"] if "text" in choice else choice["message"]["content"])


# ---- answers


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("tree", TREES, ids=NAMES)
def test_the_text_is_the_targets_and_the_sums_are_a_trees(app: Live, path: str, tree: dict[str, Any]) -> None:
    for kind in {"temperature": 0}, {"temperature": 0.9, "seed": 4, "n": 3}:
        plain, drafted = (app.ask(path, **body(path, speculation=each) | kind) for each in (NONE, tree))
        assert [content(choice) for choice in drafted["choices"]] == [
            content(each) for each in plain["choices"]
        ]
        told = drafted["speculation"]
        assert (told["drafter"], told["policy"]) == (tree["drafter"], "none")
        assert told["drafted"] > told["mean_sl"] * told["iterations"]  # more nodes than the longest way has
        assert 0 < told["mean_sl"] <= 8 and told["mean_emitted"] >= 1
        assert told["acceptance_rate"] == told["accepted"] / told["drafted"]
        details = drafted["usage"]["completion_tokens_details"]
        assert details["rejected_prediction_tokens"] == told["drafted"] - told["accepted"]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("tree", TREES, ids=NAMES)
def test_streams_add_up(app: Live, path: str, tree: dict[str, Any]) -> None:
    asked = body(path, speculation=tree, temperature=0.9, seed=3, max_tokens=40, stream_options=TOLD)
    chunks = app.stream(path, **asked)
    passes = adds_up(chunks)
    assert max(each["lookahead"] for each in passes) > 1
    assert all(each["accepted"] <= each["lookahead"] <= each["drafted"] for each in passes)
    plain = app.ask(path, **body(path, speculation=NONE, temperature=0.9, seed=3, max_tokens=40))
    assert text_of(chunks) == content(plain["choices"][0])


def test_a_short_way_that_stands_gives_a_bonus(app: Live) -> None:
    """Where nothing had been drafted, nothing fell: `correction` would be untrue."""
    asked = body(PATHS[0], speculation=DEEP, temperature=0.9, max_tokens=60, stream_options=TOLD, n=8, seed=1)
    chunks = app.stream(PATHS[0], **asked)
    own = [
        (each["tokens"][-1]["origin"], each["accepted"], each["lookahead"])
        for index in range(8)
        for each in adds_up(chunks, index)
        if each["drafted"] and len(each["tokens"]) > each["accepted"]
    ]
    assert {"bonus", "correction"} == {origin for origin, *_ in own}
    assert any(origin == "bonus" and accepted < longest for origin, accepted, longest in own)


@pytest.mark.parametrize("tree", TREES, ids=NAMES)
def test_logprobs_are_the_targets_own(app: Live, tree: dict[str, Any]) -> None:
    """Of each token the row of the node behind which it stands."""
    for kind in {"temperature": 0}, {"temperature": 1.3, "seed": 8}:
        asked = [body(PATHS[0], speculation=each, logprobs=3, max_tokens=30) | kind for each in (NONE, tree)]
        plain, drafted = (app.ask(PATHS[0], **each)["choices"][0]["logprobs"] for each in asked)
        assert drafted["tokens"] == plain["tokens"]
        assert drafted["token_logprobs"] == pytest.approx(plain["token_logprobs"], abs=1e-4)
        for found, wanted in zip(drafted["top_logprobs"], plain["top_logprobs"], strict=True):
            assert found == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize("path", PATHS)
def test_stop_strings(app: Live, path: str) -> None:
    whole = content(app.ask(path, **body(path, speculation=NONE, max_tokens=40))["choices"][0])
    for stop in {whole[9:11], whole[20:23], whole[-1]}:
        plain, *drafted = (
            app.ask(path, **body(path, speculation=each, max_tokens=40, stop=stop)) for each in (NONE, *TREES)
        )
        for answer in drafted:
            assert content(answer["choices"][0]) == content(plain["choices"][0])
            assert answer["choices"][0]["finish_reason"] == "stop"
            assert answer["usage"]["completion_tokens"] == plain["usage"]["completion_tokens"]
            assert answer["speculation"]["mean_emitted"] * answer["speculation"][
                "iterations"
            ] == pytest.approx(answer["usage"]["completion_tokens"] - 1)


@pytest.mark.parametrize("tree", TREES, ids=NAMES)
def test_a_schema_and_a_tool_hold(app: Live, tree: dict[str, Any]) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}}
    for kind in {"temperature": 0}, {"temperature": 1, "seed": 5}, {"temperature": 1}:
        asked = {"max_tokens": 90, "ignore_eos": False, "speculation": tree} | kind
        answer = app.ask(PATHS[1], **body(PATHS[1], response_format=form) | asked)
        check(answer["choices"][0]["message"]["content"], answer)
        answer = app.ask(PATHS[1], **body(PATHS[1], tools=[TOOL], tool_choice="required") | asked)
        (call,) = answer["choices"][0]["message"]["tool_calls"]
        check(call["function"]["arguments"], answer)
        if kind != {"temperature": 1}:
            plain = app.ask(PATHS[1], **body(PATHS[1], response_format=form) | asked | {"speculation": NONE})
            same = app.ask(PATHS[1], **body(PATHS[1], response_format=form) | asked)
            assert content(same["choices"][0]) == content(plain["choices"][0])


def check(text: str, answer: dict[str, Any]) -> None:
    told = json.loads(text)
    assert told.keys() == {"ok", "n"} and isinstance(told["ok"], bool) and told["n"] in (1, 22, 333)
    assert answer["speculation"]["accepted"] > 0  # what the grammar leaves one token of is drafted right


# ---- what may be named


def test_what_is_offered(app: Live) -> None:
    page = app._runner.run(app._client.get("/v1/policies")).json()
    listed = {tree["name"]: tree for tree in page["trees"]}
    assert listed.keys() == rules().keys() and len(listed) == len(page["trees"])
    for name, tree in listed.items():
        assert tree["options"] == describe_trees()[name]
        assert (tree["unavailable"] is None) == (name in page["drafters"])


@pytest.mark.parametrize("name", sorted(rules()))
def test_every_option_has_words_a_default_and_bounds(name: str) -> None:
    schema = describe_trees()[name]
    told = schema["$defs"][schema["$ref"].removeprefix("#/$defs/")]
    assert told["additionalProperties"] is False and not told.get("required")
    for option, each in told["properties"].items():
        assert each["description"] and "default" in each, option
        some = next((arm for arm in each.get("anyOf", []) if arm["type"] != "null"), each)
        if "enum" not in some and some["type"] != "boolean":
            low = some.get("minimum", some.get("exclusiveMinimum"))
            assert math.isfinite(low) and math.isfinite(some["maximum"]), option


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("speculation", "param", "words"),
    [
        ({"drafter": "dyspec", "options": {"budget": 0}}, "speculation.options.budget", "budget"),
        ({"drafter": "dyspec", "options": {"budget": 65}}, "speculation.options.budget", "budget"),
        ({"drafter": "dyspec", "options": {"budget": 2.5}}, "speculation.options.budget", "budget"),
        ({"drafter": "dyspec", "options": {"growth": "up"}}, "speculation.options.growth", "growth"),
        ({"drafter": "dyspec", "options": {"sl": 4}}, "speculation.options.sl", "valid: "),
        ({"drafter": "opt_tree", "options": {"threshold": 0.1}}, "speculation.options.threshold", "valid: "),
        ({"drafter": "opt_tree", "options": {"delta": -1}}, "speculation.options.delta", "delta"),
        (
            {"drafter": "dyspec", "options": {"draft_temperature": 0}},
            "speculation.options.draft_temperature",
            "draft_temperature",
        ),
        ({"drafter": "dyspec", "policy": "static"}, "speculation.policy", "no policy"),
        ({"drafter": "dyspec", "max_sl": 9}, "speculation.max_sl", "max_sl"),
        ({"drafter": "oak"}, "speculation.drafter", "dyspec"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(
    app: Live, path: str, speculation: dict[str, Any], param: str, words: str
) -> None:
    for stream in (False, True):
        response = app.post(path, {"model": "tiny"} | body(path, speculation=speculation, stream=stream))
        error = check_error(response, 400)
        assert error["param"] == param and words in error["message"]


def test_a_depth_that_is_asked_for_is_kept(app: Live) -> None:
    for most in 0, 1, 3:
        asked = body(PATHS[0], speculation=DEEP | {"max_sl": most}, stream_options=TOLD)
        passes = adds_up(app.stream(PATHS[0], **asked))
        assert max(each["lookahead"] for each in passes) == most


# ---- trees by default


@pytest.fixture
async def treed(tiny_llama: Path) -> AsyncIterator[httpx.AsyncClient]:
    engine = LocalEngine(config(tiny_llama, drafter="dyspec", policy_options={"budget": 5, "threshold": 0.0}))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_llama)
    async with asyncio.timeout(60), running(create_app(Settings(target="tiny"), engine, tokenizer)) as client:
        await ready(client)
        yield client


async def test_a_server_of_trees(treed: httpx.AsyncClient) -> None:
    default = (await treed.get("/v1/policies")).json()["default"]
    assert (default["drafter"], default["policy"]) == ("dyspec", "none")
    assert default["options"] == {
        "growth": "layers", "threshold": 0.0, "budget": 5, "max_depth": 8, "draft_temperature": None,
    }  # fmt: skip

    async def told(**speculation: Any) -> tuple[str, str, float]:
        asked = {"model": "tiny"} | body(PATHS[0], temperature=0.9, seed=1)
        answer = await treed.post(
            PATHS[0], json=asked | ({"speculation": speculation} if speculation else {})
        )
        assert answer.status_code == 200, answer.text
        found = answer.json()["speculation"]
        return found["drafter"], found["policy"], found["drafted"] / max(found["iterations"], 1)

    drafter, policy, nodes = await told()
    assert (drafter, policy) == ("dyspec", "none") and 3 < nodes <= 5
    assert (await told(options={"budget": 1}))[2] <= 1
    assert (await told(drafter="opt_tree"))[2] > 5  # with options of its own
    assert (await told(drafter="model"))[:2] == ("model", "static")
    assert (await told(drafter="ngram", policy="heuristic", options={"start": 1}))[:2] == (
        "ngram",
        "heuristic",
    )
    assert (await told(drafter="none"))[:2] == ("none", "none")
    asked = body(PATHS[0], speculation={"policy": "static"})
    error = check_error(await treed.post(PATHS[0], json={"model": "tiny"} | asked), 400)
    assert error["param"] == "speculation.policy" and "'dyspec'" in error["message"]
    metrics = (await treed.get("/metrics")).text
    assert 'disco_lookahead_count{drafter="dyspec",policy="none"}' in metrics
    assert 'disco_speculation_faults_total{drafter="dyspec"} 0.0' in metrics
