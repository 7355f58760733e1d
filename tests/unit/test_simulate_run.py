"""The command `simulate`: what it is told, what it writes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from lossless.toy_heads import DRAFT, TARGET, toy_head
from toy_traces import HIDDEN, toy_trace
from typer.testing import CliRunner

from classifiers import traces
from classifiers.commands import app
from classifiers.simulate import SimulateError
from classifiers.simulate_run import SimulateOptions, run
from classifiers.step_costs import CostsError, StepCosts, costs_from, read_costs
from classifiers.trace_types import take
from classifiers.train import prompt_key
from engine.speculation.heads import HeadError, Identity, save_head
from engine.speculation.policy import policies
from engine.types import InvalidRequest

COSTS = StepCosts(0.002, ((1, 0.03), (9, 0.04)))
MADE = ("target only", "static, chosen on validation", "static, best in hindsight", "oracle")


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    traces.save(tmp_path / "trace", toy_trace(prompts=24, tokens=30))
    return tmp_path / "trace"


def simulated(trace: Path, **more: Any) -> dict[str, Any]:
    given = {"traces": (trace,), "costs": COSTS, "out": trace.parent / "out.json", "max_sl": 10, **more}
    return run(SimulateOptions(**given))


def test_every_policy_by_task(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = simulated(trace)
    assert json.loads((trace.parent / "out.json").read_text()) == found
    lacking = {name for name in policies() if name in found["skipped"]}
    assert {"disco", "specdec_pp"} <= lacking and "head" in found["skipped"]["disco"]
    for task in ("easy", "hard", "all"):
        rows = {row["policy"]: row for row in found["rows"] if row["task"] == task}
        assert set(rows) == {*policies(), *MADE} - lacking
        target, best, oracle = (rows[name] for name in (MADE[0], MADE[2], MADE[3]))
        assert target["ms_per_token"] == [pytest.approx(30)] and target["speedup"] == 1
        assert target["acceptance"] is None and oracle["acceptance"] == 1
        curve = found["static"]["ms_per_token"][task]
        assert len(curve) == 11 and best["ms_per_token"] == [min(curve)]
        assert best["options"] == {"sl": int(np.argmin(curve))}
        assert rows["static"]["ms_per_token"] == [curve[5]]
        for name, row in rows.items():
            assert row["ms_per_token"][0] >= oracle["ms_per_token"][0], name
            assert row["speedup"] == pytest.approx(30 / row["ms_per_token"][0])
            counts = np.array(row["sl_histogram"])
            assert counts.sum() == row["iterations"] and counts @ np.arange(11) == row["drafted"]
            assert row["sl_mean"] == pytest.approx(row["drafted"] / row["iterations"])
            assert row["tokens"] == row["accepted"] + row["iterations"]  # no text ends early
            assert sum(row["drafted_at"]) == row["drafted"] and sum(row["accepted_at"]) == row["accepted"]
            low, middle, high = row["against_best_static"]
            assert low <= middle <= high
            assert middle == pytest.approx(best["ms_per_token"][0] / row["ms_per_token"][0], rel=0.05)
    words = capsys.readouterr()
    assert "static, best in hindsight (SL " in words.out and "not played: disco" in words.out


def test_the_static_sl_is_chosen_on_validation_and_judged_on_test(trace: Path) -> None:
    test, validation = simulated(trace), simulated(trace, part="validation")
    sl = validation["static"]["hindsight"]["all"]
    assert test["static"]["chosen"] == sl
    row = next(r for r in test["rows"] if (r["task"], r["policy"]) == ("all", MADE[1]))
    assert row["options"] == {"sl": sl} and row["ms_per_token"] == [test["static"]["ms_per_token"]["all"][sl]]
    assert not set(test["by_prompt"]["prompt"]) & set(validation["by_prompt"]["prompt"])
    whole = simulated(trace, part="all")
    assert whole["prompts"] == 24 and whole["static"]["chosen"] is None
    assert MADE[1] not in {row["policy"] for row in whole["rows"]}


def test_sums_by_prompt_are_the_rows(trace: Path) -> None:
    found = simulated(trace, part="all", policies=("heuristic",), shuffle=3)
    each = found["by_prompt"]
    assert sorted(each["prompt"]) == list(range(24)) != each["prompt"] and each["tokens"] == [29] * 24
    for task in ("easy", "all"):
        mine = np.array([task in (name, "all") for name in each["task"]])
        for row in (r for r in found["rows"] if r["task"] == task and r["policy"] in each["seconds"]):
            seconds = np.array(each["seconds"][row["policy"]])[mine].sum()
            assert row["ms_per_token"] == [pytest.approx(1e3 * seconds / (29 * mine.sum()))]


def test_options_and_heads(trace: Path, tmp_path: Path) -> None:
    asked = ("static", 'static:{"sl": 2}', "disco", "specdec_pp")
    heads = tuple(save_head(toy_head(kind, HIDDEN), tmp_path / kind) for kind in ("disco", "specdec_pp"))
    found = simulated(trace, policies=asked, heads=heads)
    assert {row["policy"] for row in found["rows"]} == {*asked, *MADE} and not found["skipped"]
    row = next(r for r in found["rows"] if r["policy"] == asked[1])
    assert (row["name"], row["options"]) == ("static", {"sl": 2})
    other = save_head(toy_head("disco", draft=Identity("other", "e" * 64)), tmp_path / "other")
    with pytest.raises(HeadError, match="other"):
        simulated(trace, heads=(other,))
    with pytest.raises(SimulateError, match="another one of kind 'disco'"):
        simulated(trace, heads=(heads[0], heads[0]))
    assert (DRAFT.name, TARGET.name) != ("other", "other")


def test_prompts_that_a_head_has_seen_are_no_test(trace: Path, tmp_path: Path) -> None:
    clean = simulated(trace, policies=("static",))
    whole = traces.load(trace)
    test = clean["by_prompt"]["prompt"]
    seen = tuple(prompt_key(whole, i) for i in (test[0], test[2]))
    head = save_head(toy_head("disco", seen=seen), tmp_path / "disco")
    found = simulated(trace, policies=("static",), heads=(head,))
    assert found["left_out"] == 2 and found["by_prompt"]["prompt"] == [test[1], *test[3:]]
    assert clean["left_out"] == simulated(trace, heads=(head,), part="all")["left_out"] == 0
    every = save_head(toy_head("c2t", seen=tuple(prompt_key(whole, i) for i in test)), tmp_path / "c2t")
    with pytest.raises(SimulateError, match="no prompts for it that no head has seen"):
        simulated(trace, heads=(every,))


def test_shorter_texts_and_several_traces(trace: Path, tmp_path: Path) -> None:
    short = simulated(trace, tokens=12, policies=("static",))
    assert short["by_prompt"]["tokens"] == [11] * short["prompts"]
    traces.save(tmp_path / "more", toy_trace(prompts=6, tokens=30, seed=5))
    both = simulated(trace, traces=(trace, tmp_path / "more"), part="all", policies=("static",))
    assert both["prompts"] == 30


def test_a_text_that_ends_at_once_counts_for_nothing(trace: Path, tmp_path: Path) -> None:
    whole = traces.load(trace)
    kept = (whole.steps.prompt != 3) | (whole.steps.pos == 0)
    number = np.cumsum(kept) - 1
    there = whole.steps.prompt[whole.branches.step] != 3
    branches = take(whole.branches, there)
    cut = traces.Trace(
        whole.manifest,
        replace(whole.prompts, finish=["stop" if i == 3 else "length" for i in range(24)]),
        take(whole.steps, kept),
        replace(branches, step=number[branches.step].astype(np.int32)),
    )
    traces.save(tmp_path / "cut", cut)
    found = simulated(trace, traces=(tmp_path / "cut",), part="all", policies=("heuristic",))
    assert found["prompts"] == 24 and found["by_prompt"]["tokens"] == [0 if i == 3 else 29 for i in range(24)]
    row = next(r for r in found["rows"] if (r["task"], r["policy"]) == ("all", "heuristic"))
    assert row["tokens"] == 23 * 29


def test_where_a_trace_is_short_of_branches_it_is_said(trace: Path) -> None:
    found = simulated(trace, max_sl=24, policies=('static:{"sl": 24}',))
    assert all(
        row["truncated"] > 0 for row in found["rows"] if row["name"] == "static" and row["sl_mean"] > 12
    )
    assert all(row["truncated"] == 0 for row in found["rows"] if row["policy"] in (MADE[0], MADE[3]))


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "policy": ({"policies": ("luck",)}, InvalidRequest, "unknown policy 'luck'"),
    "option": ({"policies": ('static:{"sl": 99}',)}, InvalidRequest, "options of policy 'static'"),
    "json": ({"policies": ("static:{",)}, SimulateError, "NAME:JSON"),
    "no object": ({"policies": ("static:3",)}, SimulateError, "must be a JSON object"),
    "no head": ({"policies": ("disco",)}, SimulateError, "policy 'disco': .*head"),
    "part": ({"part": "most"}, SimulateError, "--part most: train"),
    "max sl": ({"max_sl": 65}, SimulateError, "--max-sl must be from 1 to 64"),
    "oracle": ({"oracle_sl": 0}, SimulateError, "--oracle-sl"),
    "tokens": ({"tokens": 31}, SimulateError, "--tokens 31: the trace's texts have at most 30"),
    "out": ({"out": Path("nowhere/x.json")}, SimulateError, "no such directory"),
    "trace": ({"traces": (Path("nowhere"),)}, traces.TraceError, "nowhere"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_played_is_one_clear_line(trace: Path, name: str) -> None:
    given, error, message = REFUSED[name]
    with pytest.raises(error, match=message) as caught:
        simulated(trace, **given)
    assert "\n" not in str(caught.value)


def test_the_command(trace: Path, tmp_path: Path) -> None:
    out = tmp_path / "command.json"
    given = ["simulate", "--trace", str(trace), "--draft-ms", "2", "--target-ms", "30", "--verify", "9:40"]
    done = CliRunner().invoke(app, [*given, "--out", str(out), "--policy", "static", "--max-sl", "10"])
    assert done.exit_code == 0, done.output
    asked = simulated(trace, policies=("static",))
    assert json.loads(out.read_text())["rows"] == asked["rows"]
    done = CliRunner().invoke(app, [*given[:-2], "--verify", "9-40", "--out", str(out)])
    assert done.exit_code == 2 and "TOKENS:MS is wanted" in done.output


# ---- costs


def test_costs_of_files(tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    for told in (
        {"draft": 0.002, "verify": [[1, 0.03], [9, 0.04]]},
        {"draft": 0.002, "verify": {"9": 0.04, "1": 0.03}},
        {"card": "x", "costs": {"draft": 0.002, "verify": [[1, 0.03], [9, 0.04]], "ratio": 0.07}},
    ):
        path.write_text(json.dumps(told))
        assert read_costs(path) == COSTS
        assert costs_from(path, None, None, None, 0) == COSTS
    path.write_text(json.dumps({"draft": 0.002, "verify": [0.03, 0.031, 0.034]}))  # as bench-pair has them
    assert read_costs(path).passes()[[1, 2, 3, 4]] == pytest.approx([0.03, 0.031, 0.034, 0.037])
    assert costs_from(path, None, None, None, 50).decide == pytest.approx(5e-5)
    path.write_bytes(msgspec.json.encode(StepCosts(0.1, ((1, 1.0),), {"disco": 0.01}, 0.2, 0.3)))
    assert read_costs(path).deciding("disco") == 0.01 and read_costs(path).deciding("svip") == 0


def test_costs_between_and_beyond() -> None:
    assert COSTS.passes()[[1, 5, 9, 13, 65]] == pytest.approx([0.03, 0.035, 0.04, 0.045, 0.11])
    assert StepCosts(0.1, ((1, 1.0), (4, 0.7))).passes()[[4, 40]] == pytest.approx([0.7, 0.7])
    known = COSTS.known()
    assert known.drafts["model"].cost(1, 1) == 0.002 and known.verify.cost(1, 5) == pytest.approx(0.035)
    assert costs_from(None, 2, 30, "9:40", 0) == COSTS == costs_from(None, 2, 31, "1:30,9:40", 0)


BAD_COSTS: dict[str, tuple[Any, str]] = {
    "no object": ([1], "no costs"),
    "no verify": ({"draft": 1}, "no costs"),
    "a stranger": ({"draft": 1, "verify": [1], "drat": 2}, "unknown key 'drat'"),
    "negative": ({"draft": -1, "verify": [1]}, "the cost draft must be"),
    "free": ({"draft": 1, "verify": [0]}, "verify costs must be positive"),
    "from 2": ({"draft": 1, "verify": [[2, 1]]}, "must be given for 1 token"),
    "words": ({"draft": "x", "verify": [1]}, "Expected `float`"),
    "by name": ({"draft": 1, "verify": {"one": 1}}, "by tokens, not by 'one'"),
    "deciding": ({"draft": 1, "verify": [1], "decide": {"disco": -1}}, "the cost decide"),
}


@pytest.mark.parametrize("name", BAD_COSTS)
def test_bad_costs_are_refused(tmp_path: Path, name: str) -> None:
    told, message = BAD_COSTS[name]
    path = tmp_path / "costs.json"
    path.write_text(json.dumps(told))
    with pytest.raises(CostsError, match=message):
        read_costs(path)


def test_costs_of_the_command_line_are_whole() -> None:
    with pytest.raises(CostsError, match="--costs is wanted, or --draft-ms"):
        costs_from(None, 2, None, None, 0)
    with pytest.raises(CostsError, match="not both"):
        costs_from(Path("x"), 2, None, None, 0)
    with pytest.raises(CostsError, match="nowhere"):
        read_costs(Path("nowhere.json"))
