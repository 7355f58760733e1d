"""`classifier collect` on tiny models: what is recorded is what the engine then drafts, token by token."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from classifiers import collect as module
from classifiers import traces
from classifiers.collect import CollectOptions, collect
from classifiers.collect_report import acceptance
from classifiers.collect_rows import Plan, Recorder, Text, blocks_needed, own_blocks
from classifiers.commands import app
from classifiers.traces import Trace, TraceError
from engine.config import EngineConfig
from engine.core import Engine
from engine.models.draft import DraftConfig, DraftForCausalLM, save_draft
from engine.models.load import early_exit, load_model, tokenizer_sha256
from engine.models.reference import ReferenceRunner
from engine.speculation.control import PolicyTable
from engine.types import CannotLoad, GenerateRequest, SamplingParams, SpeculationParams

TOKENS, SEED, K = 24, 11, 6
HIDDEN = ("steps.hidden", "branches.hidden")
# Up to 16 tokens, so that the engine drafts from its first iteration on; around a KV block's length.
PROMPTS = {
    "code": ("def f(x):", "x = [1, 2"),
    "chat": ("Why?", "Hello, you", "exactly 15 byte", "A b c d e f g h"),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "some.jsonl"
    lines = [{"category": name, "text": text} for name, texts in PROMPTS.items() for text in texts]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def ending(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny target with so many end tokens that most texts end by themselves."""
    directory = tmp_path_factory.mktemp("ending") / "model"
    shutil.copytree(tiny_llama, directory)
    path = directory / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": list(range(2, 40, 3))}))
    return directory


@pytest.fixture(scope="module")
def tiny_draft(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A draft in our own format, whose head knows a third of the tokens."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 3}
    digest = tokenizer_sha256(PreTrainedTokenizerFast.from_pretrained(tiny_llama))
    reduced = {"embed_rank": 8, "draft_vocab_size": 91, "tokenizer_sha256": digest}
    config = DraftConfig(
        vocab_size=272,
        num_key_value_heads=1,
        max_position_embeddings=128,
        initializer_range=0.4,
        **sizes,
        **reduced,
    )
    draft = DraftForCausalLM(config)
    draft.lm_head.ids.copy_(torch.arange(1, 272, 3))
    directory = tmp_path_factory.mktemp("draft")
    save_draft(draft, directory, "float32")
    return directory


def options(target: Path, data: Path, out: Path, **more: Any) -> CollectOptions:
    given = {"draft": "self:2", "tokens": TOKENS, "branch": K, "seed": SEED, "device": "cpu", **more}
    return CollectOptions(target=str(target), data=(str(data),), out=out, **given)


def record(target: Path, data: Path, out: Path, **more: Any) -> Trace:
    collect(options(target, data, out, **more))
    return traces.load(out, [name for name in HIDDEN if more.get("hidden", True)])


# ---- what is recorded is what the engine drafts


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("draft", ["self:1", "self:3", "tiny", "ending"])
def test_the_engine_drafts_and_signals_what_was_recorded(
    tiny_llama: Path,
    tiny_draft: Path,
    ending: Path,
    data: Path,
    tmp_path: Path,
    temperature: float,
    draft: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    target, name = (ending, "self:3") if draft == "ending" else (tiny_llama, draft)
    name = str(tiny_draft) if draft == "tiny" else name
    trace = record(target, data, tmp_path / "trace", draft=name, temperature=temperature)
    assert set(trace.prompts.finish) == ({"stop", "length"} if draft == "ending" else {"length"})
    served = serve(monkeypatch, target, name, temperature, (1, 4, K + 1))
    for sl, (seen, texts) in served.items():
        for i, text in enumerate(texts):
            here = slice(trace.begins[i], trace.begins[i + 1])
            assert trace.steps.token[here].tolist() == text
            expected = replay(trace, i, sl)
            assert [row["token"] for row in seen[i]] == [row["token"] for row in expected]
            for got, want in zip(seen[i], expected, strict=True):
                for signal in ("prob", "entropy", "top", "hidden"):
                    error = np.abs(np.asarray(got[signal]) - np.asarray(want[signal])).max()
                    assert error < (4e-3 if signal == "hidden" else 1e-4), (signal, got, want)


Row = dict[str, Any]


def replay(trace: Trace, prompt: int, sl: int) -> list[Row]:
    """Every draft token of a static SL from the trace alone, with its signals."""
    first, last = int(trace.begins[prompt]), int(trace.begins[prompt + 1])
    branch_of, rows = trace.branch_of(), []
    at = first + 1
    while at < last:
        limit = min(sl, trace.manifest.tokens - (at - first) - 1)
        k = 0
        while k < limit and at + k < last:
            rows.append(_row(trace.steps, at + k))
            k += 1
            if not trace.steps.match[at + k - 1]:
                break
        accepted = k - (k > 0 and not trace.steps.match[at + k - 1])
        left = limit - k
        if left > 0:
            branch = branch_of[at + k - 1]
            assert trace.branches.length[branch] >= min(left, K)
            rows.extend(_row(trace.branches, (branch, j)) for j in range(left))
        at += accepted + 1
    return rows


def _row(table: Any, at: Any) -> Row:
    row = {name: getattr(table, name)[at] for name in ("prob", "entropy", "top", "hidden")}
    return {**row, "token": int(table.drafted[at])}


Served = tuple[list[list[Row]], list[list[int]]]


def serve(
    monkeypatch: pytest.MonkeyPatch, target: Path, draft: str, temperature: float, lookaheads: tuple[int, ...]
) -> dict[int, Served]:
    """By SL: what the engine's drafter told its policies, by request in order, and the texts."""
    needs = frozenset({"prob", "entropy", "top", "hidden"})
    texts = [text for some in PROMPTS.values() for text in some]
    seen: dict[str, list[Row]] = {}

    def watch(self: PolicyTable, rows: Any, signals: Any) -> list[bool]:
        for i, row in enumerate(rows):
            found = {name: getattr(signals, name)[i].numpy() for name in needs}
            seen[row.id].append({**found, "token": int(signals.token[i])})
        return [True] * len(rows)

    monkeypatch.setattr(PolicyTable, "needs", lambda self, rows: needs)
    monkeypatch.setattr(PolicyTable, "keep_drafting", watch)
    config = EngineConfig(target=str(target), draft=draft, device="cpu", max_num_seqs=4, max_model_len=64)
    engine = Engine(config)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(target)
    written: dict[str, list[int]] = {}
    for sl in lookaheads:
        asked = SpeculationParams(drafter="model", policy="static", options={"sl": sl})
        for i, text in enumerate(texts):
            seed, name = SEED + i if temperature else None, f"{sl} {i}"
            params = SamplingParams(temperature=temperature, seed=seed, max_tokens=TOKENS)
            ids = tuple(tokenizer(text)["input_ids"])
            engine.add(GenerateRequest(id=name, prompt_ids=ids, params=params, speculation=asked))
            seen[name], written[name] = [], []
    while engine.has_work():
        for event in engine.step()[0]:
            written[event.id].extend(event.token_ids)
    rows = range(len(texts))
    return {
        sl: ([seen[f"{sl} {i}"] for i in rows], [written[f"{sl} {i}"] for i in rows]) for sl in lookaheads
    }


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_laws_and_states_are_those_of_the_models_themselves(
    tiny_llama: Path, data: Path, tmp_path: Path, temperature: float
) -> None:
    collect(options(tiny_llama, data, tmp_path, temperature=temperature, target_hidden=True))
    trace = traces.load(tmp_path, traces.HIDDEN)
    target = load_model(str(tiny_llama), device="cpu")
    draft = early_exit(load_model(str(tiny_llama), device="cpu"), 2)
    vocab = trace.manifest.vocab
    assert vocab < target.config.vocab_size  # padding is never drafted
    for i in range(len(trace.prompts.name)):
        here = slice(trace.begins[i], trace.begins[i + 1])
        steps = trace.steps
        text = steps.token[here]
        ids = torch.tensor([*trace.prompts.ids_of(i).tolist(), *text[:-1].tolist()])[None]
        at = slice(int(trace.prompts.tokens[i]) - 1, None)
        with torch.no_grad():
            own = [each(input_ids=ids, output_hidden_states=True) for each in (target, draft)]
        p, q = (each.logits[0, at, :vocab].softmax(-1).numpy() for each in own)
        rows, drafted = np.arange(len(text)), steps.drafted[here]
        assert np.allclose(steps.prob[here], q[rows, drafted], atol=1e-5)
        assert np.allclose(steps.top[here], -np.sort(-q)[:, :10], atol=1e-5)
        top = steps.top[here] / steps.top[here].sum(-1, keepdims=True)
        assert np.allclose(steps.entropy_top[here], -(top * np.log(top)).sum(-1), atol=1e-5)
        assert (steps.match[here] == (drafted == text)).all()
        if temperature:
            assert steps.overlap is not None
            assert np.allclose(steps.accept[here], np.minimum(1, p / q)[rows, drafted], atol=1e-4)
            assert np.allclose(steps.overlap[here], np.minimum(p, q).sum(-1), atol=1e-5)
        else:
            assert steps.overlap is None
            assert (steps.accept[here] == steps.match[here]).all()
            assert (drafted == q.argmax(-1)).all() and (text == p.argmax(-1)).all()
        for column, each in ((steps.target_hidden, own[0]), (steps.hidden, own[1])):
            assert column is not None and column.dtype == np.float16
            assert np.abs(column[here] - each.hidden_states[-1][0, at].numpy()).max() < 4e-3


def test_every_mismatch_and_matched_end_has_a_branch(ending: Path, data: Path, tmp_path: Path) -> None:
    trace = record(ending, data, tmp_path, draft="self:3")
    ended = np.zeros(len(trace.steps.pos), bool)
    for i, finish in enumerate(trace.prompts.finish):
        ended[trace.begins[i + 1] - 1] = finish == "stop"
    assert (ended & trace.steps.match).any() and (ended & ~trace.steps.match).any()
    expected = (trace.steps.pos >= 1) & (~trace.steps.match | ended)
    assert trace.branches.step.tolist() == np.flatnonzero(expected).tolist()
    room = np.clip(TOKENS - 2 - trace.steps.pos[trace.branches.step], 0, K)
    assert trace.branches.length.tolist() == room.tolist()
    padding = np.arange(K)[None] >= trace.branches.length[:, None]
    for column in (trace.branches.drafted, trace.branches.prob, trace.branches.top, trace.branches.hidden):
        assert column is not None and not column[padding].any() and column[~padding].any()


# ---- the same for a seed, whatever the batch


def test_a_seed_names_the_recording(tiny_llama: Path, data: Path, tmp_path: Path) -> None:
    for out in ("a", "b"):
        collect(options(tiny_llama, data, tmp_path / out, temperature=1.0))
    shards = [traces.shard_file(tmp_path / out, 0).read_bytes() for out in ("a", "b")]
    assert sha256(shards[0]).hexdigest() == sha256(shards[1]).hexdigest()
    other = record(tiny_llama, data, tmp_path / "c", temperature=1.0, seed=SEED + 100)
    assert other.steps.token.tolist() != traces.load(tmp_path / "a").steps.token.tolist()


def test_batches_and_passes_change_nothing(
    tiny_llama: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = record(tiny_llama, data, tmp_path / "whole", temperature=1.0)
    monkeypatch.setattr(Plan, "on", classmethod(lambda cls, device, texts: cls(texts, 3, 7, 2)))
    parts = record(tiny_llama, data, tmp_path / "parts", temperature=1.0, batch=4)
    assert not traces.shard_file(tmp_path / "whole", 1).exists()
    assert traces.shard_file(tmp_path / "parts", 1).exists()
    for table in ("steps", "branches"):
        for name, column in vars(getattr(whole, table)).items():
            if column is not None:
                error = np.abs(column.astype(float) - getattr(getattr(parts, table), name)).max()
                assert error < (4e-3 if name == "hidden" else 1e-4), name


def test_the_runner_of_the_gpu_records_the_same() -> None:
    """Its kernels in Triton's interpreter, in passes too large for its graphs."""
    pytest.importorskip("triton")
    from engine.models.fused import FusedRunner

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=272, num_hidden_layers=2, initializer_range=0.4, **sizes)
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    rng = np.random.default_rng(0)
    texts = [
        Text(
            tuple(rng.integers(3, 259, length).tolist()),
            tuple(rng.integers(3, 259, 6).tolist()),
            "length",
            SEED,
        )
        for length in (5, 15)
    ]
    plan, found = Plan(2, 4, 512, 5), []
    for kind in (ReferenceRunner, FusedRunner):
        target = copy.deepcopy(model)
        runners = [kind(each, 16) for each in (target, early_exit(target, 1))]
        for runner in runners:
            runner.allocate(blocks_needed(plan, longest=21, branch=3, block_size=16))
        given = {"vocab": 259, "block_size": 16, "longest": 21, "tokens": 6, "branch": 3}
        found.append(Recorder(*runners, plan, **given, hidden=True, target_hidden=True).record(texts))
    for table, other in zip(*(each[:2] for each in found), strict=True):
        for name, column in vars(table).items():
            if column is None:  # what only trees need
                continue
            error = np.abs(column.astype(float) - getattr(other, name)).max()
            assert error < (2e-3 if "hidden" in name else 1e-4), name


def test_the_pool_has_the_blocks_that_are_written() -> None:
    assert [own_blocks(branch, 16) for branch in (1, 2, 17, 18, 24)] == [1, 2, 2, 3, 3]
    assert blocks_needed(Plan(3, 2, 512, 32), longest=33, branch=24, block_size=16) == 3 * 3 + 2 * 3


# ---- going on, and refusing


def test_a_killed_run_goes_on(
    tiny_llama: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = record(tiny_llama, data, tmp_path / "whole", batch=2)
    save = traces.save_shard

    def killed(directory: Path, number: int, *rest: Any) -> None:
        if number == 1:
            raise KeyboardInterrupt
        save(directory, number, *rest)

    monkeypatch.setattr(traces, "save_shard", killed)
    with pytest.raises(KeyboardInterrupt):
        collect(options(tiny_llama, data, tmp_path / "cut", batch=2))
    with pytest.raises(TraceError, match="not finished"):
        traces.load(tmp_path / "cut")
    monkeypatch.setattr(traces, "save_shard", save)
    first = traces.shard_file(tmp_path / "cut", 0)
    before = first.stat().st_mtime_ns
    cut = record(tiny_llama, data, tmp_path / "cut", batch=2)
    assert first.stat().st_mtime_ns == before
    assert cut.manifest == whole.manifest
    assert cut.prompts.name == whole.prompts.name
    assert (cut.steps.drafted == whole.steps.drafted).all()
    assert (cut.branches.drafted == whole.branches.drafted).all()


def test_a_finished_recording_is_left_as_it_is(
    tiny_llama: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = collect(options(tiny_llama, data, tmp_path))
    monkeypatch.setattr(module, "build", None)  # no model is loaded again
    assert collect(options(tiny_llama, data, tmp_path)) == done


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "tokens": ({"tokens": 20}, "--tokens"),
    "seed": ({"seed": 1}, "--seed"),
    "draft": ({"draft": "self:1"}, "--draft"),
    "temperature": ({"temperature": 1.0}, "--temperature"),
    "branch": ({"branch": 2}, "--branch"),
    "hidden": ({"hidden": False, "target_hidden": True}, "--hidden, --target-hidden"),
    "batch": ({"batch": 3}, "--batch"),
    "dtype": ({"dtype": "bfloat16"}, "--dtype"),
    "category": ({"per_category": 1}, "--per-category"),
}


@pytest.fixture(scope="module")
def recorded(tiny_llama: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("recorded")
    collect(options(tiny_llama, data, out))
    return out


@pytest.mark.parametrize("change", CHANGES)
def test_another_recording_is_refused_by_name(
    tiny_llama: Path, data: Path, recorded: Path, change: str
) -> None:
    changed, named = CHANGES[change]
    with pytest.raises(ValueError, match=f"another {named}"):
        collect(options(tiny_llama, data, recorded, **changed))


def test_other_data_and_another_target_are_refused_by_name(
    tiny_llama: Path, ending: Path, data: Path, recorded: Path, tmp_path: Path
) -> None:
    other = tmp_path / data.name
    other.write_text('{"text": "something else"}\n')
    with pytest.raises(ValueError, match="another --data"):
        collect(options(tiny_llama, other, recorded))
    retrained = tmp_path / "model"
    shutil.copytree(tiny_llama, retrained)
    model = AutoModelForCausalLM.from_pretrained(retrained)
    model.lm_head.weight.data[0, 0] += 1
    model.save_pretrained(retrained)
    with pytest.raises(ValueError, match="another --target, --draft"):
        collect(options(retrained, data, recorded))


def test_a_directory_without_a_shard_is_anybodys(tiny_llama: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(CannotLoad, match="early exit after 9 layers"):
        collect(options(tiny_llama, data, tmp_path, draft="self:9"))
    assert (tmp_path / traces.MANIFEST).exists()
    assert collect(options(tiny_llama, data, tmp_path)).counts is not None


def test_what_is_not_ours_is_never_written_into(tiny_llama: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ValueError, match=r"something else \(model\.safetensors\)"):
        collect(options(tiny_llama, data, tmp_path))
    assert [each.name for each in tmp_path.iterdir()] == ["model.safetensors"]


def test_two_runs_do_not_share_a_directory(tiny_llama: Path, data: Path, tmp_path: Path) -> None:
    with FileLock(tmp_path / ".lock"), pytest.raises(ValueError, match="another run is at work"):
        collect(options(tiny_llama, data, tmp_path))


def test_prompts_that_do_not_fit_are_left_out(tiny_llama: Path, data: Path, tmp_path: Path) -> None:
    long = tmp_path / "long.jsonl"
    long.write_text(data.read_text() + json.dumps({"text": "x" * 240, "category": "long"}) + "\n")
    trace = record(tiny_llama, long, tmp_path / "trace", hidden=False)
    assert trace.manifest.left_out == 1 and "long" not in trace.prompts.category
    assert trace.steps.hidden is None and trace.branches.hidden is None
    with pytest.raises(ValueError, match="no prompt fits: the shortest has 4 tokens"):
        collect(options(tiny_llama, data, tmp_path / "none", tokens=253))


def test_a_draft_of_shorter_context_leaves_out_more(
    tiny_llama: Path, tiny_draft: Path, tmp_path: Path
) -> None:
    path = tmp_path / "two.jsonl"
    path.write_text('{"text": "short"}\n' + json.dumps({"text": "x" * 110}) + "\n")
    trace = record(tiny_llama, path, tmp_path / "trace", draft=str(tiny_draft))
    assert trace.manifest.left_out == 1 and trace.prompts.tokens.tolist() == [5]


# ---- the command


WRONG: dict[str, tuple[list[str], int, str]] = {
    "ngram": (["--draft", "ngram"], 2, "a draft model is wanted"),
    "temperature": (["--temperature", "0.5"], 2, "--temperature 0.5: 0 or 1"),
    "tokens": (["--tokens", "1"], 2, "--tokens must be from 2"),
    "branch": (["--branch", "0"], 2, "--branch must be from 1"),
    "seed": (["--seed", "-1"], 2, "--seed must be"),
    "category": (["--per-category", "0"], 2, "--per-category must be at least 1"),
    "batch": (["--batch", "0"], 2, "--batch must be from 1"),
    "threads": (["--threads", "0"], 2, "--threads must be at least 1"),
    "no data": (["--data", "nowhere.jsonl"], 2, "nowhere.jsonl"),
    "no layers": (["--draft", "self:9"], 1, "early exit after 9 layers"),
    "no model": (["--draft", "./nowhere"], 1, "no such directory"),
    "no such dtype": (["--dtype", "int3"], 1, "int3"),
}


def run(target: Path, data: Path, out: Path, *more: str) -> Any:
    given = ["--target", str(target), "--draft", "self:2", "--data", str(data), "--out", str(out)]
    sizes = ["--tokens", str(TOKENS), "--branch", str(K), "--device", "cpu"]
    return CliRunner().invoke(app, ["collect", *given, *sizes, *more])


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_work_is_one_clear_line(tiny_llama: Path, data: Path, tmp_path: Path, case: str) -> None:
    more, code, message = WRONG[case]
    result = run(tiny_llama, data, tmp_path / "out", *more)
    lines = [line for line in result.stderr.splitlines() if line.startswith("disco-serve: ")]
    assert result.exit_code == code and len(lines) == 1 and message in lines[0]
    assert "Traceback" not in result.stderr


def test_the_command_records_and_tells(tiny_llama: Path, data: Path, tmp_path: Path) -> None:
    result = run(tiny_llama, data, tmp_path, "--per-category", "1", "--no-hidden", "--target-hidden")
    assert result.exit_code == 0, result.output
    trace = traces.load(tmp_path, ["steps.target_hidden"])
    assert trace.prompts.category == ["code", "chat"] and trace.manifest.hidden == 0
    rates = acceptance(trace)
    drafted = trace.steps.pos >= 1
    assert rates["all"] == pytest.approx(trace.steps.match[drafted].mean())
    for words in ("greedy", "code", "chat", f"{rates['all']:.3f}", "branches of up to 6 steps"):
        assert words in result.stdout, words
    assert "the target's texts" in result.stderr and "the target's texts" not in result.stdout


def test_every_module_of_the_package_is_a_subcommand() -> None:
    folder = Path(module.__file__).parent / "commands"
    names = {path.stem.replace("_", "-") for path in folder.glob("*.py") if not path.stem.startswith("_")}
    assert {command.name for command in app.registered_commands} == names and "collect" in names


def test_nan_is_an_error(
    tiny_llama: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build: Callable[..., Any] = module.build

    def broken(config: EngineConfig) -> Any:
        parts = build(config)
        runner = parts.drafters["model"].runner
        forward = runner.forward
        monkeypatch.setattr(runner, "forward", lambda batch: forward(batch) * float("nan"), raising=False)
        return parts

    monkeypatch.setattr(module, "build", broken)
    result = run(tiny_llama, data, tmp_path)
    assert result.exit_code == 1 and "the draft's logits are NaN" in result.stderr
