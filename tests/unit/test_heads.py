"""Heads: their files, what is refused, their scores."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from head_support import CPU, HIDDEN, plain_score, shown
from lossless.toy_heads import DRAFT, TARGET, toy_head
from safetensors.torch import load_file, save_file

from engine.speculation.features import VERSION
from engine.speculation.heads import (
    BUILTIN,
    KINDS,
    Head,
    HeadError,
    Kind,
    builtin_heads,
    load_head,
    save_head,
)
from engine.speculation.policy import Signals
from engine.speculation.scoring import INPUTS, inputs_of, score, width_of

# ---- scores


@pytest.mark.parametrize("kind", KINDS)
def test_folded_weights_score_as_the_format_says(kind: Kind):
    head = toy_head(kind, HIDDEN)
    x = inputs_of(shown(7, step=3), head.inputs)
    assert x.shape == (7, width_of(head.inputs, HIDDEN))
    found = score(head.folded(CPU), x)
    torch.testing.assert_close(found.double(), plain_score(head, x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", sorted(INPUTS))
def test_inputs_are_told_row_by_row(name: str):
    """No input of a row depends on the other rows, and all are finite."""
    signals = shown(5, step=2)
    together = inputs_of(signals, [name])
    assert together.dtype == torch.float32 and together.isfinite().all()
    for i in range(5):
        row = {
            field: value if field == "step" else value[i : i + 1] for field, value in vars(signals).items()
        }
        assert torch.equal(inputs_of(Signals(**row), [name]), together[i : i + 1])


def test_inputs_far_from_training_count_as_the_farthest_seen():
    head = toy_head("disco")
    high = head.weights["high"].clone()
    high[-1] = 50.0
    head = msgspec.structs.replace(head, weights=head.weights | {"high": high})
    near, far = (inputs_of(shown(3, position=torch.full((3,), p)), head.inputs) for p in (50, 9000))
    assert torch.equal(score(head.folded(CPU), near), score(head.folded(CPU), far))


def test_entropy_of_the_top_ten_is_of_their_renormalised_law():
    signals = shown(4)
    assert signals.top is not None
    share = signals.top / signals.top.sum(-1, keepdim=True)
    expected = torch.distributions.Categorical(probs=share).entropy()
    torch.testing.assert_close(inputs_of(signals, ["entropy_top"])[:, 0], expected)


# ---- files


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("suffix", ["", ".json", ".safetensors"])
def test_a_saved_head_is_read_back_alike(kind: Kind, suffix: str, tmp_path: Path):
    head = toy_head(kind, HIDDEN)
    assert save_head(head, tmp_path / "some.name" / "mine") == tmp_path / "some.name" / "mine.json"
    found = load_head(tmp_path / "some.name" / f"mine{suffix}")
    for field in set(Head.__struct_fields__) - {"weights", "weights_sha256"}:
        assert getattr(found, field) == getattr(head, field), field
    assert {name: value.tolist() for name, value in found.weights.items()} == {
        name: value.tolist() for name, value in head.weights.items()
    }
    assert found.needs == head.needs


def _json(path: Path, **changes: Any) -> None:
    told = json.loads(path.read_text())
    path.write_text(json.dumps({**told, **changes}))


MUTANTS: dict[str, tuple[dict[str, Any], str]] = {
    "features in another order": ({"inputs": ["entropy", "top", "position"]}, "in this order"),
    "a feature left out": ({"inputs": ["top", "entropy"]}, "in this order"),
    "an unknown feature": ({"inputs": ["top", "entropy", "horoscope"]}, "horoscope"),
    "another kind": ({"kind": "c2t"}, "inputs of kind 'c2t'"),
    "an unknown kind": ({"kind": "astrology"}, "kind"),
    "a newer format": ({"format": 2}, "format 2"),
    "a threshold over 1": ({"options": {"threshold": 1.5, "max_sl": 8}}, "threshold"),
    "no lookahead": ({"options": {"threshold": 0.5, "max_sl": 0}}, "max_sl"),
    "an option nobody knows": ({"options": {"threshold": 0.5, "max_sl": 8, "mood": 1}}, "mood"),
    "a temperature of 0": ({"calibration": {"method": "platt", "temperature": 0}}, "temperature"),
    "it judges what was fed": ({"judges": "fed"}, "judges"),
    "a hidden state it does not read": ({"hidden": 4}, "hidden"),
    "residual blocks": ({"depth": 3}, "depth"),
    "no draft": ({"draft": {"name": "d", "fingerprint": ""}}, "fingerprint"),
    "a field nobody knows": ({"price": 5}, "price"),
    "other weights": ({"weights_sha256": "0" * 64}, "SHA-256"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_changed_description_is_refused_by_name(name: str, tmp_path: Path):
    path = save_head(toy_head("disco"), tmp_path / "disco")
    changes, word = MUTANTS[name]
    _json(path, **changes)
    with pytest.raises(HeadError, match=word) as refused:
        load_head(path)
    assert str(path) in str(refused.value) and "\n" not in str(refused.value)


def _nan(weights: dict[str, torch.Tensor]) -> None:
    weights["w1"][0, 0] = float("nan")


def _shape(weights: dict[str, torch.Tensor]) -> None:
    weights["w1"] = weights["w1"][:, :-1].contiguous()


def _width(weights: dict[str, torch.Tensor]) -> None:
    weights["w2"] = weights["w2"][:-1].contiguous()


def _half(weights: dict[str, torch.Tensor]) -> None:
    weights["w1"] = weights["w1"].half()


def _missing(weights: dict[str, torch.Tensor]) -> None:
    del weights["b1"]


def _stranger(weights: dict[str, torch.Tensor]) -> None:
    weights["block"] = torch.zeros(12, 12)


def _deviation(weights: dict[str, torch.Tensor]) -> None:
    weights["std"][3] = 0.0


def _bounds(weights: dict[str, torch.Tensor]) -> None:
    weights["low"], weights["high"] = weights["high"], weights["low"]


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (_nan, "w1 holds NaN"),
        (_shape, r"w1 is float32\[8, 11\]"),
        (_width, r"w2 is float32\[7\]"),
        (_half, "w1 is float16"),
        (_missing, "b1"),
        (_stranger, "block"),
        (_deviation, "std must be positive"),
        (_bounds, "low at most high"),
    ],
)
def test_changed_weights_are_refused_by_name(change: Any, word: str, tmp_path: Path):
    head = toy_head("disco")
    weights = {name: value.clone() for name, value in head.weights.items()}
    change(weights)
    with pytest.raises(HeadError, match=word):
        save_head(msgspec.structs.replace(head, weights=weights), tmp_path / "disco")
    path = save_head(head, tmp_path / "disco")
    save_file(weights, path.with_suffix(".safetensors"))
    _json(path, weights_sha256=hashlib.sha256(path.with_suffix(".safetensors").read_bytes()).hexdigest())
    with pytest.raises(HeadError, match=word):
        load_head(path)


@pytest.mark.parametrize("missing", ["json", "safetensors"])
def test_a_missing_half_is_named(missing: str, tmp_path: Path):
    path = save_head(toy_head("disco"), tmp_path / "disco")
    path.with_suffix(f".{missing}").unlink()
    with pytest.raises(HeadError, match=f"disco.{missing}"):
        load_head(path)


@pytest.mark.parametrize("half", ["json", "safetensors"])
def test_a_damaged_half_is_refused(half: str, tmp_path: Path):
    path = save_head(toy_head("disco"), tmp_path / "disco")
    path.with_suffix(f".{half}").write_bytes(b"\x00\xff{")
    with pytest.raises(HeadError, match="disco"):
        load_head(path)


# ---- for which draft


def test_another_draft_features_or_width_are_refused_by_name():
    head = toy_head("specdec_pp", HIDDEN)
    head.check(DRAFT.fingerprint, VERSION, HIDDEN)
    with pytest.raises(HeadError, match=r"'toy-draft'.*ffffffffffff"):
        head.check("f" * 64, VERSION, HIDDEN)
    with pytest.raises(HeadError, match=f"version {VERSION}.*version {VERSION + 1}"):
        head.check(DRAFT.fingerprint, VERSION + 1, HIDDEN)
    with pytest.raises(HeadError, match=r"width 4.*width 5"):
        head.check(DRAFT.fingerprint, VERSION, HIDDEN + 1)
    with pytest.raises(HeadError, match="does not tell"):
        head.check(DRAFT.fingerprint)
    toy_head("disco").check(DRAFT.fingerprint)  # reads no state: its width is nobody's business


def test_heads_of_a_known_pair_are_found_by_both_fingerprints(tmp_path: Path):
    for kind in ("disco", "specdec_pp"):
        save_head(toy_head(kind), tmp_path / "pair" / "heads" / kind)
    other = toy_head("disco", draft=msgspec.structs.replace(DRAFT, fingerprint="e" * 64))
    save_head(other, tmp_path / "other" / "heads" / "disco")
    found = builtin_heads(DRAFT.fingerprint, TARGET.fingerprint, tmp_path)
    assert set(found) == {"disco", "specdec_pp"}
    assert builtin_heads(DRAFT.fingerprint, "b" * 64, tmp_path) == {}
    assert set(builtin_heads("e" * 64, TARGET.fingerprint, tmp_path)) == {"disco"}
    save_head(toy_head("disco", seed=1), tmp_path / "pair" / "heads" / "disco-2")
    with pytest.raises(HeadError, match="another of kind 'disco'"):
        builtin_heads(DRAFT.fingerprint, TARGET.fingerprint, tmp_path)


def test_a_damaged_shipped_head_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """Heads change speed alone: it must not stop every start."""
    for kind in ("disco", "specdec_pp"):
        save_head(toy_head(kind), tmp_path / "pair" / "heads" / kind)
    damaged = tmp_path / "pair" / "heads" / "disco.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:100])
    assert set(builtin_heads(DRAFT.fingerprint, TARGET.fingerprint, tmp_path)) == {"specdec_pp"}
    assert "a shipped head is damaged" in caplog.text and str(damaged.parent) in caplog.text


def test_a_found_head_of_other_features_is_left_alone(tmp_path: Path):
    save_head(toy_head("disco", feature_version=VERSION + 1), tmp_path / "pair" / "heads" / "disco")
    assert builtin_heads(DRAFT.fingerprint, TARGET.fingerprint, tmp_path) == {}


def test_the_shipped_heads_can_be_read():
    paths = sorted(BUILTIN.glob("*/heads/*.json"))
    for path in paths:
        head = load_head(path)
        assert head.feature_version == VERSION and path.stem == head.kind
        assert head.scores["test"] and head.seen


def test_safetensors_hold_what_the_head_holds(tmp_path: Path):
    head = toy_head("c2t")
    path = save_head(head, tmp_path / "c2t")
    assert load_file(path.with_suffix(".safetensors")).keys() == head.weights.keys()
