"""Playing stop policies on a recorded trace: as the engine's own policies, and as `bench-pair` counts."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from classifiers import acceptance as counted
from engine.speculation.policy import Outcome, Signals, options_of, policies

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
predict = importlib.import_module("predict")
Costs, Prompt, simulate = predict.Costs, predict.Prompt, predict.simulate

COSTS = Costs(0.1, ((1, 1.0), (5, 1.2), (9, 1.6)))


def prompt(accepted: str, top1: list[float] | None = None) -> Any:
    """`accepted` like "++-+"."""
    right = np.array([each == "+" for each in accepted])
    return Prompt("code", right, np.array(top1 or [0.9] * len(right), dtype=np.float32))


def some(seed: int, tokens: int = 60, rate: float = 0.8) -> Any:
    rng = np.random.default_rng(seed)
    return Prompt("code", rng.random(tokens) < rate, rng.random(tokens).astype(np.float32) ** 0.3)


def trace(*prompts: Any) -> dict[str, np.ndarray]:
    lengths = [len(each.accepted) for each in prompts]
    right = np.concatenate([each.accepted for each in prompts])
    return {
        "cat": np.array([each.category for each in prompts]),
        "prompt": np.repeat(np.arange(len(prompts)), lengths).astype(np.int16),
        "pos": np.concatenate([np.arange(each) for each in lengths]).astype(np.int16),
        "tok": np.full(len(right), 7, dtype=np.int32),
        "d_argmax": np.where(right, 7, 8).astype(np.int32),
        "d_top1": np.concatenate([each.top1 for each in prompts]),
    }


def played_by_engine(text: Any, policy: str, options: dict[str, Any], max_sl: int) -> tuple[int, int, int]:
    """Iterations, drafted and accepted, decided by the engine's own policy object."""
    judge = policies()[policy]
    state = judge.allocate(1, torch.device("cpu"))
    state.rows = torch.tensor([0])
    judge.reset(state, 0, options_of(policy, options))
    total, at, found = len(text.accepted), 0, [0, 0, 0]
    while at < total:
        limit = min(int(judge.limit(state)), max_sl, total - at - 1)
        sl, joint = 0, torch.ones(1)
        while sl < limit:
            q = torch.tensor([text.top1[at + sl]])
            joint, sl, token = joint * q, sl + 1, torch.tensor([0])
            facts = Signals(
                torch.tensor(sl), token, token, torch.tensor([True]), prob=q, largest=q, joint=joint
            )
            if not judge.keep_drafting(facts, state):
                break
        stands = 0
        while stands < sl and text.accepted[at + stands]:
            stands += 1
        judge.observe(Outcome(torch.tensor([sl]), torch.tensor([stands])), state)
        found = [a + b for a, b in zip(found, (1, sl, stands), strict=True)]
        at += stands + 1
    return found[0], found[1], found[2]


RULES = [
    *(("confidence", {"signal": s, "threshold": t}, predict.Confidence(s, t))
      for s in ("token", "top", "joint") for t in (0.0, 0.3, 0.7, 0.95, 1.0)),
    ("heuristic", {}, predict.Heuristic()),
    ("heuristic", {"start": 9, "max_sl": 4}, predict.Heuristic(9, 4)),
    ("static", {"sl": 0}, predict.Static(0)),
    ("static", {"sl": 3}, predict.Static(3)),
]  # fmt: skip


@pytest.mark.parametrize(("policy", "options", "rule"), RULES, ids=lambda each: str(each))
def test_rules_decide_as_the_engines_policies(policy: str, options: dict[str, Any], rule: Any) -> None:
    for seed, rate in enumerate((0.2, 0.8, 0.95)):
        run = simulate(some(seed, rate=rate), rule, 20, COSTS)
        expected = played_by_engine(some(seed, rate=rate), policy, options, 20)
        assert (run.iterations, run.drafted, run.accepted) == expected
        assert run.tokens == 60 == run.accepted + run.iterations


@pytest.mark.parametrize("sl", [0, 1, 4, 8])
def test_static_counts_as_bench_pair_does(sl: int) -> None:
    text = some(5)
    run = simulate(text, predict.Static(sl), 8, COSTS)
    other = counted.static(torch.from_numpy(text.accepted), sl)
    assert (run.iterations, run.drafted, run.accepted) == (other.passes, other.drafted, other.accepted)
    assert run.tokens == other.emitted


def test_an_iteration_by_hand() -> None:
    # drafts 3 (0.5 fell below and is kept), 2 stand, the target's third; then 1 (0.3) that fails and the
    # target's; then one token is left, for which nothing is drafted
    text = prompt("++--+", [0.9, 0.8, 0.5, 0.3, 0.9])
    run = simulate(text, predict.Confidence("token", 0.6), 8, COSTS)
    assert (run.tokens, run.iterations, run.drafted, run.accepted) == (5, 3, 4, 2)
    assert run.seconds == pytest.approx(4 * 0.1 + 1.15 + 1.05 + 1.0)


def test_drafts_go_on_after_a_mismatch() -> None:
    """The draft does not know that it is wrong: it stops where its signal falls, not where it fails."""
    text = prompt("-+++++", [0.9, 0.9, 0.9, 0.1, 0.9, 0.9])
    run = simulate(text, predict.Confidence("token", 0.4), 8, COSTS)
    # 4 drafted, none stand; then from position 1: 3 drafted up to the 0.1, all stand; then the last
    assert (run.iterations, run.drafted, run.accepted) == (3, 7, 3)


def test_a_signal_at_the_threshold_drafts_on() -> None:
    text = prompt("+++++", [0.5] * 5)
    assert simulate(text, predict.Confidence("token", 0.5), 8, COSTS).iterations == 1
    assert simulate(text, predict.Confidence("joint", 0.25), 8, COSTS).drafted == 3


def test_a_rule_forgets_between_texts() -> None:
    rule = predict.Heuristic()
    first = simulate(some(1), rule, 20, COSTS)
    simulate(some(2), rule, 20, COSTS)
    assert simulate(some(1), rule, 20, COSTS) == first and rule == predict.Heuristic()


def test_an_iteration_without_a_draft_teaches_nothing() -> None:
    rule = predict.Heuristic()
    rule.learn(0, 0)
    assert rule == predict.Heuristic()


def test_the_oracle_wastes_nothing() -> None:
    run = simulate(prompt("+" * 40), predict.Oracle(), 24, COSTS)
    assert (run.iterations, run.drafted, run.accepted) == (2, 24 + 14, 24 + 14)
    run = simulate(some(3), predict.Oracle(), 24, COSTS)
    assert run.drafted == run.accepted > 0
    for rule in (predict.Static(3), predict.Confidence("joint", 0.3), predict.Heuristic()):
        assert simulate(some(3), rule, 24, COSTS).seconds > run.seconds


def test_costs_of_passes() -> None:
    assert COSTS.passes(11)[1:] == pytest.approx([1, 1.05, 1.1, 1.15, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7, 1.8])
    assert Costs(0, ((1, 2.0),)).passes(3)[1:] == [2, 2, 2]


@pytest.mark.parametrize(
    ("draft", "verify"),
    [
        (0.1, ((2, 1.0),)),
        (0.1, ()),
        (0.1, ((1, 1.0), (8, 1.1), (8, 1.2))),
        (0.1, ((1, 0.0),)),
        (0.1, ((1, float("nan")),)),
        (-0.1, ((1, 1.0),)),
        (float("nan"), ((1, 1.0),)),
    ],
)
def test_bad_costs_are_refused(draft: float, verify: Any) -> None:
    with pytest.raises(ValueError, match="costs must be"):
        Costs(draft, verify)


def test_acceptance_by_prompt() -> None:
    found = predict.acceptance(trace(prompt("++-"), prompt("-+")))
    assert [each.tolist() for each in found] == [[True, True, False], [False, True]]


@pytest.mark.parametrize("name", ["cat", "prompt", "pos", "tok", "d_argmax", "d_top1"])
def test_a_trace_that_lacks_something_is_refused(name: str) -> None:
    arrays = trace(prompt("++"))
    del arrays[name]
    with pytest.raises(ValueError, match=f"lacks {name}"):
        predict.acceptance(arrays)


def test_a_trace_with_gaps_is_refused() -> None:
    arrays = trace(prompt("++"), prompt("+++"))
    arrays["pos"][3] = 2
    with pytest.raises(ValueError, match="positions of prompt 1"):
        predict.acceptance(arrays)


@pytest.mark.parametrize(
    "name", ["", "static", "static:-1", "static:x", "confidence:joint", "confidence:best:0.4",
             "confidence:top:1.5", "confidence:top:nan", "heuristic:3", "oracle:best"]
)  # fmt: skip
def test_unknown_rules_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="known are none, static:5"):
        predict.rules(name, 24)


def test_best_is_the_fastest_of_its_grid() -> None:
    texts, costs = [some(seed) for seed in range(3)], Costs(0.2, ((1, 2.0), (9, 3.2)))
    row = predict.report(texts, ["static:best"], 8, costs)["code"]["static:best"]
    each = {sl: predict.play(texts, predict.Static(sl), 8, costs).seconds for sl in range(9)}
    fastest = min(each, key=lambda sl: each[sl])
    assert row["rule"] == f"static:{fastest}" and row["seconds"] == each[fastest]
    assert row["speedup"] == pytest.approx(each[0] / each[fastest]) and row["speedup"] > 1


def run_command(monkeypatch: pytest.MonkeyPatch, path: Path, *more: str) -> None:
    given = ["predict", str(path), "--draft", "0.1", "--verify", "1:1,5:1.2,9:1.6", *more]
    monkeypatch.setattr(sys, "argv", given)
    predict.main()


def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = Prompt("chat", *[getattr(some(4), name) for name in ("accepted", "top1")])
    np.savez(tmp_path / "trace.npz", **trace(some(1), other, some(2)))
    out = tmp_path / "out.json"
    run_command(monkeypatch, tmp_path / "trace.npz", "--json", str(out), "--max-sl", "8")
    found = json.loads(out.read_text())
    assert list(found["categories"]) == ["code", "chat", "all"]
    code, everything = found["categories"]["code"], found["categories"]["all"]
    assert code["none"]["speedup"] == 1 and code["none"]["acceptance"] is None
    assert (code["none"]["tokens"], everything["none"]["tokens"]) == (120, 180)
    expected = predict.play([some(1), some(2)], predict.Static(5), 8, COSTS)
    assert code["static:5"]["tokens_per_second"] == pytest.approx(120 / expected.seconds)
    assert code["static:5"]["acceptance"] == pytest.approx(expected.accepted / expected.drafted)
    assert code["static:5"]["mean_sl"] == pytest.approx(expected.drafted / expected.iterations)
    shown = capsys.readouterr().out
    assert "heuristic" in shown and "* best of its grid" in shown and "confidence:joint:" in shown


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--rules", "luck"], "rule 'luck'"),
        (["--max-sl", "-1"], "max_sl -1"),
    ],
)
def test_the_command_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: list[str], message: str
) -> None:
    np.savez(tmp_path / "trace.npz", **trace(some(1)))
    with pytest.raises(SystemExit, match=message):
        run_command(monkeypatch, tmp_path / "trace.npz", *more)


def test_a_pickle_is_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = trace(some(1))
    arrays["cat"] = np.array(["code"], dtype=object)
    np.savez(tmp_path / "trace.npz", **arrays)
    with pytest.raises(SystemExit, match="allow_pickle=False"):
        run_command(monkeypatch, tmp_path / "trace.npz")
