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
    """At most `tokens` tokens of the target alone after every prompt, together.

    `on_tokens` hears how many of len(group) * `tokens` are done; a text that ends early is done. Raises
    RequestFailed.
    """
    for i, each in enumerate(group):
        params = SamplingParams(
            temperature=0.0 if each.seed is None else 1.0,
            seed=each.seed,
            max_tokens=tokens,
            sampling_method="auto" if each.seed is None else "coupled",
        )
        alone = SpeculationParams(drafter="none")
        engine.add(GenerateRequest(id=str(i), prompt_ids=each.ids, params=params, speculation=alone))
    written: list[list[int]] = [[] for _ in group]
    finish = [""] * len(group)
    while engine.has_work():
        for event in engine.step()[0]:
            if event.finish_reason == "error":
                raise RequestFailed(event.error or "the engine gave up a prompt")
            at = int(event.id)
            written[at].extend(event.token_ids)
            finish[at] = event.finish_reason or ""
            on_tokens(len(event.token_ids) + (tokens - len(written[at]) if finish[at] else 0))
    return [
        Text(each.ids, tuple(text), end, each.seed)
        for each, text, end in zip(group, written, finish, strict=True)
    ]
