"""Judging and exporting heads: the figures themselves, on which prompts, and what goes along with a head."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from rich.console import Console
from toy_traces import toy_trace
from typer.testing import CliRunner

from classifiers import ablation, head_metrics, traces
from classifiers.commands import app
from classifiers.evaluate import EvaluateOptions, evaluate
from classifiers.export import ExportOptions, export
from classifiers.head_data import DataError
from classifiers.judged import Places, plain
from classifiers.step_costs import StepCosts
from classifiers.stop_time import LONGEST, Starts
from classifiers.train import prompt_key, train
from classifiers.train_options import TrainOptions
from engine.speculation.heads import HeadError, Identity, load_head, save_head

COSTS = StepCosts(1e-3, ((1, 10e-3),))
QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trace and two heads taught on it."""
    path = tmp_path_factory.mktemp("made")
    traces.save(path / "trace", toy_trace(30))
    for kind, widths in (("disco", (8,)), ("specdec_pp", ())):
        asked = {"traces": (path / "trace",), "kind": kind, "out": path / "heads", "costs": COSTS}
        train(TrainOptions(**asked, widths=widths, epochs=6), QUIET)  # type: ignore[arg-type]
    return path


@pytest.fixture(scope="module")
def report(made: Path) -> dict[str, Any]:
    heads = tuple(made / "heads" / f"{kind}.json" for kind in ("disco", "specdec_pp"))
    options = EvaluateOptions(
        traces=(made / "trace",), heads=heads, costs=COSTS, json=made / "report.json", draws=50
    )
    return evaluate(options, QUIET)


def test_the_report_on_disk_is_plain_json(report: dict[str, Any], made: Path):
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    told = json.loads((made / "report.json").read_text(), parse_constant=refuse)
    assert told.keys() == report.keys()
    assert told["trace"]["draft"]["name"] == "toy-draft" and told["test"]["prompts"] == 6


def test_every_classifier_is_judged_whole_and_by_task(report: dict[str, Any]):
    rows = {(row["kind"], row["task"]): row for row in report["scores"]}
    assert {kind for kind, _ in rows} == {"always_accept", "top1", "disco", "specdec_pp"}
    always = rows["always_accept", "all"]
    assert always["f1_reject"] == 0 and always["auroc"] == 0.5
    accepted = always["accepted"]
    assert np.isclose(always["f1_accept"], 2 * accepted / (1 + accepted))  # how F1 of accept flatters
    for kind in ("top1", "disco"):
        whole = rows[kind, "all"]
        parts = [rows[kind, task] for task in ("easy", "hard")]
        assert whole["count"] == sum(part["count"] for part in parts) == 6 * 39
        for figure in ("auroc", "ece", "f1_reject", "precision_reject", "recall_reject"):
            assert whole[figure]["low"] <= whole[figure]["value"] <= whole[figure]["high"] or figure == "ece"
        assert whole["auroc"]["value"] > 0.7
    assert rows["top1", "all"]["ece"]["value"] < 0.12  # in the toy it is the probability


def test_positions_and_curves_cover_all_places(report: dict[str, Any]):
    for kind in ("top1", "disco"):
        assert sum(row["count"] for row in report["by_position"][kind]) == 6 * 39
        assert sum(row["count"] for row in report["calibration"][kind]) == 6 * 39
    assert [row["position"] for row in report["by_position"]["top1"]] == [1, 4, 8, 16, 32]


def test_times_are_in_the_order_that_must_be(report: dict[str, Any]):
    time = report["time"]
    ms = {name: row["ms_per_token"] for name, row in time.items()}
    assert ms["none"] == pytest.approx(10.0) and time["none"]["speedup"] == 1
    assert ms["oracle"] == min(ms.values())
    assert ms["static_hindsight"] <= min(ms["static_validation"], ms["static_5"], ms["none"])
    for row in time.values():
        assert row["speedup_interval"][0] <= row["speedup"] <= row["speedup_interval"][1]
        assert set(row["by_category"]) == {"easy", "hard"}
    assert time["oracle"]["acceptance"] == 1


def test_the_ablation_has_every_variant_that_the_trace_allows(report: dict[str, Any]):
    rows = {row["variant"]: row for row in report["ablation"]}
    assert set(rows) == set(ablation.VARIANTS) - {"with target_hidden"}
    assert rows["without entropy"]["left_out"] == "entropy" and rows["disco"]["left_out"] == "nothing"
    assert rows["largest alone"]["auroc"] > rows["hidden alone"]["auroc"]  # less noise, in the toy


def test_the_transfer_matrix_is_whole(report: dict[str, Any]):
    found = report["transfer"]
    assert (found["tasks"], found["rows"]) == (["easy", "hard"], ["easy", "hard", "all"])
    for name in ("matrix", "f1_reject", "ms_per_token", "ms_over_own"):
        assert np.array(found[name], dtype=float).shape == (3, 2)
    assert [found["ms_over_own"][i][i] for i in range(2)] == [1, 1]


# ---- which prompts


def test_what_a_head_has_seen_does_not_judge_it(made: Path):
    """Also where a prompt was in training there and falls to test here."""
    head = load_head(made / "heads" / "disco.json")
    whole = traces.load(made / "trace")
    parts = traces.split(whole)
    seen = {prompt_key(whole, i) for part in (parts.train, parts.validation) for i in part.tolist()}
    assert set(head.seen) == seen
    only = [i for i in range(30) if i not in set(parts.test.tolist())]
    traces.save(made / "only", whole.select(only))
    options = EvaluateOptions(
        traces=(made / "only",), heads=(made / "heads" / "disco.json",), costs=COSTS, json=made / "x.json"
    )
    with pytest.raises(DataError, match="seen them all"):
        evaluate(options, QUIET)
    assert not (made / "x.json").exists()


def test_a_head_of_another_draft_is_refused(made: Path):
    head = load_head(made / "heads" / "disco.json")
    other = msgspec.structs.replace(head, draft=Identity("stranger", "e" * 64))
    path = save_head(other, made / "other" / "disco")
    options = EvaluateOptions(traces=(made / "trace",), heads=(path,), costs=COSTS, json=made / "x.json")
    with pytest.raises(HeadError, match="stranger"):
        evaluate(options, QUIET)


def test_places_are_every_position_once_with_all_before_accepted():
    trace = toy_trace(5, 50)
    starts = Starts(trace)
    places = Places.of(trace, starts)
    step = starts.steps[places.start] + places.t
    assert sorted(step.tolist()) == np.flatnonzero(trace.steps.pos > 0).tolist()
    assert places.t.max() < LONGEST
    for start, t in zip(starts.steps[places.start].tolist(), places.t.tolist(), strict=True):
        assert trace.steps.match[start : start + t].all()
        assert (
            t > 0
            or start % 50 == 1
            or not trace.steps.match[start - 1]
            or trace.steps.match[start - 24 : start].all()
        )
    read = places.read(starts, plain(starts)["top1"], late=False)
    assert read.tolist() == trace.steps.top[step, 0].astype(float).tolist()
    late = places.read(starts, plain(starts)["top1"], late=True)
    here = ~np.isnan(late) & places.accepted
    assert late[here].tolist() == trace.steps.top[step[here] + 1, 0].astype(float).tolist()


# ---- the figures


def test_auroc_is_the_chance_of_ranking_right():
    source = np.random.default_rng(0)
    p, y = source.integers(0, 6, 80) / 5, source.random(80) < 0.6
    pairs = [(a > b) + 0.5 * (a == b) for a in p[y] for b in p[~y]]
    assert head_metrics.auroc(p, y) == pytest.approx(float(np.mean(pairs)))
    assert np.isnan(head_metrics.auroc(p, np.ones(80, dtype=bool)))


def test_calibration_error_of_known_cases():
    y = np.arange(3000) % 10 < 7
    assert head_metrics.calibration_error(np.full(3000, 0.7), y) < 0.005
    assert head_metrics.calibration_error(np.full(3000, 0.9), y) == pytest.approx(0.2, abs=0.005)


def test_classes_are_counted_for_reject():
    accept, truth = np.array([1, 1, 0, 0, 0], bool), np.array([1, 0, 0, 0, 1], bool)
    found = head_metrics.classes(accept, truth)
    assert (found["precision_reject"], found["recall_reject"]) == (2 / 3, 2 / 3)
    assert (found["precision_accept"], found["recall_accept"]) == (1 / 2, 1 / 2)


def test_the_best_threshold_is_the_best():
    source = np.random.default_rng(1)
    p = source.integers(0, 20, 200) / 20
    y = source.random(200) < p
    found = head_metrics.classes(p >= head_metrics.best_threshold(p, y), y)["f1_reject"]
    for t in np.append(np.unique(p), 1.1):
        assert head_metrics.classes(p >= t, y)["f1_reject"] <= found + 1e-12


def test_intervals_draw_whole_prompts():
    """Places of one prompt that are all alike say no more than one: the interval must show it."""
    prompt = np.repeat(np.arange(8), 100)
    y = np.repeat(np.array([1, 0, 1, 1, 0, 1, 0, 1], bool), 100)
    p = np.linspace(0, 1, 800)
    low, high = head_metrics.bootstrap(p, y, prompt, 0.5, 200, seed=0)["recall_reject"]
    assert high - low > 0.3


# ---- export


def test_an_exported_head_has_its_scores_with_it(made: Path, report: dict[str, Any], tmp_path: Path):
    options = ExportOptions(head=made / "heads" / "disco.json", out=tmp_path, scores=made / "report.json")
    path = export(options, QUIET)
    head = load_head(path)
    assert path == tmp_path / "disco.json" and "candidates" not in head.scores
    assert head.scores["test"]["time"] == report["time"]["disco"]
    assert {row["task"] for row in head.scores["test"]["classifier"]} == {"all", "easy", "hard"}
    assert head.weights_sha256 == load_head(made / "heads" / "disco.json").weights_sha256


def test_scores_of_another_head_are_refused(made: Path, report: dict[str, Any], tmp_path: Path):
    head = load_head(made / "heads" / "disco.json")
    other = msgspec.structs.replace(head, weights=head.weights | {"b2": head.weights["b2"] + 1})
    save_head(other, tmp_path / "disco")
    with pytest.raises(HeadError, match="does not judge this head"):
        export(
            ExportOptions(head=tmp_path / "disco", out=tmp_path / "out", scores=made / "report.json"), QUIET
        )
    (tmp_path / "odd.json").write_text("[]")
    with pytest.raises(ValueError, match="no report"):
        export(ExportOptions(head=tmp_path / "disco", out=tmp_path, scores=tmp_path / "odd.json"), QUIET)


def test_a_head_is_tuned_anew_for_other_costs(made: Path, tmp_path: Path):
    before = load_head(made / "heads" / "disco.json")
    judged = msgspec.structs.replace(before, scores={"test": {"ms": 1.0}, "validation": {}})
    old = save_head(judged, tmp_path / "judged" / "disco")
    dear = StepCosts(8e-3, ((1, 10e-3),))
    options = ExportOptions(head=old, out=tmp_path, traces=(made / "trace",), costs=dear)
    after = load_head(export(options, QUIET))
    assert set(after.scores) == {"validation"}  # those on test were of the old threshold
    assert after.options.threshold > before.options.threshold
    assert after.calibration == before.calibration and after.data["costs"]["draft"] == 8e-3
    with pytest.raises(ValueError, match="belong together"):
        export(ExportOptions(head=made / "heads" / "disco.json", out=tmp_path, costs=dear), QUIET)


# ---- the commands


def test_the_commands_go_from_a_trace_to_a_head_with_scores(made: Path, tmp_path: Path):
    run, costs = CliRunner(), ["--draft-ms", "1", "--target-ms", "10"]
    trace = ["--trace", str(made / "trace")]
    asked = ["train", *trace, "--kind", "logistic", "--out", str(tmp_path), "--epochs", "4", *costs]
    assert run.invoke(app, asked).exit_code == 0
    head = str(tmp_path / "logistic.json")
    scores = str(tmp_path / "scores.json")
    asked = ["evaluate", *trace, "--head", head, "--json", scores, "--no-ablate", "--draws", "20", *costs]
    assert run.invoke(app, asked).exit_code == 0
    asked = ["export", "--head", head, "--out", str(tmp_path / "out"), "--scores", scores]
    assert run.invoke(app, asked).exit_code == 0
    assert load_head(tmp_path / "out" / "logistic").scores["test"]


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        (["--kind", "astrology"], "astrology"),
        (["--widths", "a"], "a"),
        (["--judges", "me"], "me"),
        (["--draft-ms", "-1"], "draft"),
    ],
)
def test_the_command_says_in_one_line_what_is_wrong(
    changes: list[str], word: str, made: Path, tmp_path: Path
):
    asked = ["train", "--trace", str(made / "trace"), "--kind", "disco", "--out", str(tmp_path)]
    asked += ["--draft-ms", "1", "--target-ms", "10", *changes]
    found = CliRunner().invoke(app, asked)
    assert found.exit_code == 2
    (line,) = found.stderr.strip().splitlines()
    assert line.startswith("disco-serve: ") and word in line
