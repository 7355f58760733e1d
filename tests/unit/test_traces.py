"""Traces on disk and in parts: what is saved comes back, and parts stay consistent."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from classifiers import traces
from classifiers.traces import (
    HIDDEN,
    Branches,
    Counts,
    Identity,
    Manifest,
    Prompts,
    Source,
    Steps,
    Trace,
    TraceError,
    join,
    load,
    save,
    split,
)

K, H, HT = 3, 4, 6


def made(lengths: tuple[int, ...] = (5, 3, 4), seed: int = 0, *, greedy: bool = True) -> Trace:
    """A trace of made-up numbers; every other step mismatches."""
    rng = np.random.default_rng(seed)
    n = sum(lengths)
    pos = np.concatenate([np.arange(length) for length in lengths]).astype(np.int32)
    match = np.arange(n) % 2 == 0
    token = rng.integers(0, 50, n).astype(np.int32)
    at = np.flatnonzero((pos >= 1) & ~match).astype(np.int32)
    m = len(at)

    def floats(*shape: int) -> Any:
        return rng.random(shape, dtype=np.float32)

    steps = Steps(
        prompt=np.repeat(np.arange(len(lengths)), lengths).astype(np.int32),
        pos=pos,
        token=token,
        drafted=np.where(match, token, token + 1).astype(np.int32),
        match=match,
        top=floats(n, 10),
        entropy=floats(n),
        entropy_top=floats(n),
        prob=floats(n),
        accept=match.astype(np.float32) if greedy else floats(n),
        overlap=None if greedy else floats(n),
        hidden=floats(n, H).astype(np.float16),
        target_hidden=floats(n, HT).astype(np.float16),
    )
    branches = Branches(
        step=at,
        length=np.full(m, K, np.int32),
        drafted=rng.integers(0, 50, (m, K)).astype(np.int32),
        top=floats(m, K, 10),
        entropy=floats(m, K),
        entropy_top=floats(m, K),
        prob=floats(m, K),
        hidden=floats(m, K, H).astype(np.float16),
    )
    p = len(lengths)
    tokens = np.arange(2, 2 + p, dtype=np.int32)
    prompts = Prompts(
        category=["a" if i % 2 else "b" for i in range(p)],
        name=[f"some/{i}" for i in range(p)],
        finish=["length"] * p,
        tokens=tokens,
        ids=np.random.default_rng(99).integers(0, 50, int(tokens.sum())).astype(np.int32),
    )
    manifest = Manifest(
        feature_version=1,
        target=Identity("target", "t" * 64),
        draft=Identity("draft", "d" * 64),
        data=(Source("some.jsonl", "0" * 64, p),),
        mode="greedy" if greedy else f"coupled T=1 seed={seed}",
        tokens=5,
        branch=K,
        hidden=H,
        target_hidden=HT,
        vocab=50,
        counts=Counts(p, n, m),
    )
    return Trace(manifest, prompts, steps, branches)


def same(a: Trace, b: Trace, *, but: tuple[str, ...] = ()) -> bool:
    """Whether all columns are equal, in dtype too."""
    if (a.prompts.category, a.prompts.name, a.prompts.finish) != (
        b.prompts.category,
        b.prompts.name,
        b.prompts.finish,
    ):
        return False
    for table in ("prompts", "steps", "branches"):
        for each in fields(getattr(a, table)):
            x, y = (getattr(getattr(trace, table), each.name) for trace in (a, b))
            if isinstance(x, np.ndarray) and f"{table}.{each.name}" not in but:
                if y is None or x.dtype != y.dtype or not np.array_equal(x, y):
                    return False
            elif x is None and y is not None:
                return False
    return True


@pytest.mark.parametrize("greedy", [True, False])
def test_what_is_saved_comes_back(tmp_path: Path, greedy: bool) -> None:
    trace = made(greedy=greedy)
    save(tmp_path / "new", trace)
    back = load(tmp_path / "new", HIDDEN)
    assert same(trace, back) and back.manifest == trace.manifest
    assert back.manifest.greedy is greedy
    light = load(tmp_path / "new")
    assert same(trace, light, but=HIDDEN)
    assert light.steps.hidden is None and light.steps.target_hidden is None and light.branches.hidden is None
    one = load(tmp_path / "new", ["branches.hidden"])
    assert one.branches.hidden is not None and one.steps.hidden is None


def test_shards_are_one_trace(tmp_path: Path) -> None:
    trace = made((5, 3, 4, 2))
    for number, chosen in enumerate(([0, 1], [2], [3])):
        part = trace.select(chosen)
        traces.save_shard(tmp_path, number, part.prompts, part.steps, part.branches)
        assert traces.shard_sizes(traces.shard_file(tmp_path, number)) == Counts(
            len(chosen), len(part.steps.pos), len(part.branches.step)
        )
    traces.write_manifest(tmp_path, trace.manifest)
    assert same(trace, load(tmp_path, HIDDEN))


def test_indices_by_prompt_and_by_step() -> None:
    trace = made()
    assert trace.begins.tolist() == [0, 5, 8, 12]
    assert [trace.prompts.ids_of(i).tolist() for i in range(3)] == [
        trace.prompts.ids[:2].tolist(),
        trace.prompts.ids[2:5].tolist(),
        trace.prompts.ids[5:].tolist(),
    ]
    branch_of = trace.branch_of()
    assert (branch_of >= 0).tolist() == ((trace.steps.pos >= 1) & ~trace.steps.match).tolist()
    assert trace.branches.step[branch_of[branch_of >= 0]].tolist() == np.flatnonzero(branch_of >= 0).tolist()


def test_a_selection_is_consistent() -> None:
    trace = made()
    some = trace.select([2, 0])
    assert some.prompts.name == ["some/0", "some/2"] and some.begins.tolist() == [0, 5, 9]
    assert some.steps.top.tolist() == np.concatenate([trace.steps.top[:5], trace.steps.top[8:]]).tolist()
    assert some.prompts.ids_of(1).tolist() == trace.prompts.ids_of(2).tolist()
    kept = np.isin(trace.branches.step, [*range(5), *range(8, 12)])
    assert some.branches.prob.tolist() == trace.branches.prob[kept].tolist()
    drafted = trace.steps.drafted[trace.branches.step[kept]]
    assert some.steps.drafted[some.branches.step].tolist() == drafted.tolist()
    none = trace.select([])
    assert none.begins.tolist() == [0] and len(none.steps.pos) == len(none.branches.step) == 0
    assert same(trace.select([0, 1, 2]), trace)


# ---- splits


def test_a_split_is_by_prompt_in_every_category() -> None:
    trace = made((2,) * 40)
    found = split(trace, seed=3)
    everything = np.concatenate([found.train, found.validation, found.test])
    assert sorted(everything.tolist()) == list(range(40))
    for part, size in ((found.train, 12), (found.validation, 4), (found.test, 4)):
        categories = [trace.prompts.category[i] for i in part]
        assert categories.count("a") == categories.count("b") == size
    again, other = split(trace, seed=3), split(trace, seed=4)
    assert again.test.tolist() == found.test.tolist() != other.test.tolist()


def test_a_prompt_falls_to_the_same_part_wherever_it_stands() -> None:
    trace = made((2,) * 20)
    found = split(trace)
    names = {trace.prompts.name[i] for i in found.test}
    turned = trace.select(list(range(5, 20)))
    both = join([trace, made((2,) * 20, seed=8, greedy=False)])
    parts = split(both)
    assert {both.prompts.name[i] for i in parts.test} == names and len(parts.test) == 2 * len(names)
    assert not {both.prompts.name[i] for i in parts.train} & names
    assert len(split(turned).train) > 0


def test_few_prompts_leave_no_part_empty_and_fewer_are_all_for_training() -> None:
    three = made((2,) * 6)  # three of either category
    found = split(three, shares=(0.9, 0.05, 0.05))
    assert len(found.train) == len(found.validation) == len(found.test) == 2
    two = split(made((2,) * 4))
    assert len(two.train) == 4 and not len(two.validation) and not len(two.test)
    for shares in ((0.5, 0.5, 0.0), (0.5, 0.3, 0.3)):
        with pytest.raises(ValueError, match="add up to 1"):
            split(three, shares=shares)


# ---- unions


def test_joined_traces_keep_their_order_and_lose_what_one_lacks() -> None:
    greedy, sampled = made(), made((4, 2), seed=5, greedy=False)
    both = join([greedy, sampled])
    assert both.manifest.mode == "greedy + coupled T=1 seed=5"
    assert both.manifest.counts == Counts(5, 18, len(greedy.branches.step) + len(sampled.branches.step))
    assert both.steps.overlap is None and both.steps.hidden is not None
    assert same(both.select([0, 1, 2]), greedy)
    assert same(both.select([3, 4]), sampled, but=("steps.overlap",)) is False  # overlap is gone
    assert same(both.select([3, 4]), replace(sampled, steps=replace(sampled.steps, overlap=None)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"draft": Identity("other", "e" * 64)}, "different drafts: draft, other"),
        ({"feature_version": 2}, "feature_version: 1, 2"),
        ({"branch": 9}, "branch: 3, 9"),
        ({"tokens": 9}, "tokens: 5, 9"),
    ],
)
def test_traces_that_do_not_fit_are_not_joined(change: dict[str, Any], message: str) -> None:
    other = made()
    changed = replace(other, manifest=msgspec.structs.replace(other.manifest, **change))
    with pytest.raises(TraceError, match=message):
        join([made(), changed])


# ---- what is refused


def _edit(directory: Path, **changes: Any) -> None:
    path = directory / traces.MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


DAMAGE: dict[str, tuple[Any, str]] = {
    "no manifest": (lambda d: (d / "manifest.json").unlink(), "holds no trace"),
    "no json": (lambda d: (d / "manifest.json").write_text("{"), "manifest.json"),
    "a field": (lambda d: _edit(d, tokens="many"), r"\$\.tokens"),
    "another format": (lambda d: _edit(d, format=2), "format 2, this version reads 1"),
    "unfinished": (lambda d: _edit(d, counts=None), "not finished"),
    "no shard": (lambda d: traces.shard_file(d, 0).unlink(), "shard-00000"),
    "no tensors": (lambda d: traces.shard_file(d, 0).write_bytes(b"x" * 99), "shard-00000"),
    "cut": (
        lambda d: traces.shard_file(d, 0).write_bytes(traces.shard_file(d, 0).read_bytes()[:-9]),
        "shard",
    ),
    "counts": (lambda d: _edit(d, counts={"prompts": 3, "steps": 1, "branches": 1}), "in the manifest"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_trace_is_refused_by_name(tmp_path: Path, case: str) -> None:
    save(tmp_path, made())
    damage, message = DAMAGE[case]
    damage(tmp_path)
    with pytest.raises(TraceError, match=message) as error:
        load(tmp_path)
    assert tmp_path.name in str(error.value)


def test_states_that_were_not_recorded_cannot_be_loaded(tmp_path: Path) -> None:
    trace = made()
    bare = replace(
        trace,
        manifest=msgspec.structs.replace(trace.manifest, hidden=0),
        steps=replace(trace.steps, hidden=None),
        branches=replace(trace.branches, hidden=None),
    )
    save(tmp_path, bare)
    assert load(tmp_path, ["steps.target_hidden"]).steps.target_hidden is not None
    for name in ("steps.hidden", "branches.hidden"):
        with pytest.raises(TraceError, match=f"{name} was not recorded"):
            load(tmp_path, [name])
