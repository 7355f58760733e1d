"""What `disco-serve bench-pair` reports: the numbers as data, and as tables on a terminal."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import msgspec
import torch
from rich.console import Console
from rich.table import Table

from classifiers.acceptance import Costs, Iterations, best, ceiling, oracle, speedup, static
from classifiers.pair_score import Scores

ALL = "all"  # the pooled category
_TITLES = {
    "greedy": "greedy",
    "coupled": "temperature 1, coupled (requests with a seed)",
    "rejection": "temperature 1, rejection (requests without a seed)",
}


class AtSL(msgspec.Struct, frozen=True):
    """One static SL. None where nothing was drafted or no pass was made."""

    sl: int
    acceptance: float | None
    emitted_per_pass: float | None
    speedup: float | None


class Method(msgspec.Struct, frozen=True):
    """One sampling method: `match` is the mean chance of acceptance of one draft token, over `positions`."""

    positions: int
    match: float
    static: list[AtSL]
    best_sl: int | None
    best_speedup: float | None
    oracle_sl: float | None
    oracle_speedup: float | None


class Category(msgspec.Struct, frozen=True):
    """`overlap`: mean of 1 - TV along the sampled texts."""

    category: str
    prompts: int
    overlap: float
    methods: dict[str, Method]


class CostReport(msgspec.Struct, frozen=True):
    """Seconds at batch 1 after `context` tokens; `verify[j]` is a target pass over j + 1 tokens.

    `ceiling[k - 1]`: the speed-up of a draft that is always right at SL k.
    """

    context: int
    draft: float
    verify: list[float]
    ratio: float
    ceiling: list[float]


class PairReport(msgspec.Struct, frozen=True, kw_only=True):
    """A judged pair. The last category pools the others."""

    target: str
    draft: str
    device: str
    dtype: str
    threads: int
    tokens: int
    seed: int
    chat_template: bool
    prompts: list[str]
    costs: CostReport
    categories: list[Category]
    versions: dict[str, str]


def report_costs(costs: Costs, context: int) -> CostReport:
    """`costs`, measured after `context` tokens, with what follows from them."""
    bounds = [ceiling(sl, costs) for sl in range(1, len(costs.verify))]
    return CostReport(context, costs.draft, list(costs.verify), costs.ratio, bounds)


def summarise(scores: Seq[Scores], costs: Costs, tokens: int) -> list[Category]:
    """Every category of `scores`, and all of them pooled. `tokens`: what every text was allowed."""
    names = list(dict.fromkeys(each.text.category for each in scores))
    found = [
        _category(name, [each for each in scores if each.text.category == name], costs, tokens)
        for name in names
    ]
    return [*found, _category(ALL, scores, costs, tokens)]


def _category(name: str, scores: Seq[Scores], costs: Costs, tokens: int) -> Category:
    methods = {
        method: _method([each.accept[method] for each in scores if method in each.accept], costs, tokens)
        for method in _TITLES
    }
    overlaps = torch.cat([each.overlap for each in scores if each.overlap is not None])
    prompts = sum(each.text.seed is None for each in scores)
    return Category(name, prompts, float(overlaps.mean()), methods)


def _method(accepts: Seq[torch.Tensor], costs: Costs, tokens: int) -> Method:
    """The first token comes with the prompt's pass: iterations begin at the second."""
    by_sl = []
    iterations = Iterations()
    for sl in range(1, len(costs.verify)):
        iterations = sum((static(each[1:], sl, room=tokens - 1) for each in accepts), Iterations())
        emitted = iterations.mean_emitted
        faster = None if emitted is None else speedup(emitted, sl, costs)
        by_sl.append(AtSL(sl, iterations.acceptance, emitted, faster))
    speedups = [each.speedup for each in by_sl if each.speedup is not None]
    best_sl, best_speedup = best(speedups) if speedups else (None, None)
    whole = torch.cat(list(accepts)).float()
    return Method(
        positions=len(whole),
        match=float(whole.mean()),
        static=by_sl,
        best_sl=best_sl,
        best_speedup=best_speedup,
        oracle_sl=iterations.accepted / iterations.passes if iterations.passes else None,
        oracle_speedup=oracle(iterations, costs),
    )


def show(report: PairReport, console: Console) -> None:
    """The whole report as tables."""
    console.print(f"target {report.target}, draft {report.draft}")
    console.print(
        f"{report.device}, {report.dtype}, {report.threads} CPU threads, batch 1, "
        f"context {report.costs.context} tokens; up to {report.tokens} tokens a prompt"
    )
    if not report.chat_template:
        console.print("the target has no chat template: messages were given as plain text")
    console.print(_cost_table(report.costs))
    for method, title in _TITLES.items():
        console.print(_method_table(report.categories, method, title))


def _cost_table(costs: CostReport) -> Table:
    table = Table(title="costs", title_justify="left")
    table.add_column("")
    for sl in range(len(costs.verify)):
        table.add_column(f"SL={sl}", justify="right")
    alone = costs.verify[0]
    table.add_row("verify, ms", *(f"{1e3 * each:.2f}" for each in costs.verify))
    spent = [(sl * costs.draft + each) / alone for sl, each in enumerate(costs.verify)]
    table.add_row("iteration, target passes", *(f"{each:.2f}" for each in spent))
    table.add_row("ceiling of the speed-up", "1.00", *(f"{each:.2f}" for each in costs.ceiling))
    table.caption = f"one draft step {1e3 * costs.draft:.2f} ms, cost ratio {costs.ratio:.3f}"
    return table


def _method_table(categories: Seq[Category], method: str, title: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("category")
    table.add_column("match" if method != "rejection" else "1 - TV", justify="right")
    table.add_column("")
    for each in categories[0].methods[method].static:
        table.add_column(f"SL={each.sl}", justify="right")
    table.add_column("best", justify="right")
    table.add_column("oracle", justify="right")
    for category in categories:
        found = category.methods[method]
        match = category.overlap if method == "rejection" else found.match
        table.add_row(category.category, f"{match:.3f}", "acceptance", *_cells(found, "acceptance"))
        emitted = _cells(found, "emitted_per_pass")
        table.add_row("", "", "tokens per pass", *emitted, "", _cell(found.oracle_sl, plus=1))
        fastest = "-" if found.best_sl is None else f"SL={found.best_sl} {_cell(found.best_speedup)}"
        speedups = _cells(found, "speedup")
        table.add_row("", "", "speed-up", *speedups, fastest, _cell(found.oracle_speedup), end_section=True)
    return table


def _cells(found: Method, name: str) -> list[str]:
    return [_cell(getattr(each, name)) for each in found.static]


def _cell(value: float | None, plus: float = 0.0) -> str:
    return "-" if value is None else f"{value + plus:.2f}"
