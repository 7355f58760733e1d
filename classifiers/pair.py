"""Judges a pair of target and draft: what drafting costs, how often it is right, what that would gain.

`disco-serve bench-pair`. The target writes its own texts through the engine, without a draft; the
draft is then forced along them, which gives its acceptance at every SL and by every sampling method
at once (`classifiers.acceptance`). Speed-ups are predictions from measured costs at batch 1.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable
from collections.abc import Sequence as Seq
from importlib.metadata import version
from pathlib import Path

import msgspec
import torch
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn
from transformers import AutoConfig

from classifiers.pair_report import PairReport, report_costs, show, summarise
from classifiers.pair_score import ROUNDS, Forced, evaluate, measure_costs
from classifiers.pair_texts import Encoded, PairError, encode, read_prompts, write_texts
from engine.config import DType, EngineConfig
from engine.core import Engine
from engine.models import load
from engine.models.folder import first_line
from engine.models.references import quiet
from engine.models.runner import Runner
from engine.parts import Parts, build
from engine.speculation.drafters.model import ModelDrafter
from engine.speculation.noise import GumbelNoise

_CONTEXT = 256  # tokens before the steps that are timed
_ROWS = 32  # texts written at once
_WIDTH = 132  # columns of the tables where stdout is no terminal


class PairOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What `disco-serve bench-pair` can be told.

    `draft`: "default", "self:N" or a model. `prompts`: files (see `read_prompts`); none takes the
    built-in held-out prompts. `per_category`: the first so many of each category. `tokens`: the
    longest answer. `sl`: the largest lookahead. `json`: where the report goes as JSON.
    """

    target: str
    draft: str
    prompts: tuple[Path, ...] = ()
    per_category: int | None = None
    tokens: int = 128
    sl: int = 8
    device: str = "auto"
    dtype: DType = "auto"
    threads: int | None = None
    seed: int = 0
    json: Path | None = None

    def check(self) -> None:
        """Raises PairError, naming the first option that cannot work."""
        _require(self.draft not in ("none", "ngram"), f"--draft {self.draft}: a draft model is wanted")
        _require(self.per_category is None or self.per_category >= 1, "--per-category must be at least 1")
        _require(self.tokens >= 2, "--tokens must be at least 2: drafting begins after the first token")
        _require(1 <= self.sl <= 64, "--sl must be from 1 to 64")
        _require(self.threads is None or self.threads >= 1, "--threads must be at least 1")
        _require(0 <= self.seed < 2**63, "--seed must be from 0 to 2^63 - 1")
        for path in self.prompts:
            _require(path.is_file(), f"--prompts {path}: no such file")
        if self.json is not None:
            _require(self.json.parent.is_dir(), f"--json {self.json}: no such directory")
            _require(not self.json.is_dir(), f"--json {self.json} is a directory")


def run(options: PairOptions) -> PairReport:
    """Judges the pair: tables on stdout, progress on stderr, JSON where `options.json` says.

    Raises PairError for bad options and prompts, CannotLoad where the models cannot be served as a
    pair, RequestFailed if the target gives NaN, OSError if the report cannot be written.
    """
    options.check()
    prompts = read_prompts(options.prompts, options.per_category)
    tokenizer = load.load_tokenizer(options.target)
    report = _judge(options, encode(prompts, tokenizer), bool(tokenizer.chat_template))
    if options.json is not None:
        text = msgspec.json.format(msgspec.json.encode(report), indent=2)
        options.json.write_bytes(text + b"\n")
    wide = None if sys.stdout.isatty() else _WIDTH
    show(report, Console(highlight=False, markup=False, width=wide))
    return report


def _judge(options: PairOptions, prompts: Seq[Encoded], chat_template: bool) -> PairReport:
    config = _config(options, prompts)
    parts = build(config)
    draft = _draft_runner(parts)
    longest = max(len(prompt.ids) for prompt in prompts) + options.tokens
    room = min(parts.info.max_model_len, draft.context)
    _require(longest <= room, f"the longest prompt and --tokens need {longest} tokens, the draft has {room}")
    context = min(_CONTEXT, room - options.sl - 1)
    _require(context >= 1, f"--sl {options.sl} is over the models' context of {room} tokens")
    block_size, vocab = config.block_size, parts.info.vocab_size
    with Progress(
        *Progress.get_default_columns(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
    ) as progress:
        todo = 2 * len(prompts) * options.tokens
        written = _task(progress, "the target's texts, tokens", todo)
        texts = write_texts(Engine(config, parts), prompts, options.tokens, options.seed, written)
        # The engine has ended: from here on its KV blocks are ours.
        judged = _task(progress, "the draft along them, texts", len(texts))
        noise = GumbelNoise(vocab, parts.target.device)
        forced = [Forced(runner, vocab, block_size) for runner in (parts.target, draft)]
        scores = evaluate(texts, forced[0], forced[1], noise, lambda: judged(1))
        timed = _task(progress, "costs, rounds", ROUNDS)
        ids = _repeat([token for text in texts for token in text.tokens], context + options.sl + 1)
        costs = measure_costs(parts.target, draft, options.sl, ids, block_size, lambda: timed(1))
    device = parts.target.device
    return PairReport(
        target=options.target,
        draft=options.draft,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        dtype=parts.info.dtype,
        threads=torch.get_num_threads(),
        tokens=options.tokens,
        seed=options.seed,
        chat_template=chat_template,
        prompts=[path.name for path in options.prompts] or ["built-in"],
        costs=report_costs(costs, context),
        categories=summarise(scores, costs, options.tokens),
        versions={
            "python": platform.python_version(),
            **{name: version(name) for name in ("disco-serve", "torch", "transformers")},
        },
    )


def _config(options: PairOptions, prompts: Seq[Encoded]) -> EngineConfig:
    """An engine whose KV pools hold what is needed and no more. Raises PairError where the target's
    context does not."""
    where = load.resolve(options.target)
    with quiet(progress=False):
        try:
            context = int(AutoConfig.from_pretrained(where).get_text_config().max_position_embeddings)
        except (OSError, ValueError, AttributeError) as error:
            raise load.ModelError(f"config of {options.target!r}: {first_line(error)}") from error
    longest = max(len(prompt.ids) for prompt in prompts)
    needed = longest + options.tokens
    _require(
        needed <= context,
        f"the longest prompt ({longest} tokens) and --tokens {options.tokens} are over the target's context "
        f"of {context} tokens",
    )
    return EngineConfig(
        target=options.target,
        draft=options.draft,
        device=options.device,
        dtype=options.dtype,
        threads=options.threads,
        max_model_len=min(context, max(needed, _CONTEXT + options.sl + 1)),
        max_num_seqs=_ROWS,
    )


def _draft_runner(parts: Parts) -> Runner:
    drafter = parts.drafters["model"]
    assert isinstance(drafter, ModelDrafter)
    return drafter.runner


def _repeat(ids: Seq[int], count: int) -> list[int]:
    return [ids[i % len(ids)] for i in range(count)]


def _task(progress: Progress, name: str, total: int) -> Callable[[int], None]:
    task = progress.add_task(name, total=total)
    return lambda steps: progress.advance(task, steps)


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise PairError(message)
