"""Peers: transformers' assisted generation on tiny models, and starting a server as vLLM's is started."""

from __future__ import annotations

import copy
import json
import stat
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from load_prompts import SHORT, on_the_wire
from peers import transformers_peer, vllm_peer
from peers.rows import Row, Run, summarise
from peers.transformers_peer import PLAIN, Setting, measure, settings

from classifiers.heldout import Prompt
from engine.models.load import load_model, load_tokenizer

PROMPTS = [
    Prompt("code", "def f(x):", chat=False),
    Prompt("chat", "Good morning", chat=False),
    Prompt("code", "import os", chat=False),
]


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(str(tiny_llama))


@pytest.fixture
def target(tiny_llama: Path) -> PreTrainedModel:
    return load_model(str(tiny_llama), dtype=torch.float32, device="cpu")


@pytest.fixture
def near(target: PreTrainedModel) -> PreTrainedModel:
    """A draft that is right now and then: the target with some noise in its weights."""
    draft = copy.deepcopy(target)
    noise = torch.Generator().manual_seed(1)
    for weight in draft.parameters():
        weight.add_(torch.randn(weight.shape, generator=noise) * weight.std(correction=0) * 0.25)
    return draft


def by_setting(rows: list[Row], category: str = "all") -> dict[str, Row]:
    return {row.setting: row for row in rows if row.category == category}


def test_every_setting_gives_the_tokens_of_plain_generate(
    target: PreTrainedModel, near: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    asked = settings()
    done: list[int] = []

    rows = measure(target, near, tokenizer, PROMPTS, 10, asked, on_prompt=done.append)

    assert done == [1, 2, 3]
    names = [each.name for each in asked]
    assert len(set(names)) == 10
    where = [(category, name) for category in ("code", "chat", "all") for name in names]
    assert [(row.category, row.setting) for row in rows] == where
    assert [row.prompts for row in rows] == [2] * 10 + [1] * 10 + [3] * 10
    assert all(row.different == 0 for row in rows)
    assert all(row.tokens_per_second > 0 for row in rows)
    for category in ("code", "chat", "all"):
        of_it = by_setting(rows, category)
        best = max(of_it.values(), key=lambda row: row.tokens_per_second)
        assert [row for row in of_it.values() if row.best] == [best]
        assert of_it[PLAIN.name].speedup == 1 and of_it[PLAIN.name].emitted_per_pass == 1
        assert of_it[PLAIN.name].acceptance is None
    drafted = [row.acceptance for row in rows if row.setting != PLAIN.name and row.category == "all"]
    assert all(each is not None and 0 < each < 1 for each in drafted)  # so both paths were walked


def test_a_setting_is_what_the_draft_is_run_with(
    target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    """A draft that is always right emits SL + 1 tokens a pass, and so shows the SL."""
    eager = Setting("never sure enough", 20, threshold=1.1)
    rows = measure(
        target,
        copy.deepcopy(target),
        tokenizer,
        PROMPTS,
        15,
        [PLAIN, Setting("2", 2), Setting("4", 4), eager],
    )

    found = by_setting(rows)
    assert all(row.acceptance == 1 for name, row in found.items() if name != PLAIN.name)
    assert found["2"].emitted_per_pass == 3
    assert found["4"].emitted_per_pass == 5
    assert found[eager.name].emitted_per_pass == pytest.approx(15 / 8)  # 7 x 2, and the last one alone


def test_settings_are_there_at_every_call_and_gone_afterwards(
    target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    """The heuristic leaves its last number in the draft, which must not reach the next prompt."""
    draft = copy.deepcopy(target)
    draft.generation_config.num_assistant_tokens = 7
    before = copy.deepcopy(draft.generation_config)
    seen: set[tuple[Any, ...]] = set()

    def look(*_: Any) -> None:
        config = draft.generation_config
        names = ("num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold")
        seen.add(tuple(getattr(config, name) for name in names))

    hook = draft.register_forward_pre_hook(look)
    measure(target, draft, tokenizer, PROMPTS, 24, settings([2, 3]))
    hook.remove()

    expected = {(2, "constant", 0.0), (3, "constant", 0.0), (5, "heuristic", 0.0), (20, "constant", 0.4)}
    assert seen == expected
    assert draft.generation_config == before
    assert not draft._forward_pre_hooks and not target._forward_pre_hooks


def test_the_heuristic_would_leak(target: PreTrainedModel) -> None:
    """What the test above guards against is there: else it would pass without the reset."""
    draft = copy.deepcopy(target)
    Setting("heuristic", 5, "heuristic").apply(draft)
    prompt = torch.tensor([[5, 6, 7]])

    target.generate(
        prompt, attention_mask=torch.ones_like(prompt), assistant_model=draft, do_sample=False,
        max_new_tokens=24, min_new_tokens=24, pad_token_id=0,
    )  # fmt: skip

    assert draft.generation_config.num_assistant_tokens > 5


def test_a_repetition_penalty_of_the_checkpoint_is_left_out(
    target: PreTrainedModel, near: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    run = transformers_peer.contender(PLAIN, target, near, tokenizer, 24)
    greedy, _ = run([5, 6, 7])
    target.generation_config.repetition_penalty = 5.0

    assert run([5, 6, 7])[0] == greedy


def test_what_cannot_be_measured(
    target: PreTrainedModel, near: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    for prompts, tokens, asked in (([], 8, [PLAIN]), (PROMPTS, 1, [PLAIN]), (PROMPTS, 8, [Setting("2", 2)])):
        with pytest.raises(ValueError, match="plain generate"):
            measure(target, near, tokenizer, prompts, tokens, asked)
    with pytest.raises(ValueError, match="same name"):
        measure(target, near, tokenizer, PROMPTS, 8, [PLAIN, Setting("2", 2), Setting("2", 3)])
    assert settings([2, 2]) == settings([2])


def test_rows_of_known_runs() -> None:
    runs = {
        "plain": [
            Run("code", [1] * 10, 1.0, 10, 0),
            Run("code", [2] * 10, 2.0, 10, 0),
            Run("chat", [3] * 10, 1.0, 10, 0),
        ],
        "fast": [
            Run("code", [1] * 10, 0.25, 4, 12),
            Run("code", [2] * 10, 0.5, 6, 8),
            Run("chat", [4] * 10, 2.0, 10, 40),
        ],
    }

    rows = summarise(runs, "plain")

    assert rows[1] == Row("code", "fast", 2, 30.0, 4.0, 2.0, 0.5, different=0, best=True)
    assert rows[2] == Row("chat", "plain", 1, 10.0, 1.0, 1.0, None, different=0, best=True)
    assert rows[3] == Row("chat", "fast", 1, 5.0, 0.5, 1.0, 0.0, different=1, best=False)
    assert rows[5] == Row("all", "fast", 3, 20.0, 2.0, 1.5, 10 / 60, different=1, best=True)


def test_the_transformers_command(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "peer.json"
    given = (
        f"x --target {tiny_llama} --draft self:2 --sl 2 --per-category 1 --tokens 4 --device cpu --json {out}"
    )
    monkeypatch.setattr(sys, "argv", given.split())

    transformers_peer.main()

    written = json.loads(out.read_text())
    assert len(written["rows"]) == 5 * 4  # four categories and all; plain, SL=2, heuristic, default
    assert written["dtype"] == "torch.float32"
    assert "assisted, static SL=2" in capsys.readouterr().out


VLLM = '''#!{python}
"""Looks like vLLM from outside: `serve CHECKPOINT --host H --port P --served-model-name NAME`."""
import json, subprocess, sys, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

flags = dict(zip(sys.argv[3::2], sys.argv[4::2]))
assert sys.argv[1] == "serve", sys.argv
print("loading", sys.argv[2], flush=True)
engine = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
Path({log!r} + ".engine").write_text(str(engine.pid))
if flags.get("--how") == "crash":
    sys.exit("no room on the device")
if flags.get("--how") == "hang":
    time.sleep(60)


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        answers = {{"/health": {{}}, "/version": {{"version": "9.9"}}}}
        self.reply([json.dumps(answers[self.path])])

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with Path({log!r}).open("a") as log:
            log.write(json.dumps(body) + "\\n")
        tokens = body["max_tokens"]
        chunks = [{{"choices": [{{"text": "a"}}]}}] * tokens
        chunks.append({{"choices": [], "usage": {{"completion_tokens": tokens}}}})
        self.reply([f"data: {{json.dumps(chunk)}}\\n\\n" for chunk in chunks] + ["data: [DONE]\\n\\n"])

    def reply(self, pieces):
        self.send_response(200)
        self.end_headers()
        for piece in pieces:
            self.wfile.write(piece.encode())

    def log_message(self, *args):
        pass


ThreadingHTTPServer((flags["--host"], int(flags["--port"])), Handler).serve_forever()
'''


@pytest.fixture
def command(tmp_path: Path) -> Path:
    """A stand-in for vLLM's command, which logs the requests' bodies."""
    path = tmp_path / "vllm"
    path.write_text(VLLM.format(python=sys.executable, log=str(tmp_path / "bodies")))
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_a_server_is_started_measured_and_stopped(
    command: Path,
    tiny_llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "vllm.json"
    given = f"x --vllm {command} --model {tiny_llama} --streams 1 2 --tokens 3 --requests 2 --json {out}"
    monkeypatch.setattr(sys, "argv", [*given.split(), "--", "--dtype", "float32"])

    vllm_peer.main()

    written = json.loads(out.read_text())
    assert written["vllm"] == "9.9"
    assert written["asked"]["flags"] == ["--dtype", "float32"]
    assert [row["output_tokens"] for row in written["figures"]] == [6, 6]
    bodies = [json.loads(line) for line in (tmp_path / "bodies").read_text().splitlines()]
    assert len(bodies) == (1 + 2) + (2 + 2)
    assert bodies[0]["model"] == vllm_peer.NAME
    assert tuple(bodies[0]["prompt"]) == on_the_wire("short", str(tiny_llama))[0]
    assert "vLLM 9.9" in capsys.readouterr().out


def test_nothing_is_left_running(command: Path, tiny_llama: Path, tmp_path: Path) -> None:
    with vllm_peer.serving(command, tiny_llama) as url:
        engine = psutil.Process(int((tmp_path / "bodies.engine").read_text()))
        assert vllm_peer.version_of(url) == "9.9"
        assert engine.is_running()
    with pytest.raises(httpx.ConnectError):
        vllm_peer.version_of(url)
    deadline = time.monotonic() + 10
    while engine.is_running() and engine.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the server's own child is still there"
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("how", "timeout", "message"),
    [("crash", 60, r"exit code 1:\n(.|\n)*no room on the device"), ("hang", 1, "not healthy after 1 s")],
)
def test_a_server_that_does_not_come_up(
    command: Path, tiny_llama: Path, how: str, timeout: float, message: str
) -> None:
    with (
        pytest.raises(vllm_peer.ServeError, match=message),
        vllm_peer.serving(command, tiny_llama, ["--how", how], timeout),
    ):
        pytest.fail("it is not healthy")


def test_where_vllm_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["x", "--vllm", str(tmp_path / "vllm"), "--model", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        vllm_peer.main()

    assert ended.value.code == 2
    assert capsys.readouterr().out == "vllm is not installed\n"
    assert "vllm" not in sys.modules


def test_a_directory_without_a_checkpoint(command: Path, tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="no directory of a checkpoint"),
        vllm_peer.serving(command, tmp_path),
    ):
        pytest.fail("there is nothing to serve")


def test_prompts_on_the_wire(tiny_llama: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    assert on_the_wire("short") == SHORT
    ids = on_the_wire("short", str(tiny_llama))
    assert all(isinstance(each, tuple) for each in ids)
    assert [tokenizer.decode(each, skip_special_tokens=True) for each in ids] == list(SHORT)
    heldout = on_the_wire("heldout")
    assert len(heldout) == len(set(heldout)) == 208
    with pytest.raises(ValueError, match="known are short and heldout"):
        on_the_wire("long")


def test_the_first_prompts_are_of_all_categories() -> None:
    from load_prompts import by_turns

    given = [Prompt(category, str(i)) for category, count in (("a", 3), ("b", 2)) for i in range(count)]

    order = [(each.category, each.text) for each in by_turns(given)]
    assert order == [("a", "0"), ("b", "0"), ("a", "1"), ("b", "1"), ("a", "2")]
