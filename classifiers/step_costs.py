"""What the steps of an iteration take, for simulation: given by hand, by a file, or by a benchmark's JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from engine.speculation.costs import EngineCosts

MOST = 65  # tokens of a pass: the largest lookahead and the newest token


class CostsError(ValueError):
    """Costs that are no costs."""


class StepCosts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Seconds at batch 1.

    `draft`: one draft step. `verify`: (tokens, seconds) of a target pass, ascending from 1 token; linear
    in between and beyond. `decide`: what asking a policy adds to a draft step, for every policy that is
    asked or by its name. `iteration`: of an iteration besides drafting and verifying. `catch_up`: a token
    of the context that the draft reads before it drafts first. `layers`: (nodes, seconds) of a draft pass
    over a tree's layer, as `verify`; where it is not given, any layer costs `draft`.
    """

    draft: float
    verify: tuple[tuple[int, float], ...]
    decide: float | dict[str, float] = 0.0
    iteration: float = 0.0
    catch_up: float = 0.0
    layers: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        for name, points in (("verify", self.verify), ("layers", self.layers or ((1, 1.0),))):
            at = [tokens for tokens, _ in points]
            if at[:1] != [1] or any(b <= a for a, b in pairwise(at)):
                raise CostsError(f"{name} costs must be given for 1 token, then for more; not for {at}")
            if not all(math.isfinite(each) and each > 0 for _, each in points):
                raise CostsError(f"{name} costs must be positive numbers")
        decide = self.decide.values() if isinstance(self.decide, dict) else [self.decide]
        for name, value in (
            ("draft", self.draft),
            ("iteration", self.iteration),
            ("catch_up", self.catch_up),
            *(("decide", each) for each in decide),
        ):
            if not (math.isfinite(value) and value >= 0):
                raise CostsError(f"the cost {name} must be a number from 0, not {value}")

    def passes(self) -> np.ndarray:
        """float64[MOST + 1]: a target pass over 0, 1, ... tokens; the first entry means nothing."""
        return _line(self.verify)

    def drafting(self) -> np.ndarray:
        """float64[MOST + 1]: a draft pass over 0, 1, ... nodes of a tree; the first entry means nothing."""
        return _line(self.layers or ((1, self.draft),))

    def deciding(self, policy: str) -> float:
        """Seconds that asking this policy adds to a draft step."""
        return self.decide.get(policy, 0.0) if isinstance(self.decide, dict) else self.decide

    def known(self) -> EngineCosts:
        """The same as an engine at batch 1 knows it."""
        costs = EngineCosts()
        costs.drafts["model"].know(1, 1, self.draft)
        for tokens, seconds in enumerate(self.passes().tolist()):
            if tokens:
                costs.verify.know(1, tokens, seconds)
        return costs


def _line(points: Seq[tuple[int, float]]) -> np.ndarray:
    """float64[MOST + 1]: linear between the points and beyond."""
    at, seconds = (np.array(each, dtype=float) for each in zip(*points, strict=True))
    tokens = np.arange(MOST + 1)
    found: np.ndarray = np.interp(tokens, at, seconds)
    if len(at) > 1:
        slope = max((seconds[-1] - seconds[-2]) / (at[-1] - at[-2]), 0.0)
        found += np.maximum(tokens - at[-1], 0) * slope
    return found


def read_costs(path: Path) -> StepCosts:
    """From JSON: the fields of `StepCosts`, or a benchmark's file that has them under "costs".

    `verify` and `layers` may be pairs, an object by tokens, or a list for 1, 2, 3, ... tokens.
    Raises CostsError.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CostsError(f"{path}: {error}") from error
    inner = found.get("costs", found) if isinstance(found, dict) else None
    if not isinstance(inner, dict) or not {"draft", "verify"} <= inner.keys():
        raise CostsError(f"{path}: no costs; an object with 'draft' and 'verify' is wanted")
    known = {name: inner[name] for name in StepCosts.__struct_fields__ if name in inner}
    if inner is found and (odd := sorted(inner.keys() - known.keys())):
        raise CostsError(f"{path}: unknown key {odd[0]!r}; known: {', '.join(StepCosts.__struct_fields__)}")
    try:
        pairs = {name: _pairs(known[name], name) for name in ("verify", "layers") if name in known}
        return msgspec.convert(known | pairs, StepCosts)
    except (msgspec.ValidationError, CostsError) as error:
        raise CostsError(f"{path}: {error}") from error


def costs_from(
    path: Path | None, draft_ms: float | None, target_ms: float | None, verify: str | None, decide_us: float
) -> StepCosts:
    """From the command line: a file, or the numbers; `verify` as TOKENS:MS,... Raises CostsError."""
    if path is not None:
        if draft_ms is not None or target_ms is not None or verify is not None:
            raise CostsError("--costs or --draft-ms, --target-ms and --verify, not both")
        found = read_costs(path)
        return msgspec.structs.replace(found, decide=decide_us / 1e6) if decide_us else found
    if draft_ms is None or target_ms is None:
        raise CostsError("--costs is wanted, or --draft-ms and --target-ms")
    points = {1: target_ms / 1e3}
    for word in verify.split(",") if verify else []:
        tokens, _, ms = word.partition(":")
        try:
            points[int(tokens)] = float(ms) / 1e3
        except ValueError as error:
            raise CostsError(f"--verify {word!r}: TOKENS:MS is wanted, as in 8:41.5") from error
    return StepCosts(draft_ms / 1e3, tuple(points.items()), decide_us / 1e6)


def _pairs(verify: Any, name: str) -> Any:
    """Pairs (tokens, seconds) of whatever form; what is none of them is left to validation."""
    if isinstance(verify, Mapping):
        if odd := [tokens for tokens in verify if not str(tokens).isdecimal()]:
            raise CostsError(f"{name!r} is by tokens, not by {odd[0]!r}")
        return sorted((int(tokens), seconds) for tokens, seconds in verify.items())
    if isinstance(verify, Seq) and all(isinstance(each, int | float) for each in verify):
        return list(enumerate(verify, 1))
    return verify
