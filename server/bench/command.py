"""The command `disco-serve bench`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import typer

from server.flags import fail, one_line_errors
from server.interrupts import INTERRUPTED

_Number = TypeVar("_Number", int, float)


def bench(
    url: Annotated[str, typer.Option(help="Base URL of an OpenAI-compatible server, with /v1.")],
    model: Annotated[str | None, typer.Option(help="Default: the first that /models names.")] = None,
    endpoint: Annotated[
        Literal["completions", "chat"], typer.Option(help="Which route is loaded.")
    ] = "completions",
    concurrency: Annotated[
        str, typer.Option(metavar="N,N,...", help="Closed loop: so many requests are always open.")
    ] = "1,4,16",
    rate: Annotated[
        str | None,
        typer.Option(metavar="R,R,...", help="Open loop instead: requests a second, arriving by chance."),
    ] = None,
    requests: Annotated[int | None, typer.Option(min=1, help="Of each level.")] = None,
    seconds: Annotated[
        float | None, typer.Option(help="Each level sends so long, then waits for its answers. Default: 30.")
    ] = None,
    warmup: Annotated[
        int | None,
        typer.Option(min=0, help="Requests before each level. Default: one a stream; 4 for a rate."),
    ] = None,
    dataset: Annotated[
        Path | None,
        typer.Option(
            help=".jsonl or .json of entries with prompt, messages, text, or ShareGPT's conversations."
        ),
    ] = None,
    input_tokens: Annotated[int, typer.Option(min=1, help="Length of synthetic prompts.")] = 128,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", "--output-tokens", min=1, help="The most tokens of an answer.")
    ] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, max=2.0, help="0 is greedy.")] = 0.0,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Answers of full length, where the server takes this field.")
    ] = False,
    per_token: Annotated[
        bool,
        typer.Option(
            "--per-token-itl", help="Ask for usage in every chunk (vLLM's field): ITL between tokens."
        ),
    ] = False,
    policy: Annotated[str | None, typer.Option(help="disco-serve's stop policy.")] = None,
    drafter: Annotated[str | None, typer.Option(help="disco-serve's drafter.")] = None,
    extra_body: Annotated[
        str | None, typer.Option(metavar="JSON", help="More fields of every request.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of synthetic prompts and of arrivals.")] = 0,
    processes: Annotated[int, typer.Option(min=1, max=64, help="Processes that send.")] = 1,
    timeout: Annotated[float, typer.Option(help="Seconds without any byte, at most a day.")] = 300.0,
    api_key: Annotated[
        str | None, typer.Option(envvar="OPENAI_API_KEY", show_envvar=True, help="Is never shown.")
    ] = None,
    allow_errors: Annotated[
        bool, typer.Option("--allow-errors", help="Exit with 0 though requests failed.")
    ] = False,
    to_json: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Figures as JSON.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="With every request in the JSON.")] = False,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Latency over throughput (needs matplotlib).")
    ] = None,
) -> None:
    """Measure a server with OpenAI's API under load: latencies, throughput, failures, speculation.

    Exits with 1 if a request failed, with 130 after Ctrl-C, which shows what was measured until then.
    """
    from server.bench.plot import PlotError, check
    from server.bench.run import Options

    if raw and to_json is None:
        fail("--raw: --json must say where to", code=2)
    if requests is None and seconds is None:
        seconds = 30.0
    options = Options(
        url=url, model=model, endpoint=endpoint, requests=requests, seconds=seconds, warmup=warmup,
        concurrency=_numbers("--concurrency", concurrency, int),
        rates=() if rate is None else _numbers("--rate", rate, float),
        dataset=dataset, input_tokens=input_tokens, max_tokens=max_tokens, temperature=temperature,
        ignore_eos=ignore_eos, per_token=per_token, extra=_extra(extra_body, policy, drafter), seed=seed,
        processes=processes, timeout=timeout, api_key=api_key,
    )  # fmt: skip
    with one_line_errors(PlotError):
        if plot is not None:
            check()
    _run(options, to_json, raw, plot, allow_errors)


def _run(options: Any, to_json: Path | None, raw: bool, plot: Path | None, allow_errors: bool) -> None:
    from rich.console import Console

    from server.bench.plot import draw
    from server.bench.processes import ProcessDied
    from server.bench.report import name_of, save, show
    from server.bench.run import measure
    from server.bench.target import TargetError

    errors = Console(stderr=True)
    with one_line_errors(TargetError, ProcessDied, ValueError), errors.status("measuring") as status:

        def reached(report: Any, level: Any) -> None:
            line = f"level {name_of(level)}: {level.good} good, {level.failed} failed, "
            errors.print(line + f"{level.output_tokens_per_second:.1f} tokens/s", highlight=False)
            status.update(f"measuring; {len(report.levels)} levels are done")

        report = measure(options, reached)
    output = Console()
    show(report, output if output.is_terminal else Console(width=160))
    with one_line_errors(OSError, ValueError):
        if to_json is not None:
            save(report, to_json, raw=raw)
        if plot is not None:
            draw(report, plot)
    if report.interrupted:
        raise typer.Exit(INTERRUPTED)
    if report.failed and not allow_errors:
        fail(f"{report.failed} requests failed (--allow-errors takes that)")


def _numbers(name: str, text: str, kind: type[_Number]) -> tuple[_Number, ...]:
    try:
        return tuple(kind(each) for each in text.split(","))
    except ValueError:
        fail(f"{name} {text!r}: numbers parted by commas are wanted", code=2)


def _extra(text: str | None, policy: str | None, drafter: str | None) -> dict[str, Any]:
    """The fields of --extra-body, and `speculation` if a flag asks for it."""
    try:
        found = {} if text is None else json.loads(text)
    except (ValueError, RecursionError) as error:
        fail(f"--extra-body: not JSON: {error}", code=2)
    if not isinstance(found, dict):
        fail("--extra-body: a JSON object is wanted", code=2)
    chosen = {name: value for name, value in (("drafter", drafter), ("policy", policy)) if value is not None}
    if chosen and "speculation" in found:
        fail("--policy and --drafter beside a speculation in --extra-body", code=2)
    return found | ({"speculation": chosen} if chosen else {})
