"""What a stop policy would give on a recorded greedy trace, at given costs.

    python benchmarks/predict.py TRACE --draft 0.0006 --verify 1:0.0052,8:0.0056,16:0.0060 [--json out.json]

A trace is a draft's choices, and how sure it was, along the target's own greedy texts, so every iteration
of every policy can be played on it. `--draft` is the cost of one draft step, `--verify` of a target pass
over so many tokens (drafts + 1), linear in between and beyond the last; seconds, or any other unit for both.

Two things are not in a trace. After a mismatch a draft goes on along its own words; its signals there are
taken from the text's positions instead (the tokens are rejected either way, only how many are drafted can
differ). And a text's last drafts are cut to what is left of it, as an engine cuts them to max_tokens.
Iterations begin at a text's first token; prefill is not counted.

`best` in a rule is the value of a grid that is fastest on the very prompts it is reported for: an upper
bound for one chosen beforehand.
"""

from __future__ import annotations

import argparse
import copy
import zipfile
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from record import save
from rich.console import Console
from rich.table import Column, Table

Signal = Literal["token", "top", "joint"]
Trace = Mapping[str, np.ndarray]
_ARRAYS = ("cat", "prompt", "pos", "tok", "d_argmax", "d_top1")
_RULES = ["none", "static:5", "static:best", "heuristic", "confidence:token:0.4", "confidence:token:best",
          "confidence:joint:best", "oracle"]  # fmt: skip
_THRESHOLDS = tuple(round(0.02 * i, 2) for i in range(1, 50))


@dataclass(frozen=True)
class Prompt:
    """One text of T tokens: at each, whether the draft's choice was it, and that choice's probability."""

    category: str
    accepted: np.ndarray  # bool[T]
    top1: np.ndarray  # float32[T]


@dataclass(frozen=True)
class Costs:
    """`draft`: of one draft step. `verify`: (tokens, cost) of target passes, ascending from 1 token."""

    draft: float
    verify: tuple[tuple[int, float], ...]

    def __post_init__(self) -> None:
        tokens = [at for at, _ in self.verify]
        if tokens[:1] != [1] or any(b <= a for a, b in pairwise(tokens)):
            raise ValueError(f"verify costs must be given for 1 token, then for more; not for {tokens}")
        if not (0 <= self.draft < np.inf and all(0 < cost < np.inf for _, cost in self.verify)):
            raise ValueError("costs must be positive numbers (a draft step may be free)")

    def passes(self, most: int) -> list[float]:
        """Cost of a pass over 0, 1, ... `most` tokens; linear between and beyond the given points."""
        at, cost = (np.array(each, dtype=float) for each in zip(*self.verify, strict=True))
        tokens = np.arange(most + 1)
        found = np.interp(tokens, at, cost)
        if len(at) > 1:
            slope = (cost[-1] - cost[-2]) / (at[-1] - at[-2])
            found += np.maximum(tokens - at[-1], 0) * slope
        return [float(each) for each in found]


class Run(NamedTuple):
    """Sums over iterations. `seconds` are in the unit of the costs; `drafted` counts draft steps."""

    tokens: int
    seconds: float
    iterations: int
    drafted: int
    accepted: int


class Rule:
    """How far to draft. What it remembers lasts for one text."""

    def draft(self, prompt: Prompt, at: int, most: int) -> int:
        """Tokens drafted by an iteration that begins at position `at`: 0 to `most`."""
        raise NotImplementedError

    def learn(self, drafted: int, accepted: int) -> None:
        """The verdict of this iteration."""


@dataclass
class Static(Rule):
    """Always `sl` tokens; 0 is the target alone."""

    sl: int

    def draft(self, prompt: Prompt, at: int, most: int) -> int:
        return min(self.sl, most)


@dataclass
class Confidence(Rule):
    """Drafts on while the signal is at least the threshold; the token that fell below is kept.

    On greedy drafts `token` and `top` are the same number.
    """

    signal: Signal = "token"
    threshold: float = 0.4

    def draft(self, prompt: Prompt, at: int, most: int) -> int:
        signal = prompt.top1[at : at + most]
        if self.signal == "joint":
            signal = np.cumprod(signal, dtype=np.float32)
        below = signal < np.float32(self.threshold)
        return int(below.argmax()) + 1 if below.any() else most


@dataclass
class Heuristic(Rule):
    """`sl` grows by 2 after an iteration whose drafts were all accepted, else shrinks by 1, at least 1."""

    sl: int = 5
    max_sl: int = 16

    def draft(self, prompt: Prompt, at: int, most: int) -> int:
        return min(self.sl, self.max_sl, most)

    def learn(self, drafted: int, accepted: int) -> None:
        if drafted:
            sl = min(self.sl, self.max_sl)
            self.sl = min(sl + 2, self.max_sl) if accepted == drafted else max(sl - 1, 1)


@dataclass
class Oracle(Rule):
    """Drafts exactly what will be accepted."""

    def draft(self, prompt: Prompt, at: int, most: int) -> int:
        return _prefix(prompt.accepted[at : at + most])


def acceptance(trace: Trace) -> list[np.ndarray]:
    """By prompt, bool[T]: was the draft's choice the text's token. Raises ValueError as `prompts_of` does."""
    return [each.accepted for each in prompts_of(trace)]


def prompts_of(trace: Trace) -> list[Prompt]:
    """The texts of a trace. Raises ValueError if arrays are missing or positions are not 0, 1, ..."""
    if missing := [name for name in _ARRAYS if name not in trace]:
        raise ValueError(f"not a trace: it lacks {', '.join(missing)}")
    given = {name: np.asarray(trace[name]) for name in _ARRAYS}
    found = []
    for number, category in enumerate(given["cat"]):
        at = np.flatnonzero(given["prompt"] == number)
        if not np.array_equal(given["pos"][at], np.arange(len(at))):
            raise ValueError(f"not a trace: the positions of prompt {number} are not 0, 1, 2, ...")
        accepted = given["d_argmax"][at] == given["tok"][at]
        found.append(Prompt(str(category), accepted, given["d_top1"][at].astype(np.float32)))
    return found


def simulate(prompt: Prompt, rule: Rule, max_sl: int, costs: Costs) -> Run:
    """Plays one text: tokens, seconds, iterations, drafted, accepted. No iteration drafts over `max_sl`."""
    rule, passes = copy.copy(rule), costs.passes(max_sl + 1)
    total, at, seconds = len(prompt.accepted), 0, 0.0
    iterations = drafted = accepted = 0
    while at < total:
        sl = rule.draft(prompt, at, min(max_sl, total - at - 1))
        stands = _prefix(prompt.accepted[at : at + sl])
        rule.learn(sl, stands)
        seconds += sl * costs.draft + passes[sl + 1]
        iterations, drafted, accepted = iterations + 1, drafted + sl, accepted + stands
        at += stands + 1
    return Run(total, seconds, iterations, drafted, accepted)


def play(prompts: Seq[Prompt], rule: Rule, max_sl: int, costs: Costs) -> Run:
    """`simulate` over all prompts, at least one."""
    runs = [simulate(each, rule, max_sl, costs) for each in prompts]
    return Run(*(sum(column) for column in zip(*runs, strict=True)))


def rules(name: str, max_sl: int) -> dict[str, Rule]:
    """The rule of a name (`none`, `static:5`, `heuristic`, `confidence:joint:0.3`, `oracle`), or, with `best`
    for its number, all of its grid, by name. Raises ValueError."""
    match name.split(":"):
        case ["none"]:
            return {name: Static(0)}
        case ["oracle"]:
            return {name: Oracle()}
        case ["heuristic"]:
            return {name: Heuristic()}
        case ["static", "best"]:
            return {f"static:{sl}": Static(sl) for sl in range(max_sl + 1)}
        case ["static", sl] if sl.isdecimal():
            return {name: Static(int(sl))}
        case ["confidence", ("token" | "top" | "joint") as signal, "best"]:
            return {f"confidence:{signal}:{each}": Confidence(signal, each) for each in _THRESHOLDS}
        case ["confidence", ("token" | "top" | "joint") as signal, threshold] if (
            threshold.replace(".", "", 1).isdecimal() and float(threshold) <= 1
        ):
            return {name: Confidence(signal, float(threshold))}
    raise ValueError(f"rule {name!r}: known are {', '.join(_RULES)}, and these with other numbers")


def report(
    prompts: Seq[Prompt], names: Seq[str], max_sl: int, costs: Costs
) -> dict[str, dict[str, dict[str, Any]]]:
    """By category and for `all`, by the rules' names: the fastest rule of that name and its figures.

    `acceptance` is None if nothing was drafted. Raises ValueError without prompts, or for a bad name.
    """
    if not prompts or max_sl < 0:
        raise ValueError("a trace without prompts" if not prompts else f"max_sl {max_sl} is below 0")
    parts: dict[str, list[Prompt]] = {}
    for each in prompts:
        parts.setdefault(each.category, []).append(each)
    if len(parts) > 1:
        parts["all"] = list(prompts)
    return {part: {name: _row(mine, name, max_sl, costs) for name in names} for part, mine in parts.items()}


def _row(prompts: Seq[Prompt], name: str, max_sl: int, costs: Costs) -> dict[str, Any]:
    runs = {each: play(prompts, rule, max_sl, costs) for each, rule in rules(name, max_sl).items()}
    chosen, run = min(runs.items(), key=lambda each: each[1].seconds)
    alone = run.tokens * costs.verify[0][1]
    return {
        "rule": chosen,
        "tokens_per_second": run.tokens / run.seconds,
        "speedup": alone / run.seconds,
        "acceptance": run.accepted / run.drafted if run.drafted else None,
        "mean_sl": run.drafted / run.iterations,
        **run._asdict(),
    }


def _prefix(accepted: np.ndarray) -> int:
    """How many are true before the first that is not."""
    return len(accepted) if accepted.all() else int(accepted.argmin())


def _verify(text: str) -> tuple[tuple[int, float], ...]:
    return tuple((int(at), float(cost)) for at, cost in (each.split(":") for each in text.split(",")))


def main() -> None:
    args = _arguments()
    try:
        costs = Costs(args.draft, args.verify)
        if not zipfile.is_zipfile(args.trace):  # numpy would advise to load it as a pickle
            raise ValueError(f"{args.trace} is no .npz file")
        with np.load(args.trace, allow_pickle=False) as trace:
            prompts = prompts_of(trace)
        found = report(prompts, args.rules, args.max_sl, costs)
    except (OSError, ValueError) as error:
        raise SystemExit(f"predict: {error}") from error
    _show(found)
    if args.json:
        given = {"trace": args.trace.name, "max_sl": args.max_sl, "costs": asdict(costs)}
        save(args.json, {"what": __doc__, **given, "categories": found})


def _show(found: dict[str, dict[str, dict[str, Any]]]) -> None:
    table = Table("category", Column("rule", no_wrap=True), "tokens/s", "speed-up", "accepted", "mean SL")
    table.caption = "* best of its grid"
    for category, rows in found.items():
        for name, row in rows.items():
            shown = f"{row['rule']}*" if name.endswith(":best") else name
            rate = "-" if row["acceptance"] is None else f"{row['acceptance']:.3f}"
            figures = (
                f"{row['tokens_per_second']:.4g}",
                f"{row['speedup']:.2f}",
                rate,
                f"{row['mean_sl']:.2f}",
            )
            table.add_row(category, shown, *figures)
        table.add_section()
    Console().print(table)


def _arguments() -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("trace", type=Path, help="an .npz file")
    parser.add_argument("--draft", type=float, required=True, help="cost of a draft step")
    parser.add_argument("--verify", type=_verify, required=True, metavar="TOKENS:COST,...")
    parser.add_argument("--max-sl", type=int, default=24, help="no iteration drafts more")
    parser.add_argument("--rules", nargs="+", default=_RULES, metavar="RULE", help="default: %(default)s")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
