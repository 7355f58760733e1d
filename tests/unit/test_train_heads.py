"""Teaching heads: what they learn from made-up traces, that it repeats, resumes, is timed right."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from toy_traces import DRAFT, HIDDEN, taught, toy_trace

from classifiers import head_data, traces
from classifiers.head_data import DataError
from classifiers.head_fit import Plan, calibrate, fit, raw_score, scaled
from classifiers.head_metrics import auroc
from classifiers.step_costs import StepCosts
from classifiers.stop_time import Starts
from classifiers.train import predictions
from engine.speculation.heads import INPUTS_OF, Kind, load_head


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trace")
    traces.save(path, toy_trace(48))
    return path


def same_weights(a: Path, b: Path) -> bool:
    return load_head(a).weights_sha256 == load_head(b).weights_sha256


# ---- what it learns


@pytest.mark.parametrize("kind", ["disco", "logistic", "c2t"])
def test_a_head_finds_what_tells_of_acceptance(kind: Kind, recorded: Path, tmp_path: Path):
    """In the toy the largest probability tells all: nothing can rank much better, a head not much worse."""
    head = load_head(taught(recorded, tmp_path, kind, epochs=20, lr=1e-2 if kind == "c2t" else None))
    other = toy_trace(seed=1)
    starts = Starts(other)
    first = predictions(head, starts)[0]  # of every place, as the first token of a draft
    match = other.steps.match[starts.steps]
    best = auroc(other.steps.top[starts.steps, 0].astype(float), match)
    assert best > 0.75 and auroc(first, match) > best - 0.04
    assert abs(float(first.mean()) - float(match.mean())) < 0.08  # calibrated, at least in all
    assert head.draft.fingerprint == DRAFT and head.inputs == INPUTS_OF[kind]


def test_specdec_pp_judges_by_the_state_after_feeding_where_it_can(recorded: Path, tmp_path: Path):
    """In the toy that state tells at once; the state before it tells with noise."""
    head = load_head(taught(recorded, tmp_path, "specdec_pp", epochs=15))
    assert {row["judges"] for row in head.scores["candidates"]} == {"drafted", "fed"}
    fed = next(row for row in head.scores["candidates"] if row["judges"] == "fed")
    drafted = next(row for row in head.scores["candidates"] if row["judges"] == "drafted")
    assert fed["auroc"] > 0.95 > drafted["auroc"] > 0.65
    assert head.scores["validation"]["ms_per_token"] == min(fed["ms_per_token"], drafted["ms_per_token"])
    assert head.options.min_sl == 2 and head.options.max_sl <= 20 and head.hidden == HIDDEN


def test_without_states_in_the_branches_it_judges_the_drafted_token():
    trace = toy_trace(6, branch_hidden=False)
    with pytest.raises(DataError, match="no hidden"):
        head_data.rows(trace, Starts(trace), ("hidden",))


def test_where_nothing_tells_the_head_says_the_mean(tmp_path: Path):
    path = tmp_path / "trace"
    traces.save(path, toy_trace(30, telling=False))
    head = load_head(taught(path, tmp_path))
    other = toy_trace(12, seed=2, telling=False)
    first = predictions(head, Starts(other))[0]
    assert abs(float(first.mean()) - 0.7) < 0.05 and float(first.std()) < 0.1


def test_the_cheaper_the_draft_the_bolder_the_rule(recorded: Path, tmp_path: Path):
    cheap, dear = (
        load_head(taught(recorded, tmp_path / str(draft), costs=StepCosts(draft, ((1, 10e-3),))))
        for draft in (1e-4, 8e-3)
    )
    assert same_weights(tmp_path / "0.0001" / "disco.json", tmp_path / "0.008" / "disco.json")
    assert cheap.options.threshold < dear.options.threshold
    assert cheap.options.max_sl >= dear.options.max_sl


# ---- rows


def test_rows_are_what_verification_judges():
    trace = toy_trace(4, 20)
    starts = Starts(trace)
    rows = head_data.rows(trace, starts, ("top", "entropy", "position"))
    here = trace.steps.pos > 0
    assert torch.equal(rows.inputs[:, :10], torch.from_numpy(trace.steps.top[here]))
    assert torch.equal(rows.inputs[:, 10], torch.from_numpy(trace.steps.entropy[here]))
    assert rows.inputs[:, 11].tolist() == rows.position.tolist() == trace.steps.pos[here].tolist()
    assert rows.label.tolist() == trace.steps.match[here].tolist()
    chosen = rows.of(np.array([1, 3]))
    assert set(chosen.prompt.tolist()) == {1, 3} and len(chosen.label) == 38


def test_fed_rows_hold_the_state_that_the_judged_token_made():
    trace = toy_trace(4, 20)
    rows = head_data.rows(trace, Starts(trace), ("hidden",), fed=True)
    assert torch.equal(rows.inputs[:, 1] > 0, rows.label > 0.5)  # how the toy marks them
    hidden, away, branch = trace.steps.hidden, trace.branches.hidden, trace.branch_of()
    assert hidden is not None and away is not None
    for state, label, at in zip(rows.inputs, rows.label, rows.prompt * 20 + rows.position, strict=True):
        expected = hidden[at + 1] if label else away[branch[at], 0]
        assert state.tolist() == expected.astype(np.float32).tolist()
    lost = int((trace.branches.length == 0).sum()) + 4  # no draft step followed, or the text's last
    assert len(rows.label) >= 4 * 19 - lost


def test_chained_rows_are_those_of_every_start_up_to_its_first_mismatch():
    trace = toy_trace(3, 16)
    rows = head_data.rows(trace, Starts(trace), ("joint", "step"))
    expected = []
    for prompt in range(3):
        for start in range(1, 15):
            joint = 1.0
            for t in range(15 - start):
                i = prompt * 16 + start + t
                joint *= float(trace.steps.prob[i])
                expected.append((round(joint, 4), t + 1, bool(trace.steps.match[i])))
                if not trace.steps.match[i]:
                    break
    found = [
        (round(float(x[0]), 4), int(x[1]), bool(y)) for x, y in zip(rows.inputs, rows.label, strict=True)
    ]
    assert sorted(found) == sorted(expected)


# ---- fitting


def test_the_same_seed_makes_the_same_head(recorded: Path, tmp_path: Path):
    first = taught(recorded, tmp_path / "a", seed=3)
    assert same_weights(first, taught(recorded, tmp_path / "b", seed=3))
    assert not same_weights(first, taught(recorded, tmp_path / "c", seed=4))


@pytest.mark.parametrize("kind", ["disco", "specdec_pp"])
def test_a_killed_run_goes_on_as_if_nothing_had_been(kind: Kind, recorded: Path, tmp_path: Path):
    trace = toy_trace(9)
    rows = head_data.rows(trace, Starts(trace), INPUTS_OF[kind])
    train_rows, validation = rows.of(np.arange(6)), rows.of(np.arange(6, 9))
    plan = Plan(kind, seed=1, width=8, depth=2 if kind == "specdec_pp" else 0, epochs=8, batch=32)

    class Killed(Exception):
        pass

    seen: list[int] = []

    def kill(epochs: int) -> None:
        seen.append(epochs)
        if sum(seen) == 3:
            raise Killed

    path = tmp_path / "fit.safetensors"
    with pytest.raises(Killed):
        fit(plan, train_rows, validation, path, kill)
    again: list[int] = []
    resumed = fit(plan, train_rows, validation, path, again.append)
    assert again[0] == 3 and sum(again) == 8  # it did not begin anew
    whole = fit(plan, train_rows, validation, None, lambda _: None)
    assert (resumed.loss, resumed.epoch) == (whole.loss, whole.epoch)
    assert all(torch.equal(value, whole.weights[name]) for name, value in resumed.weights.items())


def test_a_finished_run_asked_again_changes_nothing(recorded: Path, tmp_path: Path):
    path = taught(recorded, tmp_path)
    before = path.read_bytes()
    assert taught(recorded, tmp_path) == path and path.read_bytes() == before


def test_the_weight_of_rejections_lowers_the_raw_score_and_calibration_undoes_it():
    trace = toy_trace(30)
    rows = head_data.rows(trace, Starts(trace), INPUTS_OF["disco"])
    parts = rows.of(np.arange(20)), rows.of(np.arange(20, 30))
    means = {}
    for weight in (1.0, 6.0):
        plan = Plan("disco", seed=0, width=8, epochs=6, reject_weight=weight)
        weights = fit(plan, *parts, None, lambda _: None).weights
        z = raw_score(weights, scaled(weights, parts[1].inputs), 0)
        made = calibrate(z, parts[1].label, "platt")
        means[weight] = float(z.sigmoid().mean()), float((z / made.temperature + made.bias).sigmoid().mean())
    truth = float(parts[1].label.mean())
    assert means[6.0][0] < means[1.0][0] - 0.1
    assert abs(means[6.0][1] - truth) < 0.01 and abs(means[1.0][1] - truth) < 0.01


def test_calibration_finds_a_known_scale():
    source = np.random.default_rng(0)
    z = torch.from_numpy(source.normal(0.5, 2, 40_000)).float()
    label = torch.from_numpy(
        (source.random(40_000) < 1 / (1 + np.exp(-(z.numpy() / 2 + 0.7)))).astype(np.float32)
    )
    made = calibrate(z, label, "platt")
    assert abs(made.temperature - 2) < 0.1 and abs(made.bias - 0.7) < 0.05
    only = calibrate(z, label, "temperature")
    assert only.bias == 0 and only.method == "temperature"
    assert calibrate(z, label, "none") == type(made)("none")
    assert calibrate(-z, label, "platt").temperature > 100  # never turned round


# ---- what cannot be


@pytest.mark.parametrize(
    ("kind", "options", "word"),
    [
        ("disco", {"traces": ()}, "--trace"),
        ("disco", {"widths": (0,)}, "--widths"),
        ("specdec_pp", {"widths": (8,)}, "--widths"),
        ("disco", {"inputs": ("top",)}, "--inputs"),
        ("logistic", {"inputs": ("mood",)}, "--inputs"),
        ("disco", {"judges": "fed"}, "--judges"),
        ("specdec_pp", {"depth": 0}, "--depth"),
        ("disco", {"reject_weight": -1.0}, "--reject-weight"),
        ("disco", {"epochs": 0}, "--epochs"),
        ("disco", {"batch": 0}, "--batch"),
        ("disco", {"lr": float("nan")}, "--lr"),
    ],
)
def test_bad_options_are_refused_by_name(
    kind: Kind, options: dict[str, Any], word: str, recorded: Path, tmp_path: Path
):
    with pytest.raises(ValueError, match=word):
        taught(recorded, tmp_path, kind, **options)
    assert not (tmp_path / "work").exists()


def test_a_trace_without_states_teaches_no_head_that_reads_them(tmp_path: Path):
    trace = toy_trace(9)
    bare = traces.Trace(
        msgspec.structs.replace(trace.manifest, hidden=0),
        trace.prompts,
        replace(trace.steps, hidden=None),
        replace(trace.branches, hidden=None),
    )
    traces.save(tmp_path / "trace", bare)
    with pytest.raises(ValueError, match="hidden was not recorded"):
        taught(tmp_path / "trace", tmp_path, "specdec_pp")
    assert load_head(taught(tmp_path / "trace", tmp_path, "disco")).hidden == 0


def test_positions_that_all_have_one_label_teach_nothing():
    trace = toy_trace(4)
    rows = head_data.rows(trace, Starts(trace), ("entropy",))
    ones = replace(rows, label=torch.ones_like(rows.label))
    with pytest.raises(DataError, match="all with one label"):
        fit(Plan("logistic", 0), ones, rows, None, lambda _: None)


def test_too_few_prompts_are_said_to_be_too_few(tmp_path: Path):
    traces.save(tmp_path / "trace", toy_trace(4))
    with pytest.raises(DataError, match="too few prompts"):
        taught(tmp_path / "trace", tmp_path)
