"""The server that is measured: what it is, what it serves, and which fields it takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import httpx

from server.bench.told import (
    BadFigure,
    check_sending,
    count_of,
    without_key,
    without_userinfo,
)
from server.log_lines import one_line

_PROBE = "One, two, three,"
_BROKEN = (httpx.HTTPError, httpx.InvalidURL, ValueError, RecursionError)  # what a bad answer raises


class TargetError(Exception):
    """The server cannot be measured; the message says why."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


@dataclass(frozen=True)
class About:
    """What a server says of itself. `kind` is "disco-serve", "vllm", "llama.cpp" or another owner's name."""

    url: str
    kind: str
    version: str | None
    model: str
    models: list[str]


class Target:
    """A base URL such as http://127.0.0.1:8000/v1, asked by one client. Close it by `with`."""

    def __init__(self, url: str, api_key: str | None, timeout: float) -> None:
        shown = without_userinfo(url)
        try:
            check_sending(timeout, api_key)
        except ValueError as error:
            raise TargetError(str(error)) from None
        self._key = api_key
        headers = {} if api_key is None else {"authorization": f"Bearer {api_key}"}
        try:
            if httpx.URL(url).userinfo:
                raise TargetError(f"url {shown!r} had a user or a password: --api-key is what is sent")
            self.url = str(httpx.URL(url)).rstrip("/")
            self._client = httpx.Client(
                base_url=self.url, headers=headers, timeout=timeout, trust_env=False, follow_redirects=True
            )
        except (httpx.InvalidURL, ValueError) as error:
            raise TargetError(f"url {shown!r}" + ("" if "@" in url else f": {error}")) from None
        if self._client.base_url.scheme not in ("http", "https"):
            raise TargetError(f"url {shown!r}: http:// or https:// is wanted")

    def __enter__(self) -> Target:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def about(self, model: str | None) -> About:
        """Raises TargetError if the server is not there, or names no model and `model` is None."""
        cards = self._models()
        names = [card["id"] for card in cards]
        if model is None and not names:
            raise TargetError(f"{self.url}/models names no model: does the URL end in /v1? Else say --model")
        owner = cards[0].get("owned_by") if cards else None
        owner = owner if isinstance(owner, str) else "unknown"
        version = self._json("GET", f"{self._root()}/version").get("version")
        kind = {"llamacpp": "llama.cpp"}.get(owner, owner)
        version = version if isinstance(version, str) else None
        return About(self.url, kind, version, model or names[0], names)

    def token_counter(self, model: str) -> Callable[[str], int] | None:
        """Counts tokens of a text by the server's /tokenize (ours, vLLM's, llama.cpp's); None without one."""
        if isinstance(self._tokenized({"model": model, "prompt": _PROBE}).get("count"), int):
            return lambda text: self._length({"model": model, "prompt": text})
        if isinstance(self._tokenized({"content": _PROBE}).get("tokens"), list):
            return lambda text: self._length({"content": text})
        return None

    def _tokenized(self, body: Mapping[str, Any]) -> dict[str, Any]:
        return self._json("POST", f"{self._root()}/tokenize", body)

    def _length(self, body: Mapping[str, Any]) -> int:
        found = self._tokenized(body)
        tokens = found.get("tokens")
        try:
            count = len(tokens) if isinstance(tokens, list) else None
            count = count_of(found, "count") if "count" in found else count
        except BadFigure as error:
            raise TargetError(f"{self._root()}/tokenize: {error}") from error
        if count is None:
            raise TargetError(
                f"{self._root()}/tokenize counts no longer: is the prompt too long for the model?"
            )
        return count

    def accepted(self, path: str, body: Mapping[str, Any], optional: tuple[str, ...]) -> list[str]:
        """Those of the `optional` fields of `body` that the server refuses (400 or 422), found by a short
        request. Raises TargetError for a request that it refuses without them, too."""
        small = {**body, "stream": True}
        if "min_tokens" not in body:
            small["max_tokens"] = 1
        refused: list[str] = []
        while True:
            status, text = self._try(path, {name: small[name] for name in small if name not in refused})
            if status not in (400, 404, 401, 403, 422):
                return refused  # taken; or full or broken at present, which the load will show
            left = [name for name in optional if name in small and name not in refused]
            if status not in (400, 422) or not left:
                raise TargetError(f"{self.url}/{path} refuses the request: HTTP {status}: {text[:500]}")
            named = [name for name in left if name in text]
            refused.append((named or left)[0])

    def _try(self, path: str, body: Mapping[str, Any]) -> tuple[int, str]:
        try:
            with self._client.stream("POST", path, json=body) as response:
                text = response.read().decode(errors="replace")
                return response.status_code, without_key(text, self._key)
        except _BROKEN as error:
            raise TargetError(f"{self.url}/{path}: {type(error).__name__}: {error}") from error

    def _models(self) -> list[dict[str, Any]]:
        try:
            answer = self._client.get("models")
        except _BROKEN as error:
            raise TargetError(f"no server at {self.url}: {type(error).__name__}: {error}") from error
        if answer.status_code in (401, 403):
            raise TargetError(f"{self.url} wants a key: --api-key or OPENAI_API_KEY")
        with suppress(*_BROKEN):
            found = answer.json()
            if isinstance(found, dict) and isinstance(found.get("data"), list):
                return [
                    card
                    for card in found["data"]
                    if isinstance(card, dict) and isinstance(card.get("id"), str)
                ]
        if answer.status_code == 404:
            return []
        raise TargetError(f"{self.url}/models answers HTTP {answer.status_code}, no list of models")

    def _json(self, method: str, url: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The object of an answer of 200; else an empty one."""
        with suppress(*_BROKEN):
            answer = self._client.request(method, url, json=body)
            found = answer.json() if answer.status_code == 200 else None
            return found if isinstance(found, dict) else {}
        return {}

    def _root(self) -> str:
        return self.url.removesuffix("/v1")
