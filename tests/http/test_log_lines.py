"""How log lines are written: text or JSON, and no client forges one."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Iterator

import httpx
import pytest
from fake_engine import FakeEngine
from fastapi import FastAPI
from http_support import running
from log_support import Lines, configured, writing
from test_bad_input import GOOD

from server import logs
from server.log_lines import LogFormat

FORGED = "x\n2026-01-01 00:00:00,000 INFO server.logs [1] POST /v1/completions 200 outcome=done \x1b[2J\u2028"


@pytest.fixture
def written() -> Iterator[Callable[[LogFormat], Lines]]:
    with writing() as written:
        yield written


@pytest.mark.parametrize("kind", ["text", "json"])
async def test_a_client_forges_no_line_and_no_field(
    make_app: Callable[..., FastAPI],
    engine: FakeEngine,
    written: Callable[[LogFormat], Lines],
    kind: LogFormat,
) -> None:
    lines = written(kind)
    async with running(make_app(log_prompts=True)) as client:
        await client.post("/v1/completions", json=GOOD | {"model": FORGED})
        await client.get(httpx.URL("http://tiny/v1/" + "a b=c%0A%22,%20%22status%22:%20200"))
        await client.get("/health", headers={"x-request-id": '1] POST /x 200 outcome=done "'})
        await client.post("/v1/completions", json=GOOD | {"prompt": FORGED, "max_tokens": 1})
    assert "\x1b" not in lines.text and "\u2028" not in lines.text and lines.text.isascii()
    written_lines = lines.text.splitlines()
    requests = [line for line in written_lines if "server.logs" in line]
    assert len(requests) == 4 and all(line[:4].isdigit() or line[0] == "{" for line in written_lines)
    if kind == "json":
        told = lines.requests()
        assert [line["status"] for line in told] == [404, 404, 200, 200]
        assert told[0]["model"] == FORGED and told[3]["prompts"] == [FORGED]
        return
    refused, unknown, named, said = requests
    assert f"model={json.dumps(FORGED)} " in refused + " "
    assert ' GET "/v1/a b=c\\n\\", \\"status\\": 200" 404 ' in unknown
    assert ' ["1] POST /x 200 outcome=done \\""] GET /health 200 ' in named
    assert f"prompts={json.dumps([FORGED])}" in said


def test_a_traceback_forges_no_line(written: Callable[[LogFormat], Lines]) -> None:
    text, as_json = written("text"), written("json")
    try:
        raise ValueError(FORGED)
    except ValueError:
        logging.getLogger("other").exception("what\nwas it: %s", FORGED)
    first, *rest = text.text.splitlines()
    assert first.endswith("\\u2028") and "what\\nwas it" in first
    assert rest and all(line.startswith("    ") for line in rest) and "\x1b" not in text.text
    (told,) = as_json.all()
    assert told["message"].startswith("what\nwas it") and FORGED.split("\n")[1][:30] in told["exception"]


async def test_a_long_name_is_cut(client: httpx.AsyncClient, written: Callable[[LogFormat], Lines]) -> None:
    told = written("json")
    await client.post("/v1/completions", json=GOOD | {"model": "m" * 5000})
    await client.get("/v1/" + "p" * 5000)
    named, path = told.requests()
    assert len(named["model"]) == 256 and len(path["path"]) == 256


@pytest.mark.parametrize("kind", ["text", "json"])
def test_all_that_is_said_at_start_is_in_the_format(
    capfd: pytest.CaptureFixture[str], kind: LogFormat
) -> None:
    with warnings.catch_warnings(), configured("info", kind):
        warnings.simplefilter("default")
        logs.say("one\n  two", kind)
        warnings.warn("three", UserWarning, stacklevel=1)
    one, two, three = capfd.readouterr().err.splitlines()
    assert "three" in three and "py.warnings" in three
    if kind == "text":
        assert (one, two) == ("one", "  two")
    else:
        assert [json.loads(line)["message"] for line in (one, two)] == ["one", "two"]
        assert json.loads(three)["level"] == "warning"
