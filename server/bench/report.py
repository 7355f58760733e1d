"""What was measured, for people (a table) and for programs (JSON)."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from server.bench.exchange import Record
from server.bench.figures import BUSY, PERCENTILES, Level
from server.bench.target import About
from server.log_lines import one_line

FORM = 1
"""Of the JSON file; grows when a key changes its meaning."""


@dataclass
class Report:
    """A run: what was asked of which server, and the figures of every level that was reached."""

    about: About
    started: str
    arguments: Mapping[str, Any]
    notes: list[str] = field(default_factory=list)
    levels: list[Level] = field(default_factory=list)
    records: list[list[Record]] = field(default_factory=list)

    @property
    def failed(self) -> int:
        """Requests that failed, over all levels."""
        return sum(level.failed for level in self.levels)

    @property
    def interrupted(self) -> bool:
        return any(level.interrupted for level in self.levels)


def show(report: Report, console: Console) -> None:
    """Prints tables, what went wrong, and what to know of the figures."""
    about = report.about
    of = f"{about.kind} {about.version}" if about.version else about.kind
    title = one_line(f"{about.model} at {about.url} ({of})")
    console.print(_throughput(report.levels, title))
    console.print(_latencies(report.levels))
    if any(level.speculation for level in report.levels):
        console.print(_speculation(report.levels))
    for note in [*report.notes, *_notes(report.levels)]:
        console.print(f"- {one_line(note)}", markup=False, highlight=False)
    for level in report.levels:
        for line in _errors(level):
            console.print(f"[red]{escape(one_line(line))}[/red]", highlight=False)


def save(report: Report, path: Path, *, raw: bool) -> None:
    """Writes the report as JSON; `raw` adds every request. Raises OSError."""
    found: dict[str, Any] = {
        "form": FORM,
        "started": report.started,
        "server": asdict(report.about),
        "arguments": dict(report.arguments),
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in ("disco-serve", "httpx", "h11")},
        },
        "notes": [*report.notes, *_notes(report.levels)],
        "levels": [
            asdict(level) | {"failed": level.failed, "held_up": level.held_up} for level in report.levels
        ],
    }
    if raw:
        for level, records in zip(found["levels"], report.records, strict=True):
            level["raw"] = [asdict(record) for record in records]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def name_of(level: Level) -> str:
    """What a level is called: its concurrency, or its rate."""
    return str(level.concurrency) if level.rate is None else f"{level.rate:g}/s"


def _throughput(levels: Sequence[Level], title: str) -> Table:
    first = "rate" if any(level.rate is not None for level in levels) else "concurrency"
    heads = (first, "good", "failed", "requests/s", "output tokens/s", "tokens/chunk", "generator CPU")
    table = Table(title=escape(title), title_justify="left", box=SIMPLE_HEAD)
    for head in heads:
        table.add_column(head, justify="right")
    for level in levels:
        table.add_row(
            *(name_of(level), str(level.good), f"[red]{level.failed}[/red]" if level.failed else "0"),
            *(f"{level.requests_per_second:.2f}", f"{level.output_tokens_per_second:.1f}"),
            f"{level.output_tokens / level.chunks:.2f}" if level.chunks else "-",
            f"{level.generator_cpu:.0%} x {level.processes}",
        )
    return table


def _latencies(levels: Sequence[Level]) -> Table:
    table = Table("level", "milliseconds", box=SIMPLE_HEAD)
    for head in ("mean", *(f"p{percent}" for percent in PERCENTILES)):
        table.add_column(head, justify="right")
    for level in levels:
        kinds = (
            ("TTFT, to the first output", level.ttft_ms),
            (f"ITL, between {level.itl_of}", level.itl_ms),
            ("TPOT, a token after the first", level.tpot_ms),
            ("E2E, the whole answer", level.e2e_ms),
        )
        for row, (kind, found) in enumerate(kinds):
            figures = ["-"] * 4 if found is None else [_ms(value) for value in astuple(found)]
            table.add_row("" if row else name_of(level), kind, *figures, end_section=row == 3)
    return table


def _ms(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def _speculation(levels: Sequence[Level]) -> Table:
    heads = ("level", "drafter, policy", "drafted", "accepted", "acceptance", "mean SL", "emitted/pass")
    table = Table(title="speculation, as the answers tell it", title_justify="left", box=SIMPLE_HEAD)
    for head in heads:
        table.add_column(head, justify="left" if head == "drafter, policy" else "right")
    for level in levels:
        told = level.speculation
        if told is None:
            continue
        names = [", ".join(each) for each in (told.drafters, told.policies) if each]
        ratios = [_ratio(each) for each in (told.acceptance_rate, told.mean_sl, told.mean_emitted)]
        table.add_row(
            name_of(level),
            escape(one_line("; ".join(names)) or "-"),
            str(told.drafted),
            str(told.accepted),
            *ratios,
        )
    return table


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _notes(levels: Sequence[Level]) -> list[str]:
    """What must be known to read the figures."""
    notes = []
    for level in levels:
        name = f"level {name_of(level)}"
        if level.counted_by != "usage":
            notes.append(
                f"{name}: answers without usage: tokens are counted by {level.counted_by}, "
                "and a chunk may hold several tokens"
            )
        if level.interrupted:
            notes.append(f"{name}: interrupted; {level.cut} requests were under way and are not counted")
        if level.failed:
            notes.append(f"{name}: the figures are of its {level.good} good requests only")
        if level.held_up:
            notes.append(f"{name}: {_held_up(level)}: raise --processes, or send from elsewhere")
    return notes


def _held_up(level: Level) -> str:
    lag, late = (_ms(each or 0.0) for each in (level.loop_lag_p99_ms, level.late_p99_ms))
    return (
        f"the load generator was held up: its busiest process took {level.generator_cpu:.0%} of a core "
        f"(bound {BUSY:.0%}), at p99 its loop was {lag} ms and its schedule {late} ms late "
        f"(bound {level.lag_bound_ms:.0f} ms)"
    )


def _errors(level: Level) -> list[str]:
    when = ((level.warmup_errors, " in the warm-up"), (level.errors, ""))
    return [
        f"level {name_of(level)}: {count} x {kind}{where}, for example: {level.error_examples[kind]}"
        for kinds, where in when
        for kind, count in kinds.items()
    ]


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
