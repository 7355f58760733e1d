"""`bench-pair` end to end on tiny models: what it predicts is what the engine does."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from classifiers import heldout
from classifiers.acceptance import Costs
from classifiers.heldout import Prompt
from classifiers.pair import PairOptions, run
from classifiers.pair_report import Method, report_costs, summarise
from classifiers.pair_score import Forced, Scores, measure_costs, score
from classifiers.pair_texts import PairError, Text, encode, read_prompts
from engine.config import EngineConfig
from engine.core import Engine
from engine.models.reference import ReferenceRunner
from engine.models.runner import Batch
from engine.speculation.noise import GumbelNoise
from engine.types import CannotLoad, GenerateRequest, SamplingParams, SpeculationParams

CPU = torch.device("cpu")
TOKENS, SEED = 24, 11
# Short, so that the engine drafts from its first iteration on.
PROMPTS = {"code": ("def f(x):", "x = [1, 2"), "chat": ("Why?", "Hello, you", "A b c d")}


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "some.jsonl"
    lines = [{"category": name, "text": text} for name, texts in PROMPTS.items() for text in texts]
    path.write_text("\n".join(json.dumps(line) for line in lines), encoding="utf-8")
    return path


def judge(target: Path, draft: str, prompts: Path, **more: Any) -> Any:
    given = {"tokens": TOKENS, "sl": 4, "device": "cpu", "seed": SEED, "prompts": (prompts,), **more}
    return run(PairOptions(target=str(target), draft=draft, **given))


def test_a_model_is_always_right_about_itself(tiny_llama: Path, prompts: Path) -> None:
    report = judge(tiny_llama, str(tiny_llama), prompts)
    assert [each.category for each in report.categories] == ["code", "chat", "all"]
    assert [each.prompts for each in report.categories] == [2, 3, 5]
    for category in report.categories:
        assert category.overlap == pytest.approx(1, abs=1e-5)
        for name, method in category.methods.items():
            assert method.match == pytest.approx(1, abs=1e-5), name
            for each in method.static:
                assert each.acceptance == pytest.approx(1, abs=1e-4), (name, each.sl)
                assert each.emitted_per_pass == pytest.approx(min(each.sl + 1, 5), rel=0.2)


@pytest.mark.parametrize("layers", [1, 3])
def test_predicted_acceptance_is_what_the_engine_then_does(
    tiny_llama: Path, prompts: Path, layers: int
) -> None:
    report = judge(tiny_llama, f"self:{layers}", prompts)
    pooled = report.categories[-1].methods
    for name, temperature in (("greedy", 0.0), ("coupled", 1.0)):
        for sl in (1, 4):
            drafted, accepted, passes, emitted = serve(tiny_llama, f"self:{layers}", temperature, sl)
            found = pooled[name].static[sl - 1]
            assert found.acceptance == accepted / drafted, (name, sl)
            assert found.emitted_per_pass == pytest.approx(emitted / passes), (name, sl)
    assert 0 < pooled["rejection"].match < 1


def serve(target: Path, draft: str, temperature: float, sl: int) -> tuple[int, int, int, int]:
    """Drafted, accepted, iterations and tokens that they emitted, of the engine itself."""
    config = EngineConfig(target=str(target), draft=draft, device="cpu", max_num_seqs=4, max_model_len=64)
    engine = Engine(config)
    asked = SpeculationParams(drafter="model", policy="static", options={"sl": sl})
    texts = [text for each in PROMPTS.values() for text in each]
    tokenizer = PreTrainedTokenizerFast.from_pretrained(target)
    for i, text in enumerate(texts):
        params = SamplingParams(temperature=temperature, seed=SEED + i, max_tokens=TOKENS)
        ids = tuple(tokenizer(text)["input_ids"])
        engine.add(GenerateRequest(id=str(i), prompt_ids=ids, params=params, speculation=asked))
    sums = [0, 0, 0, 0]
    while engine.has_work():
        for event in engine.step()[0]:
            emitted = len(event.token_ids) if event.iterations else 0
            counts = (event.drafted, event.accepted, event.iterations, emitted)
            sums = [a + b for a, b in zip(sums, counts, strict=True)]
    return sums[0], sums[1], sums[2], sums[3]


def test_the_report_as_tables_and_json(
    tiny_llama: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "report.json"
    report = judge(tiny_llama, "self:2", prompts, per_category=1, json=path)
    captured = capsys.readouterr()
    for words in (
        "greedy",
        "coupled",
        "rejection",
        "code",
        "cost ratio",
        "tokens per pass",
        "no chat template",
    ):
        assert words in captured.out, words
    assert "Traceback" not in captured.err and "texts" in captured.err and "texts" not in captured.out
    written = json.loads(path.read_text())
    assert written["target"] == str(tiny_llama) and written["draft"] == "self:2"
    assert set(written["versions"]) == {"python", "disco-serve", "torch", "transformers"}
    assert written["dtype"] == "float32" and written["prompts"] == ["some.jsonl"]
    assert [each["prompts"] for each in written["categories"]] == [1, 1, 2]
    costs = written["costs"]
    assert len(costs["verify"]) == 5 and len(costs["ceiling"]) == 4
    assert costs["ratio"] == pytest.approx(costs["draft"] / costs["verify"][0])
    for method in written["categories"][-1]["methods"].values():
        for each in method["static"]:
            spent = (each["sl"] * costs["draft"] + costs["verify"][each["sl"]]) / costs["verify"][0]
            assert each["speedup"] == pytest.approx(each["emitted_per_pass"] / spent)
        best = max([1.0, *(each["speedup"] for each in method["static"])])
        assert method["best_speedup"] == best
        assert method["oracle_speedup"] >= best * 0.999 or best == 1.0
    assert report.threads == torch.get_num_threads()


def test_a_category_may_look_like_markup(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "marked.jsonl"
    path.write_text(json.dumps({"category": "[/x]", "text": "hello"}), encoding="utf-8")
    judge(tiny_llama, "self:1", path)
    assert "[/x]" in capsys.readouterr().out


def test_a_seed_names_the_sampled_texts(tiny_llama: Path, prompts: Path) -> None:
    one, two, three = (
        [
            method.match
            for each in judge(tiny_llama, "self:3", prompts, seed=seed).categories
            for method in each.methods.values()
        ]
        for seed in (1, 1, 2)
    )
    assert one == two
    assert one[0] == three[0]  # greedy
    assert one != three


# ---- prompts


def test_files_of_prompts(tmp_path: Path) -> None:
    lines = tmp_path / "questions.txt"
    lines.write_text("One?\n\nTwo?\nThree?\n", encoding="utf-8")
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text('{"category": "raw", "text": "a ="}\n{"prompt": "Hi"}\n', encoding="utf-8")
    assert read_prompts((lines, mixed), 2) == [
        Prompt(category="questions", text="One?", chat=True),
        Prompt(category="questions", text="Two?", chat=True),
        Prompt(category="raw", text="a =", chat=False),
        Prompt(category="mixed", text="Hi", chat=True),
    ]


def test_without_files_the_held_out_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    own = [Prompt("code", "1", True), Prompt("code", "2", True), Prompt("chat", "3", True)]
    monkeypatch.setattr(heldout, "prompts", lambda: list(own))
    assert read_prompts(()) == own
    assert read_prompts((), 1) == [own[0], own[2]]


def test_messages_go_through_the_template_and_raw_text_does_not(
    make_tokenizer: Callable[..., PreTrainedTokenizerFast],
) -> None:
    tokenizer = make_tokenizer()
    given = [Prompt("a", "Hi", True), Prompt("a", "Hi", False)]
    assert encode(given, tokenizer)[0] == encode(given, tokenizer)[1]  # no template
    tokenizer.chat_template = (
        "{{ bos_token }}Q:{{ messages[0]['content'] }}{% if add_generation_prompt %}A:{% endif %}"
    )
    message, raw = encode(given, tokenizer)
    assert tokenizer.decode(list(message.ids)) == "<s>Q:HiA:"
    assert tokenizer.decode(list(raw.ids)) == "Hi"
    tokenizer.chat_template = "{{ raise_exception('no lone question') }}"
    with pytest.raises(PairError, match="no lone question"):
        encode(given, tokenizer)
    with pytest.raises(PairError, match="no tokens"):
        encode([Prompt("a", "", False)], tokenizer)


BAD_FILES = {
    "empty.txt": (" \n", "empty.txt: no prompt"),
    "bad.jsonl": ('{"prompt": "a"}\n{"prompt"', "bad.jsonl, line 2"),
    "both.jsonl": ('{"prompt": "a", "text": "b"}', "line 1: either"),
    "neither.jsonl": ('{"category": "a"}', "line 1: either"),
    "blank.jsonl": ('{"text": ""}', "line 1: the prompt is empty"),
    "key.jsonl": ('{"promt": "a"}', "line 1: .*promt"),
    "kind.jsonl": ('{"prompt": 3}', "line 1: Expected `str"),
    "table.csv": ("a", r"table.csv: a .jsonl or .txt"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_are_named(tmp_path: Path, name: str) -> None:
    text, message = BAD_FILES[name]
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(PairError, match=message):
        read_prompts((tmp_path / name,))


def test_bytes_that_are_no_text_are_named(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(PairError, match=r"latin.txt: .*utf-8"):
        read_prompts((tmp_path / "latin.txt",))


# ---- refusals


BAD_OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "tokens": ({"tokens": 1}, "--tokens must be at least 2"),
    "sl": ({"sl": 0}, "--sl must be from 1"),
    "per category": ({"per_category": 0}, "--per-category"),
    "threads": ({"threads": 0}, "--threads"),
    "seed": ({"seed": -1}, "--seed"),
    "no file": ({"prompts": Path("nowhere.txt")}, "nowhere.txt: no such file"),
    "json": ({"json": Path("nowhere/report.json")}, "no such directory"),
    "ngram": ({"draft": "ngram"}, "--draft ngram: a draft model"),
    "none": ({"draft": "none"}, "--draft none: a draft model"),
    "context": ({"tokens": 250}, "--tokens 250 are over the target's context of 256"),
    "many layers": ({"draft": "self:9"}, "the model has 4"),
    "device": ({"device": "tpu"}, "tpu"),
}


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_what_cannot_work_is_one_clear_line(tiny_llama: Path, prompts: Path, name: str) -> None:
    given, message = BAD_OPTIONS[name]
    with pytest.raises((PairError, CannotLoad), match=message) as caught:
        judge(tiny_llama, **{"draft": "self:2", "prompts": prompts, **given})
    assert "\n" not in str(caught.value)


def test_another_tokenizer_is_refused(
    tiny_llama: Path, prompts: Path, tmp_path: Path, make_tokenizer: Callable[..., PreTrainedTokenizerFast]
) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_llama, other)
    make_tokenizer(merges=(("a", "b"),)).save_pretrained(other)
    with pytest.raises(CannotLoad, match="does not share the tokenizer"):
        judge(tiny_llama, str(other), prompts)


def test_a_draft_of_shorter_context_is_refused(tiny_llama: Path, prompts: Path, tmp_path: Path) -> None:
    short = tmp_path / "short"
    shutil.copytree(tiny_llama, short)
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 30}))
    with pytest.raises(PairError, match="the draft has 30"):
        judge(tiny_llama, str(short), prompts)


# ---- parts


def test_forced_logits_are_the_models_own(tiny_llama: Path) -> None:
    ids = torch.randint(3, 259, (1, 150), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        own = LlamaForCausalLM.from_pretrained(tiny_llama)(ids).logits[0, :, :259]
    runner = ReferenceRunner(LlamaForCausalLM.from_pretrained(tiny_llama).eval(), 16)
    runner.allocate(10)
    forced = Forced(runner, 259, 16)
    for cut in (1, 70):  # the chunks are shorter than prompt and text
        text = Text("a", tuple(ids[0, :cut].tolist()), tuple(ids[0, cut:].tolist()), None)
        found = torch.cat(list(forced(text)))
        torch.testing.assert_close(found, own[cut - 1 : -1], rtol=1e-4, atol=1e-4)


def test_chunks_do_not_change_a_score() -> None:
    generator = torch.Generator().manual_seed(3)
    p, q = torch.randn(10, 7, generator=generator), torch.randn(10, 7, generator=generator)
    noise = GumbelNoise(7, CPU)
    tokens = (p.double() + noise([4] * 10, range(5, 15))).argmax(-1)
    text = Text("a", (1,) * 5, tuple(tokens.tolist()), 4)
    whole = score(text, lambda _: [p], lambda _: [q], noise)
    parts = score(text, lambda _: p.tensor_split(3), lambda _: q.tensor_split(3), noise)
    assert parts.overlap is not None and whole.overlap is not None
    assert torch.equal(whole.accept["coupled"], parts.accept["coupled"])
    assert torch.equal(whole.overlap, parts.overlap)
    assert bool(score(text, lambda _: [p], lambda _: [p], noise).accept["coupled"].all())
    with pytest.raises(ValueError, match="zip"):
        score(text, lambda _: [p[:5]], lambda _: [q[:5], q[5:]], noise)


def test_nan_of_the_draft_is_an_error() -> None:
    text = Text("a", (1,), (2, 3), None)
    with pytest.raises(PairError, match="NaN"):
        score(text, lambda _: [], lambda _: [torch.full((2, 5), float("nan"))], GumbelNoise(5, CPU))


class Clockwork:
    """A runner whose passes take a set time on a clock of its own: `fixed` and 1 s a token."""

    vocab_size, context, device = 5, 100, CPU

    def __init__(self, now: list[float], fixed: float) -> None:
        self._now, self._fixed = now, fixed
        self.passes: list[tuple[int, int]] = []

    def forward(self, batch: Batch) -> Tensor:
        count = batch.query_lens[0]
        self.passes.append((batch.context_lens[0] - count, count))
        self._now[0] += self._fixed + count
        return torch.zeros(len(batch.logits_at), 5)


def test_costs_are_those_of_draft_chains_and_of_passes_after_the_context(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    target, draft = Clockwork(now, 10.0), Clockwork(now, 0.5)
    costs = measure_costs(target, draft, 3, [1] * 84, 16)
    assert costs.draft == 1.5
    assert costs.verify == (11.0, 12.0, 13.0, 14.0)
    assert target.passes[:2] == draft.passes[:2] == [(0, 64), (64, 16)]
    assert target.passes[2:6] == [(80, 1), (80, 2), (80, 3), (80, 4)]
    assert draft.passes[2:5] == [(80, 1), (81, 1), (82, 1)]
    report = report_costs(costs, 80)
    assert report.ceiling[2] == pytest.approx(4 / ((3 * 1.5 + 14) / 11))


def test_texts_of_one_token_have_no_iterations() -> None:
    costs = Costs(draft=1.0, verify=(10.0, 11.0))
    greedy = Scores(Text("a", (1,), (2,), None), {"greedy": torch.tensor([True])})
    sampled = Scores(
        Text("a", (1,), (2,), 0),
        {"coupled": torch.tensor([True]), "rejection": torch.tensor([0.5])},
        torch.tensor([0.25]),
    )
    found = summarise([greedy, sampled], costs, 8)[0]
    method: Method = found.methods["rejection"]
    assert (method.match, found.overlap, method.best_sl, method.oracle_speedup) == (0.5, 0.25, None, None)
    assert method.static[0].acceptance is None and method.static[0].speedup is None
