"""Held-out prompts and training openings, and that the two stay apart."""

from __future__ import annotations

import random
import re
from collections import Counter

import pytest

from classifiers import openings as module
from classifiers.heldout import prompts
from classifiers.openings import SHARES, SLOT, Opening, catalogue, openings

CATEGORIES = ("code", "chat", "arithmetic", "writing")
HELD_OUT_LISTS = (
    "task",
    "web_task",
    "sql_task",
    "data_task",
    "shell_task",
    "goal",
    "sentence",
    "passage",
    "wrong",
)


def normal(text: str) -> str:
    """Lower case words only, one space between."""
    return re.sub(r"[\W_]+", " ", text.lower()).strip()


def runs(text: str, length: int) -> set[tuple[str, ...]]:
    words = normal(text).split()
    return {tuple(words[i : i + length]) for i in range(len(words) - length + 1)}


@pytest.fixture(scope="module")
def drawn() -> list[Opening]:
    return openings(11, 20_000)


# held-out prompts


def test_held_out_counts() -> None:
    counts = Counter(prompt.category for prompt in prompts())
    assert set(counts) == set(CATEGORIES)
    assert min(counts.values()) >= 48


def test_held_out_prompts_are_different() -> None:
    texts = [normal(prompt.text) for prompt in prompts()]
    assert len(set(texts)) == len(texts)
    assert all(texts)


def test_raw_prompts_are_some_of_code() -> None:
    raw = [prompt for prompt in prompts() if not prompt.chat]
    code = [prompt for prompt in prompts() if prompt.category == "code"]
    assert {prompt.category for prompt in raw} == {"code"}
    assert 8 <= len(raw) <= len(code) / 4


def test_first_of_each_category() -> None:
    few = prompts(3)
    assert Counter(prompt.category for prompt in few) == dict.fromkeys(CATEGORIES, 3)
    for category in CATEGORIES:
        first = [prompt for prompt in prompts() if prompt.category == category][:3]
        assert [prompt for prompt in few if prompt.category == category] == first


@pytest.mark.parametrize("count", [0, -1, 10_000])
def test_numbers_that_cannot_be_had_are_refused(count: int) -> None:
    with pytest.raises(ValueError, match=str(count)):
        prompts(count)


def test_the_caller_owns_the_list() -> None:
    prompts().clear()
    assert prompts()


# the catalogue


def test_catalogue_sizes() -> None:
    found = catalogue()
    assert set(found.templates) == set(SHARES)
    assert set(found.manners) == set(SHARES) - {"text"}
    assert sum(len(found.templates[name]) for name in CATEGORIES) >= 150
    assert len(found.templates["text"]) >= 50
    assert len(found.slots["topic"]) >= 400
    assert len(found.slots["task"]) >= 200


def test_catalogue_entries_are_different() -> None:
    found = catalogue()
    for lists in (found.templates, found.manners, found.slots):
        for name, entries in lists.items():
            twice = [entry for entry, count in Counter(entries).items() if count > 1]
            assert not twice, f"{name}: {twice}"


def test_every_slot_has_a_list_and_every_list_a_slot() -> None:
    found = catalogue()
    texts = [
        text for lists in (found.templates, found.slots) for entries in lists.values() for text in entries
    ]
    assert {slot[1] for text in texts for slot in SLOT.finditer(text)} - {"n", "N"} == set(found.slots)


def test_every_template_fills() -> None:
    for entries in catalogue().templates.values():
        for template in entries:
            assert not SLOT.search(module._Filler(random.Random(3)).fill(template)), template


def test_user_messages_can_break_off() -> None:
    for name in CATEGORIES:
        for template in catalogue().templates[name]:
            for seed in range(30):
                filled = module._Filler(random.Random(seed)).fill(template)
                assert len(filled.split(" ")) >= 3, template


def test_labels_repeat_and_others_do_not() -> None:
    for seed in range(50):
        filled = module._Filler(random.Random(seed)).fill("{name:1} {name:2} {name:1} {name}")
        first, second, again, other = filled.split()
        assert first == again
        assert len({first, second, other}) == 3


def test_braces_of_code_stay() -> None:
    text = 'x = {} {"a": {1}} {X} { n } ${}'
    assert module._Filler(random.Random(0)).fill(text) == text


# openings


def test_openings_follow_the_seed() -> None:
    assert openings(5, 200) == openings(5, 200)
    assert openings(5, 200) != openings(6, 200)


@pytest.mark.parametrize("count", [0, 1, 137])
def test_openings_count(count: int) -> None:
    assert len(openings(0, count)) == count


def test_a_negative_count_is_refused() -> None:
    with pytest.raises(ValueError, match="-1"):
        openings(0, -1)


def test_openings_are_different_and_not_empty(drawn: list[Opening]) -> None:
    assert len({opening.text for opening in drawn}) == len(drawn)
    assert all(opening.text.strip() for opening in drawn)


def test_shares() -> None:
    assert sum(SHARES.values()) == pytest.approx(1)


def test_kinds(drawn: list[Opening]) -> None:
    kinds = Counter(opening.kind for opening in drawn)
    assert set(kinds) == {"user", "user_open", "text"}
    assert kinds["text"] / len(drawn) == pytest.approx(SHARES["text"], abs=0.01)
    assert kinds["user_open"] / (kinds["user"] + kinds["user_open"]) == pytest.approx(module.OPEN, abs=0.02)


def test_openings_are_short(drawn: list[Opening]) -> None:
    assert max(len(opening.text) for opening in drawn) <= 1000


# held-out prompts and openings apart


def test_no_opening_holds_a_held_out_prompt(drawn: list[Opening]) -> None:
    held_out = [f" {normal(prompt.text)} " for prompt in prompts()]
    for opening in drawn:
        text = f" {normal(opening.text)} "
        found = [prompt for prompt in held_out if prompt in text]
        assert not found, f"{opening.text!r} holds {found}"


def test_no_template_gives_a_held_out_prompt() -> None:
    """Not only was none drawn: no filling is a held-out prompt, with or without a wish after it."""
    held_out = [(normal(prompt.text), prompt) for prompt in prompts()]
    for name, entries in catalogue().templates.items():
        wishes = "|".join(normal(manner) for manner in catalogue().manners.get(name, []))
        for template in entries:
            pattern = re.compile(f"{_pattern(template)}(?: (?:{wishes}))?")
            found = [prompt.text for text, prompt in held_out if pattern.fullmatch(text)]
            assert not found, f"{template!r} gives {found}"


def test_the_pattern_of_a_template_knows_its_fillings() -> None:
    rng = random.Random(2)
    for entries in catalogue().templates.values():
        for template in entries:
            filled = module._Filler(rng).fill(template)
            assert re.fullmatch(_pattern(template), normal(filled)), (template, filled)


def _pattern(template: str) -> str:
    """Matches the normalised fillings of a template."""
    slots: list[str] = []

    def mark(slot: re.Match[str]) -> str:
        slots.append(slot[1])
        return f"zzslot{chr(96 + len(slots))}zz"

    pattern = normal(SLOT.sub(mark, template))
    for i, name in enumerate(slots):
        pattern = pattern.replace(f"zzslot{chr(97 + i)}zz", _slot_pattern(name))
    return pattern


def _slot_pattern(name: str) -> str:
    if name in ("n", "N"):
        return r"\d+"
    entries = [*catalogue().slots[name], *(["Python"] if name == "language" else [])]
    return f"(?:{'|'.join(_pattern(entry) for entry in entries)})"


@pytest.mark.parametrize("name", HELD_OUT_LISTS)
def test_what_openings_ask_for_is_in_no_held_out_prompt(name: str) -> None:
    held_out = [f" {normal(prompt.text)} " for prompt in prompts()]
    for entry in catalogue().slots[name]:
        found = [prompt for prompt in held_out if re.search(f" {_pattern(entry)} ", prompt)]
        assert not found, f"{entry!r} is in {found}"


def test_held_out_prompts_are_not_about_topics_of_several_words() -> None:
    held_out = [f" {normal(prompt.text)} " for prompt in prompts()]
    for topic in catalogue().slots["topic"]:
        if " " in topic.removeprefix("the "):
            found = [prompt for prompt in held_out if f" {normal(topic)} " in prompt]
            assert not found, f"{topic!r} is in {found}"


def test_held_out_prompts_share_few_phrases_with_openings(drawn: list[Opening]) -> None:
    """Of a held-out prompt's runs of four words, at most half occur anywhere in the openings."""
    known = {run for opening in drawn for run in runs(opening.text, 4)}
    for prompt in prompts():
        own = runs(prompt.text, 4)
        assert len(own & known) <= len(own) / 2, f"{prompt.text!r} shares {own & known}"
