"""The benchmark of policies: its figures on made-up runs, and one small run of the whole command."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import policies
from play import Text
from policies import ALONE, CHOSEN, HINDSIGHT, ORACLE, Played

from engine.speculation.costs import EngineCosts

TEXTS = [Text("code", "a", (1,)), Text("code", "b", (1,)), Text("prose", "c", (1,))]


def played(seconds: dict[str, list[float]], iterations: list[tuple[int, int]]) -> Played:
    return Played(seconds, {text.name: iterations for text in TEXTS}, {text.name: [1] for text in TEXTS})


def flat(seconds: float, iterations: list[tuple[int, int]]) -> Played:
    return played({text.name: [seconds, 3 * seconds, seconds] for text in TEXTS}, iterations)


def test_ms_per_token_leaves_the_first_token_out() -> None:
    assert policies.ms_per_token(flat(0.2, []), TEXTS, 11) == pytest.approx([20.0, 60.0, 20.0])


def test_the_oracle_pays_for_what_stands_and_for_nothing_else() -> None:
    costs = EngineCosts()
    costs.drafts["model"].know(1, 1, 0.001)
    for tokens, seconds in ((1, 0.010), (4, 0.012)):
        costs.verify.know(1, tokens, seconds)
    engine = cast(Any, SimpleNamespace(costs=costs))
    found = policies.oracle(engine, played({}, [(24, 4), (24, 1)]))
    assert found.seconds["a"] == [pytest.approx(3 * 0.001 + 0.012 + 0.010)]
    assert found.iterations["a"] == [(3, 4), (0, 1)]


def test_a_paired_speed_is_the_ratio_of_times() -> None:
    low, mid, high = policies.against(flat(0.1, []), flat(0.13, []), TEXTS)
    assert low == mid == high == pytest.approx(1.3)


def test_rows_name_the_best_and_the_chosen_static() -> None:
    found = {
        ALONE: flat(1.0, [(0, 1)]),
        "static 2": flat(0.5, [(2, 2)]),
        "static 5": played({"a": [0.1], "b": [0.1], "c": [2.0]}, [(5, 1), (5, 6)]),
        "goodput": flat(0.25, [(3, 3)]),
        ORACLE: flat(0.2, [(2, 3)]),
    }
    args = Namespace(tokens=11)
    rows, paired = policies._rows(found, TEXTS, ["static 2", "static 5"], "static 2", args)
    by = {(row["task"], row["policy"]): row for row in rows}
    assert by["code", HINDSIGHT]["ms_per_token"] == [pytest.approx(10.0)]
    assert by["prose", HINDSIGHT]["ms_per_token"][0] == pytest.approx(50.0)
    assert by["all", CHOSEN]["speedup"] == pytest.approx(2.0)
    assert by["all", "goodput"]["acceptance"] == pytest.approx(2 / 3)
    assert by["code", "static 5"]["sl_histogram"] == {5: 4}
    speeds = {(each["task"], each["against"]): each["speed"][1] for each in paired}
    assert speeds["all", ALONE] == pytest.approx(4.0) and speeds["all", ORACLE] == pytest.approx(0.8)


def test_the_command_runs(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every policy that needs no head, on three prompts, and the draft's quantization beside them."""
    tasks = tmp_path / "tasks.jsonl"
    entries = [{"category": "code", "name": f"n{i}", "text": f"def f{i}(x):"} for i in range(3)]
    tasks.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    words = ["policies.py", "--target", str(tiny_llama), "--draft", "self:2", "--tasks", str(tasks)]
    words += ["--per-task", "2", "--validation", "1", "--tokens", "6", "--repeats", "1", "--rounds", "6"]
    words += ["--context", "256", "--threads", "1", "--json", str(tmp_path / "out.json")]
    monkeypatch.setattr("sys.argv", words)
    policies.main()
    found = json.loads((tmp_path / "out.json").read_text())
    names = {row["policy"] for row in found["rows"]}
    assert {"goodput", "bandit", ORACLE, ALONE, CHOSEN, HINDSIGHT} <= names and "disco" not in names
    assert not any(found["texts_unlike_target_only"].values())
    assert found["draft_step"]["goodput"]["seconds"] > 0
