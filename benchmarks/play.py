"""Prompts of the task sets as token ids, and the engine playing some of them."""

from __future__ import annotations

import time
import zlib
from collections import defaultdict
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from classifiers.data_files import encode, read_data
from classifiers.pair_texts import Encoded
from engine.core import Engine
from engine.types import GenerateRequest, SamplingParams, SpeculationParams

TASKS = Path(__file__).parent / "data" / "tasks.jsonl"
_SALT = count()


@dataclass(frozen=True)
class Text:
    """A prompt of a task, as token ids."""

    task: str
    name: str
    ids: tuple[int, ...]


def read_texts(
    tasks: Path, tokenizer: Any, validation: int, test: int, only: Seq[str] | None
) -> tuple[list[Text], list[Text]]:
    """Of every task its last `test` prompts, and the `validation` ones before them."""
    by_task: dict[str, list[Text]] = defaultdict(list)
    for prompt in read_data([str(tasks)])[0]:
        if only is None or prompt.category in only:
            by_task[prompt.category].append(Text(prompt.category, prompt.name, encode(prompt, tokenizer)))
    small = [task for task, texts in by_task.items() if len(texts) < validation + test]
    if small:
        raise SystemExit(f"task {small[0]!r} of {tasks} has fewer than {validation + test} prompts")
    chosen = [texts[-(validation + test) :] for texts in by_task.values()]
    return [t for texts in chosen for t in texts[:validation]], [t for texts in chosen for t in texts[-test:]]


def _seed(ids: Seq[int]) -> int:
    """Of each prompt its own, whatever it is played beside."""
    return zlib.crc32(",".join(map(str, ids)).encode())


def generate(
    engine: Engine,
    texts: Seq[Text | Encoded],
    tokens: int,
    speculation: SpeculationParams,
    temperature: float,
    seeded: bool = True,
) -> tuple[dict[str, list[int]], dict[str, list[tuple[int, int]]], float]:
    """All texts at once: ids and (drafted, emitted) of each, and seconds from the first token on.

    Samples are coupled, or without `seeded` drawn by rejection.
    """
    for i, text in enumerate(texts):
        params = SamplingParams(
            temperature=temperature,
            max_tokens=tokens,
            ignore_eos=True,
            seed=_seed(text.ids) if temperature and seeded else None,
        )
        request = GenerateRequest(
            id=str(i), prompt_ids=text.ids, params=params, speculation=speculation,
            cache_salt=str(next(_SALT)),
        )  # fmt: skip
        engine.add(request)
    ids: dict[str, list[int]] = {str(i): [] for i in range(len(texts))}
    iterations: dict[str, list[tuple[int, int]]] = {name: [] for name in ids}
    begin = 0.0
    while engine.has_work():
        events, stats = engine.step()
        if stats.speculation_faults:  # the rest would be measured without a draft
            raise SystemExit(f"a drafter failed, see the log: {stats.speculation_faults}")
        begin = begin or (time.perf_counter() if events else 0.0)
        for event in events:
            if event.error is not None:
                raise SystemExit(event.error)
            ids[event.id].extend(event.token_ids)
            if event.iterations:
                iterations[event.id].append((event.drafted, len(event.token_ids)))
    return ids, iterations, time.perf_counter() - begin
