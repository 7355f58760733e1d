"""The engine's own draws: thousands of short seeded requests against the target's law, alpha 1e-4.

Seeds are fixed, so that a run that passes passes always.
"""

from __future__ import annotations

import pytest
from lossless.chi_square import ALPHA, output_p_value
from lossless.coupled import spec
from lossless.peek import PEEK_PAIR, registered
from lossless.toys import Pair, broken, different, toy_engine

from engine.core import Engine
from engine.types import GenerateRequest, SamplingParams, SpeculationParams

PAIR = different(8)
PROMPT = (0, 1, 2, 3, 0, 1, 2, 5, 0, 1)


def asked(
    count: int, speculation: SpeculationParams, prompt: tuple[int, ...] = PROMPT, **params: object
) -> list[GenerateRequest]:
    return [
        GenerateRequest(
            id=str(seed),
            prompt_ids=prompt,
            params=SamplingParams(seed=seed, **params),
            speculation=speculation,
        )
        for seed in range(count)
    ]


def engine_of(pair: Pair, rows: int) -> Engine:
    return toy_engine(pair, blocks=rows * 12, rows=rows)


@pytest.mark.parametrize("method", ["rejection", "coupled"])
@pytest.mark.parametrize(
    "speculation",
    [
        spec("model", sl=2),
        spec("ngram", sl=2),
        spec("model", "heuristic", start=2),
        spec("model", "confidence", signal="token", threshold=0.3),
        SpeculationParams(drafter="none"),
    ],
    ids=lambda s: f"{s.drafter}-{s.policy}",
)
def test_output_has_the_targets_law(speculation: SpeculationParams, method: str):
    """Four tokens of eight: the first one plain, then an iteration or more of up to two drafts."""
    some = asked(3000, speculation, max_tokens=4, temperature=0.6, sampling_method=method)
    assert output_p_value(lambda rows: engine_of(PAIR, rows), PAIR, some) > ALPHA


def test_filters_and_penalties():
    some = asked(
        3000,
        spec("model", sl=2),
        max_tokens=4,
        top_p=0.9,
        top_k=4,
        presence_penalty=0.5,
        repetition_penalty=1.2,
        sampling_method="rejection",
    )
    assert output_p_value(lambda rows: engine_of(PAIR, rows), PAIR, some) > ALPHA


def test_a_draft_that_gives_nan_harms_nothing():
    pair = broken(8)
    some = asked(2000, spec("model", sl=3), max_tokens=4, temperature=0.6, sampling_method="rejection")
    assert output_p_value(lambda rows: engine_of(pair, rows), pair, some) > ALPHA


def test_a_policy_that_looks_at_the_drafted_token():
    """Its next lookahead depends on a token that was drafted where the row drafts again."""
    with registered():
        some = asked(4000, spec("model", "peek"), (0, 1, 2), max_tokens=4, sampling_method="rejection")
        assert output_p_value(lambda rows: engine_of(PEEK_PAIR, rows), PEEK_PAIR, some) > ALPHA


def test_the_check_sees_another_law():
    """4,000 draws at temperature 1 are not taken for temperature 0.9."""
    some = asked(4000, spec("model", sl=2), max_tokens=3, temperature=1.0, sampling_method="rejection")
    cooler = Pair(8, lambda context: [x / 0.9 for x in PAIR.target(context)], None)
    assert output_p_value(lambda rows: engine_of(PAIR, rows), cooler, some) < ALPHA
