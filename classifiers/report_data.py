"""What the report reads: the JSON of `simulate`, of `evaluate`, and of the benchmark of policies."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class ReportError(ValueError):
    """A file that cannot be reported, or a page that cannot be made."""


@dataclass(frozen=True)
class Row:
    """One policy on one task. `repeats`: ms per token of each run; `ms` is their median."""

    task: str
    policy: str
    repeats: tuple[float, ...]
    speedup: float | None
    acceptance: float | None
    sl_mean: float | None
    sl_sd: float | None
    histogram: tuple[int, ...]  # iterations by SL, from 0

    @property
    def ms(self) -> float:
        return statistics.median(self.repeats)


@dataclass(frozen=True)
class Timing:
    """Rows of one run at one temperature."""

    title: str
    temperature: float | None
    measured: bool
    rows: tuple[Row, ...]

    @property
    def tasks(self) -> list[str]:
        return list(dict.fromkeys(row.task for row in self.rows))

    @property
    def policies(self) -> list[str]:
        """The oracle last."""
        names = dict.fromkeys(row.policy for row in self.rows)
        return sorted(names, key=lambda name: name == "oracle")

    def row(self, task: str, policy: str) -> Row | None:
        return next((row for row in self.rows if (row.task, row.policy) == (task, policy)), None)


def read(path: Path, needs: Seq[str] = ()) -> dict[str, Any]:
    """A JSON object that has these keys. Raises ReportError."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ReportError(f"{path}: {error}") from error
    if not isinstance(found, dict):
        raise ReportError(f"{path}: an object is wanted")
    if missing := [name for name in needs if name not in found]:
        raise ReportError(f"{path} lacks {', '.join(map(repr, missing))}: it is of another kind")
    return found


def timings(path: Path, found: Mapping[str, Any], measured: bool) -> list[Timing]:
    """One for each temperature of the rows. Raises ReportError for rows that lack something."""
    by_temperature: dict[float | None, list[Row]] = {}
    default = None if measured else _temperature(found)
    for number, row in enumerate(found["rows"]):
        try:
            temperature = row.get("temperature", default)
            by_temperature.setdefault(temperature, []).append(_row(row))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ReportError(f"{path}: row {number}: {type(error).__name__}: {error}") from error
    what = "measured" if measured else "simulated"
    return [
        Timing(_title(path, what, temperature), temperature, measured, tuple(rows))
        for temperature, rows in by_temperature.items()
    ]


def histogram(given: Any) -> tuple[int, ...]:
    """Counts by SL from 0: of a list, or of an object by SL."""
    if given is None:
        return ()
    if isinstance(given, Mapping):
        known = {int(sl): int(count) for sl, count in given.items()}
        return tuple(known.get(sl, 0) for sl in range(max(known, default=-1) + 1))
    return tuple(int(count) for count in given)


def value(figure: Any) -> tuple[float | None, float | None, float | None]:
    """(value, low, high) of a number, or of one with its interval."""
    if isinstance(figure, Mapping):
        return figure.get("value"), figure.get("low"), figure.get("high")
    return figure, None, None


def _row(row: Mapping[str, Any]) -> Row:
    ms = row["ms_per_token"]
    repeats = tuple(float(each) for each in (ms if isinstance(ms, list) else [ms]))
    if not repeats:
        raise ValueError("ms_per_token is empty")
    figures = [row.get(name) for name in ("speedup", "acceptance", "sl_mean", "sl_sd")]
    speedup, acceptance, sl_mean, sl_sd = (
        statistics.median(each) if isinstance(each, list) else each for each in figures
    )
    counts = histogram(row.get("sl_histogram"))
    return Row(str(row["task"]), str(row["policy"]), repeats, speedup, acceptance, sl_mean, sl_sd, counts)


def _temperature(found: Mapping[str, Any]) -> float | None:
    mode = str(found.get("trace", {}).get("mode", ""))
    if " + " in mode:
        return None
    return 0.0 if mode == "greedy" else 1.0 if mode.startswith("coupled T=1") else None


def _title(path: Path, what: str, temperature: float | None) -> str:
    words = "" if temperature is None else ", greedy" if temperature == 0 else f", T={temperature:g}"
    return f"{path.stem} ({what}{words})"
