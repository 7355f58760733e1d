"""A frame of `disco-serve top`: tables of what a server does now."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from server.top_page import Quantiles, Speculated, Window

_TIMES = (
    ("time to first token", "time_to_first_token_seconds"),
    ("inter-token", "inter_token_latency_seconds"),
    ("queue", "request_queue_seconds"),
    ("prefill", "request_prefill_seconds"),
    ("decode", "request_decode_seconds"),
    ("end to end", "request_seconds"),
)
_PHASES = ("draft", "verify", "decide", "wait")


def frame(window: Window, state: str, url: str) -> RenderableType:
    """All of it. `state` is what /health says."""
    info = window.new.info()
    models = ", ".join(
        f"{name} {info[name]}" for name in ("target", "draft", "dtype", "device") if name in info
    )
    head = Text.assemble(
        ("disco-serve ", "bold"), f"{info.get('version', '')} at {url}: ",
        (state, "green" if state.startswith("ready") else "bold red"),
        f"\n{models or 'no model yet'}; changes over {window.seconds:.1f} s",
    )  # fmt: skip
    return Group(head, _now(window), _times(window), _policies(window.speculated()), _reasons(window))


def unreachable(url: str, why: str, interval: float) -> RenderableType:
    """What is shown while nobody answers."""
    return Text.assemble(
        ("disco-serve ", "bold"), f"at {url}: ", (why, "bold red"), f"\nasking again every {interval:g} s"
    )


def _now(window: Window) -> Table:
    page = window.new
    table = Table(box=None, pad_edge=False, show_header=False)
    ended = window.grown("requests_total", "outcome")
    outcomes = ", ".join(f"{name} {count:.0f}" for (name,), count in sorted(ended.items()) if count)
    discarded = window.grown("discarded_tokens_total", "reason")
    lost = ", ".join(f"{name} {count:.0f}" for (name,), count in sorted(discarded.items()) if count)
    open_now = ", ".join(
        f"{name.replace('_', ' ')} {_count(page.value(f'requests_{name}'))}"
        for name in ("running", "waiting", "in_flight")
    )
    table.add_row("requests", escape(f"{open_now}; ended: {outcomes or 'none'}"))
    table.add_row(
        "tokens/s",
        f"generated {_number(window.rate('generated_tokens_total'), '.1f')}, "
        f"prompts {_number(window.rate('prompt_tokens_total'), '.1f')}; discarded: {escape(lost) or 'none'}",
    )
    used, blocks = page.value("kv_blocks_used"), page.value("kv_blocks")
    hits = window.ratio("prefix_cache_hit_tokens_total", "prefix_cache_queried_tokens_total")
    table.add_row(
        "KV",
        f"{_share(page.value('kv_usage_ratio'))} ({_count(used)} of {_count(blocks)} blocks), "
        f"preemptions {_count(window.total('preemptions_total'))}, prefix cache hits {_share(hits)}",
    )
    return table


def _times(window: Window) -> Table:
    table = Table("milliseconds", box=None, pad_edge=False, header_style="bold")
    for head in ("p50", "p90", "p99", "observed"):
        table.add_column(head, justify="right")
    for name, metric in _TIMES:
        table.add_row(name, *_quantiles(window.quantiles(metric)))
    return table


def _quantiles(found: Quantiles | None) -> tuple[str, ...]:
    if found is None:
        return ("-", "-", "-", "0")
    return (*(_ms(each) for each in (found.p50, found.p90, found.p99)), str(found.count))


def _policies(found: Sequence[Speculated]) -> Table:
    heads = ("policy", "drafter", "passes", "tokens", "acceptance", "mean SL", "tokens/pass", "speed-up")
    table = Table(box=None, pad_edge=False, header_style="bold")
    for head in (*heads, "stop precision", "recall", "/".join(_PHASES)):
        table.add_column(head, justify="left" if head in ("policy", "drafter") else "right")
    for each in found:
        table.add_row(
            *(escape(each.policy), escape(each.drafter), f"{each.iterations:.0f}", f"{each.emitted:.0f}"),
            *(_share(each.acceptance), _number(each.mean_sl, ".2f"), _number(each.mean_emitted, ".2f")),
            *(_number(each.speedup, ".2f"), _share(each.precision), _share(each.recall)),
            "/".join(f"{each.phases.get(phase, 0.0):.0%}" for phase in _PHASES) if each.phases else "-",
        )
    if not found:
        table.add_row("none at work", *["-"] * (len(table.columns) - 1))
    return table


def _reasons(window: Window) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    grown = window.grown("stop_reason_total", ("policy", "drafter", "reason"))
    for policy, drafter in sorted({each[:2] for each in grown}):
        own = {
            reason: count for (p, d, reason), count in grown.items() if (p, d) == (policy, drafter) and count
        }
        whole = sum(own.values())
        shares = sorted(own.items(), key=lambda item: -item[1])
        if whole:
            text = ", ".join(f"{reason} {count / whole:.0%}" for reason, count in shares)
            table.add_row("drafting ended by", escape(f"{policy}, {drafter}: {text}"))
    return table


def _ms(seconds: float) -> str:
    if math.isinf(seconds):
        return "over all buckets"
    value = seconds * 1e3
    return f"{value:.0f}" if value >= 100 else f"{value:.2f}"


def _count(value: float | None) -> str:
    return _number(value, ".0f")


def _share(value: float | None) -> str:
    return _number(value, ".1%")


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
