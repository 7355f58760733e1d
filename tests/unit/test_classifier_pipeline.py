"""The whole way in miniature, by the commands: from prompts to a head, and the engine that serves it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest
from lossless.toy_heads import toy_head
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from classifiers.commands import app
from engine.client_local import LocalEngine
from engine.config import EngineConfig
from engine.core import Engine
from engine.models import load
from engine.speculation.features import VERSION
from engine.speculation.heads import Calibration, Head, load_head, save_head
from engine.types import CannotLoad, EngineUnavailable, GenerateRequest, SamplingParams, SpeculationParams

DRAFT, TOKENS, MAX_SL = "self:3", 24, 8
KINDS = ("disco", "specdec_pp")
COSTS = ("--draft-ms", "1", "--target-ms", "8", "--verify", "9:10")
GREEDY = {"temperature": 0.0}
SAMPLED = {"temperature": 1.0, "seed": 5}


def run(*arguments: object) -> Any:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result


@dataclass
class Made:
    """What the commands left: `taught` and `ready` (exported) heads by kind, and the report."""

    taught: dict[str, Path]
    ready: dict[str, Path]
    report: dict[str, Any]


@pytest.fixture(scope="module")
def made(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Both heads, from prompts to what is served."""
    where = tmp_path_factory.mktemp("pipeline")
    data, trace, heads, scores = (where / name for name in ("some.jsonl", "trace", "heads", "scores.json"))
    lines = [{"category": name, "text": f"{name} {i * 37}:"} for name in ("sums", "words") for i in range(6)]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    pair = ("--target", tiny_llama, "--draft", DRAFT, "--device", "cpu", "--threads", 1)
    run("collect", *pair, "--data", data, "--out", trace, "--tokens", TOKENS, "--branch", MAX_SL)
    taught = {kind: heads / f"{kind}.json" for kind in KINDS}
    for kind in KINDS:
        width = ("--widths", "8") if kind == "disco" else ()
        run("train", "--trace", trace, "--kind", kind, "--out", heads, "--epochs", 4, *width, *COSTS)
    asked = [word for path in taught.values() for word in ("--head", path)]
    judge = ("--draws", 20, "--no-ablate", *COSTS)
    run("evaluate", "--trace", trace, *asked, "--json", scores, *judge)
    ready = {}
    for kind, path in taught.items():
        run("export", "--head", path, "--out", where / "ready", "--scores", scores)
        ready[kind] = where / "ready" / f"{kind}.json"
    return Made(taught, ready, json.loads(scores.read_text()))


def config(target: Path, *heads: Path, **changes: Any) -> EngineConfig:
    given = {"draft": DRAFT, "heads": tuple(map(str, heads)), "device": "cpu", "max_num_seqs": 4, **changes}
    return EngineConfig(target=str(target), kv_blocks=64, max_sl=MAX_SL, threads=1, **given)


@dataclass
class Served:
    """Texts by prompt, and the lengths of the drafts of every iteration that was stopped by its policy."""

    texts: list[list[int]]
    drafted: list[int]


def serve(engine: Engine, target: Path, kind: dict[str, Any], **speculation: Any) -> Served:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(target)
    served = Served([[] for _ in range(4)], [])
    for i in range(len(served.texts)):
        ids = tuple(tokenizer(f"words {i}")["input_ids"])
        params = SamplingParams(max_tokens=TOKENS, ignore_eos=True, **kind)
        asked = SpeculationParams(**speculation)
        engine.add(GenerateRequest(id=str(i), prompt_ids=ids, params=params, speculation=asked))
    while engine.has_work():
        for event in engine.step()[0]:
            assert event.error is None
            served.texts[int(event.id)].extend(event.token_ids)
            if event.stop_reason == "policy":
                served.drafted.append(event.drafted)
    return served


# ---- from prompts to a served head


def test_the_commands_leave_heads_with_their_scores(made: Made, tiny_llama: Path) -> None:
    rows = {(row["kind"], row["task"]) for row in made.report["scores"]}
    assert rows >= {(kind, task) for kind in KINDS for task in ("all", "sums", "words")}
    for kind in KINDS:
        taught, ready = load_head(made.taught[kind]), load_head(made.ready[kind])
        assert ready.weights_sha256 == taught.weights_sha256 and ready.options == taught.options
        assert {row["task"] for row in ready.scores["test"]["classifier"]} == {"all", "sums", "words"}
        assert "test" not in taught.scores
        assert ready.draft.name == DRAFT and ready.target.name == tiny_llama.name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_an_engine_serves_them_without_changing_a_text(
    made: Made, tiny_llama: Path, kind: str, params: dict[str, Any]
) -> None:
    engine = Engine(config(tiny_llama, *made.ready.values(), policy=kind))
    assert engine.info.refusals["model"] == {}
    assert engine.info.heads.keys() == set(KINDS)
    shown = engine.info.heads[kind]
    assert shown["draft"] == DRAFT and "test" in shown["scores"]
    alone = serve(engine, tiny_llama, params, drafter="none")
    with_head = serve(engine, tiny_llama, params)
    assert with_head.texts == alone.texts and all(len(text) == TOKENS for text in alone.texts)
    assert sum(with_head.drafted) > 0 and not alone.drafted


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_head_that_decides(made: Made, tiny_llama: Path, tmp_path: Path, kind: str) -> None:
    """Sure of every token it drafts to its cap, sure of none as little as it may; the text stays."""
    texts, lengths = [], []
    for name, odds in (("sure", 1000.0), ("never", -1000.0)):
        head = biased(load_head(made.ready[kind]), odds)
        engine = Engine(config(tiny_llama, save_head(head, tmp_path / name), policy=kind))
        served = serve(engine, tiny_llama, GREEDY)
        texts.append(served.texts)
        lengths.append(set(served.drafted))
    assert texts[0] == texts[1]
    assert lengths == [{MAX_SL - 1}, {max(1, head.options.min_sl)}]


def biased(head: Head, odds: float) -> Head:
    """The head with other log-odds, and a cap below the engine's: it is always the policy that stops."""
    options = msgspec.structs.replace(head.options, threshold=0.5, max_sl=MAX_SL - 1)
    return msgspec.structs.replace(head, calibration=Calibration("platt", bias=odds), options=options)


# ---- refused at start


def other_draft(tmp_path: Path, made: Made) -> tuple[Path, dict[str, Any]]:
    return made.ready["disco"], {"draft": "self:2"}


def other_features(tmp_path: Path, made: Made) -> tuple[Path, dict[str, Any]]:
    head = msgspec.structs.replace(load_head(made.ready["disco"]), feature_version=VERSION + 1)
    return save_head(head, tmp_path / "newer"), {}


def other_width(tmp_path: Path, made: Made) -> tuple[Path, dict[str, Any]]:
    head = load_head(made.ready["specdec_pp"])
    cut = {name: value if value.dim() == 1 else value[:31, :31] for name, value in head.weights.items()}
    cut = {name: value[:31] if value.shape == (32,) else value for name, value in cut.items()}
    return save_head(msgspec.structs.replace(head, hidden=31, weights=cut), tmp_path / "narrow"), {}


def damaged_weights(tmp_path: Path, made: Made) -> tuple[Path, dict[str, Any]]:
    path = copied(tmp_path, made)
    weights = path.with_suffix(".safetensors")
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    return path, {}


def damaged_json(tmp_path: Path, made: Made) -> tuple[Path, dict[str, Any]]:
    path = copied(tmp_path, made)
    path.write_text(path.read_text()[:200])
    return path, {}


def without_weights(tmp_path: Path, made: Made) -> tuple[Path, dict[str, Any]]:
    path = copied(tmp_path, made)
    path.with_suffix(".safetensors").unlink()
    return path, {}


def nowhere(tmp_path: Path, made: Made) -> tuple[Path, dict[str, Any]]:
    return tmp_path / "nowhere.json", {}


def no_model(tmp_path: Path, made: Made) -> tuple[Path, dict[str, Any]]:
    return made.ready["disco"], {"draft": "none"}


def of_ngrams(tmp_path: Path, made: Made) -> tuple[Path, dict[str, Any]]:
    return made.ready["disco"], {"draft": "ngram"}


def of_no_policy(tmp_path: Path, made: Made) -> tuple[Path, dict[str, Any]]:
    head = load_head(made.ready["disco"])
    toy = toy_head("logistic", draft=head.draft, target=head.target)
    return save_head(toy, tmp_path / "logistic"), {"policy": "static"}


def twice(tmp_path: Path, made: Made) -> tuple[Path, dict[str, Any]]:
    first, second = made.ready["disco"], copied(tmp_path, made)
    return second, {"heads": (str(first), str(second))}


def copied(tmp_path: Path, made: Made) -> Path:
    for suffix in (".json", ".safetensors"):
        shutil.copy(made.ready["disco"].with_suffix(suffix), tmp_path)
    return tmp_path / "disco.json"


Case = Callable[[Path, Made], tuple[Path, dict[str, Any]]]
REFUSED: dict[Case, tuple[str, ...]] = {
    other_draft: ("'disco'", "was trained for the draft 'self:3'"),
    other_features: ("'disco'", f"version {VERSION + 1}", f"computes version {VERSION}"),
    other_width: ("'specdec_pp'", "of width 31", "of width 32"),
    damaged_weights: ("disco.json", "the weights are not those"),
    damaged_json: ("disco.json",),
    without_weights: ("disco.json", "disco.safetensors", "No such file"),
    nowhere: ("nowhere.json", "No such file"),
    no_model: ("disco.json", "draft 'none' is no model"),
    of_ngrams: ("disco.json", "draft 'ngram' is no model"),
    of_no_policy: ("logistic", "no policy reads"),
    twice: ("both of kind 'disco'",),
}


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.__name__)
async def test_what_does_not_fit_is_refused_at_start(
    made: Made, tiny_llama: Path, tmp_path: Path, case: Case, caplog: pytest.LogCaptureFixture
) -> None:
    """As a client of the engine sees it: in one line that names the head, without a traceback."""
    path, changes = case(tmp_path, made)
    engine = LocalEngine(config(tiny_llama, path, **{"policy": "disco", **changes}))
    with pytest.raises(EngineUnavailable) as raised:
        await engine.start()
    await engine.close()
    message = str(raised.value)
    assert "\n" not in message and str(path) in message, message
    assert all(part in message for part in REFUSED[case]), message
    assert "Traceback" not in caplog.text


@pytest.mark.parametrize("draft", ["none", "ngram", DRAFT])
async def test_a_policy_without_its_head_is_no_default(tiny_llama: Path, draft: str) -> None:
    engine = LocalEngine(config(tiny_llama, policy="disco", draft=draft))
    if draft == "none":  # nothing drafts: nothing is to be governed
        await engine.start()
        await engine.close()
        return
    with pytest.raises(EngineUnavailable, match=r"policy 'disco' cannot govern drafter .* a head"):
        await engine.start()
    await engine.close()


@pytest.mark.parametrize("case", [damaged_weights, nowhere, of_ngrams, of_no_policy, twice])
def test_heads_are_read_before_models(
    made: Made, tiny_llama: Path, tmp_path: Path, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large target takes minutes to load: what is wrong with a file is told without it."""
    path, changes = case(tmp_path, made)
    monkeypatch.setattr(load, "load_model", None)
    with pytest.raises(CannotLoad, match="head"):
        Engine(config(tiny_llama, path, **changes))
