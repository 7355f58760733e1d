"""Recorded traces: what a draft would have proposed along its target's own texts, and what it showed.

For greedy and for coupled sampling under a seed, iterations can be replayed exactly from them. As
long as drafts match, a draft that is forced along the text is the draft that runs by itself; after
the first mismatch it goes on with its own wrong token, and that continuation depends on the position
of the mismatch only: it is recorded as a branch.

On disk: a directory with `manifest.json` and `*.safetensors` shards, one for each group of prompts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from collections.abc import Sequence as Seq
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from classifiers.trace_types import (
    FORMAT,
    Array,
    Branches,
    Bushes,
    Counts,
    Identity,
    Manifest,
    Prompts,
    Rows,
    Source,
    Steps,
    Trace,
)

__all__ = [
    "FORMAT",
    "HIDDEN",
    "Array",
    "Branches",
    "Bushes",
    "Counts",
    "Identity",
    "Manifest",
    "Prompts",
    "Source",
    "Split",
    "Steps",
    "Trace",
    "TraceError",
    "join",
    "load",
    "read_manifest",
    "save",
    "save_shard",
    "shard_file",
    "shard_sizes",
    "split",
    "write_manifest",
]

MANIFEST = "manifest.json"
HIDDEN = ("steps.hidden", "steps.target_hidden", "branches.hidden")
"""The large arrays: of float16, loaded on request only."""


class TraceError(ValueError):
    """A directory holds no trace that can be used; the message says why."""


# ---- on disk


def shard_file(directory: Path, number: int) -> Path:
    return directory / f"shard-{number:05d}.safetensors"


def save(directory: Path, trace: Trace) -> None:
    """Writes a whole trace, in one shard. Raises OSError."""
    directory.mkdir(parents=True, exist_ok=True)
    sizes = len(trace.prompts.name), len(trace.steps.pos), len(trace.branches.step)
    save_shard(directory, 0, trace.prompts, trace.steps, trace.branches, trace.bushes)
    write_manifest(directory, msgspec.structs.replace(trace.manifest, counts=Counts(*sizes)))


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Whole or not at all."""
    part = directory / ".manifest.part"
    part.write_bytes(msgspec.json.format(msgspec.json.encode(manifest), indent=1) + b"\n")
    part.rename(directory / MANIFEST)


def save_shard(
    directory: Path,
    number: int,
    prompts: Prompts,
    steps: Steps,
    branches: Branches,
    bushes: Bushes | None = None,
) -> None:
    """Whole or not at all. Indices of prompts and steps count within the shard."""
    arrays = {"prompts.tokens": prompts.tokens, "prompts.ids": prompts.ids}
    tables: dict[str, Steps | Branches | Bushes] = {"steps": steps, "branches": branches}
    if bushes is not None:
        tables["bushes"] = bushes
    for name, table in tables.items():
        for each in fields(table):
            if (array := getattr(table, each.name)) is not None:
                arrays[f"{name}.{each.name}"] = np.ascontiguousarray(array)
    words = {name: getattr(prompts, name) for name in ("category", "name", "finish")}
    part = directory / ".shard.part"
    save_file(arrays, part, metadata={"prompts": json.dumps(words)})  # one entry: their order is not kept
    part.rename(shard_file(directory, number))


def read_manifest(directory: Path) -> Manifest:
    """Raises TraceError if there is none, or one of another format."""
    path = directory / MANIFEST
    try:
        found = msgspec.json.decode(path.read_bytes(), type=Manifest)
    except OSError as error:
        raise TraceError(f"{directory} holds no trace: {path.name}: {error.strerror}") from error
    except msgspec.DecodeError as error:
        raise TraceError(f"{path}: {error}") from error
    if found.format != FORMAT:
        raise TraceError(f"{path}: a trace of format {found.format}, this version reads {FORMAT}")
    return found


def load(directory: Path, hidden: Collection[str] = ()) -> Trace:
    """A finished recording. `hidden`: which of HIDDEN to load; the others are None.

    Raises TraceError where files are missing, damaged or lack what is asked for.
    """
    manifest = read_manifest(directory)
    if manifest.counts is None:
        raise TraceError(f"{directory}: the recording is not finished; run the same collect command again")
    for name in hidden:
        width = manifest.target_hidden if name == "steps.target_hidden" else manifest.hidden
        if name not in HIDDEN or not width:
            raise TraceError(
                f"{directory}: {name} was not recorded" if name in HIDDEN else f"no array {name!r}"
            )
    unwanted = {name for name in HIDDEN if name not in hidden}
    parts: list[Parts] = []
    while sum(len(part[0].name) for part in parts) < manifest.counts.prompts:
        parts.append(_read_shard(shard_file(directory, len(parts)), unwanted))
    trace = Trace(manifest, *_concatenate(parts))
    if _sizes(trace) != manifest.counts:
        raise TraceError(f"{directory}: {_sizes(trace)} in the shards, {manifest.counts} in the manifest")
    return trace


Parts = tuple[Prompts, Steps, Branches, Bushes | None]


def _read_shard(path: Path, unwanted: Collection[str]) -> Parts:
    try:
        with safe_open(path, "numpy") as file:
            words = json.loads(file.metadata()["prompts"])
            arrays = {name: file.get_tensor(name) for name in file.keys() if name not in unwanted}  # noqa: SIM118
        tables: dict[str, dict[str, Array]] = {"steps": {}, "branches": {}, "bushes": {}, "prompts": {}}
        for name, array in arrays.items():
            table, _, column = name.partition(".")
            tables[table][column] = array
        return (
            Prompts(words["category"], words["name"], words["finish"], **tables["prompts"]),
            Steps(**tables["steps"]),
            Branches(**tables["branches"]),
            Bushes(**tables["bushes"]) if tables["bushes"] else None,
        )
    except (OSError, SafetensorError, ValueError, TypeError, KeyError) as error:
        raise TraceError(f"{path}: {str(error) or type(error).__name__}") from error


def shard_sizes(path: Path) -> Counts:
    """What a shard holds. Raises TraceError."""
    try:
        with safe_open(path, "numpy") as file:
            names = ("prompts.tokens", "steps.pos", "branches.step")
            return Counts(*(file.get_slice(name).get_shape()[0] for name in names))
    except (OSError, SafetensorError) as error:
        raise TraceError(f"{path}: {str(error) or type(error).__name__}") from error


def _concatenate(parts: Seq[Parts]) -> Parts:
    """Parts as one, indices counted on. Arrays that one of them lacks are left out."""
    steps, branches, bushes = [], [], []
    prompt = step = 0
    for prompts, own, theirs, off in parts:
        steps.append(replace(own, prompt=own.prompt + np.int32(prompt)))
        branches.append(replace(theirs, step=theirs.step + np.int32(step)))
        if off is not None:
            bushes.append(replace(off, step=off.step + np.int32(step)))
        prompt, step = prompt + len(prompts.name), step + len(own.pos)
    every = [part[0] for part in parts]
    prompts = Prompts(
        category=[each for some in every for each in some.category],
        name=[each for some in every for each in some.name],
        finish=[each for some in every for each in some.finish],
        tokens=np.concatenate([some.tokens for some in every]),
        ids=np.concatenate([some.ids for some in every]),
    )
    return prompts, _stack(steps), _stack(branches), _stack(bushes) if len(bushes) == len(parts) else None


def _stack(tables: Seq[Rows]) -> Rows:
    arrays: dict[str, Any] = {}
    for each in fields(tables[0]):
        found = [getattr(table, each.name) for table in tables]
        arrays[each.name] = None if any(array is None for array in found) else np.concatenate(found)
    return type(tables[0])(**arrays)


def _sizes(trace: Trace) -> Counts:
    return Counts(len(trace.prompts.name), len(trace.steps.pos), len(trace.branches.step))


# ---- parts and unions


@dataclass(frozen=True)
class Split:
    """Indices of prompts, int64, ascending."""

    train: Array
    validation: Array
    test: Array


def split(trace: Trace, seed: int = 0, shares: tuple[float, float, float] = (0.6, 0.2, 0.2)) -> Split:
    """Train, validation and test by prompt, in the same shares of every category.

    A function of seed, category and prompt alone: the same prompt recorded twice (greedy and sampled,
    joined or not) falls to the same part. Of three prompts and more every part gets one. Raises ValueError
    unless the shares are positive and add up to 1.
    """
    if min(shares) <= 0 or abs(sum(shares) - 1) > 1e-6:
        raise ValueError(f"shares {shares}: three positive numbers that add up to 1")
    parts: tuple[list[int], list[int], list[int]] = ([], [], [])
    by_category: dict[str, dict[str, list[int]]] = {}
    for i, category in enumerate(trace.prompts.category):
        text = f"{seed}\0{category}\0".encode() + trace.prompts.ids_of(i).astype("<i4").tobytes()
        by_category.setdefault(category, {}).setdefault(hashlib.sha256(text).hexdigest(), []).append(i)
    for prompts in by_category.values():
        order = sorted(prompts)
        few = max(1, round(shares[1] * len(order))), max(1, round(shares[2] * len(order)))
        test, validation = len(order) - few[1], len(order) - few[1] - few[0]
        if len(order) < 3:  # a part would be empty: training has it all
            test = validation = len(order)
        for at, key in enumerate(order):
            parts[(at >= validation) + (at >= test)].extend(prompts[key])
    return Split(*(np.array(sorted(part), dtype=np.int64) for part in parts))


def join(traces: Seq[Trace]) -> Trace:
    """Traces of one pair as one. Raises TraceError where drafts, features or K differ.

    States that some lack are left out. Prompts that are in several stay apart, as do their steps.
    """
    first = traces[0].manifest
    for other in (trace.manifest for trace in traces[1:]):
        for name in ("feature_version", "branch", "tokens"):
            if getattr(first, name) != getattr(other, name):
                raise TraceError(f"traces differ in {name}: {getattr(first, name)}, {getattr(other, name)}")
        if other.draft.fingerprint != first.draft.fingerprint:
            raise TraceError(f"traces are of different drafts: {first.draft.name}, {other.draft.name}")
    manifests = [trace.manifest for trace in traces]
    manifest = msgspec.structs.replace(
        first,
        data=tuple(dict.fromkeys(source for each in manifests for source in each.data)),
        mode=" + ".join(dict.fromkeys(each.mode for each in manifests)),
        hidden=min(each.hidden for each in manifests),
        target_hidden=min(each.target_hidden for each in manifests),
    )
    joined = Trace(manifest, *_concatenate([(t.prompts, t.steps, t.branches, t.bushes) for t in traces]))
    return replace(joined, manifest=msgspec.structs.replace(manifest, counts=_sizes(joined)))
