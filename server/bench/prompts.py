"""What is sent: the entries of a data set, or words drawn by a seed."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from server.log_lines import one_line

Message = dict[str, str]
_TRIES = 8  # corrections of a synthetic prompt's length
_AT_ONCE = 8
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


class DataError(ValueError):
    """A data set that cannot be used; the message names the file and the entry."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


@dataclass(frozen=True)
class Synthetic:
    """Prompts of drawn words. `unit` is what their lengths were counted in: "tokens" or "words"."""

    texts: tuple[str, ...]
    unit: str
    shortest: int
    longest: int


def read_dataset(path: Path) -> list[list[Message] | str]:
    """The prompts of a file in order: messages, or a raw text to be continued.

    `.jsonl` (an object a line) or `.json` (a list). An entry has "prompt" (a user's message), "messages",
    "text" (raw), or ShareGPT's "conversations", of which what comes before the first answer is sent.
    Other keys are ignored. Raises DataError.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"dataset {path}: {error}") from error
    found = []
    for number, row in _rows(path, text):
        try:
            found.append(_entry(row))
        except (DataError, KeyError, TypeError) as error:
            raise DataError(f"dataset {path}, entry {number}: {error}") from error
    if not found:
        raise DataError(f"dataset {path}: no entry in it")
    return found


def on_the_wire(prompts: Sequence[list[Message] | str], chat: bool) -> tuple[Any, ...]:
    """Prompts as the endpoint takes them: messages for chat (a raw text is the user's), else texts
    (messages without a template, parted by blank lines)."""
    if chat:
        return tuple([_user(each)] if isinstance(each, str) else each for each in prompts)
    return tuple(
        each if isinstance(each, str) else "\n\n".join(message["content"] for message in each)
        for each in prompts
    )


def synthetic(count: int, length: int, seed: int, tokens_of: Callable[[str], int] | None = None) -> Synthetic:
    """`count` different texts of `length` tokens by `tokens_of`, or of `length` words without it.

    Text i is a function of seed, i and what `tokens_of` says. A length that its words do not meet in
    some tries is missed by as little as they allow. Whatever `tokens_of` raises goes on to the caller.
    """

    def make(number: int) -> tuple[str, int]:
        return _text(random.Random(f"{seed}/{number}"), length, tokens_of)

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        made = list(pool.map(make, range(count)))
    sizes = [size for _, size in made]
    unit = "words" if tokens_of is None else "tokens"
    return Synthetic(tuple(text for text, _ in made), unit, min(sizes), max(sizes))


def _text(draw: random.Random, length: int, tokens_of: Callable[[str], int] | None) -> tuple[str, int]:
    words = draw.choices(WORDS, k=length)
    if tokens_of is None:
        return " ".join(words), length
    best, least = "", length + 1  # by how much its length is missed
    for _ in range(_TRIES):
        text = " ".join(words)
        size = tokens_of(text)
        if best == "" or abs(size - length) < least:
            best, least, met = text, abs(size - length), size
        if size == length:
            break
        wanted = max(1, round(len(words) * length / max(size, 1)))
        wanted = min(wanted, 16 * length)  # whatever the server counts
        kept = words[: min(wanted, len(words) - (wanted == len(words)))]  # the same number: another last word
        words = kept + draw.choices(WORDS, k=wanted - len(kept))
    return best, met


def _rows(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    lines = path.name.endswith(".jsonl")
    if not lines and not path.name.endswith(".json"):
        raise DataError(f"dataset {path}: wanted is .jsonl or .json")
    texts = (
        [(i, line) for i, line in enumerate(text.split("\n"), 1) if line.strip()] if lines else [(1, text)]
    )
    for number, each in texts:
        try:
            found = json.loads(each)
        except (ValueError, RecursionError) as error:
            raise DataError(f"dataset {path}, line {number}: {error}") from error
        if lines:
            yield number, found
        elif isinstance(found, list):
            yield from enumerate(found, 1)
        else:
            raise DataError(f"dataset {path}: a list of objects is wanted")


def _entry(row: Any) -> list[Message] | str:
    if not isinstance(row, dict):
        raise DataError("an object is wanted")
    known = ("prompt", "messages", "text", "conversations")
    given = [key for key in known if row.get(key) is not None]
    if len(given) != 1:
        raise DataError(
            f"one of {', '.join(known)} is wanted, it has {' and '.join(given or row) or 'nothing'}"
        )
    (key,) = given
    if key == "messages":
        return [
            {name: _word(each[name], name) for name in ("role", "content")} for each in _list(row[key], key)
        ]
    if key == "conversations":
        return _shared(_list(row[key], key))
    text = _word(row[key], key)
    return [_user(text)] if key == "prompt" else text


def _shared(turns: Sequence[Any]) -> list[Message]:
    messages: list[Message] = []
    for turn in turns:
        role = _ROLES.get(turn["from"])
        if role is None:
            raise DataError(f'"from" is {turn["from"]!r}; known are {", ".join(_ROLES)}')
        if role == "assistant" and messages:
            break
        if role != "assistant":  # some begin with the answer to a question that was cut off
            messages.append({"role": role, "content": _word(turn["value"], "value")})
    if not messages or messages[-1]["role"] != "user":
        raise DataError("no question in the conversation")
    return messages


def _list(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise DataError(f'"{name}" must be a list of objects')
    if not all(isinstance(each, dict) for each in value):
        raise DataError(f'"{name}" must be a list of objects, and has something else in it')
    return value


def _word(value: Any, name: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise DataError(f'"{name}" is empty or no text')
    if any("\ud800" <= each <= "\udfff" for each in value):
        raise DataError(f'"{name}" has half a character (a lone surrogate)')
    return value


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


_WORDS = (
    "the of and to in for on with as by at from or an be this which but not are was were have has had will "
    "can may would could should do did time year people way day man thing world life hand part place week "
    "case point number group problem fact house water room money story month book night home business issue "
    "side kind head service friend power hour game line end member law car city name team minute idea body "
    "back parent face level office door health person art war history party result change morning reason "
    "research moment air force paper space ground table light field road market state school family student "
    "country question work word company system program government area age policy process music sense nation "
    "plan college interest death experience effect use class control rate value action model season society "
    "tax director position player record value voice street image tree summer river north south east west"
)
WORDS = _WORDS.split()
"""Common words: with a space before it, each is one token of most vocabularies."""
