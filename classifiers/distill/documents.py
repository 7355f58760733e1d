"""The beginnings of the documents that the target continues: what is forced, and what is its own."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from classifiers.distill.options import DistillError
from classifiers.openings import openings

_MARK = "\u241f"  # stands for the user's message in the chat template; no template has it
LONGEST = 192  # tokens of a forced beginning; a longer one is left out
ALONE = 0.05  # of the chats begin with nothing: the target invents the whole question


@dataclass(frozen=True)
class Beginnings:
    """D documents: `tokens` int64[D, Q] (padded), `lengths` int64[D], `open` bool[D], `temperature` [D].

    An open document ends inside the user's message: the target invents the rest, then `answer`
    (int64[S]: the template from the end of the user's message to the beginning of the answer) is
    forced, and the target answers. `kinds`: how many of each kind, for the card; `too_long`: how many
    were left out, for being longer than LONGEST tokens.
    """

    tokens: Tensor
    lengths: Tensor
    open: Tensor
    temperature: Tensor
    answer: Tensor
    kinds: dict[str, int]
    too_long: int = 0


def chat_frame(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str] | None:
    """What the template puts before and after a lone user message; None without a template."""
    if not tokenizer.chat_template:
        return None
    try:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": _MARK}], tokenize=False, add_generation_prompt=True
        )
    except TemplateError as error:
        raise DistillError(f"the target's chat template refuses a lone user message: {error}") from error
    assert isinstance(text, str)
    before, found, after = text.partition(_MARK)
    if not found:
        raise DistillError("the target's chat template does not show the user's message as it is")
    return before, after


def read_prompts(paths: Seq[Path]) -> list[str]:
    """User messages: one a line, or JSON lines with "prompt". Raises DistillError with file and line."""
    prompts: list[str] = []
    for path in paths:
        try:
            lines = path.read_text(encoding="utf-8").split("\n")  # not splitlines: JSON may hold U+2028
        except UnicodeDecodeError as error:
            raise DistillError(f"{path}: not UTF-8: {error}") from error
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            if path.suffix == ".jsonl":
                try:
                    line = json.loads(line)["prompt"]
                except (ValueError, KeyError, TypeError) as error:
                    raise DistillError(f'{path}:{number}: not an object with "prompt"') from error
                if not isinstance(line, str):
                    raise DistillError(f'{path}:{number}: "prompt" is not a string')
            if not _encodes(line):
                raise DistillError(f"{path}:{number}: holds half of a surrogate pair")
            prompts.append(line)
    if paths and not prompts:
        raise DistillError(f"no prompt in {', '.join(map(str, paths))}")
    return prompts


def beginnings(
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    seed: int,
    temperatures: Seq[float],
    prompts: Seq[str],
    device: torch.device,
) -> Beginnings:
    """`count` documents, the same for a seed: half from `prompts` if there are any, the rest built in."""
    rng = random.Random(seed)
    frame = chat_frame(tokenizer)
    can_open = frame is not None and bool(tokenizer(frame[1], add_special_tokens=False)["input_ids"])
    texts: list[str] = []
    opens: list[bool] = []
    kinds: list[str] = []
    for opening in openings(seed, count):
        kind: str = opening.kind
        text = opening.text
        if prompts and rng.random() < 0.5:
            kind, text = "prompt file", rng.choice(prompts)
        elif kind != "text" and rng.random() < ALONE:
            kind, text = "user_open", ""
        if frame is None or kind == "text":
            texts.append(text)
        else:
            texts.append(frame[0] + text + ("" if kind == "user_open" else frame[1]))
        opens.append(can_open and kind == "user_open")
        kinds.append(kind)
    ids = encode(texts, tokenizer)
    kept = [i for i, each in enumerate(ids) if 1 <= len(each) <= LONGEST]
    if not kept:
        raise DistillError(f"no prompt is between 1 and {LONGEST} tokens long")
    if prompts and "prompt file" not in {kinds[i] for i in kept}:
        raise DistillError(f"every prompt of --prompts is longer than {LONGEST} tokens, template included")
    width = max(len(ids[i]) for i in kept)
    answer = tokenizer(frame[1], add_special_tokens=False)["input_ids"] if can_open and frame else [0]

    def tensor(values: list[list[int]] | list[int] | list[bool] | list[float]) -> Tensor:
        return torch.tensor(values, device=device)

    return Beginnings(
        tokens=tensor([ids[i] + [0] * (width - len(ids[i])) for i in kept]),
        lengths=tensor([len(ids[i]) for i in kept]),
        open=tensor([opens[i] for i in kept]),
        temperature=tensor([float(rng.choice(temperatures)) for _ in kept]),
        answer=tensor(answer),
        kinds=dict(Counter(kinds[i] for i in kept)),
        too_long=sum(len(each) > LONGEST for each in ids),
    )


def encode(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Ids of texts that may be templated or not: with a beginning token where plain text gets one, once."""
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"]
    bos = tokenizer.bos_token_id
    if bos is None or tokenizer("a")["input_ids"][:1] != [bos]:
        return ids
    return [each if each[:1] == [bos] else [bos, *each] for each in ids]


def _encodes(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
