"""Prompts out of files and of the `datasets` hub, in our own form and in those of well-known task sets.

A file is `.jsonl` (one object a line) or `.json` (a list of objects), either also `.gz`. Forms are
told by their keys:

- ours: "prompt" (a user's message), "messages" (a conversation) or "text" (raw, to be continued), and
  if wanted "name" and "category"; other keys are ignored;
- HumanEval ("prompt", "entry_point"): the code as raw text; MBPP ("text" or "prompt", "test_list"): the
  task and its tests; GSM8K ("question", "answer"); Alpaca ("instruction", "input"); CNN/DailyMail
  ("article").
"""

from __future__ import annotations

import gzip
import hashlib
import importlib
import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import IO, Any

from transformers import PreTrainedTokenizerBase

from classifiers.prompt_ids import TemplateRefusal, prompt_ids
from classifiers.traces import Source
from engine.models.folder import first_line

HUB = "hub:"
EXAMPLES = "examples"
"""The prompts that ship with the package, written for this project: ten of each of four kinds."""
_KNOWN = {
    "openai_humaneval": ("openai/openai_humaneval", None, "test"),
    "mbpp": ("google-research-datasets/mbpp", "full", "test"),
    "gsm8k": ("openai/gsm8k", "main", "test"),
    "alpaca": ("tatsu-lab/alpaca", None, "train"),
    "cnn_dailymail": ("abisee/cnn_dailymail", "3.0.0", "test"),
}
"""Hub data sets by the last part of their names: path, configuration, split."""
_SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz")

Messages = tuple[Mapping[str, str], ...]


class DataError(ValueError):
    """Data that cannot be read or used; the message names file and entry."""


@dataclass(frozen=True)
class Prompt:
    """`messages` for the chat template, or, without any, `text` to be continued as it stands."""

    category: str
    name: str
    messages: Messages = ()
    text: str = ""


@dataclass(frozen=True)
class Form:
    """A kind of entry: the keys that tell it, its category, and how it reads."""

    category: str
    keys: frozenset[str]
    read: Callable[[dict[str, Any]], Messages | str]
    name: str = "id"  # the key that names an entry


def _user(text: str) -> Messages:
    return ({"role": "user", "content": text},)


def _word(row: dict[str, Any], *keys: str) -> str:
    """What stands under the first of the keys that is there. Raises DataError if it is empty or no text."""
    key = next((key for key in keys if row.get(key) is not None), keys[0])
    if not isinstance(text := row.get(key), str) or not text.strip():
        raise DataError(f"{key!r} is empty or no text")
    return text


def _mbpp(row: dict[str, Any]) -> Messages:
    tests = "\n".join(map(str, row["test_list"] or ()))
    return _user(f"{_word(row, 'text', 'prompt')}\nYour code should pass these tests:\n\n{tests}")


def _alpaca(row: dict[str, Any]) -> Messages:
    more = row.get("input")
    task = _word(row, "instruction")
    return _user(f"{task}\n\n{more}" if more else task)


def _article(row: dict[str, Any]) -> Messages:
    return _user(f"Summarize the following article in three sentences.\n\n{_word(row, 'article')}")


FORMS = (
    Form("humaneval", frozenset({"prompt", "entry_point"}), lambda row: _word(row, "prompt"), "task_id"),
    Form("mbpp", frozenset({"test_list"}), _mbpp, "task_id"),
    Form("gsm8k", frozenset({"question", "answer"}), lambda row: _user(_word(row, "question"))),
    Form("alpaca", frozenset({"instruction"}), _alpaca),
    Form("cnn_dailymail", frozenset({"article"}), _article),
)


def read_data(names: Seq[str], per_category: int | None = None) -> tuple[list[Prompt], list[Source]]:
    """The prompts of files, of "examples" and of "hub:NAME[:CONFIG[:SPLIT]]", in order.

    `per_category`: the first so many of each category.

    Raises DataError, naming the file and the entry that cannot be used.
    """
    if not names:
        raise DataError("--data: no file is given")
    taken: Counter[str] = Counter()
    prompts: list[Prompt] = []
    sources = []
    for name in names:
        hub, path = name.startswith(HUB), _path(name)
        rows = _hub_rows(name, per_category) if hub else _file_rows(path)
        found = []
        for prompt in rows:
            if per_category is None or taken[prompt.category] < per_category:
                taken[prompt.category] += 1
                found.append(prompt)
        digest = _digest(found) if hub else _file_digest(path)
        sources.append(Source(name if hub else path.name, digest, len(found)))
        prompts.extend(found)
    return prompts, sources


def encode(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The prompt's tokens: messages through the chat template, text with the tokenizer's own special tokens.

    Without a template the messages' contents are text. Raises DataError for what the template refuses.
    """
    text = prompt.text or "\n\n".join(message["content"] for message in prompt.messages)
    try:
        ids = prompt_ids(prompt.messages, text, tokenizer)
    except TemplateRefusal as error:
        raise DataError(f"{prompt.name}: the target's chat template refuses it: {error}") from error
    if not ids:
        raise DataError(f"{prompt.name}: the prompt has no tokens")
    return ids


# ---- files


def _path(name: str) -> Path:
    if name == EXAMPLES:
        return Path(str(resources.files("classifiers").joinpath("data/examples.jsonl")))
    return Path(name).expanduser()


def _file_rows(path: Path) -> Iterator[Prompt]:
    """Raises DataError."""
    if not path.name.endswith(_SUFFIXES):
        raise DataError(f"data {path}: wanted is one of {', '.join(_SUFFIXES)}")
    stem = path.name.removesuffix(".gz").rpartition(".")[0]
    try:
        with _opened(path) as file:
            count = 0
            for number, row in _objects(path, file):
                yield _prompt(row, stem, f"{stem}/{number}", f"data {path}, entry {number}")
                count += 1
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise DataError(f"data {path}: {first_line(error)}") from error
    if not count:
        raise DataError(f"data {path}: no entry in it")


def _opened(path: Path) -> IO[str]:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8")
    return path.open(encoding="utf-8")


def _objects(path: Path, file: Iterable[str]) -> Iterator[tuple[int, Any]]:
    """Numbered objects: lines of .jsonl, members of the list of .json."""
    lines = path.name.removesuffix(".gz").endswith(".jsonl")
    texts = ((i, line) for i, line in enumerate(file, 1) if line.strip()) if lines else [(1, "".join(file))]
    for number, text in texts:
        try:
            found = json.loads(text)
        except ValueError as error:
            raise DataError(f"data {path}, line {number}: {error}") from error
        if lines:
            yield number, found
        elif isinstance(found, list):
            yield from enumerate(found, 1)
        else:
            raise DataError(f"data {path}: a list of objects is wanted")


def _prompt(row: Any, category: str, name: str, where: str) -> Prompt:
    """One entry, of the form that its keys tell. Raises DataError."""
    if not isinstance(row, dict):
        raise DataError(f"{where}: an object is wanted")
    try:
        for form in FORMS:
            if form.keys <= row.keys():
                return Prompt(form.category, str(row.get(form.name) or name), *_either(form.read(row)))
        category = _word(row, "category") if row.get("category") else category
        name = _word(row, "name") if row.get("name") else name
        return Prompt(category, name, *_either(_own(row)))
    except (DataError, TypeError) as error:
        raise DataError(f"{where}: {error}") from error


def _either(read: Messages | str) -> tuple[Messages, str]:
    return ((), read) if isinstance(read, str) else (read, "")


def _own(row: dict[str, Any]) -> Messages | str:
    """What an entry in our own form asks. Raises DataError."""
    given = [key for key in ("prompt", "messages", "text") if row.get(key) is not None]
    if len(given) != 1:
        had = " and ".join(given) or ", ".join(map(str, row)) or "nothing"
        raise DataError(f'one of "prompt", "messages" and "text" is wanted, it has {had}')
    if given[0] != "messages":
        text = _word(row, given[0])
        return _user(text) if given[0] == "prompt" else text
    messages = row["messages"]
    if not isinstance(messages, list) or not messages or not all(isinstance(each, dict) for each in messages):
        raise DataError('"messages" is a list of objects with "role" and "content"')
    return tuple({key: _word(each, key) for key in ("role", "content")} for each in messages)


# ---- the hub


def _hub_rows(name: str, limit: int | None) -> Iterator[Prompt]:
    """Raises DataError, also where the `datasets` package or the hub is missing."""
    path, config, split = _hub_place(name)
    if limit is None:
        raise DataError(f"data {name}: the hub's sets are large; say how many with --per-category")
    try:
        load_dataset = importlib.import_module("datasets").load_dataset
    except ImportError as error:
        raise DataError(f"data {name}: the package `datasets` is wanted: pip install -e '.[data]'") from error
    category = path.rpartition("/")[2]
    count = 0
    try:
        for row in load_dataset(path, config, split=split, streaming=True):
            count += 1
            yield _prompt(row, category, f"{category}/{count}", f"data {name}, entry {count}")
            if count == limit:
                break
    except DataError:
        raise
    except Exception as error:  # whatever the hub's transport and its readers raise
        raise DataError(f"data {name}: {type(error).__name__}: {first_line(error)}") from error
    if not count:
        raise DataError(f"data {name}: no entry in it")


def _hub_place(name: str) -> tuple[str, str | None, str]:
    """Path, configuration and split."""
    path, _, rest = name.removeprefix(HUB).partition(":")
    config, _, split = rest.partition(":")
    known = _KNOWN.get(path.rpartition("/")[2], (path, None, "train"))
    if not path:
        raise DataError(f"data {name!r}: hub:NAME[:CONFIG[:SPLIT]]; known are {', '.join(_KNOWN)}")
    return (path if "/" in path else known[0]), config or known[1], split or known[2]


def _digest(prompts: Iterable[Prompt]) -> str:
    text = json.dumps([[each.category, each.name, each.messages, each.text] for each in prompts])
    return hashlib.sha256(text.encode()).hexdigest()


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
