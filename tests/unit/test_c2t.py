"""C2T's rule, its head, and who is refused without one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lossless.toy_heads import toy_head
from lossless.toys import different, toy_engine
from toy_traces import COSTS, taught, toy_trace

from classifiers import traces
from classifiers.evaluate import EvaluateOptions, evaluate
from classifiers.export import ExportOptions, export
from classifiers.head_data import DataError
from classifiers.simulate_trees import SimulateTreesOptions, run
from classifiers.traces import TraceError
from classifiers.tree_heads import rows
from engine.config import EngineConfig
from engine.pairing import named_heads
from engine.speculation import c2t
from engine.speculation.c2t import C2T, C2TOptions
from engine.speculation.heads import INPUTS_OF, HeadError, load_head, save_head
from engine.speculation.policy import Signals
from engine.speculation.tree import Followers, Growth
from engine.types import GenerateRequest, InvalidRequest, SpeculationParams

LAW = (0.5, 0.3, 0.1, 0.06, 0.04)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Signals]:
    """The chance is the joint probability; every call's signals."""
    calls: list[Signals] = []

    def inputs(signals: Signals, names: tuple[str, ...]) -> torch.Tensor:
        assert names == INPUTS_OF["c2t"]
        calls.append(signals)
        assert signals.joint is not None
        return signals.joint

    monkeypatch.setattr(c2t, "inputs_of", inputs)
    monkeypatch.setattr(c2t, "score", lambda weights, x: torch.logit(x))
    return calls


def grown(most: int = 64, deepest: int = 8, begin: int = 0, **options: float) -> Growth:
    """A tree all of whose nodes have one law."""
    told = {"budget": most, "threshold": 0.05, "leaf": 0.0, **options}
    growth = C2T(toy_head("c2t")).start(C2TOptions(**told), most, deepest)  # type: ignore[arg-type]
    growth.begin = begin
    while wanted := growth.wants():
        growth.grow({node: followers() for node in wanted})
    return growth


def followers() -> Followers:
    return Followers(iter(list(enumerate(LAW))), entropy=1.2, top=[*LAW, 0, 0, 0, 0, 0])


def ways(growth: Growth) -> Mapping[tuple[int, ...], float]:
    found = {}
    for node in growth.kept():
        way, at = [], node
        while at >= 0:
            way.append(growth.tokens[at])
            at = growth.parents[at]
        found[tuple(way[::-1])] = growth.value[node]
    return found


def test_likely_nodes_are_drafted_on_and_unlikely_ones_are_leaves(asked: list[Signals]) -> None:
    found = ways(grown(threshold=0.25, leaf=0.08))
    assert found == pytest.approx(
        {(0,): 0.5, (1,): 0.3, (2,): 0.1, (0, 0): 0.25, (0, 1): 0.15, (1, 0): 0.15, (1, 1): 0.09}
        | {(0, 0, 0): 0.125}
    )
    assert len(asked) == 3  # a layer is judged at once


def test_what_a_candidate_is_judged_by(asked: list[Signals]) -> None:
    grown(begin=7, threshold=0.4, leaf=0.4)
    first, second = asked
    assert first.position.tolist() == [7] * 5 and second.position.tolist() == [8] * 5
    assert (int(first.step), int(second.step)) == (1, 2)
    assert second.prob is not None and second.joint is not None and second.entropy is not None
    assert second.prob.tolist() == pytest.approx(LAW)
    assert second.joint.tolist() == pytest.approx([0.5 * p for p in LAW])
    assert second.entropy.tolist() == pytest.approx([1.2] * 5) and second.top is not None
    assert second.top.shape == (5, 10)


def test_of_more_than_the_budget_the_likeliest_stay(asked: list[Signals]) -> None:
    every, few = ways(grown(threshold=0.0)), ways(grown(most=6, threshold=0.0))
    assert len(few) == 6
    assert sorted(few.values()) == pytest.approx(sorted(every.values())[-6:])
    assert all(way[:-1] in few or len(way) == 1 for way in few)


@pytest.mark.usefixtures("asked")
def test_bounds_of_depth_and_width() -> None:
    assert max(len(way) for way in ways(grown(deepest=2, threshold=0.0))) == 2
    short = replace_options(max_sl=1)
    growth = short.start(C2TOptions(threshold=0.0), 32, 8)
    growth.wants()
    growth.grow({-1: followers()})
    assert growth.wants() == []
    assert {token for way in ways(grown(width=2, threshold=0.0)) for token in way} == {0, 1}


def replace_options(**changes: int) -> C2T:
    head = toy_head("c2t")
    told = {"threshold": 0.5, "max_sl": 16, **changes}
    return C2T(toy_head("c2t", options=type(head.options)(**told)))  # type: ignore[arg-type]


def test_a_child_is_worth_no_more_than_its_parent() -> None:
    growth = grown(threshold=0.0)
    assert len(growth.tokens) > 10
    assert all(growth.value[k] <= growth.worth(growth.parents[k]) for k in range(len(growth.tokens)))


def test_without_a_head_it_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lossless.toys._heads", dict)
    engine = toy_engine(different(3))
    assert "c2t" not in engine.info.drafters and "dyspec" in engine.info.drafters
    asked = GenerateRequest(id="a", prompt_ids=(0,), speculation=SpeculationParams(drafter="c2t"))
    with pytest.raises(InvalidRequest, match="cannot draft here: needs a head of kind 'c2t'") as refused:
        engine.add(asked)
    assert (refused.value.param, refused.value.code) == ("speculation.drafter", "drafter_unavailable")


def test_a_head_may_be_named(tmp_path: Path) -> None:
    path = save_head(toy_head("c2t"), tmp_path / "c2t")
    assert set(named_heads(EngineConfig(target="toy", draft="toy", heads=(str(path),)))) == {str(path)}
    other = save_head(toy_head("logistic"), tmp_path / "logistic")
    with pytest.raises(ValueError, match=r"no policy reads .* nor a tree"):
        named_heads(EngineConfig(target="toy", draft="toy", heads=(str(other),)))


def test_it_is_taught_on_ways_on_and_off_the_text(tmp_path: Path) -> None:
    trace = toy_trace(9)
    found = rows(trace, INPUTS_OF["c2t"])
    assert found.inputs.shape[1] == 15 and 0 < float(found.label.mean()) < 0.3
    joint, likely = found.inputs[:, 13], found.label > 0
    assert float(joint[likely].mean()) > 2 * float(joint[~likely].mean())
    with pytest.raises(TraceError, match="--trees"):
        rows(replace(trace, bushes=None), INPUTS_OF["c2t"])
    traces.save(tmp_path / "trace", trace)
    head = load_head(taught(tmp_path / "trace", tmp_path / "heads", "c2t", epochs=20, lr=1e-2))
    assert 0 < head.options.threshold < 1 and head.scores["validation"]["auroc"] > 0.8
    judged = EvaluateOptions(
        traces=(tmp_path / "trace",),
        heads=(tmp_path / "heads/c2t.json",),
        costs=COSTS,
        json=tmp_path / "judged.json",
    )
    with pytest.raises(DataError, match="simulate-trees"):
        evaluate(judged)
    scored = tmp_path / "scored.json"
    asked = {"heads": judged.heads, "budgets": (4,), "costs": COSTS}
    run(SimulateTreesOptions(traces=judged.traces, out=scored, **asked))  # type: ignore[arg-type]
    shipped = export(ExportOptions(head=judged.heads[0], out=tmp_path / "shipped", scores=scored))
    (row,) = load_head(shipped).scores["test"]["trees"]
    assert row["budget"] == 4 and row["emitted_per_pass"] > 1
    told = json.loads(scored.read_text()) | {"heads": {"c2t": {"weights_sha256": "0" * 64}}}
    scored.write_text(json.dumps(told))
    with pytest.raises(HeadError, match="does not judge this head"):
        export(ExportOptions(head=judged.heads[0], out=tmp_path / "other", scores=scored))
