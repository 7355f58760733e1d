"""Conversations, to see where their turns go."""

from __future__ import annotations

from typing import Any

import httpx

from ray_check.streams import REPLICA_HEADER

_SYSTEM = "You are a librarian. Answer in one short sentence, and never mention that you are one. " * 4


def conversations(url: str, model: str, count: int, turns: int) -> list[list[str]]:
    """The replicas of each conversation's turns. All begin with the same system prompt."""
    with httpx.Client(base_url=url, timeout=600) as client:
        return [_conversation(client, model, number, turns) for number in range(count)]


def _conversation(client: httpx.Client, model: str, number: int, turns: int) -> list[str]:
    messages: list[dict[str, Any]] = [{"role": "system", "content": _SYSTEM}]
    replicas = []
    for turn in range(turns):
        messages.append(
            {"role": "user", "content": f"Question {turn} of reader {number}: what shall I read?"}
        )
        body = {"model": model, "messages": messages, "max_tokens": 8, "temperature": 0}
        response = client.post("/v1/chat/completions", json=body)
        response.raise_for_status()
        replicas.append(response.headers[REPLICA_HEADER])
        said = response.json()["choices"][0]["message"]["content"]
        messages.append({"role": "assistant", "content": said})
    return replicas
