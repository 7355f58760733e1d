"""benchmarks/data/tasks.jsonl: what stop policies are judged on, apart from what heads are trained on."""

from __future__ import annotations

import re
from collections import Counter
from importlib import resources
from pathlib import Path

import pytest

from classifiers import heldout
from classifiers.data_files import Prompt, read_data

COUNTS = {"code": 40, "instructions": 40, "summaries": 40, "prose": 40, "noise": 16}
CHAT = {"instructions", "summaries"}
RUN = 12  # words in a row that two prompts of different files must not share


def _text(prompt: Prompt) -> str:
    return prompt.text or "\n".join(message["content"] for message in prompt.messages)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _runs(text: str) -> set[tuple[str, ...]]:
    """Every run of `RUN` words; the whole of a shorter text."""
    words = _words(text)
    return {tuple(words[at : at + RUN]) for at in range(max(1, len(words) - RUN + 1))}


@pytest.fixture(scope="module")
def tasks() -> list[Prompt]:
    path = Path(__file__).parents[2] / "benchmarks/data/tasks.jsonl"
    return read_data([str(path)])[0]


def test_each_category_has_its_prompts_in_its_form(tasks: list[Prompt]) -> None:
    assert Counter(prompt.category for prompt in tasks) == COUNTS
    for prompt in tasks:
        assert bool(prompt.messages) == (prompt.category in CHAT), prompt.name
        assert not prompt.messages or [message["role"] for message in prompt.messages] == ["user"]
        assert prompt.name.startswith(f"{prompt.category}/")


def test_names_and_texts_are_unique(tasks: list[Prompt]) -> None:
    assert not [name for name, times in Counter(prompt.name for prompt in tasks).items() if times > 1]
    texts = Counter(" ".join(_words(_text(prompt))) for prompt in tasks)
    assert not [text for text, times in texts.items() if times > 1]


def test_lengths_are_those_of_the_category(tasks: list[Prompt]) -> None:
    low_high = {"instructions": (10, 60), "summaries": (110, 180), "prose": (20, 60)}
    for prompt in tasks:
        text = _text(prompt)
        if prompt.category == "summaries":
            wish, _, text = text.partition("\n\n")
            assert wish and text, prompt.name
        if prompt.category in low_high:
            low, high = low_high[prompt.category]
            assert low <= len(text.split()) <= high, prompt.name


def test_nothing_of_it_is_in_the_other_files(tasks: list[Prompt]) -> None:
    with resources.as_file(resources.files("classifiers").joinpath("data/examples.jsonl")) as path:
        examples = read_data([str(path)])[0]
    others = [*map(_text, examples), *(prompt.text for prompt in heldout.prompts())]
    known = {run for text in others for run in _runs(text)}
    assert not {prompt.name for prompt in examples} & {prompt.name for prompt in tasks}
    assert not [prompt.name for prompt in tasks if _runs(_text(prompt)) & known]
