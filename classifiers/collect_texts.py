"""The target's own texts for a recording, written by the engine."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from classifiers.collect_rows import Text
from classifiers.data_files import Prompt
from engine.core import Engine
from engine.types import GenerateRequest, RequestFailed, SamplingParams, SpeculationParams


@dataclass(frozen=True)
class Asked:
    """A prompt as the target reads it. `seed` of its sample, None where greedy."""

    prompt: Prompt
    ids: tuple[int, ...]
    seed: int | None


def write_texts(
    engine: Engine, group: Seq[Asked], tokens: int, on_tokens: Callable[[int], None] = lambda _: None
) -> list[Text]:
    """`write` for a recording. Raises RequestFailed."""
    written = write(engine, [(each.ids, each.seed) for each in group], tokens, on_tokens)
    return [
        Text(each.ids, tokens, end, each.seed) for each, (tokens, end) in zip(group, written, strict=True)
    ]


def write(
    engine: Engine,
    asked: Seq[tuple[tuple[int, ...], int | None]],
    tokens: int,
    on_tokens: Callable[[int], None],
) -> list[tuple[tuple[int, ...], str]]:
    """At most `tokens` tokens of the target alone after every prompt, together, and why each ended.

    `asked`: prompt ids, and the seed of a sample at temperature 1, None for greedy. `on_tokens` hears how
    many of len(asked) * `tokens` are done; a text that ends early is done. Raises RequestFailed.
    """
    for i, (ids, seed) in enumerate(asked):
        params = SamplingParams(
            temperature=0.0 if seed is None else 1.0,
            seed=seed,
            max_tokens=tokens,
            sampling_method="auto" if seed is None else "coupled",
        )
        alone = SpeculationParams(drafter="none")
        engine.add(GenerateRequest(id=str(i), prompt_ids=ids, params=params, speculation=alone))
    written: list[list[int]] = [[] for _ in asked]
    finish = [""] * len(asked)
    while engine.has_work():
        for event in engine.step()[0]:
            if event.finish_reason == "error":
                raise RequestFailed(event.error or "the engine gave up a prompt")
            at = int(event.id)
            written[at].extend(event.token_ids)
            finish[at] = event.finish_reason or ""
            on_tokens(len(event.token_ids) + (tokens - len(written[at]) if finish[at] else 0))
    return [(tuple(text), end) for text, end in zip(written, finish, strict=True)]
