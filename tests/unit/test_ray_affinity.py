"""Where a request goes under Ray Serve: keys of prefixes, and the order of replicas."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "deploy" / "ray"))

from disco_ray.affinity import HEAD_CHARACTERS, affinity_key, least_busy, ranked

CHAT, TEXT, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
SYSTEM = {"role": "system", "content": "Be short."}
FIRST = {"role": "user", "content": "Hello"}


def key(path: str, **body: Any) -> str | None:
    return affinity_key(path, json.dumps(body).encode())


def test_the_turns_of_a_conversation_have_one_key() -> None:
    messages = [SYSTEM, FIRST]
    first = key(CHAT, messages=messages, max_tokens=8)
    later = [*messages, {"role": "assistant", "content": "Hi"}, {"role": "user", "content": "And?"}]
    assert first is not None
    assert key(CHAT, messages=later, temperature=0) == first
    assert key(CHAT, messages=[SYSTEM, {"role": "user", "content": "Bye"}]) != first


def test_tools_and_instructions_are_part_of_the_prefix() -> None:
    assert key(CHAT, messages=[FIRST]) != key(CHAT, messages=[FIRST], tools=[{"type": "function"}])
    assert key(RESPONSES, input="Hello") != key(RESPONSES, input="Hello", instructions="Be short.")
    turns = [FIRST, {"role": "assistant", "content": "Hi"}]
    assert key(RESPONSES, input="Hello") == key(RESPONSES, input=turns)


def test_texts_that_begin_alike_have_one_key() -> None:
    head = "x" * HEAD_CHARACTERS
    assert key(TEXT, prompt=head + "a") == key(TEXT, prompt=head + "b")
    assert key(TEXT, prompt="a" + head) != key(TEXT, prompt="b" + head)
    assert key(TEXT, prompt=[head + "a", "other"]) == key(TEXT, prompt=head)
    ids = list(range(100))
    assert key(TEXT, prompt=[*ids, 1]) == key(TEXT, prompt=[ids]) != key(TEXT, prompt=[7, *ids])


def test_a_key_that_the_client_gives_comes_first() -> None:
    assert key(TEXT, prompt="a", prompt_cache_key="k") == key(CHAT, messages=[FIRST], prompt_cache_key="k")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/models", b"{}"),
        (TEXT, b""),
        (TEXT, b"not JSON"),
        (TEXT, b"\xff"),
        (TEXT, b"[1]"),
        (TEXT, b"[" * 100_000),
        (TEXT, b'{"prompt": ""}'),
        (TEXT, b'{"prompt": []}'),
        (TEXT, b'{"prompt": 3}'),
        (CHAT, b'{"messages": "Hello"}'),
        (CHAT, b'{"messages": []}'),
        (CHAT, b"{}"),
    ],
)
def test_what_has_no_prefix_has_no_key(path: str, body: bytes) -> None:
    assert affinity_key(path, body) is None


def test_odd_messages_do_no_harm() -> None:
    assert key(CHAT, messages=[1, None, {"content": [{"type": "text"}]}]) is not None


def test_an_idle_cluster_sends_a_prefix_to_its_home() -> None:
    replicas = dict.fromkeys("abcd", 0)
    homes = Counter(ranked(str(i), replicas, 1.25, 8)[0] for i in range(400))
    assert ranked("k", replicas, 1.25, 8) == ranked("k", dict(reversed(replicas.items())), 1.25, 8)
    assert set(homes) == set("abcd") and min(homes.values()) > 50


def test_a_replica_that_goes_moves_only_its_own_prefixes() -> None:
    four, three = dict.fromkeys("abcd", 0), dict.fromkeys("abc", 0)
    for i in range(100):
        before = ranked(str(i), four, 1.25, 8)
        assert ranked(str(i), three, 1.25, 8) == [name for name in before if name != "d"]


def test_a_prefix_that_all_share_spreads() -> None:
    loads = dict.fromkeys("abcd", 0)
    for _ in range(200):
        loads[ranked("shared", loads, 1.25, 8)[0]] += 1
    assert max(loads.values()) <= 1.25 * 200 / 4 + 1


def test_up_to_the_spare_load_a_home_keeps_its_prefix() -> None:
    home = ranked("k", {"a": 0, "b": 0}, 1.25, 8)[0]
    other = {"a": "b", "b": "a"}[home]
    assert ranked("k", {home: 7, other: 0}, 1.25, 8)[0] == home
    assert ranked("k", {home: 8, other: 0}, 1.25, 8)[0] == other


def test_busy_replicas_come_last_and_none_is_left_out() -> None:
    assert ranked("k", {"a": 50, "b": 40, "c": 0}, 1.25, 8) == ["c", "b", "a"]
    assert ranked("k", {}, 1.25, 8) == []


def test_without_a_prefix_the_least_busy_comes_first() -> None:
    assert least_busy("r", {"a": 2, "b": 0, "c": 1}) == ["b", "c", "a"]
    ties = Counter(least_busy(str(i), {"a": 0, "b": 0})[0] for i in range(200))
    assert min(ties.values()) > 50
