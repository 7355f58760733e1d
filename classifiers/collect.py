"""Records what a draft would have proposed along its target's own texts, as a trace.

`disco-serve classifier collect`. The engine writes the target's texts, group by group, without a
draft; `classifiers.collect_rows` runs the draft along them. A group is a shard: a killed run goes on
with the first that is missing.
"""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn
from transformers import AutoConfig

from classifiers import traces
from classifiers.collect_bushes import Extent
from classifiers.collect_rows import Plan, Recorder, blocks_needed
from classifiers.collect_store import alone, claim, refuse_another_directory, require
from classifiers.collect_texts import Asked, write_texts
from classifiers.data_files import encode, read_data
from classifiers.traces import Counts, Identity, Manifest, Prompts, Source
from engine.config import DType, EngineConfig
from engine.core import Engine
from engine.models import fingerprint, load
from engine.models.folder import first_line
from engine.models.references import quiet
from engine.models.runner import Runner
from engine.parts import Parts, build
from engine.speculation.drafters.model import ModelDrafter
from engine.speculation.features import VERSION


class CollectOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What `disco-serve classifier collect` can be told.

    `draft`: "default", "self:N" or a model. `data`: see `classifiers.data_files.read_data`.
    `temperature` 0 is greedy, 1 coupled sampling with seeds `seed`, `seed` + 1, ... by prompt. `tokens`:
    the longest text. `branch`: the draft's own steps after a mismatch. `trees`: record what simulating trees
    needs. `batch`: texts of a shard, None for 64 on a GPU and 16 on a CPU.
    """

    target: str
    draft: str
    data: tuple[str, ...]
    out: Path
    temperature: float = 0.0
    seed: int = 0
    tokens: int = 128
    branch: int = 24
    hidden: bool = True
    target_hidden: bool = False
    trees: bool = False
    per_category: int | None = None
    batch: int | None = None
    device: str = "auto"
    dtype: DType = "auto"
    threads: int | None = None

    def check(self) -> None:
        """Raises CollectError, naming the first option that cannot work."""
        require(self.draft not in ("none", "ngram"), f"--draft {self.draft}: a draft model is wanted")
        require(self.temperature in (0, 1), f"--temperature {self.temperature:g}: 0 or 1")
        require(0 <= self.seed < 2**63, "--seed must be from 0 to 2^63 - 1")
        require(2 <= self.tokens <= 8192, "--tokens must be from 2 to 8192: the second is the first drafted")
        require(1 <= self.branch <= 64, "--branch must be from 1 to 64")
        require(self.per_category is None or self.per_category >= 1, "--per-category must be at least 1")
        require(self.batch is None or 1 <= self.batch <= 1024, "--batch must be from 1 to 1024")
        require(self.threads is None or self.threads >= 1, "--threads must be at least 1")
        require(not self.out.exists() or self.out.is_dir(), f"--out {self.out} is no directory")


def collect(options: CollectOptions) -> Manifest:
    """Records the trace in `options.out`, or what is missing of it; progress on stderr.

    Raises CollectError or DataError for what was asked wrongly, CannotLoad where the models cannot be
    served as a pair, RequestFailed if one gives NaN, OSError.
    """
    options.check()
    prompts, sources = read_data(options.data, options.per_category)
    tokenizer = load.load_tokenizer(options.target)
    asked = [
        Asked(prompt, encode(prompt, tokenizer), options.seed + i if options.temperature else None)
        for i, prompt in enumerate(prompts)
    ]
    manifest = _manifest(options, sources, fingerprint.of_draft(options.draft, options.target, tokenizer))
    refuse_another_directory(options.out)
    options.out.mkdir(parents=True, exist_ok=True)
    with alone(options.out):
        found = claim(options.out, manifest)
        if found.counts is not None:
            return found
        job = _Job(options, asked, found)
        job.run()
        traces.write_manifest(options.out, job.manifest)
        return job.manifest


def _manifest(options: CollectOptions, sources: Seq[Source], draft: str | None) -> Manifest:
    """What is known before the models are loaded."""
    device = load.pick_device(options.device)
    batch = options.batch or (64 if device.type == "cuda" else 16)
    given = msgspec.structs.asdict(options)
    kept = ("temperature", "seed", "tokens", "branch", "hidden", "target_hidden", "trees", "per_category")
    dtype = str(load.pick_dtype(options.dtype, device)).removeprefix("torch.")
    settings: dict[str, Any] = {name: given[name] for name in kept}
    settings |= {"batch": batch, "device": device.type, "dtype": dtype}
    assert draft is not None
    return Manifest(
        feature_version=VERSION,
        target=Identity(_short(options.target), fingerprint.of_model(options.target)),
        draft=Identity(_short(options.draft), draft),
        data=tuple(sources),
        mode=f"coupled T=1 seed={options.seed}" if options.temperature else "greedy",
        tokens=options.tokens,
        branch=options.branch,
        vocab=0,
        settings=settings,
        versions={
            "python": platform.python_version(),
            **{name: version(name) for name in ("disco-serve", "torch", "transformers")},
        },
    )


def _short(reference: str) -> str:
    """A reference without the directories above a model's own."""
    path = Path(reference).expanduser()
    return path.resolve().name if path.exists() else reference


class _Job:
    """The recording at work."""

    def __init__(self, options: CollectOptions, asked: Seq[Asked], manifest: Manifest) -> None:
        """Loads the models. Leaves out the prompts that do not fit."""
        self._options, self._out = options, options.out
        batch = int(manifest.settings["batch"])
        context = _context(options.target)
        fits = [each for each in asked if len(each.ids) + options.tokens <= context]
        require(bool(fits), _too_long(asked, options.tokens, "target", context))
        longest = max(len(each.ids) for each in fits) + options.tokens
        plan = Plan.on(load.pick_device(options.device), min(batch, len(fits)))
        trees = Extent() if options.trees else None
        self._config = EngineConfig(
            target=options.target,
            draft=options.draft,
            device=options.device,
            dtype=options.dtype,
            threads=options.threads,
            max_model_len=longest,
            max_num_seqs=plan.texts,
            kv_blocks=blocks_needed(
                plan, longest, options.branch, EngineConfig(target=options.target).block_size, trees
            ),
            prefix_cache=False,  # the recorder writes over the blocks of texts that are done
        )
        self._parts = build(self._config)
        draft = _draft_of(self._parts)
        self._asked = [each for each in fits if len(each.ids) + options.tokens <= draft.context]
        require(bool(self._asked), _too_long(asked, options.tokens, "draft", draft.context))
        for model, runner, wanted in (
            ("draft", draft, options.hidden),
            ("target", self._parts.target, options.target_hidden),
        ):
            require(
                not wanted or runner.hidden_size is not None, f"the {model} does not show its hidden states"
            )
        info = self._parts.info
        self._groups = [self._asked[i : i + batch] for i in range(0, len(self._asked), batch)]
        self._recorder = Recorder(
            self._parts.target,
            draft,
            plan,
            vocab=info.vocab_size,
            block_size=info.block_size,
            longest=longest,
            tokens=options.tokens,
            branch=options.branch,
            hidden=options.hidden,
            target_hidden=options.target_hidden,
            trees=trees,
        )
        self.manifest = msgspec.structs.replace(
            manifest,
            vocab=info.vocab_size,
            eos_ids=info.eos_token_ids,
            hidden=(draft.hidden_size or 0) if options.hidden else 0,
            target_hidden=(self._parts.target.hidden_size or 0) if options.target_hidden else 0,
            left_out=len(asked) - len(self._asked),
        )

    def run(self) -> None:
        """Records the groups that are missing; `manifest` is complete then."""
        engine = Engine(self._config, dataclasses.replace(self._parts, drafters={}))
        with _bars(len(self._asked), self._options.tokens, self._options.trees) as bars:
            for number, group in enumerate(self._groups):
                path = traces.shard_file(self._out, number)
                if path.exists():
                    bars.skip(len(group))
                else:
                    self._record(engine, number, group, bars)
        sizes = [traces.shard_sizes(traces.shard_file(self._out, i)) for i in range(len(self._groups))]
        counts = Counts(*(sum(getattr(each, name) for each in sizes) for name in Counts.__struct_fields__))
        self.manifest = msgspec.structs.replace(self.manifest, counts=counts)

    def _record(self, engine: Engine, number: int, group: Seq[Asked], bars: _Bars) -> None:
        texts = write_texts(engine, group, self._options.tokens, bars.written)
        # The engine has no request left: from here on its KV blocks are the recorder's.
        steps, branches, bushes = self._recorder.record(texts, bars.forced, bars.branched, bars.off)
        prompts = Prompts(
            category=[each.prompt.category for each in group],
            name=[each.prompt.name for each in group],
            finish=[text.finish for text in texts],
            tokens=np.array([len(each.ids) for each in group], np.int32),
            ids=np.array([token for each in group for token in each.ids], np.int32),
        )
        bars.off(sum(self._options.tokens - len(text.tokens) + 1 for text in texts))  # without a bush
        traces.save_shard(self._out, number, prompts, steps, branches, bushes)


def _draft_of(parts: Parts) -> Runner:
    drafter = parts.drafters["model"]
    assert isinstance(drafter, ModelDrafter)
    return drafter.runner


def _context(target: str) -> int:
    """The target's context, before it is loaded. Raises ModelError."""
    where = load.resolve(target)
    with quiet(progress=False):
        try:
            return int(AutoConfig.from_pretrained(where).get_text_config().max_position_embeddings)
        except (OSError, ValueError, AttributeError) as error:
            raise load.ModelError(f"config of {target!r}: {first_line(error)}") from error


def _too_long(asked: Seq[Asked], tokens: int, model: str, context: int) -> str:
    shortest = min(len(each.ids) for each in asked)
    return (
        f"no prompt fits: the shortest has {shortest} tokens, with --tokens {tokens} that is over "
        f"the {model}'s context of {context}"
    )


# ---- progress


class _Bars:
    """Bars on stderr: tokens written, texts forced, branches run (their number shows on the way), and with
    `trees` positions that have their bushes."""

    def __init__(self, progress: Progress, texts: int, tokens: int, trees: bool) -> None:
        self._progress, self._tokens = progress, tokens
        self._texts = progress.add_task("the target's texts, tokens", total=texts * tokens)
        self._forced = progress.add_task("the draft along them, texts", total=texts)
        self._branches = progress.add_task("on its own tokens, branches", total=None)
        self._off = progress.add_task("off the texts, positions", total=texts * tokens) if trees else None
        self._before = 0

    def skip(self, texts: int) -> None:
        """A group that is there already."""
        self.written(texts * self._tokens)
        self.off(texts * self._tokens)
        self.forced(texts)

    def written(self, tokens: int) -> None:
        self._progress.advance(self._texts, tokens)

    def forced(self, texts: int) -> None:
        self._progress.advance(self._forced, texts)

    def off(self, positions: int) -> None:
        if self._off is not None:
            self._progress.advance(self._off, positions)

    def branched(self, done: int, total: int) -> None:
        self._progress.update(self._branches, completed=self._before + done, total=self._before + total)
        if done == total:
            self._before += total


@contextmanager
def _bars(texts: int, tokens: int, trees: bool) -> Iterator[_Bars]:
    columns = (*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        yield _Bars(progress, texts, tokens, trees)
