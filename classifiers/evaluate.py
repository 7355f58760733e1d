"""`disco-serve classifier evaluate`: how good heads are on prompts that none of them has seen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from classifiers import ablation, judged, time_table, traces
from classifiers.head_data import DataError
from classifiers.judged import Places
from classifiers.step_costs import StepCosts
from classifiers.stop_time import Reals, Starts
from classifiers.traces import Trace
from classifiers.train import SPLIT_SEED, predictions, progress_bar, prompt_key
from engine.speculation.heads import Head, load_head


class EvaluateOptions(msgspec.Struct, frozen=True, kw_only=True):
    """`heads`: paths of trained heads. `draws`: of prompts, for the intervals."""

    traces: tuple[Path, ...]
    heads: tuple[Path, ...]
    costs: StepCosts
    json: Path
    draws: int = 200
    seed: int = 0
    ablate: bool = True

    def check(self) -> None:
        """Raises ValueError naming the option that cannot be."""
        if not self.traces:
            raise ValueError("--trace: at least one trace")
        if not 10 <= self.draws <= 100_000:
            raise ValueError("--draws: 10 to 100000")


def evaluate(options: EvaluateOptions, console: Console | None = None) -> dict[str, Any]:
    """Writes the figures as JSON and gives them. Raises ValueError, TraceError, HeadError, OSError."""
    options.check()
    console = console or Console(stderr=True)
    trace = _read(options.traces)
    heads = _heads(options.heads, trace)
    train, validation, test = _split(trace, heads)
    starts = Starts(validation), Starts(test)
    with progress_bar(console) as progress:
        report: dict[str, Any] = {
            "format": 1,
            "trace": _about(trace),
            "test": {"prompts": len(test.prompts.name), "positions": len(test.steps.pos)},
            "costs": msgspec.to_builtins(options.costs),
            "heads": {name: _told(head) for name, head in heads.items()},
            **_judge(options, heads, (validation, test), starts, progress),
        }
        if options.ablate:
            report |= _ablate(options, (train, validation, test), progress)
    _print(report, console)
    told: dict[str, Any] = _finite(report)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(told, indent=1) + "\n")
    return told


def _read(paths: tuple[Path, ...]) -> Trace:
    manifests = [traces.read_manifest(path) for path in paths]
    wanted = ["steps.target_hidden"] if all(each.target_hidden for each in manifests) else []
    if all(each.hidden for each in manifests):
        wanted += ["steps.hidden", "branches.hidden"]
    return traces.join([traces.load(path, wanted) for path in paths])


def _heads(paths: tuple[Path, ...], trace: Trace) -> dict[str, Head]:
    """By kind; a second one of a kind by its file's name. Raises HeadError for a head of another draft."""
    found: dict[str, Head] = {}
    for path in paths:
        head = load_head(path)
        if head.kind == "c2t":
            raise DataError(f"{path}: a c2t head judges trees, and `classifier simulate-trees` judges it")
        head.check(
            trace.manifest.draft.fingerprint, trace.manifest.feature_version, trace.manifest.hidden or None
        )
        name = head.kind if head.kind not in found else path.stem
        if name in found:
            raise ValueError(f"--head {str(path)!r}: another of that kind and name was given")
        found[name] = head
    return found


def _split(trace: Trace, heads: dict[str, Head]) -> tuple[Trace, Trace, Trace]:
    """Training, validation and test; test without any prompt that a head has seen."""
    parts = traces.split(trace, SPLIT_SEED)
    seen = {key for head in heads.values() for key in head.seen}
    test = [i for i in parts.test.tolist() if prompt_key(trace, i) not in seen]
    if not test or len(parts.validation) == 0:
        raise DataError("no test prompts: too few, or the heads have seen them all")
    return trace.select(parts.train), trace.select(parts.validation), trace.select(test)


def _judge(
    options: EvaluateOptions,
    heads: dict[str, Head],
    both: tuple[Trace, Trace],
    starts: tuple[Starts, Starts],
    progress: Progress,
) -> dict[str, Any]:
    """Classifiers on test, and time per token."""
    places = Places.of(both[0], starts[0]), Places.of(both[1], starts[1])
    tables: dict[str, tuple[Reals, Reals]] = {}
    plain = [judged.plain(each) for each in starts]
    tables["top1"] = plain[0]["top1"], plain[1]["top1"]
    for name, head in heads.items():
        tables[name] = predictions(head, starts[0]), predictions(head, starts[1])
    task = progress.add_task("judging", total=len(tables) + 1)
    plainly = {"kind": "always_accept", "task": "all", "count": len(places[1].accepted)}
    found: dict[str, Any] = {
        "scores": [
            plainly | {"accepted": float(places[1].accepted.mean())} | judged.always_accept(places[1])
        ],
        "calibration": {},
        "by_position": {},
    }
    for name, table in tables.items():
        late = name in heads and heads[name].judges == "fed"
        one = judged.classifier(table, starts, places, late, options.draws)
        found["scores"] += [{"kind": name, **row} for row in one.scores]
        found["calibration"][name], found["by_position"][name] = one.curve, one.by_position
        progress.advance(task)
    predicted = {name: tables[name][1] for name in heads}
    found["time"] = time_table.time_table(*starts, heads, predicted, options.costs)
    progress.advance(task)
    return found


def _ablate(
    options: EvaluateOptions, three: tuple[Trace, Trace, Trace], progress: Progress
) -> dict[str, Any]:
    variants = ablation.variants_of(three[0])
    task = progress.add_task("ablation", total=len(variants))
    parts = ablation.parts(*three)
    rows = []
    for name, inputs in variants.items():
        taught = ablation.teach(inputs, parts[0], parts[1], options.costs, options.seed)
        left_out = ", ".join(each for each in ablation.DISCO if each not in inputs) or "nothing"
        figures = ablation.judge(taught, parts[2], options.costs)
        rows.append({"variant": name, "left_out": left_out, **figures})
        progress.advance(task)
    task = progress.add_task("transfer", total=len(set(three[0].prompts.category)) + 1)
    matrix = ablation.transfer(three, options.costs, options.seed, lambda: progress.advance(task))
    return {"ablation": rows, "transfer": matrix}


def _about(trace: Trace) -> dict[str, Any]:
    told: dict[str, Any] = msgspec.to_builtins(trace.manifest)
    return {
        name: told[name]
        for name in ("target", "draft", "data", "mode", "tokens", "feature_version", "versions")
    }


def _told(head: Head) -> dict[str, Any]:
    return {
        "kind": head.kind,
        "judges": head.judges,
        "options": msgspec.to_builtins(head.options),
        "weights_sha256": head.weights_sha256,
    }


def _finite(value: Any) -> Any:
    """NaN is no JSON: null stands for a figure that is not defined."""
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    if isinstance(value, float | np.floating):
        return float(value) if np.isfinite(value) else None
    return value


def _print(report: dict[str, Any], console: Console) -> None:
    table = Table("classifier", "AUROC", "ECE", "F1 reject", "precision", "recall")
    for row in (row for row in report["scores"] if row["task"] == "all"):
        figures = [row[name] for name in ("auroc", "ece", "f1_reject", "precision_reject", "recall_reject")]
        table.add_row(row["kind"], *(f"{v['value'] if isinstance(v, dict) else v:.3f}" for v in figures))
    console.print(table)
    table = Table("rule", "ms/token", "speed-up", "SL", "acceptance")
    for name, row in report["time"].items():
        table.add_row(
            name,
            f"{row['ms_per_token']:.3f}",
            f"{row['speedup']:.3f}",
            f"{row['sl_mean']:.2f} ± {row['sl_sd']:.2f}",
            f"{row['acceptance']:.3f}",
        )
    console.print(table)
