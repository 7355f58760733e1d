"""Losses, the student's beginnings, training that resumes, and the command in miniature."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPTNeoXConfig, PreTrainedModel

from classifiers.distill import evaluate, run
from classifiers.distill.generate import FRESH, SAMPLED
from classifiers.distill.losses import finish_loss, kl, total_variation
from classifiers.distill.options import DistillError, DistillOptions
from classifiers.distill.student import check_layers, components, new_student
from classifiers.distill.teacher import Teacher
from classifiers.distill.text import Text
from classifiers.distill.train import Trainer
from classifiers.heldout import Prompt

SMALL: dict[str, Any] = dict(
    text_tokens=400,
    rows=4,
    length=48,
    answer_tokens=20,
    hidden=16,
    layers=2,
    heads=2,
    intermediate=24,
    embed_rank=8,
    draft_vocab=64,
    train_tokens=6 * 192,
    batch_tokens=192,
    eval_tokens=8,
    eval_every=3,
    device="cpu",
)


@pytest.fixture
def model(tiny_llama: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(tiny_llama).eval().requires_grad_(False)


@pytest.fixture(autouse=True)
def short_exam(monkeypatch: pytest.MonkeyPatch) -> None:
    """The built-in held-out prompts are longer than the tiny target's context of bytes."""
    exam = [Prompt("code", "def f(x):", chat=False), Prompt("chat", "Hello", chat=False)]
    monkeypatch.setattr(evaluate, "prompts", lambda per_category: exam)


def options(tiny_llama: Path, out: Path, **changes: Any) -> DistillOptions:
    return DistillOptions(target=str(tiny_llama), out=out, **{**SMALL, **changes})


def text(rows: int = 8, length: int = 24) -> Text:
    generator = torch.Generator().manual_seed(0)
    made = object.__new__(Text)
    made.tokens = torch.randint(3, 259, (rows, length), generator=generator).int()
    made.flags = torch.full((rows, length), SAMPLED, dtype=torch.uint8)
    made.flags[:, 0] = FRESH
    made.flags[:, length // 2] = FRESH
    made._epoch, made._order = -1, torch.empty(0)
    return made


def test_losses_are_the_textbooks_on_a_law_of_three() -> None:
    p, q = torch.tensor([[0.5, 0.3, 0.2]]), torch.tensor([[0.2, 0.5, 0.3]])
    assert float(kl(p.log(), q.log())) == pytest.approx(float((p * (p / q).log()).sum()), abs=1e-6)
    assert float(total_variation(p.log(), q.log(), 1.0)) == pytest.approx(0.3, abs=1e-6)
    sharp_p, sharp_q = p**2 / (p**2).sum(), q**2 / (q**2).sum()
    expected = 0.5 * float((sharp_p - sharp_q).abs().sum())
    assert float(total_variation(p.log(), q.log(), 0.5)) == pytest.approx(expected, abs=1e-6)
    near_greedy = float(total_variation(p.log(), q.log(), 0.01))
    assert near_greedy == pytest.approx(1.0, abs=1e-4)  # the choices differ


def test_what_a_reduced_head_cannot_say_counts_as_lost() -> None:
    p = torch.tensor([[0.5, 0.3, 0.2]]).log()
    q = torch.tensor([[0.5, 0.5]]).log()
    assert float(total_variation(p, q, 1.0)) == pytest.approx(1 - (0.5 + 0.3), abs=1e-6)
    assert float(kl(p, q)) == pytest.approx(0.5 * 0.0 + 0.3 * float(torch.tensor(0.6).log()), abs=1e-6)


def test_weightless_positions_teach_nothing() -> None:
    p, q = torch.randn(4, 5), torch.randn(4, 5, requires_grad=True)
    finish_loss(p, q, torch.tensor([1.0, 0.0, 1.0, 0.0]), (1.0,)).backward()
    assert q.grad is not None
    assert bool((q.grad[[1, 3]] == 0).all())
    assert bool((q.grad[[0, 2]] != 0).any())


def test_components_keep_the_geometry() -> None:
    matrix = torch.randn(50, 4) @ torch.randn(4, 12)
    found = components(matrix, 4)
    centred = matrix - matrix.mean(0)
    assert torch.allclose(found @ found.T, centred @ centred.T, atol=1e-3)
    assert bool((components(matrix, 20)[:, 12:] == 0).all())


def test_all_layers_of_the_target_are_the_target(
    model: PreTrainedModel, tiny_llama: Path, tmp_path: Path
) -> None:
    student = new_student(options(tiny_llama, tmp_path, init="layers:0,1,2,3"), model, "", None)
    ids = torch.arange(9)[None]
    assert torch.equal(student(input_ids=ids).logits, model(input_ids=ids).logits)
    student = new_student(options(tiny_llama, tmp_path, init="layers:0,3"), model, "", None)
    assert student.config.num_hidden_layers == 2
    assert torch.equal(student.model.layers[1].mlp.up_proj.weight, model.model.layers[3].mlp.up_proj.weight)
    with pytest.raises(DistillError, match="from 0 to 3"):
        new_student(options(tiny_llama, tmp_path, init="layers:0,4"), model, "", None)


def test_the_teacher_says_the_targets_law_within_each_document(model: PreTrainedModel) -> None:
    made = text()
    ids = torch.tensor([7, 100, 3])
    teacher = Teacher(model, made, ids, 259)
    assert teacher.keeps
    hidden = teacher.hidden(torch.tensor([2]))[0]
    own = model(input_ids=made.tokens[2:3, 12:].long()).logits[0]  # the second document, alone
    order = [7, 100, 3, *(i for i in range(259) if i not in (7, 100, 3))]
    assert torch.allclose(hidden[12:] @ teacher.weight.T, own[:, order], atol=1e-4)


def trainer(model: PreTrainedModel, tiny_llama: Path, tmp_path: Path, **changes: Any) -> Trainer:
    given = options(tiny_llama, tmp_path, batch_tokens=96, train_tokens=96 * 40, **changes)
    made = text()
    ids = made.frequent(64, 259, (2,))
    student = new_student(given, model, "", ids)
    return Trainer(given, student, Teacher(model, made, ids, 259), made)


def test_training_lowers_both_losses(model: PreTrainedModel, tiny_llama: Path, tmp_path: Path) -> None:
    for finish_from in (1.0, 0.0):
        made = trainer(model, tiny_llama, tmp_path, finish_from=finish_from)
        losses = [float(made.train_step()) for _ in range(made.steps)]
        assert sum(losses[-4:]) < 0.95 * sum(losses[:4])


def test_a_restored_trainer_goes_on_as_if_never_stopped(
    model: PreTrainedModel, tiny_llama: Path, tmp_path: Path
) -> None:
    whole = trainer(model, tiny_llama, tmp_path)
    first = [float(whole.train_step()) for _ in range(20)]
    kept = whole.state()
    rest = [float(whole.train_step()) for _ in range(20)]
    other = trainer(model, tiny_llama, tmp_path)
    other.restore(20, kept)
    assert [float(other.train_step()) for _ in range(20)] == rest
    assert first != rest


def draft_of(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model.safetensors")


def test_the_whole_command_stops_resumes_and_makes_a_draft(tiny_llama: Path, tmp_path: Path) -> None:
    given = options(tiny_llama, tmp_path / "whole")
    assert run.distill(given, "disco-serve distill-draft ...")
    card = (tmp_path / "whole" / "README.md").read_text()
    assert "disco-serve distill-draft ..." in card
    assert "| code |" in card
    parts = options(tiny_llama, tmp_path / "parts", stop_after_minutes=0.0, checkpoint_minutes=0.0)
    stops = 0
    while not run.distill(parts, "..."):
        stops += 1
        assert stops < 30
    assert stops >= 2
    whole, pieces = draft_of(tmp_path / "whole"), draft_of(tmp_path / "parts")
    assert whole.keys() == pieces.keys()
    assert all(torch.equal(whole[name], pieces[name]) for name in whole)


def test_other_options_in_the_same_directory_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    assert not run.distill(options(tiny_llama, tmp_path, stop_after_minutes=0.0), "...")
    with pytest.raises(DistillError, match="--hidden"):
        run.distill(options(tiny_llama, tmp_path, hidden=32), "...")


def test_a_directory_at_work_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    with FileLock(tmp_path / "work" / ".lock"), pytest.raises(DistillError, match="another run"):
        run.distill(options(tiny_llama, tmp_path), "...")


def test_changed_prompts_are_other_prompts(tiny_llama: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.txt"
    file.write_text("one\n")
    given = options(tiny_llama, tmp_path / "out", prompts=(file,), stop_after_minutes=0.0)
    assert not run.distill(given, "...")
    file.write_text("two\n")
    with pytest.raises(DistillError, match="--prompts"):
        run.distill(given, "...")


def test_another_models_directory_is_not_written_into(tiny_llama: Path, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(tiny_llama).save_pretrained(tmp_path)
    with pytest.raises(DistillError, match="something else"):
        run.distill(options(tiny_llama, tmp_path), "...")
    assert not (tmp_path / "work").exists()


def test_layers_that_lie_elsewhere_are_refused() -> None:
    size = dict(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4
    )
    neox = AutoModelForCausalLM.from_config(GPTNeoXConfig(**size))
    with pytest.raises(DistillError, match="GPTNeoX"):
        check_layers(neox, (0, 2))


def test_what_would_fail_later_fails_before_text_is_written(tiny_llama: Path, tmp_path: Path) -> None:
    for changes in ({"eval_tokens": 300}, {"init": "layers:0,9"}):
        with pytest.raises(DistillError):
            run.distill(options(tiny_llama, tmp_path, **changes), "...")
    assert not (tmp_path / "work").exists()


def test_rows_without_room_for_an_answer_are_refused(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Text, "answered", lambda self: 0)
    with pytest.raises(DistillError, match="no answer fits"):
        run.distill(options(tiny_llama, tmp_path), "...")


def test_rows_longer_than_the_targets_context_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(DistillError, match="context of 256"):
        run.distill(options(tiny_llama, tmp_path, length=300, batch_tokens=300), "...")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": 15}, "--hidden"),
        ({"heads": 2, "kv_heads": 3}, "--kv-heads"),
        ({"length": 4}, "--length"),
        ({"temperatures": (3.0,)}, "--temperatures"),
        ({"finish_temperatures": (0.0,)}, "--finish-temperatures"),
        ({"init": "best"}, "--init"),
        ({"train_tokens": 0}, "--train-tokens"),
        ({"prompts": (Path("nowhere.txt"),)}, "nowhere.txt"),
    ],
)
def test_bad_options_are_named(
    tiny_llama: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(DistillError, match=message):
        options(tiny_llama, tmp_path, **changes).check()


def test_a_killed_command_goes_on(tiny_llama: Path, tmp_path: Path) -> None:
    """kill -9 while it works, then the same command to the end."""
    exam = "import classifiers.distill.evaluate as e, classifiers.heldout as h\n"
    exam += "e.prompts = lambda n: [h.Prompt('code', 'def f(x):', chat=False)]\n"
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    flags += [f"--target={tiny_llama}", f"--out={tmp_path}", "--checkpoint-minutes=0", "--train-tokens=40000"]
    start = (
        f"import sys\n{exam}from server.cli import main\nsys.argv[1:] = {['distill-draft', *flags]!r}\nmain()"
    )
    process = subprocess.Popen([sys.executable, "-c", start], stderr=subprocess.DEVNULL)
    checkpoint = tmp_path / "work" / "checkpoint.safetensors"
    deadline = time.monotonic() + 120
    while not checkpoint.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    again = subprocess.run([sys.executable, "-c", start], capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert "going on from step" in again.stderr
    assert json.loads((tmp_path / "config.json").read_text())["hidden_size"] == 16
