"""Speculation for a target larger than the GPU: a 70B shape whose layers are streamed from the host.

    python benchmarks/offload.py [--source smollm2] [--draft default] [--drafters JSON]
        [--resident-layers N] [--temperatures 0 1] [--json out/offload.json]

The target is made in memory, without touching the disk: the source widened to the shape (`widen.py`), so
that text and acceptance are the source's. Layers beyond the source's are random, read and multiplied,
and add nothing; those that are streamed share one pinned buffer, which is copied for each of them.
A pass cannot take less than its floor: streamed bytes over the bandwidth of pinned copies of 1 GiB.
Batch 1; a row is all prompts one after the other, and its speed is from each text's first token to its
last. Tokens a pass leave out each text's last pass. JSON is saved after each row, with the rows that
`--seconds` left no time for.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import msgspec
import offload_pair as pair
import play
import record
import torch
from rich.console import Console
from rich.table import Table
from widen import SHAPES, Shape

from classifiers.heldout import prompts
from classifiers.pair_texts import Encoded, encode
from engine.config import EngineConfig
from engine.core import Engine
from engine.models.load import load_tokenizer, pick_device
from engine.types import CannotLoad, InvalidRequest, SpeculationParams

ALONE = SpeculationParams(drafter="none")
DRAFTERS = [
    {"drafter": "dyspec", "options": {"budget": 64, "max_depth": 12, "threshold": 0.02}},
    {"policy": "static", "options": {"sl": 8}},
    {"policy": "goodput"},
]
BLOCK = 16
console = Console(width=150)


@dataclass
class Row:
    """One setting at one temperature, over the prompts that there was time for."""

    temperature: float
    setting: dict[str, Any]
    tokens: int = 0  # without each text's first
    seconds: float = 0.0
    prompts: int = 0
    passes: int = 0
    iterations: list[tuple[int, int]] = field(default_factory=list)  # (drafted, emitted); see `_played`
    first_ids: list[list[int]] = field(default_factory=list)

    @property
    def speed(self) -> float:
        """Tokens a second."""
        return self.tokens / self.seconds if self.seconds else 0.0


class Clock:
    """Time that is left, by what earlier runs have taken."""

    def __init__(self, most: float) -> None:
        self._begin, self._most = time.monotonic(), most

    @property
    def spent(self) -> float:
        return time.monotonic() - self._begin

    def allows(self, seconds: float) -> bool:
        return self.spent + seconds <= self._most


def main() -> None:
    args = _arguments()
    clock = Clock(args.seconds)
    rate = pair.bandwidth(pick_device(args.device))
    console.print(f"host to device {rate / 1e9:.1f} GB/s")
    tokenizer = load_tokenizer(args.source)
    try:
        engine, built = pair.engine_of(_config(args), _shape(args), tokenizer, console.print)
    except (CannotLoad, ValueError) as error:
        raise SystemExit(f"offload: {error}") from error
    costs = {"verify_seconds": engine.costs.verify, "draft_seconds": engine.costs.drafts["model"]}
    figures: dict[str, Any] = {
        "arguments": {name: str(value) for name, value in vars(args).items()},
        "host_to_device_bytes_per_second": rate,
        "floor_seconds": built["streamed_bytes"] / rate,
        **built,
        **{name: {str(key): s for key, s in each.table().items()} for name, each in costs.items()},
        "rows": [],
        "no_time_for": [],
        "refused": [],
    }
    console.print(
        f"started in {built['start_seconds']:.0f} s; a pass's floor is {figures['floor_seconds']:.3f} s; "
        f"measured by (rows, tokens): {figures['verify_seconds']}, draft steps {figures['draft_seconds']}"
    )
    texts = encode(prompts(args.per_category), tokenizer)[: args.prompts]
    table = Table(*COLUMNS, title=f"{args.source} as {args.shape}, draft {args.draft}")
    for temperature in args.temperatures:
        _rows(engine, texts, temperature, args, clock, figures, table)
    console.print(table)
    console.print(f"{clock.spent:.0f} s in all; no time for {figures['no_time_for'] or 'nothing'}")


def _rows(
    engine: Engine,
    texts: Seq[Encoded],
    temperature: float,
    args: argparse.Namespace,
    clock: Clock,
    figures: dict[str, Any],
    table: Table,
) -> None:
    """Every setting at one temperature."""
    alone = _played(engine, ALONE, texts[:1], temperature, args.alone_tokens, args, clock)
    _keep(figures, table, alone, alone, args.json)
    for setting in args.drafters:
        speculation = msgspec.convert(setting, SpeculationParams)
        try:
            if clock.allows(0):  # compiles and captures
                _played(engine, speculation, texts[:1], temperature, args.warm_tokens, args, clock)
        except InvalidRequest as error:
            console.print(f"{setting}: {error}", style="red")
            figures["refused"].append({"setting": setting, "message": str(error)})
            continue
        row = _played(engine, speculation, texts, temperature, args.tokens, args, clock)
        if row.prompts < len(texts):
            missing = {"temperature": temperature, "setting": setting, "prompts": len(texts) - row.prompts}
            figures["no_time_for"].append(missing)
        _keep(figures, table, row, alone, args.json)


COLUMNS = (
    *("T", "setting", "prompts", "tok/s", "over alone", "emitted a pass", "drafted a pass"),
    *("s a pass", "of the floor", "unlike alone"),
)


def _played(
    engine: Engine,
    speculation: SpeculationParams,
    texts: Seq[Encoded],
    temperature: float,
    tokens: int,
    args: argparse.Namespace,
    clock: Clock,
) -> Row:
    """One text after the other, while there is time for another like the slowest so far."""
    row, longest = Row(temperature, _shown(speculation)), 0.0
    for text in texts:
        if not clock.allows(longest):
            break
        begin = time.perf_counter()
        ids, iterations, seconds = play.generate(
            engine, [text], tokens, speculation, temperature, seeded=args.sampling == "coupled"
        )
        longest = max(longest, time.perf_counter() - begin)
        row.tokens += len(ids["0"]) - 1
        row.seconds += seconds
        row.prompts += 1
        row.passes += len(iterations["0"])
        row.iterations += iterations["0"][:-1]  # the last one may have been cut to the text's length
        row.first_ids.append(ids["0"])
    return row


def _keep(figures: dict[str, Any], table: Table, row: Row, alone: Row, path: Path) -> None:
    """Adds the row to the figures, saves them, and shows it."""
    passes, whole = row.passes, len(row.iterations)
    if not whole:
        record.save(path, figures)
        return
    drafted, emitted = (sum(each[i] for each in row.iterations) for i in (0, 1))
    common = [a[: len(b)] == b[: len(a)] for a, b in zip(row.first_ids, alone.first_ids, strict=False)]
    found = {
        "temperature": row.temperature,
        "setting": row.setting,
        "prompts": row.prompts,
        "tokens": row.tokens,
        "tokens_per_second": row.speed,
        "over_alone": row.speed / alone.speed if alone.speed else None,
        "passes": passes,
        "emitted_per_pass": emitted / whole,
        "drafted_per_pass": drafted / whole,
        "seconds_per_pass": row.seconds / passes,
        "of_floor": figures["floor_seconds"] * passes / row.seconds,
        "texts_unlike_alone": common.count(False) if row.temperature == 0 else None,
        "iterations": row.iterations,
    }
    figures["rows"].append(found)
    record.save(path, figures)
    shown = (
        f"{row.temperature:g}",
        json.dumps(row.setting) if row.setting != _shown(ALONE) else "target alone",
        str(row.prompts),
        f"{row.speed:.3f}",
        "-" if found["over_alone"] is None else f"{found['over_alone']:.2f}",
        f"{found['emitted_per_pass']:.2f}",
        f"{found['drafted_per_pass']:.1f}",
        f"{found['seconds_per_pass']:.3f}",
        f"{found['of_floor']:.1%}",
        "-" if found["texts_unlike_alone"] is None else f"{common.count(False)} of {len(common)}",
    )
    table.add_row(*shown)
    console.print(" | ".join(f"{name} {value}" for name, value in zip(COLUMNS, shown, strict=True)))


def _shown(speculation: SpeculationParams) -> dict[str, Any]:
    """What was given of it."""
    given: dict[str, Any] = msgspec.to_builtins(speculation)
    return {name: value for name, value in given.items() if value is not None}


def _config(args: argparse.Namespace) -> EngineConfig:
    return EngineConfig(
        target=args.source,
        draft=args.draft,
        device=args.device,
        dtype=args.dtype,
        offload="target",
        resident_layers=args.resident_layers,
        offload_buffers=args.buffers,
        max_model_len=args.context,
        kv_blocks=3 * -(-args.context // BLOCK),
        max_num_seqs=2,
        max_sl=args.max_sl,
        block_size=BLOCK,
    )


def _shape(args: argparse.Namespace) -> Shape:
    given = {each.name: getattr(args, each.name) for each in fields(Shape) if each.name != "vocab"}
    return replace(SHAPES[args.shape], **{name: value for name, value in given.items() if value is not None})


def _drafters(text: str) -> list[dict[str, Any]]:
    found = json.loads(text)
    for each in found if isinstance(found, list) else [None]:
        msgspec.convert(each, SpeculationParams)
    return list(found)


def _layers(text: str) -> int | None:
    return None if text == "auto" else int(text)


def _arguments() -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--source", default="smollm2", help="the checkpoint that is widened")
    parser.add_argument("--draft", default="default", help="its draft: default or a model")
    parser.add_argument(
        "--drafters", type=_drafters, default=DRAFTERS, help="SpeculationParams, as JSON list"
    )
    parser.add_argument("--shape", choices=sorted(SHAPES), default="70b")
    for each in fields(Shape):
        if each.name != "vocab":
            flag = "--" + each.name.replace("_", "-")
            parser.add_argument(flag, type=int, metavar="N", help=f"instead of the shape's {each.name}")
    parser.add_argument("--resident-layers", type=_layers, metavar="N|auto", help="default: auto, what fits")
    parser.add_argument("--buffers", type=int, default=2)
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 1.0])
    parser.add_argument("--sampling", choices=["rejection", "coupled"], default="rejection")
    parser.add_argument("--per-category", type=int, default=1, help="held-out prompts of each category")
    parser.add_argument("--prompts", type=int, help="at most, of all")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument(
        "--alone-tokens", type=int, default=8, help="of the target alone, on the first prompt"
    )
    parser.add_argument("--warm-tokens", type=int, default=4, help="of each setting, before it is timed")
    parser.add_argument("--seconds", type=float, default=340.0, help="no text begins that would end later")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--max-sl", type=int, default=16)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--json", type=Path, default=Path("out/offload.json"))
    args = parser.parse_args()
    if not torch.cuda.is_available() and args.device in ("auto", "cuda"):
        parser.error("no GPU: --device cpu tries the benchmark, not the speed")
    return args


if __name__ == "__main__":
    main()
