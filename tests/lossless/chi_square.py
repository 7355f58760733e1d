"""Chi-square of many seeded outputs against the target's own law."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from collections.abc import Sequence as Seq

from lossless.law import sequence_law
from lossless.toys import Pair, run, tokens_of
from scipy.stats import chisquare

from engine.core import Engine
from engine.types import GenerateRequest

ALPHA = 1e-4
_LEAST = 8.0  # expected count of a cell; smaller ones are pooled


def p_value(counts: Counter[tuple[int, ...]], law: dict[tuple[int, ...], float]) -> float:
    """Of the counts if their law is `law`. Asserts that nothing impossible was counted."""
    assert counts.keys() <= law.keys(), f"impossible: {counts.keys() - law.keys()}"
    total = counts.total()
    rare = {cell for cell, p in law.items() if p * total < _LEAST}
    observed = [counts[cell] for cell in law if cell not in rare]
    expected = [p * total for cell, p in law.items() if cell not in rare]
    pooled = sum(law[cell] for cell in rare) * total
    if pooled >= _LEAST:
        observed.append(sum(counts[cell] for cell in rare))
        expected.append(pooled)
    else:  # too rare even together: what was counted there joins the smallest cell
        least = expected.index(min(expected))
        observed[least] += sum(counts[cell] for cell in rare)
        expected[least] += pooled
    return float(chisquare(observed, expected, sum_check=False).pvalue)


def output_p_value(
    build: Callable[[int], Engine], pair: Pair, asked: Seq[GenerateRequest], batch: int = 500
) -> float:
    """Of the outputs of requests that differ in id and seed alone; `build(rows)` makes an engine."""
    first = asked[0]
    counts: Counter[tuple[int, ...]] = Counter()
    for start in range(0, len(asked), batch):
        some = asked[start : start + batch]
        events = run(build(len(some)), some)
        counts.update(tokens_of(own) for own in events.values())
    return p_value(counts, sequence_law(pair.target, first.prompt_ids, first.params))
