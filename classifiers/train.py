"""`disco-serve classifier train`: one head of one kind, from traces to the two files that are served.

Candidates (widths; for SpecDec++ also which token the state is made to judge) are fitted on the
training prompts. On the validation prompts each is calibrated and gets the threshold and the cap of
least time per token; the quickest one is kept. Test prompts are not looked at.

How `specdec_pp` differs from the paper: the draft's tokens are those of the traces (its own choices
along the target's text and one step beyond a mismatch), not a mix of sampled and target tokens;
weights decay and the best epoch is kept, since traces are small; the probability is calibrated,
which undoes the weight of rejections that helped to fit it, so that h is a probability. With `judges`
"fed" it judges a token by the state after feeding it, as in the paper, which needs the traces' branches
to hold hidden states and costs one draft token more before it can stop. "drafted" judges a token by
the state that it was chosen from.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import torch
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

from classifiers import head_data, head_metrics, stop_time, traces, tree_heads
from classifiers.head_data import DataError, Rows
from classifiers.head_fit import Fitted, Plan, calibrate, fit
from classifiers.step_costs import StepCosts
from classifiers.stop_time import Starts
from classifiers.traces import Trace
from classifiers.train_options import WIDTHS, TrainOptions
from engine.speculation.heads import (
    FORMAT,
    Calibration,
    Head,
    HeadOptions,
    Identity,
    load_head,
    save_head,
)
from engine.speculation.policy import policies
from engine.speculation.scoring import score
from engine.speculation.tree import rules

SPLIT_SEED = 0
BOUNDS = {"specdec_pp": (2, 20)}
"""Bounds of the lookahead in the paper."""


@dataclass(frozen=True)
class Candidate:
    """One fit to try."""

    name: str
    plan: Plan
    judges: Literal["drafted", "fed"]


@dataclass
class Material:
    """The prompts of training and of validation: their traces, where drafts begin, and the costs."""

    whole: Trace
    train: Trace
    validation: Trace
    starts: dict[str, Starts]
    digest: str

    @classmethod
    def read(cls, paths: tuple[Path, ...], hidden: bool) -> Material:
        """Raises TraceError, DataError."""
        whole = read_traces(paths, hidden)
        parts = traces.split(whole, SPLIT_SEED)
        if len(parts.validation) == 0:
            raise DataError("too few prompts: every category needs three for training, validation and test")
        train, validation = whole.select(parts.train), whole.select(parts.validation)
        found = hashlib.sha256(msgspec.json.encode(whole.manifest))
        for values in (whole.steps.drafted, whole.steps.token, whole.steps.top):
            found.update(np.ascontiguousarray(values).tobytes())
        starts = {"train": Starts(train), "validation": Starts(validation)}
        return cls(whole, train, validation, starts, found.hexdigest())

    def rows(self, part: Literal["train", "validation"], options: TrainOptions, fed: bool) -> Rows:
        trace = self.train if part == "train" else self.validation
        if options.kind == "c2t":
            return tree_heads.rows(trace, options.read())
        soft = options.kind == "specdec_pp"
        return head_data.rows(trace, self.starts[part], options.read(), soft=soft, fed=fed)


def read_traces(paths: tuple[Path, ...], hidden: bool) -> Trace:
    """The traces as one; the states only if asked for, since they are large."""
    wanted = ("steps.hidden", "branches.hidden") if hidden else ()
    return traces.join([traces.load(path, wanted) for path in paths])


def prompt_key(trace: Trace, prompt: int) -> str:
    """What a head remembers of a prompt that it was taught or tuned on."""
    return hashlib.sha256(trace.prompts.ids_of(prompt).astype("<i4").tobytes()).hexdigest()[:12]


def train(options: TrainOptions, console: Console | None = None) -> Path:
    """Makes the head and gives the path of its JSON. A killed run goes on with the same options.

    Raises ValueError (options, traces without what is needed), TraceError, HeadError, OSError.
    """
    options.check()
    console = console or Console(stderr=True)
    material = Material.read(options.traces, "hidden" in options.read())
    digest = _digest(options, material)
    work = options.out / "work" / f"{options.kind}-{digest}"
    there = options.out / f"{options.kind}.json"
    if there.exists() and not work.exists():
        raise DataError(f"{there} is there, made otherwise: name another --out, or remove it")
    work.mkdir(parents=True, exist_ok=True)
    tried: list[tuple[Head, dict[str, Any]]] = []
    candidates = list(_candidates(options, material))
    with progress_bar(console) as progress:
        for candidate in candidates:
            train_rows = material.rows("train", options, candidate.judges == "fed")
            validation_rows = material.rows("validation", options, candidate.judges == "fed")
            task = progress.add_task(f"{options.kind} {candidate.name}", total=candidate.plan.epochs)
            fitted = fit(
                candidate.plan,
                train_rows,
                validation_rows,
                work / f"{candidate.name}.safetensors",
                lambda epochs, task=task: progress.advance(task, epochs),  # type: ignore[misc]
            )
            tried.append(_judge(options, material, candidate, fitted, validation_rows))
    head, _ = min(tried, key=lambda each: each[1]["ms_per_token"])
    table = [row for _, row in tried]
    scores = {"validation": next(row for made, row in tried if made is head), "candidates": table}
    path = save_head(msgspec.structs.replace(head, scores=scores), options.out / options.kind)
    load_head(path)  # what is written is what serving will accept
    for row in table:
        console.print(
            f"{row['candidate']}: loss {row['loss']:.4f}, AUROC {row['auroc']:.4f}, ECE {row['ece']:.4f}, "
            f"{row['ms_per_token']:.3f} ms/token at threshold {row['threshold']:.3f}, max_sl {row['max_sl']}",
            highlight=False,
            soft_wrap=True,
        )
    served = options.kind in policies() or options.kind in rules()
    use = f"serve it with --head {path}" if served else "no policy reads this kind: it is for comparison"
    console.print(f"done: {path}; {use}", highlight=False, soft_wrap=True)
    return path


def _candidates(options: TrainOptions, material: Material) -> Iterator[Candidate]:
    small = options.kind in ("disco", "logistic")
    plan = Plan(
        options.kind,
        options.seed,
        depth=options.depth if options.kind == "specdec_pp" else 0,
        reject_weight=options.reject_weight or (6.0 if options.kind == "specdec_pp" else 1.0),
        epochs=options.epochs or {"disco": 40, "logistic": 30, "c2t": 10, "specdec_pp": 20}[options.kind],
        batch=options.batch,
        lr=options.lr or (3e-3 if small else 1e-3),
        weight_decay=1e-3 if options.kind != "specdec_pp" else 0.1,
    )
    judges: list[Literal["drafted", "fed"]] = ["drafted"]
    if options.kind == "specdec_pp":
        kept = material.whole.branches.hidden is not None and material.starts["train"].chains.width > 0
        if options.judges == "fed" and not kept:
            raise DataError("--judges fed: the traces' branches hold no hidden states")
        if options.judges != "auto":
            judges = [options.judges]
        elif kept:
            judges = ["drafted", "fed"]
    for width in options.widths or WIDTHS[options.kind]:
        for judge in judges:
            name = f"w{width}" if width else (judge if options.kind == "specdec_pp" else "linear")
            yield Candidate(name, replace(plan, width=width), judge)


def tuned(head: Head, starts: Starts, costs: StepCosts) -> tuple[HeadOptions, float]:
    """The threshold and the cap of least time per token on these texts, and its ms per token."""
    if head.kind == "c2t":
        return tree_heads.tuned(head, starts.trace, costs)
    least, most = BOUNDS.get(head.kind, (0, stop_time.LONGEST))
    product = head.kind == "specdec_pp"
    rule, ms = stop_time.tune(
        starts,
        predictions(head, starts),
        costs,
        head.kind,
        product=product,
        late=head.judges == "fed",
        min_sl=least,
        caps=tuple(cap for cap in stop_time.CAPS if cap <= most),
    )
    threshold = round(1 - rule.least if product else rule.least, 6)
    return HeadOptions(threshold=threshold, max_sl=rule.max_sl, min_sl=least), ms


def predictions(head: Head, starts: Starts) -> stop_time.Reals:
    """float64[LONGEST, S]: the head's probability after each token of a draft begun at each place."""
    weights = head.folded(torch.device("cpu"))
    with torch.inference_mode():
        return head_data.probabilities(starts, head.inputs, lambda x: score(weights, x).sigmoid())


def _judge(
    options: TrainOptions, material: Material, candidate: Candidate, fitted: Fitted, rows: Rows
) -> tuple[Head, dict[str, Any]]:
    """The candidate as a head, calibrated and tuned on validation, and its figures there."""
    draft = _head(options, material, candidate, fitted, Calibration("none"))
    cpu = torch.device("cpu")
    with torch.inference_mode():
        calibration = calibrate(score(draft.folded(cpu), rows.inputs), rows.label, options.calibration)
        head = msgspec.structs.replace(draft, calibration=calibration)
        likely = score(head.folded(cpu), rows.inputs).sigmoid().double().numpy()
    made, ms = tuned(head, material.starts["validation"], options.costs)
    figures = head_metrics.judge(likely, rows.label.numpy() >= 0.5, 0.5)
    row = {
        "candidate": candidate.name,
        "judges": candidate.judges,
        "epoch": fitted.epoch,
        "loss": fitted.loss,
        "ms_per_token": ms,
        "threshold": made.threshold,
        "max_sl": made.max_sl,
        **{name: figures[name] for name in ("auroc", "ece", "brier", "log_loss")},
    }
    return msgspec.structs.replace(head, options=made), row


def _head(
    options: TrainOptions, material: Material, candidate: Candidate, fitted: Fitted, calibration: Calibration
) -> Head:
    manifest, hidden = material.whole.manifest, "hidden" in options.read()
    return Head(
        format=FORMAT,
        kind=options.kind,
        feature_version=manifest.feature_version,
        inputs=options.read(),
        judges=candidate.judges,
        hidden=manifest.hidden if hidden else 0,
        depth=candidate.plan.depth,
        options=HeadOptions(threshold=0.5, max_sl=stop_time.LONGEST),
        calibration=calibration,
        draft=Identity(manifest.draft.name, manifest.draft.fingerprint),
        target=Identity(manifest.target.name, manifest.target.fingerprint),
        data=_data(options, material),
        scores={},
        seen=_seen(material),
        versions={name: version(name) for name in ("disco-serve", "torch", "transformers")},
        weights=fitted.weights,
    )


def _data(options: TrainOptions, material: Material) -> dict[str, Any]:
    """What it was taught on."""
    manifest = material.whole.manifest
    counts = {
        name: {"prompts": len(part.prompts.name), "positions": len(part.steps.pos)}
        for name, part in (("train", material.train), ("validation", material.validation))
    }
    return {
        "sources": msgspec.to_builtins(manifest.data),
        "mode": manifest.mode,
        "tokens": manifest.tokens,
        "seed": options.seed,
        "costs": msgspec.to_builtins(options.costs),
        **counts,
    }


def _seen(material: Material) -> tuple[str, ...]:
    """The prompts that may no longer judge the head."""
    parts = (material.train, material.validation)
    keys = {prompt_key(part, i) for part in parts for i in range(len(part.prompts.name))}
    return tuple(sorted(keys))


def _digest(options: TrainOptions, material: Material) -> str:
    """Of all that the fits depend on: another run has another place for its checkpoints."""
    told = msgspec.to_builtins(options, enc_hook=str)
    kept = {
        name: value for name, value in told.items() if name not in ("out", "traces", "costs", "calibration")
    }
    return hashlib.sha256(msgspec.json.encode([kept, material.digest])).hexdigest()[:12]


def progress_bar(console: Console) -> Progress:
    return Progress(
        *Progress.get_default_columns(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    )
