"""The API's description for people: complete, without scripts, nothing from elsewhere, and it can be off."""

from __future__ import annotations

import html
import re
from collections.abc import Callable

import httpx
from fastapi import FastAPI
from http_support import running
from pydantic import SecretStr

from server.routes.docs import typed

MakeApp = Callable[..., FastAPI]


async def test_it_tells_every_route_and_every_field(client: httpx.AsyncClient) -> None:
    response = await client.get("/docs")
    assert response.status_code == 200 and response.headers["content-type"].startswith("text/html")
    text = html.unescape(response.text)
    page = (await client.get("/openapi.json")).json()
    for path, operations in page["paths"].items():
        for method, operation in operations.items():
            assert f'id="{method} {path}"' in text and operation["description"] in text
    for name, schema in page["components"]["schemas"].items():
        assert f'id="{name}"' in text
        for field in schema.get("properties", {}):
            assert f"<code>{field}</code>" in text
    for anchor in set(re.findall('href="#([^"]+)"', text)):
        assert f'id="{anchor}"' in text, anchor


async def test_it_loads_nothing_from_elsewhere(client: httpx.AsyncClient) -> None:
    response = await client.get("/docs")
    assert "default-src 'none'" in response.headers["content-security-policy"]
    assert response.headers["x-content-type-options"] == "nosniff"
    assert not re.search(r"<script|\son\w+=|style=|src=|href=\"(https?:)?//", response.text)
    style = await client.get("/docs/docs.css")
    assert style.status_code == 200 and style.headers["content-type"].startswith("text/css")
    assert "url(" not in style.text and "@import" not in style.text
    assert (await client.get("/redoc")).status_code == 404


async def test_it_can_be_off(make_app: MakeApp) -> None:
    async with running(make_app(docs=False)) as client:
        for path in ("/docs", "/docs/docs.css", "/openapi.json", "/redoc"):
            assert (await client.get(path)).status_code == 404
        assert (await client.get("/v1/models")).status_code == 200


async def test_it_needs_the_key(make_app: MakeApp) -> None:
    async with running(make_app(api_key=[SecretStr("one")])) as client:
        for path in ("/docs", "/openapi.json"):
            assert (await client.get(path)).status_code == 401
        text = (await client.get("/docs", headers={"authorization": "Bearer one"})).text
        assert "Authorization: Bearer KEY" in text


async def test_what_an_operator_names_is_escaped(make_app: MakeApp) -> None:
    async with running(make_app(served_model_name=["</pre><script>alert(1)</script>"])) as client:
        assert "<script" not in (await client.get("/docs")).text


def test_types_in_words() -> None:
    said = {
        "integer ≥ 1 or null": {"anyOf": [{"type": "integer", "minimum": 1}, {"type": "null"}]},
        "list of (string)": {"type": "array", "items": {"type": "string"}},
        "<code>a</code> or <code>1</code>": {"enum": ["a", 1]},
        '<a href="#Usage">Usage</a>': {"$ref": "#/components/schemas/Usage"},
        "any": {},
        "<code>&lt;b&gt;</code>": {"const": "<b>"},
    }
    for words, schema in said.items():
        assert str(typed(schema)) == words
