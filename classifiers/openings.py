"""Openings that a target continues, so that a draft can learn from the target's own text.

They combine the templates and lists of `classifiers/data/openings.json`, all written for this project. The
held-out prompts (`classifiers.heldout`) cannot come out of them; tests/unit/test_prompts.py holds that.
"""

from __future__ import annotations

import functools
import random
import re
from dataclasses import dataclass
from importlib import resources
from typing import Literal

import msgspec

Kind = Literal["user", "user_open", "text"]

SHARES = {"code": 0.40, "chat": 0.25, "writing": 0.17, "arithmetic": 0.13, "text": 0.05}
"""Of the openings. Code leads, its long predictable stretches pay most; chat comes next, as what is asked
most besides; raw text is only what completions without a chat template need."""
OPEN = 0.5  # of user messages break off: what the target asks itself is more varied than any list
MANNERED = 0.3  # of user messages end with a wish about the answer
CASUAL = 0.1  # of user messages are typed without a capital and a final mark
PYTHON = 0.55  # of the places where a template leaves the language open

SLOT = re.compile(r"\{([a-z_]+|N)(?::(\w+))?\}")
"""`{slot}`: an entry of that list, not yet used in this opening; `{slot:label}`: the same entry wherever the
label stands again; `{n}` and `{N}`: a small and a large number."""


@dataclass(frozen=True)
class Opening:
    """`kind`: a whole user message, the beginning of one, or raw text to go on with."""

    text: str
    kind: Kind


class Catalogue(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`templates` and `manners` (wishes about the answer) by share, `slots` by name."""

    templates: dict[str, list[str]]
    manners: dict[str, list[str]]
    slots: dict[str, list[str]]


def openings(seed: int, count: int) -> list[Opening]:
    """`count` different openings, the same for a seed.

    Raises ValueError for a negative count.
    """
    if count < 0:
        raise ValueError(f"count is {count}, must be at least 0")
    rng = random.Random(seed)
    names, shares = list(SHARES), list(SHARES.values())
    seen: set[str] = set()
    found = []
    for name in rng.choices(names, shares, k=count):
        kind: Kind = "text" if name == "text" else "user_open" if rng.random() < OPEN else "user"
        text = _text(rng, name, kind)
        while text in seen:  # drawn again as the same kind, so that the shares hold
            text = _text(rng, name, kind)
        seen.add(text)
        found.append(Opening(text, kind))
    return found


@functools.cache
def catalogue() -> Catalogue:
    """What openings are made of."""
    data = resources.files("classifiers").joinpath("data/openings.json").read_bytes()
    return msgspec.json.decode(data, type=Catalogue)


def _text(rng: random.Random, name: str, kind: Kind) -> str:
    text = _Filler(rng).fill(rng.choice(catalogue().templates[name]))
    if kind == "text":
        return text
    if rng.random() < MANNERED:
        between = "\n" if "\n" in text else " "
        text += between + rng.choice(catalogue().manners[name])
    if rng.random() < CASUAL:
        text = text[0].lower() + text[1:].rstrip(".?!")
    if kind == "user":
        return text
    words = text.split(" ")
    return " ".join(words[: rng.randint(2, len(words) - 1)])


class _Filler:
    """Fills the slots of one opening."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._labelled: dict[str, str] = {}
        self._used: set[str] = set()

    def fill(self, template: str) -> str:
        return SLOT.sub(lambda slot: self._value(slot[0], slot[1], slot[2]), template)

    def _value(self, slot: str, name: str, label: str | None) -> str:
        if slot not in self._labelled:
            value = self._draw(name)
            if label is None:
                return value
            self._labelled[slot] = value
        return self._labelled[slot]

    def _draw(self, name: str) -> str:
        if name == "n":
            return str(self._rng.randint(2, 24))
        if name == "N":
            return str(self._rng.randint(25, 2500))
        if name == "language" and self._rng.random() < PYTHON:
            return "Python"
        entries = [entry for entry in catalogue().slots[name] if entry not in self._used]
        entry = self._rng.choice(entries)
        self._used.add(entry)
        return self.fill(entry)
