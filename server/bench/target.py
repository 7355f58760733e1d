"""The server that is measured: what it is, what it serves, and which fields it takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import httpx

_PROBE = "One, two, three,"


class TargetError(Exception):
    """The server cannot be measured; the message says why."""


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
        headers = {} if api_key is None else {"authorization": f"Bearer {api_key}"}
        try:
            self.url = str(httpx.URL(url)).rstrip("/")
            self._client = httpx.Client(
                base_url=self.url, headers=headers, timeout=timeout, trust_env=False, follow_redirects=True
            )
        except UnicodeEncodeError:
            raise TargetError("the API key has characters that no header can hold") from None
        except httpx.InvalidURL as error:
            raise TargetError(f"url {url!r}: {error}") from error
        if self._client.base_url.scheme not in ("http", "https"):
            raise TargetError(f"url {url!r}: http:// or https:// is wanted")

    def __enter__(self) -> Target:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def about(self, model: str | None) -> About:
        """Raises TargetError if the server is not there, or names no model and `model` is None."""
        cards = self._models()
        names = [str(card.get("id")) for card in cards]
        if model is None and not names:
            raise TargetError(f"{self.url}/models names no model: does the URL end in /v1? Else say --model")
        owner = str(cards[0].get("owned_by", "unknown")) if cards else "unknown"
        version = self._json("GET", f"{self._root()}/version").get("version")
        kind = {"llamacpp": "llama.cpp"}.get(owner, owner)
        return About(self.url, kind, None if version is None else str(version), model or names[0], names)

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
        count = found.get("count", found.get("tokens"))
        if not isinstance(count, int | list):
            raise TargetError(
                f"{self._root()}/tokenize counts no longer: is the prompt too long for the model?"
            )
        return count if isinstance(count, int) else len(count)

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
                return response.status_code, response.read().decode(errors="replace")
        except httpx.HTTPError as error:
            raise TargetError(f"{self.url}/{path}: {type(error).__name__}: {error}") from error

    def _models(self) -> list[dict[str, Any]]:
        try:
            answer = self._client.get("models")
        except httpx.HTTPError as error:
            raise TargetError(f"no server at {self.url}: {type(error).__name__}: {error}") from error
        if answer.status_code in (401, 403):
            raise TargetError(f"{self.url} wants a key: --api-key or OPENAI_API_KEY")
        with suppress(ValueError):
            found = answer.json()
            if isinstance(found, dict) and isinstance(found.get("data"), list):
                return [card for card in found["data"] if isinstance(card, dict)]
        if answer.status_code == 404:
            return []
        raise TargetError(f"{self.url}/models answers HTTP {answer.status_code}, no list of models")

    def _json(self, method: str, url: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The object of an answer of 200; else an empty one."""
        with suppress(httpx.HTTPError, ValueError):
            answer = self._client.request(method, url, json=body)
            found = answer.json() if answer.status_code == 200 else None
            return found if isinstance(found, dict) else {}
        return {}

    def _root(self) -> str:
        return self.url.removesuffix("/v1")
