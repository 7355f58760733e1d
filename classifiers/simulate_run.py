"""`disco-serve classifier simulate`: the time per token of every policy on a trace, at given costs."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import msgspec
import numpy as np
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

from classifiers import traces
from classifiers.chains import Chains
from classifiers.simulate import Player, Rules, SimulateError
from classifiers.simulate_tables import ORACLE, TARGET, Played, ms_per_token, show, tables
from classifiers.step_costs import MOST, StepCosts
from classifiers.train import prompt_key
from engine.speculation.heads import builtin_heads, load_head
from engine.speculation.policy import options_of, policies

if TYPE_CHECKING:
    from engine.speculation.heads import Head

Part = Literal["train", "validation", "test", "all"]


class SimulateOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What `disco-serve classifier simulate` can be told.

    `policies`: NAME or NAME:JSON of options; none takes every registered one that can be played, with its
    defaults. `part`: of the split by prompt under `seed`, which `train` and `evaluate` make too; the test
    prompts are without those that a head here was taught or tuned on. `tokens`:
    the most tokens of a text, if not all that was recorded. `shuffle`: a seed for the order of prompts, in
    which policies that learn over requests meet them; None is the trace's order. `cached`: see `Rules`.
    """

    traces: tuple[Path, ...]
    costs: StepCosts
    out: Path
    policies: tuple[str, ...] = ()
    heads: tuple[Path, ...] = ()
    part: Part = "test"
    seed: int = 0
    tokens: int | None = None
    max_sl: int = 24
    oracle_sl: int = 24
    shuffle: int | None = None
    cached: bool = False

    def check(self) -> None:
        """Raises SimulateError, naming the first option that cannot work."""
        _require(bool(self.traces), "--trace is missing")
        _require(self.part in get_args(Part), f"--part {self.part}: {', '.join(get_args(Part))}")
        _require(1 <= self.max_sl < MOST, f"--max-sl must be from 1 to {MOST - 1}")
        _require(1 <= self.oracle_sl < MOST, f"--oracle-sl must be from 1 to {MOST - 1}")
        _require(self.tokens is None or self.tokens >= 2, "--tokens must be at least 2")
        _require(self.out.parent.is_dir(), f"--out {self.out}: no such directory")
        _require(not self.out.is_dir(), f"--out {self.out} is a directory")


def run(options: SimulateOptions) -> dict[str, Any]:
    """Plays, writes the JSON, prints a table; what it wrote is returned.

    Raises SimulateError, TraceError, CannotLoad (heads) or InvalidRequest (policies and their options).
    """
    options.check()
    asked = _asked(options.policies)
    trace = _read(options.traces, any("hidden" in policies()[name].needs for name, _ in asked.values()))
    heads = _heads(options.heads, trace.manifest)
    parts = _parts(trace, options.seed)
    judged = parts[options.part]
    if options.part == "test":
        seen = {key for head in heads.values() for key in head.seen}
        judged = np.array([i for i in judged.tolist() if prompt_key(trace, i) not in seen], dtype=np.int64)
    left_out = len(parts[options.part]) - len(judged)
    _require(len(judged) > 0, f"--part {options.part}: the trace has no prompts for it that no head has seen")
    if options.shuffle is not None:
        judged = np.random.default_rng(options.shuffle).permutation(judged)
    player = Player(Chains.of(trace), _rules(trace, options), options.costs, heads)
    with _progress() as progress:
        played = _play(player, asked, judged.tolist(), not options.policies, progress)
        chosen = _chosen(player, parts["validation"].tolist()) if options.part != "all" else None
        oracle = player.oracle(judged.tolist(), options.oracle_sl)
    played.policies = {TARGET: played.statics[0], **played.policies, ORACLE: oracle}
    figures = {
        "what": "disco-serve classifier simulate",
        "format": 1,
        "versions": {name: version(name) for name in ("disco-serve", "torch")},
        "trace": _of_trace(trace.manifest),
        "part": options.part,
        "prompts": len(judged),
        "left_out": left_out,
        "costs": msgspec.to_builtins(options.costs),
        "rules": msgspec.to_builtins(player.rules),
        **tables(played, trace.prompts.category, judged.tolist(), chosen, options.max_sl),
    }
    text = json.dumps(figures, indent=1)
    options.out.write_text(text + "\n", encoding="utf-8")
    found: dict[str, Any] = json.loads(text)
    show(found)
    return found


def _play(
    player: Player,
    asked: Mapping[str, tuple[str, Any]],
    prompts: Seq[int],
    skip: bool,
    progress: Progress,
) -> Played:
    """`skip`: leave out what cannot be played, and say why; else it is an error."""
    steps = _task(progress, "policies", len(asked) + player.rules.max_sl + 1)
    statics = []
    for sl in range(player.rules.max_sl + 1):
        statics.append(player.play("static", options_of("static", {"sl": sl}), prompts))
        steps()
    played = Played({}, statics, {}, {})
    for label, (name, options) in asked.items():
        reason = player.missing(name)
        if reason is not None and skip:
            played.skipped[label] = reason
        else:
            played.policies[label] = player.play(name, options, prompts)
            played.options[label] = name, msgspec.to_builtins(options)
        steps()
    return played


def _chosen(player: Player, validation: Seq[int]) -> int | None:
    """The static lookahead that is fastest over all validation prompts; None without any."""
    if not validation:
        return None
    times = [
        ms_per_token(player.play("static", options_of("static", {"sl": sl}), validation))
        for sl in range(player.rules.max_sl + 1)
    ]
    return int(np.argmin(times))


def _asked(given: Seq[str]) -> dict[str, tuple[str, Any]]:
    """By label: the policy's name and its validated options. Raises InvalidRequest or SimulateError."""
    found = {}
    for label in given or sorted(policies()):
        name, _, text = label.partition(":")
        try:
            options = json.loads(text) if text else {}
        except ValueError as error:
            raise SimulateError(f"--policy {label!r}: NAME or NAME:JSON is wanted: {error}") from error
        _require(isinstance(options, dict), f"--policy {label!r}: the options must be a JSON object")
        found[label] = name, options_of(name, options)
    return found


def _read(paths: Seq[Path], hidden: bool) -> traces.Trace:
    """The traces as one; with the draft's states if they are wanted and were recorded."""
    parts = []
    for path in paths:
        there = hidden and traces.read_manifest(path).hidden
        parts.append(traces.load(path, ("steps.hidden", "branches.hidden") if there else ()))
    return parts[0] if len(parts) == 1 else traces.join(parts)


def _heads(paths: Seq[Path], manifest: traces.Manifest) -> dict[str, Head]:
    """The pair's shipped heads, and these. Raises HeadError for a broken one, or one of another draft."""
    given: dict[str, Head] = {}
    for path in paths:
        head = load_head(path)
        head.check(manifest.draft.fingerprint, manifest.feature_version, manifest.hidden or None)
        _require(head.kind not in given, f"--head {path}: there is another one of kind {head.kind!r}")
        given[head.kind] = head
    return {**builtin_heads(manifest.draft.fingerprint, manifest.target.fingerprint), **given}


def _parts(trace: traces.Trace, seed: int) -> dict[Part, np.ndarray]:
    found = traces.split(trace, seed)
    every = np.arange(len(trace.prompts.category))
    return {"train": found.train, "validation": found.validation, "test": found.test, "all": every}


def _rules(trace: traces.Trace, options: SimulateOptions) -> Rules:
    most = trace.manifest.tokens
    tokens = options.tokens or most
    _require(tokens <= most, f"--tokens {tokens}: the trace's texts have at most {most}")
    lengths = np.diff(trace.begins)
    for finish, length in zip(trace.prompts.finish, lengths, strict=True):
        _require(finish != "length" or length == most, "a text of the trace ends before its length")
    budget = 2048 if trace.manifest.settings.get("device") == "cuda" else 256  # as engines there have it
    return Rules(tokens, options.max_sl, budget, options.cached)


def _of_trace(manifest: traces.Manifest) -> dict[str, Any]:
    names = ("target", "draft", "data", "mode", "tokens", "branch", "counts", "versions")
    found: dict[str, Any] = msgspec.to_builtins({name: getattr(manifest, name) for name in names})
    return found


def _progress() -> Progress:
    return Progress(
        *Progress.get_default_columns(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
    )


def _task(progress: Progress, name: str, total: int) -> Callable[[], None]:
    task = progress.add_task(name, total=total)
    return lambda: progress.advance(task, 1)


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise SimulateError(message)
