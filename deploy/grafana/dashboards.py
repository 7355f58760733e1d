"""The three dashboards: `python deploy/grafana/dashboards.py` writes their JSON anew."""

from __future__ import annotations

import json
from pathlib import Path

from panels import Panel, bars, dashboard, heatmap, lines, query, row, stat, table, variable

FOLDER = Path(__file__).parent / "dashboards"
_HERE = 'instance=~"$instance"'
_OURS = 'instance=~"$instance", policy=~"$policy"'
_BOTH = "policy, drafter"
_PAIR = "{{policy}}/{{drafter}}"
_ONE = "{{instance}}"
_INSTANCE = variable("instance", "Instance", "label_values(disco_engine_up, instance)")
_POLICY = variable("policy", "Policy", "label_values(disco_iterations_total, policy)")


def rate(name: str, by: str = "", where: str = _HERE, over: str = "$__rate_interval") -> str:
    """A counter's growth a second, summed."""
    return f"sum{f' by ({by}) ' if by else ''}(rate(disco_{name}{{{where}}}[{over}]))"


def grown(name: str, by: str, where: str = _HERE, over: str = "$__rate_interval") -> str:
    """A counter's growth in an interval, summed."""
    return f"sum by ({by}) (increase(disco_{name}{{{where}}}[{over}]))"


def quantile(q: float, name: str) -> str:
    """A quantile of a histogram over all chosen instances."""
    return f"histogram_quantile({q}, {rate(f'{name}_bucket', 'le')})"


def quantiles(title: str, text: str, name: str) -> Panel:
    """Four of them over time."""
    found = [query(quantile(q, name), f"p{q * 100:g}") for q in (0.5, 0.9, 0.95, 0.99)]
    return lines(title, text, *found, unit="s")


def buckets(title: str, name: str) -> Panel:
    """The whole histogram, in seconds, over time."""
    return heatmap(f"{title}, distribution", "How many a bucket", grown(f"{name}_bucket", "le"), "s")


def overview() -> Panel:
    text = "What clients see: rates, errors, latencies, and what is behind them."
    panels = [*_now(), *_requests(), *_latency(), *_load()]
    return dashboard("disco-overview", "disco-serve: overview", text, [_INSTANCE], panels)


_API = f'{_HERE}, route=~"/v1/.*|/tokenize|/detokenize"'


def _failed(name: str, failed: str, all_: str) -> str:
    # without a failure there is no such series to add up
    return f"({rate(name, where=failed)} or vector(0)) / {rate(name, where=all_)}"


_HTTP_ERRORS = _failed("http_requests_total", f'{_API}, status=~"5.."', _API)


def _now() -> list[Panel]:
    late = quantile(0.95, "time_to_first_token_seconds")
    return [
        row("Now"),
        stat("Requests", "The API's answers a second", rate("http_requests_total", where=_API), "reqps"),
        stat("Errors", "Share of the API's answers that are 500 and above", _HTTP_ERRORS, "percentunit"),
        stat("Running", "Sequences in the engine's batch", f"sum(disco_requests_running{{{_HERE}}})"),
        stat("Waiting", "Sequences that wait for a place", f"sum(disco_requests_waiting{{{_HERE}}})"),
        stat(
            "KV use",
            "KV blocks in use, of all; the fullest instance",
            f"max(disco_kv_usage_ratio{{{_HERE}}})",
            "percentunit",
        ),
        stat("Tokens", "Tokens generated a second", rate("generated_tokens_total")),
        stat("First token, p95", "From arrival to the first token", late, "s"),
        stat("Engines up", "Engines that are ready", f"sum(disco_engine_up{{{_HERE}}})"),
    ]


def _requests() -> list[Panel]:
    routes = query(rate("http_requests_total", "route, status"), "{{route}} {{status}}")
    sequences = _failed("requests_total", f'{_HERE}, outcome="error"', _HERE)
    outcomes = query(rate("requests_total", "outcome"), "{{outcome}}")
    return [
        row("Requests"),
        lines("Requests by route and status", "HTTP answers a second", routes, unit="reqps"),
        lines(
            "Error ratio",
            "HTTP: 500 and above. Sequences: ended in an error, also after a 200",
            query(_HTTP_ERRORS, "HTTP"),
            query(sequences, "sequences"),
            unit="percentunit",
        ),
        lines("Sequences by outcome", "Ended a second", outcomes, unit="reqps", stack="normal"),
    ]


def _latency() -> list[Panel]:
    first, between, whole = "time_to_first_token_seconds", "inter_token_latency_seconds", "request_seconds"
    return [
        row("Latency"),
        quantiles("Time to first token", "From arrival to the first token", first),
        quantiles("Inter-token latency", "A gap of N tokens is N observations of gap/N", between),
        quantiles("End to end", "From arrival to the last token", whole),
        buckets("Time to first token", first),
        buckets("Inter-token latency", between),
        buckets("End to end", whole),
        quantiles("Queue", "From arrival to the sequence's first step", "request_queue_seconds"),
        quantiles("Prefill", "From there to the first token", "request_prefill_seconds"),
        quantiles("Decode", "From the first token to the last one", "request_decode_seconds"),
    ]


def _load() -> list[Panel]:
    places = [
        query(f"sum(disco_requests_{name}{{{_HERE}}})", name.replace("_", " "))
        for name in ("running", "waiting", "in_flight")
    ]
    used = query(f"disco_kv_usage_ratio{{{_HERE}}}", _ONE)
    hits = f"{rate('prefix_cache_hit_tokens_total')} / {rate('prefix_cache_queried_tokens_total')}"
    tokens = [query(rate(f"{kind}_tokens_total"), kind) for kind in ("prompt", "generated")]
    lost = query(rate("discarded_tokens_total", "reason"), "{{reason}}")
    again = query(rate("preemptions_total"), "preemptions")
    return [
        row("Load"),
        lines("Sequences", "In flight: all that the server waits for", *places),
        lines("KV use", "KV blocks in use, of all", used, unit="percentunit", max=1),
        lines(
            "Prefix cache hit ratio",
            "Prompt tokens found, of those looked up",
            query(hits, "hits"),
            unit="percentunit",
            max=1,
        ),
        lines("Tokens", "A second", *tokens),
        lines("Discarded tokens", "Generated a second, but in no answer", lost, stack="normal"),
        lines("Preemptions", "Sequences put back for want of KV blocks, a second", again),
    ]


# --- speculation: figures are (heading, what it is, numerator, denominator, unit)
_DRAFTED, _PASSES = "draft_tokens_total", "iterations_total"
_RATIOS = (
    ("Acceptance", "Draft tokens accepted, of all drafted", "accepted_tokens_total", _DRAFTED, "percentunit"),
    ("Lookahead", "Draft tokens an iteration, on the longest way", "lookahead_sum", _PASSES, "short"),
    ("Emitted per target pass", "Tokens that an iteration gave", "emitted_tokens_total", _PASSES, "short"),
    (
        "Speed-up",
        "Over no draft, by measured costs",
        "baseline_seconds_total",
        "iteration_seconds_total",
        "short",
    ),
)
_STOPS = (
    ("Precision of stopping", "Of the tokens behind which a policy stopped: share rejected", "decision"),
    ("Recall of stopping", "Of the tokens rejected: share behind which the policy stopped", "verdict"),
)


def _figures(by: str = "", over: str = "$__rate_interval") -> list[tuple[str, str, str, str]]:
    """Heading, what it is, query and unit of each figure."""

    def part(name: str, more: str = "") -> str:
        return rate(name, by, _OURS + more, over)

    right = part("stop_decisions_total", ', decision="stop", verdict="rejected"')
    whole = {"decision": ', decision="stop"', "verdict": ', verdict="rejected"'}
    return [(title, text, f"{part(top)} / {part(low)}", unit) for title, text, top, low, unit in _RATIOS] + [
        (title, text, f"{right} / {part('stop_decisions_total', whole[of])}", "percentunit")
        for title, text, of in _STOPS
    ]


def speculation() -> Panel:
    text = "What drafting brings, by stop policy and drafter."
    columns = {title: (expr, unit) for title, _, expr, unit in _figures(_BOTH, "$__range")} | {
        "Tokens a second": (rate("emitted_tokens_total", _BOTH, _OURS, "$__range"), "short"),
        "Iterations a second": (rate("iterations_total", _BOTH, _OURS, "$__range"), "short"),
    }
    panels = [
        row("Now, all chosen policies together"),
        *(stat(title, text, expr, unit, 4) for title, text, expr, unit in _figures()),
        row("Policies side by side, over the time shown"),
        table("Policies", "Averages over the time shown", columns, ["policy", "drafter"]),
        row("Over time"),
        *(lines(title, text, query(expr, _PAIR), unit=unit) for title, text, expr, unit in _figures(_BOTH)),
        *_drafts(),
        *_time(),
    ]
    return dashboard("disco-speculation", "disco-serve: speculation", text, [_INSTANCE, _POLICY], panels)


def _drafts() -> list[Panel]:
    by, over = "policy, position", "$__range"
    accepted = grown("position_accepted_total", by, _OURS, over)
    by_position = f"{accepted} / {grown('position_drafted_total', by, _OURS, over)}"
    lengths = grown("lookahead_bucket", "le", _OURS)
    kinds = (("draft", "drafted"), ("accepted", "accepted"))
    tokens = [query(rate(f"{name}_tokens_total", "", _OURS), legend) for name, legend in kinds]
    reasons = query(rate("stop_reason_total", "reason", _OURS), "{{reason}}")
    return [
        row("Drafts"),
        heatmap("Lookahead, distribution", "Iterations by the length of their draft", lengths, "short", 12),
        bars(
            "Acceptance by position",
            "Of the drafts that reached a position: share whose token was accepted there",
            by_position,
            "percentunit",
            along="position",
            each="policy",
        ),
        lines("Why drafts ended", "Drafts a second, as shares", reasons, stack="percent", width=12),
        lines("Draft tokens", "A second", *tokens, width=12),
    ]


def _time() -> list[Panel]:
    phases = query(rate("iteration_seconds_total", "phase", _OURS), "{{phase}}")
    policies = query(rate("iteration_seconds_total", _BOTH, _OURS), _PAIR)
    wait = "Shares of decoding; wait is what is neither drafting, deciding nor verifying"
    return [
        row("Time"),
        lines("Time by phase", wait, phases, unit="s", stack="percent", width=12),
        lines("Time by policy", "Seconds of decoding a second", policies, unit="s", stack="normal", width=12),
    ]


def instance() -> Panel:
    text = "The process: its engine, its steps and its memory."
    panels = [*_state(), *_steps(), *_life()]
    return dashboard("disco-instance", "disco-serve: instance", text, [_INSTANCE], panels)


def _state() -> list[Panel]:
    down, up = {"text": "down", "color": "red"}, {"text": "up", "color": "green"}
    words = {"type": "value", "options": {"0": down, "1": up}}
    labels = ["instance", "target", "draft", "dtype", "device", "version"]
    # an info metric is 1: its labels are what it tells
    models = {"Served": (f"max by ({', '.join(labels)}) (disco_model_info{{{_HERE}}})", "short")}
    return [
        row("State; the worst of the chosen instances"),
        stat("Server", "Whether Prometheus reads /metrics", f"min(up{{{_HERE}}})", words=words, width=6),
        stat("Engine", "Whether it is ready", f"min(disco_engine_up{{{_HERE}}})", words=words, width=6),
        stat(
            "Restarts",
            "Of the engine, since the server's start",
            f"max(disco_engine_restarts_total{{{_HERE}}})",
            width=6,
        ),
        stat(
            "In flight",
            "Sequences that the server waits for",
            f"max(disco_requests_in_flight{{{_HERE}}})",
            width=6,
        ),
        table("Models", "What each instance serves", models, labels),
    ]


def _steps() -> list[Panel]:
    steps = query(rate("engine_step_seconds_count", "instance"), _ONE)
    blocks = (("kv_blocks", "all"), ("kv_blocks_used", "used"))
    return [
        row("Steps and memory"),
        quantiles("Step time", "Wall time of one engine step", "engine_step_seconds"),
        buckets("Step time", "engine_step_seconds"),
        lines("Steps", "A second", steps),
        lines(
            "KV blocks",
            "Of the pool, and in use",
            *(query(f"disco_{name}{{{_HERE}}}", f"{_ONE} {legend}") for name, legend in blocks),
        ),
        lines("Batch", "Sequences in it", query(f"disco_requests_running{{{_HERE}}}", _ONE)),
        lines("Queue", "Sequences in it", query(f"disco_requests_waiting{{{_HERE}}}", _ONE)),
    ]


def _life() -> list[Panel]:
    scrape = query(f"scrape_duration_seconds{{{_HERE}}}", _ONE)
    restarts = query(f"disco_engine_restarts_total{{{_HERE}}}", _ONE)
    return [
        row("Life"),
        lines("Engine up", "1: ready", query(f"disco_engine_up{{{_HERE}}}", _ONE), max=1),
        lines("Engine restarts", "Since the server's start", restarts),
        lines("Scrape", "Time that reading /metrics took", scrape, unit="s"),
    ]


def files() -> dict[Path, str]:
    """The JSON of each dashboard by its file."""
    pages = (overview(), speculation(), instance())
    return {
        FOLDER / f"{page['uid'].removeprefix('disco-')}.json": json.dumps(page, indent=1) + "\n"
        for page in pages
    }


if __name__ == "__main__":
    for file, text in files().items():
        file.write_text(text)
