"""Prompts for judging a pair, and the target's own answers to them."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path

import msgspec
from transformers import PreTrainedTokenizerBase

from classifiers import heldout
from classifiers.collect_texts import write
from classifiers.heldout import Prompt
from classifiers.prompt_ids import TemplateRefusal, prompt_ids
from engine.core import Engine
from engine.models.folder import first_line


class PairError(ValueError):
    """Something that the command was given cannot work; the message says what."""


@dataclass(frozen=True)
class Encoded:
    """A prompt as the target reads it."""

    category: str
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Text:
    """What the target answered to `prompt_ids`: greedy if `seed` is None, else its coupled sample at
    temperature 1 with that seed."""

    category: str
    prompt_ids: tuple[int, ...]
    tokens: tuple[int, ...]
    seed: int | None


class _Line(msgspec.Struct, forbid_unknown_fields=True):
    category: str | None = None
    prompt: str | None = None
    text: str | None = None


def read_prompts(files: Seq[Path], per_category: int | None = None) -> list[Prompt]:
    """The prompts of `files`, or the built-in held-out ones without any; the first of each category.

    A `.jsonl` line is {"category", "prompt"} (a user's message) or {"category", "text"} (raw); a `.txt`
    line is a user's message. Without a category the file's name is it. Raises PairError, naming file
    and line.
    """
    found = [prompt for path in files for prompt in _read(path)] if files else heldout.prompts()
    return found if per_category is None else heldout.first_of_each(found, per_category)


def _read(path: Path) -> list[Prompt]:
    if path.suffix not in (".jsonl", ".txt"):
        raise PairError(f"prompts {path}: a .jsonl or .txt file is wanted")
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # not splitlines: JSON may hold U+2028
    except (OSError, UnicodeDecodeError) as error:
        raise PairError(f"prompts {path}: {first_line(error)}") from error
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise PairError(f"prompts {path}: no prompt in it")
    if path.suffix == ".txt":
        return [Prompt(category=path.stem, text=line, chat=True) for _, line in numbered]
    return [_parse(path, number, line) for number, line in numbered]


def _parse(path: Path, number: int, line: str) -> Prompt:
    try:
        given = msgspec.json.decode(line, type=_Line)
    except msgspec.DecodeError as error:
        raise PairError(f"prompts {path}, line {number}: {first_line(error)}") from error
    if (given.prompt is None) == (given.text is None):
        raise PairError(f'prompts {path}, line {number}: either "prompt" or "text" is wanted')
    chat = given.prompt is not None
    text = (given.prompt if chat else given.text) or ""
    if not text:
        raise PairError(f"prompts {path}, line {number}: the prompt is empty")
    return Prompt(category=given.category or path.stem, text=text, chat=chat)


def encode(prompts: Seq[Prompt], tokenizer: PreTrainedTokenizerBase) -> list[Encoded]:
    """Messages through the chat template, raw text with the tokenizer's own special tokens.

    Without a template a message is raw text. Raises PairError for what the template refuses.
    """
    return [Encoded(prompt.category, _ids(prompt, tokenizer)) for prompt in prompts]


def _ids(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    messages = [{"role": "user", "content": prompt.text}] if prompt.chat else []
    try:
        ids = prompt_ids(messages, prompt.text, tokenizer)
    except TemplateRefusal as error:
        raise PairError(f"the target's chat template refuses {prompt.text!r}: {error}") from error
    if not ids:
        raise PairError(f"the prompt {prompt.text!r} has no tokens")
    return ids


def write_texts(
    engine: Engine, prompts: Seq[Encoded], tokens: int, seed: int, on_tokens: Callable[[int], None]
) -> list[Text]:
    """At most `tokens` tokens of the target alone after every prompt: a greedy text each, then a sampled one
    each, with seeds `seed`, `seed` + 1, ...

    `on_tokens` hears how many of the len(prompts) * 2 * `tokens` are done. Raises RequestFailed.
    """
    seeds: list[int | None] = [*[None] * len(prompts), *range(seed, seed + len(prompts))]
    asked = list(zip([*prompts, *prompts], seeds, strict=True))
    written = write(engine, [(prompt.ids, own) for prompt, own in asked], tokens, on_tokens)
    return [
        Text(prompt.category, prompt.ids, text, own)
        for (prompt, own), (text, _) in zip(asked, written, strict=True)
    ]
