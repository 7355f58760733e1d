"""Which replica a request should go to: the one that has its prefix cached, unless that one is too busy.

Pure functions, without Ray. Consistent hashing with bounded loads (arXiv 1608.01350) over rendezvous
hashing: every front finds the same home for a prefix without asking anyone, a replica that comes or goes
moves only its own prefixes, and a prefix that all requests share spreads over all replicas.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Any

HEAD_CHARACTERS = 256
"""Of a text prompt: prompts that begin alike share a home."""
HEAD_TOKENS = 64
"""The same of a prompt of token ids."""


def affinity_key(path: str, body: bytes) -> str | None:
    """What requests that share a cached prefix have in common; None if there is nothing to go by.

    `prompt_cache_key` if the client gave one. Else, of a chat, everything up to its first user message: all
    turns of a conversation have that in common. Of a text, its beginning. Faulty bodies have no key; the
    replica tells what is wrong with them.
    """
    read = _READERS.get(path)
    if read is None:
        return None
    try:
        data = json.loads(body)
    except (ValueError, RecursionError):
        return None
    if not isinstance(data, dict):
        return None
    given = data.get("prompt_cache_key")
    if isinstance(given, str) and given:
        return _digest(["key", given])
    head = read(data)
    return None if head is None else _digest(head)


def ranked(key: str, loads: Mapping[str, int], slack: float, spare: int) -> list[str]:
    """Replicas for the prefix `key`, best first. `loads`: requests under way, by replica.

    The order is the prefix's own, but replicas above the bound come last, least busy first. The bound is
    `slack` times the mean load with this request, and never below `spare`: up to there a replica batches
    them for little.
    """
    if not loads:
        return []
    bound = max(math.ceil(slack * (sum(loads.values()) + 1) / len(loads)), spare)
    order = sorted(loads, key=lambda replica: _digest([key, replica]))
    free = [replica for replica in order if loads[replica] < bound]
    busy = [replica for replica in order if loads[replica] >= bound]
    return free + sorted(busy, key=loads.__getitem__)


def least_busy(salt: str, loads: Mapping[str, int]) -> list[str]:
    """Replicas for a request without a prefix, least busy first; `salt` decides between equals."""
    return sorted(loads, key=lambda replica: (loads[replica], _digest([salt, replica])))


def _of_completion(data: dict[str, Any]) -> Any:
    prompt = data.get("prompt")
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list):
        prompt = prompt[0]  # several prompts: the first one's
    if isinstance(prompt, str):
        return ["text", prompt[:HEAD_CHARACTERS]] if prompt else None
    return ["ids", prompt[:HEAD_TOKENS]] if isinstance(prompt, list) and prompt else None


def _of_chat(data: dict[str, Any]) -> Any:
    return _of_messages(data.get("messages"), data.get("tools"))


def _of_response(data: dict[str, Any]) -> Any:
    given = data.get("input")
    if isinstance(given, str):
        given = [{"role": "user", "content": given}]
    return _of_messages(given, [data.get("instructions"), data.get("tools")])


def _of_messages(messages: Any, before: Any) -> Any:
    if not isinstance(messages, list) or not messages:
        return None
    roles = [each.get("role") if isinstance(each, dict) else None for each in messages]
    end = roles.index("user") + 1 if "user" in roles else 1
    return ["chat", before, _plain(messages[:end])]


def _plain(messages: Sequence[Any]) -> list[Any]:
    return [[each.get("role"), each.get("content")] if isinstance(each, dict) else each for each in messages]


def _digest(parts: Any) -> str:
    return blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()


_READERS = {
    "/v1/completions": _of_completion,
    "/v1/chat/completions": _of_chat,
    "/v1/responses": _of_response,
}
