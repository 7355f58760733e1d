"""One run of `disco-serve bench`: asks the server what it is, then measures level by level."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from server.bench.figures import Level, level_of
from server.bench.load import Load
from server.bench.processes import send
from server.bench.prompts import on_the_wire, read_dataset, synthetic
from server.bench.report import Report
from server.bench.target import Target

_MOST_SYNTHETIC = 512
_BY_TIME = 256  # synthetic prompts where no number of requests is given
_RATE_WARMUP = 4


@dataclass(frozen=True)
class Options:
    """What is asked for, as on the command line. Lengths in tokens, times in seconds."""

    url: str
    model: str | None = None
    endpoint: str = "completions"
    concurrency: Sequence[int] = (1, 4, 16)
    rates: Sequence[float] = ()
    requests: int | None = None
    seconds: float | None = None
    warmup: int | None = None
    dataset: Path | None = None
    input_tokens: int = 128
    max_tokens: int = 128
    temperature: float = 0.0
    ignore_eos: bool = False
    per_token: bool = False
    extra: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    processes: int = 1
    timeout: float = 300.0
    api_key: str | None = field(default=None, repr=False)

    def arguments(self) -> dict[str, Any]:
        """For the JSON file: everything but the key."""
        told = asdict(self)
        del told["api_key"]
        return told | {"dataset": None if self.dataset is None else str(self.dataset)}


def measure(options: Options, reached: Callable[[Report, Level], None]) -> Report:
    """Measures every level, telling of each as it ends. Ctrl-C gives what there is until then.

    Raises TargetError, DataError, ValueError for numbers that cannot work, ProcessDied.
    """
    chat = options.endpoint == "chat"
    path = "chat/completions" if chat else "completions"
    with Target(options.url, options.api_key, options.timeout) as target:
        about = target.about(options.model)
        report = Report(about, datetime.now(UTC).isoformat(timespec="seconds"), options.arguments())
        loads = list(_loads(options, Load(about.url, path, ("",), {}, **_common(options))))
        for load in loads:
            load.check()
        prompts = _prompts(options, target, loads, report)
        fields = _fields(options, about.model)
        probe = {"messages" if chat else "prompt": prompts[0], **fields}
        refused = target.accepted(path, probe, ("ignore_eos", "stream_options"))
    for name in refused:
        del fields[name]
        report.notes.append(f"the server refuses {name}: it is not sent")
    first = 0
    for load in loads:
        outcome = send(replace(load, prompts=prompts, fields=fields, first=first), _processes(options, load))
        report.levels.append(level_of(load, outcome, _processes(options, load)))
        report.records.append(outcome.records)
        reached(report, report.levels[-1])
        if outcome.interrupted:
            break
        used = [record.number for record in outcome.warmup + outcome.records]
        first = max(used, default=first - 1) + 1  # so that no level has its prompts cached
    return report


def _common(options: Options) -> dict[str, Any]:
    names = ("requests", "seconds", "seed", "timeout", "api_key")
    return {name: getattr(options, name) for name in names} | {"streams": 1}


def _loads(options: Options, base: Load) -> Iterator[Load]:
    for rate in options.rates:
        warmup = _RATE_WARMUP if options.warmup is None else options.warmup
        yield replace(base, streams=None, rate=rate, warmup=warmup)
    if not options.rates:
        for streams in options.concurrency:
            warmup = streams if options.warmup is None else options.warmup
            yield replace(base, streams=streams, warmup=warmup)


def _processes(options: Options, load: Load) -> int:
    return options.processes if load.streams is None else min(options.processes, load.streams)


def _fields(options: Options, model: str) -> dict[str, Any]:
    """The body but for its prompt. Raises ValueError for an extra field that has a flag of its own."""
    usage: dict[str, Any] = {"include_usage": True}
    if options.per_token:
        usage["continuous_usage_stats"] = True
    fields: dict[str, Any] = {
        "model": model,
        "max_tokens": options.max_tokens,
        "temperature": options.temperature,
        "stream": True,
        "stream_options": usage,
    }
    if options.ignore_eos:
        fields["ignore_eos"] = True
    twice = sorted({*fields, "prompt", "messages"} & options.extra.keys())
    if twice:
        raise ValueError(f"--extra-body: {', '.join(twice)} is set by flags of its own, or by bench itself")
    return {**fields, **options.extra}


def _prompts(options: Options, target: Target, loads: Sequence[Load], report: Report) -> tuple[Any, ...]:
    chat = options.endpoint == "chat"
    if options.dataset is not None:
        found = read_dataset(options.dataset)
        report.notes.append(f"prompts: {len(found)} of {options.dataset.name}, taking turns")
        return on_the_wire(found, chat)
    needed = sum(load.warmup + (load.requests or 0) for load in loads)
    count = min(_MOST_SYNTHETIC, needed) if options.requests is not None else _BY_TIME
    drawn = synthetic(count, options.input_tokens, options.seed, target.token_counter(report.about.model))
    by = "by the server's /tokenize" if drawn.unit == "tokens" else "since the server has no /tokenize"
    size = str(drawn.shortest) if drawn.shortest == drawn.longest else f"{drawn.shortest} to {drawn.longest}"
    more = "; a chat template adds its own" if chat else ""
    report.notes.append(f"prompts: {count} synthetic ones of {size} {drawn.unit} ({by}), taking turns{more}")
    return on_the_wire(drawn.texts, chat)
