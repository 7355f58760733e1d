"""The report: whatever figures are given are on the page, and nothing else."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
from toy_traces import toy_trace
from typer.testing import CliRunner

from classifiers import traces
from classifiers.commands import app
from classifiers.report import ReportOptions, run
from classifiers.report_data import ReportError, histogram, read, timings
from classifiers.report_tables import against, figure, table
from classifiers.simulate_run import SimulateOptions
from classifiers.simulate_run import run as simulate
from classifiers.step_costs import StepCosts

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("simulated")
    traces.save(directory / "trace", toy_trace(prompts=12, tokens=24))
    path = directory / "toy.json"
    costs = StepCosts(0.002, ((1, 0.03),))
    simulate(SimulateOptions(traces=(directory / "trace",), costs=costs, out=path, max_sl=8))
    return path


def evaluated() -> dict[str, Any]:
    whole = {"value": 0.91, "low": 0.88, "high": 0.93}
    bins = [{"predicted": 0.1, "accepted": 0.2, "count": 10}, {"predicted": 0.9, "accepted": 0.8, "count": 9}]
    return {
        "scores": [
            {"kind": "always_accept", "task": "all", "auroc": 0.5, "f1_reject": 0.0},
            {"kind": "disco", "task": "all", "auroc": whole, "f1_reject": whole, "ece": None},
            {"kind": "disco", "task": "code", "auroc": 0.87, "f1_reject": 0.66},
            {"kind": "disco", "task": "prose", "auroc": 0.77, "f1_reject": 0.55},
        ],
        "calibration": {"disco": bins},
        "by_position": {"disco": [{"position": 1, "auroc": 0.71}, {"position": 4, "auroc": 0.72}]},
        "ablation": [{"variant": "without top", "left_out": "top", "auroc": 0.81, "ms_per_token_each": 9.5}],
        "transfer": {
            "tasks": ["code", "prose"],
            "rows": ["code", "prose", "all"],
            "measure": "auroc",
            "matrix": [[0.911, 0.822], [0.733, 0.944], [None, 0.955]],
            "ms_over_own": [[1.0, 1.211], [1.122, 1.0], [1.033, 1.044]],
        },
    }


def grid(task: str = "easy") -> dict[str, Any]:
    row = {"task": task, "temperature": 0.0, "speedup": 1.5, "acceptance": 0.5, "sl_mean": 3.2, "sl_sd": 1.1}
    return {
        "environment": {"card": "x"},
        "rows": [
            row
            | {"policy": "heuristic", "ms_per_token": [21.0, 20.0, 23.0], "sl_histogram": {"1": 5, "3": 2}},
            row | {"policy": "oracle", "ms_per_token": [15.0], "sl_histogram": [1, 2, 3]},
            row | {"policy": "heuristic", "ms_per_token": [30.0], "temperature": 1.0, "acceptance": None},
        ],
    }


def written(path: Path, found: dict[str, Any]) -> Path:
    path.write_text(json.dumps(found))
    return path


def pictures(page: Path) -> list[str]:
    """Names of the plots on the page, which must all be there, and no others."""
    shown = re.findall(r"!\[.*?\]\((.*?)\)", page.read_text())
    assert sorted(shown) == sorted(each.name for each in page.parent.glob("*.png"))
    assert all((page.parent / name).read_bytes().startswith(PNG) for name in shown)
    return [name.split("-", 1)[1].removesuffix(".png") for name in shown]


def test_everything_on_one_page(simulated: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    judged, measured = written(tmp_path / "judged.json", evaluated()), written(tmp_path / "run.json", grid())
    out = tmp_path / "new" / "page"
    page = run(ReportOptions(out=out, simulate=(simulated,), evaluate=(judged,), grid=(measured,)))
    assert page == out / "report.md"
    text = page.read_text()
    assert pictures(page) == [
        *("time-per-token", "lookaheads", "time-per-token"),  # greedy and sampled; the latter has no counts
        *("time-per-token", "lookaheads", "static-lookaheads", "acceptance"),
        *("calibration", "transfer-auroc", "transfer-ms_over_own"),
    ]
    for words in (
        "## run (measured, greedy)",
        "## run (measured, T=1)",
        "## toy (simulated, greedy)",
        "| heuristic | 21.00 (1.50x) [20.00 to 23.00] |",
        "| heuristic | 3.20 ± 1.1, 0.50 |",
        "toy-target and toy-draft, greedy",
        "a draft step 2 ms, a target pass 30 ms",
        "| disco | 0.910 (0.880 to 0.930) |  | 0.910",
        "| disco | 0.870 | 0.770 |",
        "| without top | 0.810 | 9.500 |",
        "| all |  | 0.955 |",
        "| prose | 1.122 | 1.000 |",
    ):
        assert words in text, words
    found = json.loads(simulated.read_text())
    row = next(r for r in found["rows"] if (r["task"], r["policy"]) == ("easy", "heuristic"))
    off = 100 * (row["ms_per_token"][0] / 21.0 - 1)
    assert f"| easy | heuristic | 21.00 | {row['ms_per_token'][0]:.2f} | {off:+.1f}% |" in text
    assert f"The static SL chosen on validation is {found['static']['chosen']}." in text


def test_only_what_is_given(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    bare = written(tmp_path / "bare.json", {"scores": evaluated()["scores"]})
    page = run(ReportOptions(out=tmp_path / "a", evaluate=(bare,)))
    text = page.read_text()
    assert pictures(page) == [] and text.count("## ") == 1 and "transfer" not in text
    page = run(ReportOptions(out=tmp_path / "b", grid=(written(tmp_path / "run.json", grid()),)))
    assert page.read_text().count("## ") == 2 and "Simulated against" not in page.read_text()


def test_measured_and_simulated_meet_at_one_temperature_only() -> None:
    real = timings(Path("a.json"), grid(), measured=True)
    made = {**grid(), "trace": {"mode": "coupled T=1 seed=0"}}
    for row in made["rows"]:
        del row["temperature"]
        row["ms_per_token"] = [33.0]
    page = against([*real, *timings(Path("b.json"), made, measured=False)])
    assert page.count("heuristic") == 1 and "| 30.00 | 33.00 | +10.0% |" in page
    assert against(real) == ""


def test_figures() -> None:
    assert histogram({"2": 3, "0": 1}) == histogram([1, 0, 3]) == (1, 0, 3) and histogram(None) == ()
    assert figure(0.12345) == "0.123" and figure(None) == "" == figure({"value": None})
    assert table(["a", "b"], [["x|y", "1"]]) == "| a | b |\n| --- | ---: |\n| x\\|y | 1 |\n"


BAD_FILES: dict[str, tuple[str, str, str]] = {
    "no json": ("simulate", "{", "Expecting"),
    "a list": ("grid", "[]", "an object is wanted"),
    "another kind": ("simulate", '{"rows": []}', "lacks 'static': it is of another kind"),
    "no scores": ("evaluate", "{}", "lacks 'scores'"),
    "no time": ("grid", '{"rows": [{"task": "a", "policy": "b"}]}', "row 0: KeyError: 'ms_per_token'"),
    "no repeats": ("grid", '{"rows": [{"task": "a", "policy": "b", "ms_per_token": []}]}', "row 0"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_are_named(tmp_path: Path, name: str) -> None:
    pytest.importorskip("matplotlib")
    kind, text, message = BAD_FILES[name]
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(ReportError, match=r"bad\.json") as caught:
        run(ReportOptions(out=tmp_path / "out", **{kind: (path,)}))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_nothing_to_report(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="nothing to report"):
        run(ReportOptions(out=tmp_path))
    with pytest.raises(ReportError, match=r"nowhere\.json: .*No such file"):
        read(tmp_path / "nowhere.json")


def test_without_matplotlib_it_says_what_to_install(
    simulated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "matplotlib" else find(name))
    out = tmp_path / "out"
    done = CliRunner().invoke(app, ["report", "--simulate", str(simulated), "--out", str(out)])
    assert done.exit_code == 2 and "pip install -e '.[report]'" in done.output
    assert not out.exists()
