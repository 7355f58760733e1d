"""What the server answers to a request, whole or streamed, by any of the three ways to generate."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import httpx


@dataclass
class Said:
    """One choice. `ids`: its tokens, where the request has `return_token_ids`."""

    text: str = ""
    ids: list[int] = field(default_factory=list)
    finish: str | None = None


@dataclass
class Reply:
    """One answer. `status`: 0 if it was left before there was one; `fault`: what an error said.

    `sent`: the whole request was; what was left before that the server need not know of.
    """

    status: int = 0
    left: bool = False
    sent: bool = False
    fault: str | None = None
    usage: dict[str, Any] | None = None  # under the names of completions
    choices: dict[int, Said] = field(default_factory=dict)
    speculation: list[dict[str, Any]] = field(default_factory=list)  # the sum is that of the answer

    def said(self) -> list[Said]:
        """The choices in their order."""
        return [said for _, said in sorted(self.choices.items())]

    def take(self, part: dict[str, Any]) -> None:
        """Adds a whole answer of completions or chat, or a chunk of one."""
        if "error" in part:
            self.fault = str(part)[:400]
            return
        self.usage = part.get("usage") or self.usage
        for choice in part["choices"]:
            said = self.choices.setdefault(choice["index"], Said())
            message = choice.get("message") or choice.get("delta") or {}
            said.text += choice.get("text") or message.get("content") or ""
            said.ids += choice.get("token_ids") or []
            said.finish = choice["finish_reason"] or said.finish
        if "speculation" in part:
            self.speculation.append(part["speculation"])

    def take_response(self, response: dict[str, Any]) -> None:
        """Takes a whole answer of the Responses API, which has one choice."""
        if response["status"] not in ("completed", "incomplete"):
            self.fault = str(response.get("error"))
            return
        usage = response["usage"]
        self.usage = {"prompt_tokens": usage["input_tokens"], "completion_tokens": usage["output_tokens"]}
        parts = [part for item in response["output"] for part in item.get("content", ())]
        self.choices[0] = Said(
            "".join(part.get("text", "") for part in parts),
            response.get("token_ids") or [],
            "length" if response["status"] == "incomplete" else "stop",
        )
        self.speculation.append(response["speculation"])


async def ask(
    client: httpx.AsyncClient, path: str, body: dict[str, Any], leave_after: float | None = None
) -> Reply:
    """Sends a request and reads its answer. `leave_after`: see `accounts.Ask`. Raises httpx.HTTPError."""
    reply = Reply()

    async def trace(event: str, _: object) -> None:
        reply.sent = reply.sent or event == "http11.send_request_body.complete"

    if body.get("stream"):
        await _stream(client, path, body, leave_after, reply)
        return reply
    try:
        asked = client.post(path, json=body, extensions={"trace": trace})
        answer = await asyncio.wait_for(asked, leave_after)
    except TimeoutError:
        reply.left = True
        return reply
    reply.status = answer.status_code
    if answer.status_code != 200:
        reply.fault = answer.text[:400]
    elif path == "/v1/responses":
        reply.take_response(answer.json())
    else:
        reply.take(answer.json())
    return reply


async def _stream(
    client: httpx.AsyncClient, path: str, body: dict[str, Any], leave_after: float | None, reply: Reply
) -> None:
    count = 0
    async with client.stream("POST", path, json=body) as answer:
        reply.status = answer.status_code
        if answer.status_code != 200:
            reply.fault = (await answer.aread()).decode()[:400]
            return
        async for part in _parts(answer):
            if leave_after is not None and count >= leave_after:
                reply.left = True
                return
            count += 1
            kind = part.get("type", "")
            if kind in ("response.completed", "response.incomplete", "response.failed"):
                reply.take_response(part["response"])
            elif not kind.startswith("response."):
                reply.take({"error": part} if kind == "error" else part)
    if reply.usage is None and reply.fault is None:
        reply.fault = f"a stream without usage: {path} {body}"[:400]


async def _parts(answer: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    async for line in answer.aiter_lines():
        if line.startswith("data: ") and line != "data: [DONE]":
            yield json.loads(line.removeprefix("data: "))
