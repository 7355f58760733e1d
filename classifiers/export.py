"""`disco-serve classifier export`: a trained head where it is to be served from, with its scores on test.

Those are of `evaluate`; of a c2t head of `simulate-trees`.

Optionally tuned anew: a threshold and a cap belong to the costs of a machine, the probabilities do not.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console

from classifiers import traces
from classifiers.head_data import DataError
from classifiers.step_costs import StepCosts
from classifiers.stop_time import Starts
from classifiers.train import SPLIT_SEED, read_traces, tuned
from engine.speculation.heads import Head, HeadError, load_head, save_head


class ExportOptions(msgspec.Struct, frozen=True, kw_only=True):
    """`scores`: the JSON of `evaluate`, or of `simulate-trees`, on this head. `traces` with `costs`: tune it
    for these."""

    head: Path
    out: Path
    scores: Path | None = None
    traces: tuple[Path, ...] = ()
    costs: StepCosts | None = None

    def check(self) -> None:
        """Raises ValueError naming the option that cannot be."""
        if bool(self.traces) != (self.costs is not None):
            raise ValueError("--trace and costs belong together: a head is tuned on a trace, for costs")


def export(options: ExportOptions, console: Console | None = None) -> Path:
    """Writes `out/<kind>.json` and its weights and gives the path. Raises ValueError, HeadError, OSError."""
    options.check()
    console = console or Console(stderr=True)
    head = load_head(options.head)
    scores = {name: value for name, value in head.scores.items() if name != "candidates"}
    if options.scores is not None:
        scores["test"] = _scores(options.scores, head)
    if options.costs is not None:
        made, ms = tuned(head, _validation(options.traces, head), options.costs)
        scores["validation"] = {"ms_per_token": ms, "threshold": made.threshold, "max_sl": made.max_sl}
        data = head.data | {"costs": msgspec.to_builtins(options.costs)}
        scores.pop("test", None)  # they were of the old threshold
        head = msgspec.structs.replace(head, options=made, data=data)
    there = options.out / f"{head.kind}.json"
    if there.exists():
        raise DataError(f"{there} is there: name another --out, or remove it")
    path = save_head(msgspec.structs.replace(head, scores=scores), options.out / head.kind)
    load_head(path)
    told = f"threshold {head.options.threshold:.3f}, max_sl {head.options.max_sl}"
    console.print(f"done: {path}, {told}", highlight=False, soft_wrap=True)
    return path


def _validation(paths: tuple[Path, ...], head: Head) -> Starts:
    trace = read_traces(paths, "hidden" in head.inputs)
    head.check(
        trace.manifest.draft.fingerprint, trace.manifest.feature_version, trace.manifest.hidden or None
    )
    chosen = traces.split(trace, SPLIT_SEED).validation
    if len(chosen) == 0:
        raise DataError("too few prompts to tune on")
    return Starts(trace.select(chosen))


def _scores(path: Path, head: Head) -> dict[str, Any]:
    """What the report says of this head. Raises HeadError if it judged another."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        names = [n for n, told in report["heads"].items() if told["weights_sha256"] == head.weights_sha256]
        if not names:
            raise HeadError(f"{path} does not judge this head: its weights are not among those judged")
        if head.kind == "c2t":
            grown = [row for row in report["rows"] if (row["drafter"], row["task"]) == ("c2t", "all")]
            return {"trees": grown, "costs": report["costs"]}
        rows = [row for row in report["scores"] if row["kind"] == names[0]]
        return {"classifier": rows, "time": report["time"][names[0]], "costs": report["costs"]}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, HeadError):
            raise
        raise ValueError(f"{path} is no report of this head's judge: {error}") from error
