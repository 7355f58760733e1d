"""The live page: its files, their headers, who may read them; it asks for nothing from elsewhere."""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib.resources import files

import httpx
import pytest
from fastapi import FastAPI
from http_support import running
from pydantic import SecretStr

from server.routes.page import PATHS
from server.settings import Settings

PAGE = files("server").joinpath("page")
TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
SAFE = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-cache",
}


def test_the_paths_are_the_files() -> None:
    names = {each.name for each in PAGE.iterdir()}
    assert {"/", *(f"/page/{name}" for name in names - {"index.html"})} == PATHS
    assert {"index.html", "app.js", "style.css"} <= names


@pytest.mark.parametrize("path", sorted(PATHS))
async def test_headers(client: httpx.AsyncClient, path: str) -> None:
    response = await client.get(path)
    name = path.rpartition("/")[2] or "index.html"
    assert response.status_code == 200 and response.content == PAGE.joinpath(name).read_bytes()
    assert response.headers["content-type"].split(";")[0] == TYPES[name.rpartition(".")[2]]
    assert SAFE.items() <= dict(response.headers).items()
    policy = dict(
        each.strip().split(" ", 1) for each in response.headers["content-security-policy"].split(";")
    )
    assert policy.pop("default-src") == "'none'"
    assert set(policy.values()) <= {"'self'", "'none'"} and policy["frame-ancestors"] == "'none'"
    head = await client.head(path)
    assert (head.status_code, head.content, head.headers["etag"]) == (200, b"", response.headers["etag"])


@pytest.mark.parametrize("path", sorted(PATHS))
async def test_it_is_sent_once(client: httpx.AsyncClient, path: str) -> None:
    tag = (await client.get(path)).headers["etag"]
    assert re.fullmatch(r'"[0-9a-f]{32}"', tag)
    for known in (tag, f"W/{tag}", f'"other", {tag}', "*"):
        again = await client.get(path, headers={"if-none-match": known})
        assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", tag)
        assert again.headers["cache-control"] == "no-cache"
    for other in ('"other"', "", tag.strip('"')):
        assert (await client.get(path, headers={"if-none-match": other})).status_code == 200


async def test_what_changes_has_another_tag(client: httpx.AsyncClient) -> None:
    tags = [(await client.get(path)).headers["etag"] for path in PATHS]
    assert len(set(tags)) == len(tags)


async def test_no_other_file(client: httpx.AsyncClient) -> None:
    for path in ("/page/", "/page/index.html", "/page/none.js", "/page/../app.py", "/page/%2e%2e/app.py"):
        response = await client.get(path)
        assert (response.status_code, response.json()["error"]["code"]) == (404, "not_found"), path
    assert (await client.post("/")).status_code == 405


async def test_it_needs_no_key_and_the_api_does(make_app: Callable[..., FastAPI]) -> None:
    async with running(make_app(api_key=[SecretStr("one")])) as client:
        assert {(await client.get(path)).status_code for path in PATHS} == {200}
        for path in ("/page/none.js", "/v1/models", "/v1/policies", "/docs"):
            assert (await client.get(path)).status_code == 401
        assert (await client.post("/v1/completions", json={})).status_code == 401


async def test_it_can_be_left_out(make_app: Callable[..., FastAPI]) -> None:
    async with running(make_app(page=False)) as client:
        assert {(await client.get(path)).status_code for path in PATHS} == {404}
    async with running(make_app(page=False, api_key=[SecretStr("one")])) as client:
        assert {(await client.get(path)).status_code for path in PATHS} == {401}


def test_it_is_left_out_by_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Settings().page
    monkeypatch.setenv("DISCO_PAGE", "false")
    assert not Settings().page


def test_it_is_no_part_of_the_api(make_app: Callable[..., FastAPI]) -> None:
    assert not PATHS & set(make_app().openapi()["paths"])


def test_nothing_from_elsewhere_and_nothing_inline() -> None:
    """The policy would block it; here is where it shows which file would break."""
    for each in PAGE.iterdir():
        text = each.read_text().replace('xmlns="http://www.w3.org/2000/svg"', "")
        assert not re.search(r"https?:|//[\w-]+\.\w|@import|url\(|\bdata:[a-z]", text), each.name
        assert not re.search(r"<style|<script(?![^>]*src=)|\son[a-z]+=|\sstyle=|javascript:", text), each.name
        assert not re.search(r"\beval\(|new Function|innerHTML|outerHTML|document\.write", text), each.name
    page = PAGE.joinpath("index.html").read_text()
    named = set(re.findall(r'(?:src|href)="([^"#]+)"', page))
    scripts = [each.read_text() for each in PAGE.iterdir() if each.name.endswith(".js")]
    named |= {f"page/{name}" for script in scripts for name in re.findall(r'from "\./([^"]+)"', script)}
    assert {f"/{name}" for name in named} == PATHS - {"/"}  # each file is used, and none is missing
    asked = {path for script in scripts for path in re.findall(r'"((?:v1/|ready|health)[\w/]*)"', script)}
    assert asked == {"v1/models", "v1/policies", "v1/chat/completions", "v1/completions", "ready"}
