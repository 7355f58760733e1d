"""`disco-serve distill-draft` from beginning to end, and on again after a kill."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import msgspec
import torch
from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from classifiers.distill.card import write_card
from classifiers.distill.documents import LONGEST, Beginnings, beginnings, read_prompts
from classifiers.distill.evaluate import Examiner, Marks, held_out, line
from classifiers.distill.generate import Writer, documents_per_wave
from classifiers.distill.options import DistillError, DistillOptions, flag
from classifiers.distill.student import check_layers, new_student
from classifiers.distill.teacher import Teacher, check_head
from classifiers.distill.text import Text, save_wave, wave_file
from classifiers.distill.train import Trainer
from engine.models import load
from engine.models.draft import save_draft

_MAY_CHANGE = {
    *("stop_after_minutes", "checkpoint_minutes", "out", "eval_every"),
    *("eval_per_category", "eval_tokens", "weights"),
}
"""Options that a resumed run may be given anew."""


class Stopped(Exception):
    """The time that the command was given is up; what was done is kept."""


@dataclass
class Job:
    """One distillation at work: what its phases share."""

    options: DistillOptions
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    eos_ids: tuple[int, ...]
    vocab: int
    say: Callable[[str], None]
    deadline: float | None
    facts: dict[str, Any] = field(default_factory=dict)  # for the card

    @property
    def work(self) -> Path:
        return self.options.out / "work"

    @property
    def late(self) -> bool:
        return self.deadline is not None and time.monotonic() > self.deadline


def distill(options: DistillOptions, command: str) -> bool:
    """Makes the draft in `options.out`; False if the time ran out before (the same call goes on).

    `command` is what the card names. Raises DistillError, ModelError or OSError.
    """
    options.check()
    begun = time.monotonic()
    console = Console(stderr=True)
    device = load.pick_device(options.device)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    tokenizer = load.load_tokenizer(options.target)
    model = load.load_model(options.target, dtype=load.pick_dtype(options.dtype, device), device=device)
    vocab = min(load.real_vocab_size(tokenizer), int(model.config.get_text_config().vocab_size))
    minutes = options.stop_after_minutes
    job = Job(
        options,
        model,
        tokenizer,
        load.eos_token_ids(model, tokenizer),
        vocab,
        lambda text: console.print(text, highlight=False, markup=False, soft_wrap=True),
        None if minutes is None else begun + 60 * minutes,
    )
    _check_all(job)
    _refuse_another_model(options.out)
    job.work.mkdir(parents=True, exist_ok=True)
    with _alone(options):
        _claim(options)
        try:
            text = _text(job)
            student, marks = _train(job, text)
        except Stopped:
            job.say("stopped: the time is up; the same command goes on from here")
            return False
        save_draft(student, options.out, options.weights, tokenizer)
        write_card(options, command, job.facts, marks)
    job.say(f"done: {options.out}; serve it with --target {options.target} --draft {options.out}")
    return True


def _check_all(job: Job) -> None:
    """What would be refused later is refused before hours of text are written."""
    options, model = job.options, job.model
    context = int(model.config.get_text_config().max_position_embeddings)
    if options.length > context:
        raise DistillError(f"--length {options.length} is over the target's context of {context}")
    if (numbers := options.layer_numbers()) is not None:
        check_layers(model, numbers)
    check_head(model)
    held_out(options, job.tokenizer, model)
    read_prompts(options.prompts)


def _refuse_another_model(out: Path) -> None:
    """A model's directory that no run of ours made is never written into."""
    if out.is_dir() and not (out / "work").is_dir():
        taken = [each.name for each in out.iterdir() if each.suffix in (".json", ".safetensors", ".md")]
        if taken:
            raise DistillError(f"{out} holds something else ({min(taken)}); give another --out")


@contextmanager
def _alone(options: DistillOptions) -> Iterator[None]:
    """Two runs in one directory would write each other's files. The lock goes with its process."""
    try:
        with FileLock(options.out / "work" / ".lock", timeout=0):
            yield
    except Timeout as error:
        raise DistillError(f"another run is at work in {options.out}") from error


def _claim(options: DistillOptions) -> None:
    """The directory belongs to one set of options. Raises DistillError if it holds another's work."""
    path = options.out / "work" / "options.json"
    mine = json.loads(msgspec.json.encode(options, enc_hook=str))
    mine["prompts"] = [f"{each} {sha256(each.read_bytes()).hexdigest()}" for each in options.prompts]
    begun = any(path.parent.glob("*.safetensors"))
    if path.exists() and begun:
        try:
            theirs = json.loads(path.read_text())
        except ValueError as error:
            raise DistillError(f"{path} is damaged; give another --out") from error
        changed = [name for name in mine if name not in _MAY_CHANGE and mine[name] != theirs.get(name)]
        if changed:
            raise DistillError(
                f"{options.out} holds a run with another {', '.join(map(flag, changed))}; "
                "give the same options to go on, or another --out"
            )
    part = path.with_suffix(".part")
    part.write_text(json.dumps(mine, indent=1) + "\n")
    part.rename(path)


def _documents(job: Job) -> Beginnings:
    options = job.options
    per_wave = documents_per_wave(options.rows, options.length)
    prompts = read_prompts(options.prompts)
    count = per_wave * _waves(options)
    found = beginnings(job.tokenizer, count, options.seed, options.temperatures, prompts, job.model.device)
    if found.too_long:
        job.say(f"left out {found.too_long} of {count} beginnings: longer than {LONGEST} tokens")
    (job.work / "documents.json").write_text(json.dumps(found.kinds) + "\n")
    return found


def _waves(options: DistillOptions) -> int:
    return -(-options.text_tokens // (options.rows * options.length))


def _text(job: Job) -> Text:
    """Writes the waves that are missing."""
    options, waves = job.options, _waves(job.options)
    missing = [i for i in range(waves) if not wave_file(job.work, i).exists()]
    if missing:
        documents = _documents(job)
        writer = Writer(
            job.model,
            documents,
            rows=options.rows,
            length=options.length,
            answer_tokens=options.answer_tokens,
            eos_ids=job.eos_ids,
            vocab=job.vocab,
        )
        with _bar("writing text", options.rows * options.length * len(missing)) as advance:
            began = time.monotonic()
            for done, number in enumerate(missing, 1):
                save_wave(job.work, number, writer.write(number, options.seed, advance))
                rate = options.rows * options.length * done / (time.monotonic() - began)
                job.say(f"text {number + 1}/{waves}, {rate:,.0f} tokens/s")
                if job.late:
                    raise Stopped
        writer.close()
    text = Text(job.work, waves, job.model.device)
    job.facts["documents"] = json.loads((job.work / "documents.json").read_text())
    job.facts["text_tokens"] = text.tokens.numel()
    job.facts["answer_tokens"] = text.answered()
    if job.facts["answer_tokens"] == 0:
        raise DistillError(f"no answer fits in rows of --length {options.length}")
    return text


def _train(job: Job, text: Text) -> tuple[PreTrainedModel, Marks]:
    options, model = job.options, job.model
    ids = None
    if options.draft_vocab is not None and options.layer_numbers() is None:
        ids = text.frequent(min(options.draft_vocab, job.vocab), job.vocab, job.eos_ids)
        job.facts["coverage"] = text.covered(ids, job.vocab)
    student = new_student(options, model, load.tokenizer_sha256(job.tokenizer), ids)
    job.facts["parameters"] = student.num_parameters()
    examiner = Examiner(job.model, job.tokenizer, options, job.eos_ids, job.vocab)
    teacher = Teacher(model, text, ids, job.vocab)
    trainer = Trainer(options, student, teacher, text)
    _resume(job, trainer)
    kept = "kept" if teacher.keeps else "made at every step"
    job.say(
        f"draft of {job.facts['parameters']:,} parameters; {trainer.steps} steps of "
        f"{trainer.tokens_per_step} tokens; target's states {kept}"
    )
    _steps(job, trainer, examiner, student)
    marks = examiner.examine(student)
    job.say(line(trainer.step, marks))
    job.facts["steps"] = trainer.step
    job.facts["train_tokens"] = trainer.step * trainer.tokens_per_step
    return student, marks


def _steps(job: Job, trainer: Trainer, examiner: Examiner, student: PreTrainedModel) -> None:
    options = job.options
    saved = began = time.monotonic()
    first, losses = trainer.step, []
    with _bar("training", trainer.steps, trainer.step) as advance:
        while trainer.step < trainer.steps:
            losses.append(trainer.train_step())
            advance(1)
            if trainer.step % options.eval_every == 0:
                loss = float(torch.stack(losses).mean())
                rate = (trainer.step - first) * trainer.tokens_per_step / (time.monotonic() - began)
                job.say(
                    f"{line(trainer.step, examiner.examine(student))}; loss {loss:.4f}; {rate:,.0f} tokens/s"
                )
                losses.clear()
            late = job.late
            if late or time.monotonic() - saved >= 60 * options.checkpoint_minutes:
                _checkpoint(job, trainer)
                saved = time.monotonic()
            if late:
                raise Stopped
    _checkpoint(job, trainer)


def _checkpoint(job: Job, trainer: Trainer) -> None:
    part = job.work / ".checkpoint.part"
    save_file(trainer.state(), part, metadata={"step": str(trainer.step)})
    part.rename(job.work / "checkpoint.safetensors")


def _resume(job: Job, trainer: Trainer) -> None:
    path = job.work / "checkpoint.safetensors"
    if path.exists():
        with safe_open(path, "pt") as file:
            step = int(file.metadata()["step"])
        trainer.restore(step, load_file(path))
        job.say(f"going on from step {step}")


@contextmanager
def _bar(name: str, total: int, done: int = 0) -> Iterator[Callable[[int], None]]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(file=sys.stderr), transient=True) as progress:
        task = progress.add_task(name, total=total, completed=done)
        yield lambda steps: progress.advance(task, steps)
