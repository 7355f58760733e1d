"""What `speculation` may name: GET /v1/policies says it, requests that name anything else get a 400."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from fake_engine import FakeEngine
from fastapi import FastAPI
from http_support import events_of, running
from lossless.toy_heads import toy_head
from msgspec.structs import replace
from test_bad_input import CHAT, GOOD, check_error
from transformers import PreTrainedTokenizerFast

from engine.client_local import LocalEngine
from engine.config import EngineConfig
from engine.models.fingerprint import of_draft, of_model
from engine.speculation.heads import Identity, save_head
from engine.speculation.load import Load
from engine.speculation.policy import Equipment, describe, policies, refusals
from server.app import create_app
from server.settings import Settings

DRAFT, SERVED = "self:2", "tiny"
NEED_HEADS = {"disco", "specdec_pp"}
ALONG = {("ddd", "first"): {"last": 64}, ("ddd", "last"): {"first": 1}}
"""What an option's bounds need of another one."""


@pytest.fixture(scope="module")
def disco(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A head for the one policy that this server can serve of those that need one."""
    fingerprint = of_draft(DRAFT, str(tiny_llama))
    assert fingerprint is not None
    draft, target = Identity("its draft", fingerprint), Identity("its target", of_model(str(tiny_llama)))
    head = toy_head("disco", draft=draft, target=target, data={"prompts": 3}, scores={"test": {"auroc": 0.9}})
    return save_head(head, tmp_path_factory.mktemp("head") / "disco")


def real(target: Path, head: Path, policy: str = "static", **options: Any) -> FastAPI:
    """The app around a real engine of the tiny model."""
    config = EngineConfig(
        target=str(target), draft=DRAFT, heads=(str(head),), policy=policy, policy_options=options,
        device="cpu", kv_blocks=64, max_num_seqs=8, max_sl=8, threads=1,
    )  # fmt: skip
    tokenizer = PreTrainedTokenizerFast.from_pretrained(target)
    return create_app(Settings(target=SERVED), LocalEngine(config), tokenizer)


@pytest.fixture
async def served(tiny_llama: Path, disco: Path) -> AsyncIterator[httpx.AsyncClient]:
    async with running(real(tiny_llama, disco)) as client:
        await ready(client)
        yield client


async def ready(client: httpx.AsyncClient) -> None:
    async with asyncio.timeout(60):
        while (await client.get("/ready")).status_code != 200:
            await asyncio.sleep(0.05)


async def text(client: httpx.AsyncClient, prompt: str, **speculation: Any) -> str:
    body = {"model": SERVED, "prompt": prompt, "max_tokens": 24, "temperature": 0, "ignore_eos": True}
    response = await client.post("/v1/completions", json=body | {"speculation": speculation})
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["text"])


# ---- the page


async def test_the_page_tells_what_can_be_served(served: httpx.AsyncClient) -> None:
    page = (await served.get("/v1/policies")).json()
    listed = {policy["name"]: policy for policy in page["policies"]}
    assert listed.keys() == policies().keys() and len(page["policies"]) == len(listed)
    trees = [tree["name"] for tree in page["trees"] if tree["unavailable"] is None]
    assert page["drafters"] == [*sorted(["model", "ngram", *trees]), "none"] and page["max_sl"] == 8
    assert page["default"] == {"drafter": "model", "policy": "static", "options": {"sl": 5}}
    for name, policy in listed.items():
        assert policy["options"] == describe()[name]
        expected = {"ngram"} if name == "disco" else {"model", "ngram"} if name in NEED_HEADS else set()
        assert policy["unavailable"].keys() == expected, name
        for reason in policy["unavailable"].values():
            assert "head" in reason and name in reason
        assert (policy["head"] is not None) == (name == "disco")
    head = listed["disco"]["head"]
    assert (head["draft"], head["target"], head["data"]) == ("its draft", "its target", {"prompts": 3})
    assert head["scores"] == {"test": {"auroc": 0.9}}
    assert head["options"] == {"threshold": 0.6, "max_sl": 16, "min_sl": 0}


def schema_of(name: str) -> dict[str, Any]:
    schema = describe()[name]
    found: dict[str, Any] = schema["$defs"][schema["$ref"].removeprefix("#/$defs/")]
    return found


@pytest.mark.parametrize("name", sorted(policies()))
def test_every_option_has_words_a_default_and_bounds(name: str) -> None:
    schema = schema_of(name)
    assert schema["type"] == "object" and schema["additionalProperties"] is False
    assert schema["properties"] and not schema.get("required")
    for option, told in schema["properties"].items():
        assert told["description"] and "default" in told, option
        if "enum" in told:
            assert told["default"] in told["enum"]
        elif told["type"] != "boolean":
            low, high = bounds(told)
            assert math.isfinite(low) and math.isfinite(high) and low <= told["default"] <= high, option


def bounds(told: dict[str, Any]) -> tuple[float, float]:
    return told.get("minimum", told.get("exclusiveMinimum")), told.get(
        "maximum", told.get("exclusiveMaximum")
    )


# ---- options


def wrong_options() -> Iterator[Any]:
    """Of every option of every policy a value below, one above, and one of another type."""
    for name in sorted(policies()):
        for option, told in schema_of(name)["properties"].items():
            values: list[Any] = ["much", None, [1]]
            if "enum" not in told and told["type"] != "boolean":
                low, high = bounds(told)
                values += [low if "exclusiveMinimum" in told else low - 1, high + 1]
                values += [0.5] if told["type"] == "integer" else []
            yield from (pytest.param(name, option, value, id=f"{name} {option} {value}") for value in values)


@pytest.mark.parametrize(("name", "option", "value"), [*wrong_options()])
async def test_wrong_options_are_refused(
    client: httpx.AsyncClient, engine: FakeEngine, name: str, option: str, value: Any
) -> None:
    speculation = {"policy": name, "options": {option: value}}
    error = check_error(await client.post("/v1/completions", json=GOOD | {"speculation": speculation}), 400)
    assert (error["param"], error["code"]) == (f"speculation.options.{option}", "invalid_option")
    assert name in error["message"] and f"$.{option}" in error["message"]
    assert engine.requests == []


@pytest.mark.parametrize("name", sorted(policies()))
async def test_options_at_their_bounds_are_served(
    client: httpx.AsyncClient, engine: FakeEngine, name: str
) -> None:
    asked = []
    for option, told in schema_of(name)["properties"].items():
        values = told.get("enum") or ([True, False] if told["type"] == "boolean" else bounds(told))
        along = ALONG.get((name, option), {})
        asked += [{option: value, **along} for value in values if value != told.get("exclusiveMinimum")]
    for options in asked:
        body = GOOD | {"speculation": {"policy": name, "options": options}}
        response = await client.post("/v1/completions", json=body)
        assert response.status_code == 200, (options, response.text)
    assert [request.speculation.options for request in engine.requests] == asked


# ---- heads that are not there


@pytest.fixture
def bare(engine: FakeEngine) -> FakeEngine:
    """The scripted engine as one with a draft model, for which no head is there."""
    refused = refusals(Equipment(Load(torch.device("cpu"))))
    assert refused.keys() == NEED_HEADS
    engine._info = replace(
        engine._info,
        drafters=("model", "ngram", "none"),
        default_drafter="model",
        refusals={"model": refused, "ngram": refused},
    )
    return engine


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", sorted(NEED_HEADS))
@pytest.mark.parametrize("drafter", [None, "model", "ngram"])
async def test_a_policy_without_its_head_is_refused(
    bare: FakeEngine, client: httpx.AsyncClient, path: str, stream: bool, name: str, drafter: str | None
) -> None:
    body = (GOOD if path == "/v1/completions" else CHAT) | {"stream": stream}
    named = {} if drafter is None else {"drafter": drafter}
    response = await client.post(path, json=body | {"speculation": {"policy": name, **named}})
    error = check_error(response, 400)  # of a stream too: it has not begun
    assert (error["param"], error["code"]) == ("speculation.policy", "policy_unavailable")
    assert f"policy {name!r}" in error["message"] and f"drafter {drafter or 'model'!r}" in error["message"]
    assert bare.requests == []
    response = await client.post(path, json=body | {"speculation": named})
    assert response.status_code == 200 and len(bare.requests) == 1


@pytest.mark.parametrize("name", sorted(NEED_HEADS))
async def test_nothing_drafted_needs_no_head(bare: FakeEngine, client: httpx.AsyncClient, name: str) -> None:
    body = GOOD | {"speculation": {"policy": name, "drafter": "none"}}
    assert (await client.post("/v1/completions", json=body)).status_code == 200


async def test_what_is_refused_harms_nobody(served: httpx.AsyncClient) -> None:
    """Others run on while such requests come, and get the text of the target alone."""
    prompts = [f"number {i}" for i in range(4)]
    alone = [await text(served, prompt, drafter="none") for prompt in prompts]
    good = [asyncio.create_task(text(served, prompt, policy="disco")) for prompt in prompts]
    refused = []
    while not all(task.done() for task in good):
        for asked in {"policy": "specdec_pp"}, {"policy": "disco", "drafter": "ngram"}, {"policy": "magic"}:
            body = {"model": SERVED, "prompt": "other", "speculation": asked}
            refused.append(await served.post("/v1/completions", json=body))
    assert [await task for task in good] == alone
    assert len(refused) >= 3 and {response.status_code for response in refused} == {400}
    for response in refused:
        assert check_error(response, 400)["code"] in ("policy_unavailable", "unknown_policy")
    assert await text(served, prompts[0], policy="tetris") == alone[0]


async def test_a_default_of_one_drafter_is_asked_of_no_other(tiny_llama: Path, disco: Path) -> None:
    """A server whose default needs a head: who names n-grams is to name a policy too, and is told so."""
    async with running(real(tiny_llama, disco, "disco", tau=0.3)) as client:
        await ready(client)
        alone = await text(client, "a", drafter="none")
        assert await text(client, "a") == alone
        assert await text(client, "a", drafter="ngram", policy="static") == alone
        body = {"model": SERVED, "prompt": "a", "speculation": {"drafter": "ngram"}}
        error = check_error(await client.post("/v1/completions", json=body), 400)
        assert (error["param"], error["code"]) == ("speculation.drafter", "policy_unavailable")
        assert "'disco'" in error["message"] and "'ngram'" in error["message"]


@pytest.mark.parametrize("name", sorted(policies().keys() - {"specdec_pp"}))
async def test_every_other_policy_gives_the_targets_text(served: httpx.AsyncClient, name: str) -> None:
    """And says in its answer who decided."""
    body = {"model": SERVED, "prompt": "hello", "max_tokens": 20, "temperature": 0, "stream": True}
    texts = []
    for asked in {"drafter": "none"}, {"policy": name}:
        events = events_of(await served.post("/v1/completions", json=body | {"speculation": asked}))
        assert events.pop() == "[DONE]"
        texts.append("".join(choice["text"] for event in events for choice in event["choices"]))
    assert texts[0] == texts[1]
    told = next(event["speculation"] for event in events if "speculation" in event)
    assert (told["policy"], told["drafter"]) == (name, "model")
    # these two weigh costs, and here a draft may cost as much as its target
    assert told["drafted"] > 0 or name in ("goodput", "bandit")
