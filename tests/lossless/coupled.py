"""What coupled sampling promises: the text is a function of the target and the seed alone."""

from __future__ import annotations

import math
from collections.abc import Iterable
from collections.abc import Sequence as Seq

import torch
from lossless.law import ends, token_law
from lossless.toys import Pair, run, tokens_of

from engine.core import Engine
from engine.speculation.noise import GumbelNoise
from engine.types import GenerateRequest, SamplingParams, SpeculationParams


def spec(drafter: str = "model", policy: str = "static", **options: object) -> SpeculationParams:
    return SpeculationParams(drafter=drafter, policy=policy, options=options)


def tree(drafter: str, **options: object) -> SpeculationParams:
    return SpeculationParams(drafter=drafter, options=options)


EVERY_TREE = (
    tree("dyspec"),
    *(
        tree("dyspec", growth=growth, budget=n, max_depth=d, draft_temperature=1.5)
        for growth in ("layers", "greedy")
        for n, d in ((1, 1), (6, 3))
    ),
    tree("dyspec", budget=64, max_depth=12, threshold=0.0),
    tree("goodput_tree", budget=16, max_depth=5),
    *(tree("opt_tree", budget=n, max_depth=d, width=2) for n, d in ((2, 5), (12, 4))),
    tree("c2t"),
    *(tree("c2t", budget=n, max_depth=d, threshold=0.1, width=3) for n, d in ((1, 1), (6, 3))),
)

EVERY_SPECULATION = (
    SpeculationParams(drafter="none"),
    *(spec(drafter, "static", sl=sl) for drafter in ("model", "ngram") for sl in (0, 1, 3, 7)),
    *(spec(drafter, "heuristic", start=start) for drafter in ("model", "ngram") for start in (1, 5)),
    *(
        spec(drafter, "confidence", signal=signal, threshold=threshold)
        for drafter in ("model", "ngram")
        for signal, threshold in (("token", 0.4), ("top", 0.5), ("joint", 0.1))
    ),
    *(spec(drafter, "confidence", signal="top", online=True) for drafter in ("model", "ngram")),
    *(spec(drafter, "adaedl", threshold=0.5) for drafter in ("model", "ngram")),
    spec("model", "svip", scale=1.0, threshold=1.0),
    spec("model", "ddd", first=1, every=2, threshold=-2.0),
    *(spec(drafter, "tetris", share=2) for drafter in ("model", "ngram")),
    *(spec(drafter, "bandit", max_sl=5) for drafter in ("model", "ngram")),
    spec("model", "disco"),
    spec("model", "specdec_pp"),
    *EVERY_TREE,
)


def alone(pair: Pair, request: GenerateRequest, eos: Seq[int] = ()) -> tuple[int, ...]:
    """argmax(log p + g(seed, position)) of the target without engine or draft."""
    params = request.params
    assert params.seed is not None
    noise = GumbelNoise(pair.vocab, torch.device("cpu"))
    output: tuple[int, ...] = ()
    while len(output) < params.max_tokens:
        context = request.prompt_ids + output
        law = token_law(pair.target(context), request.prompt_ids, output, params, eos)
        gumbel = noise([params.seed], [len(context)])[0].tolist()
        scores = [math.log(p) + g if p else -math.inf for p, g in zip(law, gumbel, strict=True)]
        output += (scores.index(max(scores)),)
        if ends(output[-1], params, eos):
            break
    return output


def requests(
    params: SamplingParams,
    speculations: Iterable[SpeculationParams] = EVERY_SPECULATION,
    prompt: tuple[int, ...] = (0, 1, 2, 0, 1, 3, 0, 1),
    seeds: Iterable[int] = (1, 2),
) -> list[GenerateRequest]:
    """One request for each speculation and seed."""
    return [
        GenerateRequest(
            id=f"{i}-{seed}",
            prompt_ids=prompt,
            params=SamplingParams(
                **{**{f: getattr(params, f) for f in params.__struct_fields__}, "seed": seed}
            ),
            speculation=asked,
        )
        for i, asked in enumerate(speculations)
        for seed in seeds
    ]


def check_identity(engine: Engine, pair: Pair, asked: Seq[GenerateRequest], eos: Seq[int] = ()) -> None:
    """Every request, all in one engine, gives what its target gives alone."""
    events = run(engine, asked)
    for request in asked:
        found, expected = tokens_of(events[request.id]), alone(pair, request, eos)
        assert found == expected, f"{request.speculation}: {found}, the target alone: {expected}"
