"""Trees on a trace against the engine itself: the same nodes and verdicts, iteration by iteration."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lossless.toy_heads import toy_heads
from toy_traces import ending
from typer.testing import CliRunner

from classifiers import traces
from classifiers.collect import CollectOptions, collect
from classifiers.collect_bushes import Extent
from classifiers.commands import app
from classifiers.forest import Forest
from classifiers.report import ReportOptions
from classifiers.report import run as report
from classifiers.simulate import CPU, SimulateError
from classifiers.simulate_trees import MOST_EMITTED, ORACLE, SimulateTreesOptions, run
from classifiers.step_costs import CostsError, StepCosts, read_costs
from classifiers.trace_types import take
from classifiers.traces import Trace, TraceError
from classifiers.tree_play import TreePlayer
from engine.config import EngineConfig
from engine.core import Engine
from engine.parts import build
from engine.speculation.load import Load
from engine.speculation.policy import Equipment
from engine.speculation.tree import rules, tree_options
from engine.types import GenerateRequest, SamplingParams, SpeculationParams

TOKENS, SEED = 20, 11
COSTS = StepCosts(0.1, ((1, 1.0), (9, 1.8)), iteration=0.05, layers=((1, 0.1), (3, 0.3)))
TEXTS = ["def f(x): return", "x = [1, 2", "A b c d e f g h", "a prompt of more than 16 tokens, so" * 2]
ENDS = (2, *range(36, 44))  # several, so that some texts end early
TREES: dict[str, tuple[str, dict[str, Any]]] = {
    "dyspec": ("dyspec", {"budget": 8, "max_depth": 5}),
    "dyspec greedy": ("dyspec", {"growth": "greedy", "budget": 6, "max_depth": 5}),
    "opt_tree": ("opt_tree", {"budget": 8, "max_depth": 4, "width": 2}),
    "c2t": ("c2t", {"budget": 6, "max_depth": 2, "threshold": 0.1, "leaf": 0.05, "width": 2}),
}


@dataclass
class Recorded:
    """A pair's trace, and the engine that it came from."""

    trace: Trace
    engine: Engine
    seed: int | None
    directory: Path


@pytest.fixture(scope="module", params=[None, SEED], ids=["greedy", "coupled"])
def recorded(request: Any, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    seed, directory = request.param, tmp_path_factory.mktemp("trees")
    target = ending(tiny_llama, directory / "target", ENDS)
    data = directory / "texts.jsonl"
    data.write_text("".join(json.dumps({"category": "a", "text": text}) + "\n" for text in TEXTS))
    given: dict[str, Any] = {"temperature": 0.0 if seed is None else 1.0, "seed": seed or 0}
    out = directory / "trace"
    given |= {"tokens": TOKENS, "branch": 4, "hidden": False, "trees": True, "batch": 3, "device": "cpu"}
    with pytest.MonkeyPatch.context() as patch:
        # Laws of tiny models are flat: trees go on from what real ones would leave.
        patch.setattr("classifiers.collect.Extent", lambda: Extent(least=0.0003, nodes=64, wide=16))
        collect(CollectOptions(target=str(target), draft="self:3", data=(str(data),), out=out, **given))
    trace = traces.load(out)
    assert {"stop", "length"} <= set(trace.prompts.finish)
    config = EngineConfig(
        target=str(target), draft="self:3", device="cpu", max_num_seqs=1, max_sl=8, prefix_cache=False
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("engine.parts.heads_of", lambda named, pair, draft: toy_heads(draft.hidden_size))
        engine = Engine(config, build(config))
    return Recorded(trace, engine, seed, out)


def served(recorded: Recorded, drafter: str, options: dict[str, Any]) -> list[tuple[int, int, int]]:
    """(prompt, nodes, tokens) of every iteration of the engine, one request after another."""
    found = []
    for i in range(len(TEXTS)):
        params = (
            SamplingParams(temperature=0.0, max_tokens=TOKENS)
            if recorded.seed is None
            else SamplingParams(temperature=1.0, seed=recorded.seed + i, max_tokens=TOKENS)
        )
        recorded.engine.add(
            GenerateRequest(
                id=str(i),
                prompt_ids=tuple(recorded.trace.prompts.ids_of(i).tolist()),
                params=params,
                speculation=SpeculationParams(drafter=drafter, options=options),
            )
        )
        while recorded.engine.has_work():
            for event in recorded.engine.step()[0]:
                if event.iterations:
                    found.append((i, event.drafted, len(event.token_ids)))
    return found


@pytest.mark.parametrize("name", TREES)
def test_it_does_what_the_engine_does(recorded: Recorded, name: str) -> None:
    drafter, options = TREES[name]
    rule = rules()[drafter].equipped(Equipment(Load(CPU), toy_heads(), 4))
    player = TreePlayer(Forest.of(recorded.trace), COSTS)
    played = player.play(rule, tree_options(drafter, options), range(len(TEXTS)))
    assert sum(each.tree.unknown for each in played) == 0
    found = [(each.prompt, each.tree.nodes, each.emitted) for each in played]
    assert found == served(recorded, drafter, options)
    assert max(len(each.tree.passes) for each in played) > 1 and any(each.emitted > 2 for each in played)


def test_a_part_of_a_trace_and_one_that_was_saved_again(recorded: Recorded, tmp_path: Path) -> None:
    drafter, options = TREES["dyspec"]
    rule, asked = rules()[drafter], tree_options(drafter, options)
    whole = TreePlayer(Forest.of(recorded.trace), COSTS).play(rule, asked, [1, 3])
    some = recorded.trace.select([1, 3])
    traces.save(tmp_path / "saved", some)
    for trace in (some, traces.load(tmp_path / "saved"), traces.join([some, some])):
        again = TreePlayer(Forest.of(trace), COSTS).play(rule, asked, [0, 1])
        assert [each.tree for each in again] == [each.tree for each in whole]


def test_what_no_bush_has_is_counted(recorded: Recorded) -> None:
    bushes = recorded.trace.bushes
    assert bushes is not None
    forest = Forest.of(replace(recorded.trace, bushes=take(bushes, np.zeros(0, np.int64))))
    played = TreePlayer(forest, COSTS).play(
        rules()["dyspec"], tree_options("dyspec", TREES["dyspec"][1]), [0, 1]
    )
    assert sum(each.tree.unknown for each in played) > 0


def test_what_trees_take(recorded: Recorded) -> None:
    player = TreePlayer(Forest.of(recorded.trace), COSTS)
    played = player.play(rules()["dyspec"], tree_options("dyspec", {"budget": 4, "max_depth": 3}), [0])[0]
    expected = 0.05 + sum(0.1 * nodes for nodes in played.tree.passes) + 1 + 0.1 * played.tree.nodes
    assert player.seconds(played) == pytest.approx(expected)
    flat = TreePlayer(player.forest, StepCosts(0.1, ((1, 1.0),)))
    assert flat.seconds(played) == pytest.approx(1 + 0.1 * len(played.tree.passes))


def test_the_oracle_and_chains_bound_the_trees(recorded: Recorded, tmp_path: Path) -> None:
    out = tmp_path / "trees.json"
    found = run(
        SimulateTreesOptions(traces=(recorded.directory,), costs=COSTS, out=out, budgets=(2, 8), part="all")
    )
    assert json.loads(out.read_text()) == found
    figures = {(row["drafter"], row["budget"]): row for row in found["rows"] if row["task"] == "all"}
    for budget in (2, 8):
        oracle = figures[ORACLE, budget]["emitted_per_pass"]
        for name in ("dyspec", "opt_tree", MOST_EMITTED):
            row = figures[name, budget]
            assert 1 <= row["emitted_per_pass"] <= oracle and row["verified"] <= budget
            low, high = row["emitted_interval"]
            assert low <= row["emitted_per_pass"] <= high
    assert figures["dyspec", 8]["emitted_per_pass"] > figures["dyspec", 2]["emitted_per_pass"]
    assert "head" in found["skipped"]["c2t"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"budgets": (0,)}, "--budgets"),
        ({"depth": 0}, "--depth"),
        ({"tokens": TOKENS + 1}, "--tokens"),
        ({"drafters": ("oak",)}, "tree drafters are"),
        ({"drafters": ("dyspec:{",)}, "NAME:JSON"),
        ({"drafters": ('dyspec:{"budget": 3}',)}, "--budgets"),
        ({"drafters": ('dyspec:{"draft_temperature": 1}',)}, "one law"),
        ({"drafters": ("c2t",)}, "needs a head"),
    ],
)
def test_what_cannot_be_played_is_refused(
    recorded: Recorded, tmp_path: Path, given: dict[str, Any], message: str
) -> None:
    asked = {"traces": (recorded.directory,), "costs": COSTS, "out": tmp_path / "a.json", "part": "all"}
    with pytest.raises(SimulateError, match=message):
        run(SimulateTreesOptions(**(asked | given)))


def test_a_trace_without_trees_is_refused(recorded: Recorded) -> None:
    with pytest.raises(TraceError, match="--trees"):
        Forest.of(replace(recorded.trace, bushes=None))


def test_the_command(recorded: Recorded, tmp_path: Path) -> None:
    out = tmp_path / "a.json"
    words = ["simulate-trees", "--trace", str(recorded.directory), "--out", str(out), "--part", "all"]
    costs = ["--draft-ms", "1", "--target-ms", "10", "--budgets", "2,4"]
    done = CliRunner().invoke(app, [*words, *costs])
    assert done.exit_code == 0 and "dyspec" in done.output and "tokens per target pass" in done.output
    assert CliRunner().invoke(app, [*words, *costs[:-1], "2,x"]).exit_code != 0


def test_costs_of_layers(tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    path.write_text(json.dumps({"draft": 1.0, "verify": [2.0], "layers": {"1": 1.0, "5": 3.0}}))
    assert read_costs(path).drafting()[[1, 3, 7]].tolist() == [1.0, 2.0, 4.0]
    path.write_text(json.dumps({"draft": 1.0, "verify": [2.0], "layers": [[2, 1.0]]}))
    with pytest.raises(CostsError, match="layers costs must be given for 1 token"):
        read_costs(path)


def test_the_report_shows_it(recorded: Recorded, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "oak.json"
    given: dict[str, Any] = {"budgets": (2, 4), "drafters": ("dyspec",), "part": "all"}
    found = run(SimulateTreesOptions(traces=(recorded.directory,), costs=COSTS, out=out, **given))
    text = report(ReportOptions(out=tmp_path / "page", trees=(out,))).read_text()
    row = next(
        row for row in found["rows"] if (row["task"], row["drafter"], row["budget"]) == ("all", "dyspec", 2)
    )
    low, high = row["emitted_interval"]
    assert f"| dyspec | {row['emitted_per_pass']:.2f} ({low:.2f} to {high:.2f}) |" in text
    assert "## oak: trees" in text and "a layer 100 ms for 1, 300 ms for 3 nodes" in text
    assert (tmp_path / "page/01-trees-by-budget.png").read_bytes().startswith(b"\x89PNG")
