"""Prompts for judging drafts: never trained on, written for this project."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources

import msgspec


@dataclass(frozen=True)
class Prompt:
    """`text` is a user's message for the chat template or, without `chat`, raw text to be continued."""

    category: str
    text: str
    chat: bool = True


class _Line(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    category: str
    prompt: str
    chat: bool


def prompts(per_category: int | None = None) -> list[Prompt]:
    """The held-out prompts: all of them, or the first `per_category` of each category.

    Raises ValueError if a category has fewer than that, or for a number below 1.
    """
    if per_category is None:
        return list(_all())
    fewest = min(Counter(prompt.category for prompt in _all()).values())
    if not 1 <= per_category <= fewest:
        raise ValueError(f"held-out prompts of a category: {per_category}, must be 1 to {fewest}")
    return first_of_each(_all(), per_category)


def first_of_each(found: Iterable[Prompt], per_category: int) -> list[Prompt]:
    """At most `per_category` prompts of each category, the first ones."""
    taken: Counter[str] = Counter()
    kept = []
    for prompt in found:
        taken[prompt.category] += 1
        if taken[prompt.category] <= per_category:
            kept.append(prompt)
    return kept


@functools.cache
def _all() -> tuple[Prompt, ...]:
    lines = resources.files("classifiers").joinpath("data/heldout.jsonl").read_bytes().splitlines()
    read = (msgspec.json.decode(line, type=_Line) for line in lines)
    return tuple(Prompt(line.category, line.prompt, line.chat) for line in read)
