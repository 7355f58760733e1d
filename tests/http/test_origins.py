"""Web pages of other sites: refused where there is no key, answered with CORS only where asked for."""

from __future__ import annotations

import json
from collections.abc import Callable

import httpx
import pytest
from fake_engine import FakeEngine
from fastapi import FastAPI
from http_support import listening, running
from pydantic import SecretStr, ValidationError
from test_bad_input import GOOD, check_error

from server.settings import Settings

MakeApp = Callable[..., FastAPI]
FOREIGN = [
    {"origin": "https://evil.example"},
    {"origin": "null"},
    {"origin": "http://tiny:81"},
    {"origin": "http://tiny.evil.example"},
    {"origin": "http://tiny@evil.example"},
    {"origin": ""},
    {"sec-fetch-site": "cross-site"},
    {"sec-fetch-site": "same-site"},
]


@pytest.mark.parametrize("headers", FOREIGN)
@pytest.mark.parametrize("kind", ["text/plain", "application/json", "application/x-www-form-urlencoded"])
async def test_a_foreign_page_gets_403(
    client: httpx.AsyncClient, engine: FakeEngine, headers: dict[str, str], kind: str
) -> None:
    for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/v1/nothing"):
        response = await client.post(path, content=json.dumps(GOOD), headers=headers | {"content-type": kind})
        assert check_error(response, 403)["code"] == "origin_not_allowed"
    assert not engine.requests


@pytest.mark.parametrize(
    "headers",
    [{}, {"origin": "http://tiny"}, {"sec-fetch-site": "same-origin"}, {"sec-fetch-site": "none"}],
)
async def test_programs_and_the_own_page_do_not(client: httpx.AsyncClient, headers: dict[str, str]) -> None:
    content = headers | {"content-type": "text/plain"}  # as `curl -d` nearly does
    response = await client.post("/v1/completions", content=json.dumps(GOOD), headers=content)
    assert response.status_code == 200


async def test_an_allowed_origin_may(make_app: MakeApp) -> None:
    page = {"origin": "https://app.example"}
    async with running(make_app(cors_origin=["https://app.example"])) as client:
        response = await client.post("/v1/completions", json=GOOD, headers=page)
        assert response.status_code == 200
        assert response.headers["access-control-allow-origin"] == "https://app.example"
        other = await client.post(
            "/v1/completions", json=GOOD, headers={"origin": "https://app.example.evil"}
        )
        assert other.status_code == 403 and "access-control-allow-origin" not in other.headers


async def test_a_key_is_what_foreign_pages_lack(make_app: MakeApp) -> None:
    headers = {"origin": "https://evil.example"}
    async with running(make_app(api_key=[SecretStr("one")])) as client:
        assert (await client.post("/v1/completions", json=GOOD, headers=headers)).status_code == 401
        keyed = headers | {"authorization": "Bearer one"}
        assert (await client.post("/v1/completions", json=GOOD, headers=keyed)).status_code == 200


async def test_a_name_that_points_here_is_foreign(make_app: MakeApp) -> None:
    """DNS rebinding: the page's origin is the request's host, but a name that its owner points at us."""
    async with listening(make_app()) as port, httpx.AsyncClient() as client:
        for host, status in (("evil.example", 403), ("localhost", 200), ("127.0.0.1", 200), ("[::1]", 200)):
            headers = {"host": f"{host}:{port}", "origin": f"http://{host}:{port}"}
            url = f"http://127.0.0.1:{port}/v1/completions"
            assert (await client.post(url, json=GOOD, headers=headers)).status_code == status, host


@pytest.mark.parametrize(
    "origin", ["https://a/", "a.example", "https://*.a", "HTTPS://a", "https://", "null"]
)
def test_only_exact_origins(origin: str) -> None:
    with pytest.raises(ValidationError, match="no origin"):
        Settings(cors_origin=[origin])


def test_every_origin_takes_a_key() -> None:
    with pytest.raises(ValidationError, match="every web page"):
        Settings(cors_origin=["*"])
    assert Settings(cors_origin=["*"], api_key=[SecretStr("k")]).cors_origin == ["*"]
