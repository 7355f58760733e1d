"""The prompts that every benchmark over HTTP sends, the same for every server."""

from __future__ import annotations

from itertools import zip_longest

from classifiers import heldout
from classifiers.heldout import Prompt

SHORT = (
    "The three things every garden needs are",
    "def fibonacci(n):",
    "Once upon a time, a lighthouse keeper",
    "The train to the coast leaves at",
    "SELECT name, total FROM orders WHERE",
    "To bake bread at home, first",
    "The square of seventeen is",
    "Dear neighbours, on Saturday we will",
    "import json\n\nwith open(",
    "A good night's sleep begins with",
    "The river rose slowly, and by noon",
    "If a box holds twelve eggs, five boxes hold",
    "class Queue:\n    def __init__(self):",
    "The meeting ended early because",
    "Water boils at a lower temperature when",
    "She opened the old letter and read:",
)
"""Texts to be continued, shorter than a KV block of 16 tokens, so that prefix caches make no difference."""

Wire = str | tuple[int, ...]
"""A prompt as /v1/completions takes it: a text, or token ids."""


def on_the_wire(name: str, tokenizer: str | None = None) -> tuple[Wire, ...]:
    """The prompts called `name`: "short", or "heldout" with its categories taking turns.

    With `tokenizer`, a reference, they are token ids and a message goes through its chat template;
    without, they are plain texts. Raises ValueError for another name, ModelError for the reference.
    """
    if name == "short":
        chosen = [Prompt("short", text, chat=False) for text in SHORT]
    elif name == "heldout":
        chosen = by_turns(heldout.prompts())
    else:
        raise ValueError(f"prompts {name!r}: known are short and heldout")
    if tokenizer is None:
        return tuple(prompt.text for prompt in chosen)
    # here, because they bring torch, which sending texts can do without
    from classifiers.pair_texts import encode
    from engine.models.load import load_tokenizer

    return tuple(each.ids for each in encode(chosen, load_tokenizer(tokenizer)))


def by_turns(prompts: list[Prompt]) -> list[Prompt]:
    """One of each category, then the next of each: any first n are of all categories alike."""
    categories: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        categories.setdefault(prompt.category, []).append(prompt)
    turns = zip_longest(*categories.values())
    return [prompt for turn in turns for prompt in turn if prompt is not None]
