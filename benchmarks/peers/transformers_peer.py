"""transformers' own speculation at its best: plain generate, and assisted generation at every setting.

    python benchmarks/peers/transformers_peer.py --target smollm2 --draft default --per-category 12

Greedy, batch 1 (assisted generation takes no other), held-out prompts, every answer of --tokens tokens.
Every prompt runs through all settings before the next, in a rotating order. The figure of a setting is
the median over a category's prompts of tokens per second; its best setting there is marked. Outputs
are compared with plain generate's: in float32 a difference ends the run with exit code 1, in bfloat16,
where a pass over several tokens rounds differently from one over one, it is counted.

`assistant_confidence_threshold`: drafting ends below this probability of the draft's token, whatever the
schedule. transformers' default is 20 tokens and 0.4, which it adapts during a call if scikit-learn is
installed. Where not named here the threshold is 0: off.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a script, for what lies in benchmarks/

from contenders import Contender
from record import save

from classifiers.heldout import Prompt, prompts
from classifiers.pair_texts import encode
from engine.models.builtin import builtin_draft
from engine.models.load import early_exit, load_model, load_tokenizer, pick_device, pick_dtype
from peers.rows import Row, Run, show, summarise

LOOKAHEADS = (2, 3, 4, 6, 8, 12, 16)


@dataclass(frozen=True)
class Setting:
    """How to assist: `tokens` to draft (None: no draft), by which schedule, above which probability."""

    name: str
    tokens: int | None = None
    schedule: str = "constant"
    threshold: float = 0.0

    def apply(self, draft: PreTrainedModel) -> None:
        """Sets up the draft for one call. Before every call: `heuristic` leaves its last number there.

        Only the draft's own generation config counts; the same names as arguments of the target's
        generate() are ignored without a word.
        """
        config = draft.generation_config
        config.num_assistant_tokens = self.tokens
        config.num_assistant_tokens_schedule = self.schedule
        config.assistant_confidence_threshold = self.threshold
        draft.config.use_cache = config.use_cache = True


PLAIN = Setting("plain generate")


def settings(lookaheads: Sequence[int] = LOOKAHEADS) -> list[Setting]:
    """Plain, static SLs, the heuristic from 5 tokens, and transformers' default, a threshold of 0.4."""
    return [
        PLAIN,
        *(Setting(f"assisted, static SL={sl}", sl) for sl in dict.fromkeys(lookaheads)),
        Setting("assisted, heuristic from 5", 5, "heuristic"),
        Setting("assisted, up to 20 above 0.4 (default)", 20, "constant", 0.4),
    ]


def measure(
    target_model: PreTrainedModel,
    draft_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    tokens: int,
    settings: Sequence[Setting],
    on_prompt: Callable[[int], None] = lambda done: None,
) -> list[Row]:
    """Every setting over all prompts: rows by category, in the order of the settings, then of "all".

    The draft must read the target's token ids; its generation config is put back afterwards.
    `on_prompt` hears how many prompts are done. Raises ValueError without `PLAIN` among the settings,
    for two of one name, for no prompts, or for fewer than 2 tokens.
    """
    if PLAIN not in settings or not prompts or tokens < 2:
        raise ValueError("wanted: plain generate among the settings, a prompt, and 2 tokens or more")
    if len({each.name for each in settings}) < len(settings):
        raise ValueError("two settings have the same name")
    encoded = encode(prompts, tokenizer)
    decode = {each: contender(each, target_model, draft_model, tokenizer, tokens) for each in settings}
    runs: dict[Setting, list[Run]] = {each: [] for each in settings}
    order = list(settings)
    with _unchanged(draft_model), _passes(target_model) as target, _passes(draft_model) as draft:
        for each in order:
            decode[each](list(encoded[0].ids))  # warm up
        for i, prompt in enumerate(encoded):
            shift = i % len(order)
            for each in order[shift:] + order[:shift]:
                target.count = draft.count = 0
                begin = time.perf_counter()
                output, _ = decode[each](list(prompt.ids))
                seconds = time.perf_counter() - begin
                runs[each].append(Run(prompt.category, output, seconds, target.count, draft.count))
            on_prompt(i + 1)
    return summarise({each.name: of for each, of in runs.items()}, PLAIN.name)


def contender(
    setting: Setting,
    target: PreTrainedModel,
    draft: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tokens: int,
) -> Contender:
    """Decodes one prompt under a setting: exactly `tokens` tokens."""
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id

    def run(ids: list[int]) -> tuple[list[int], dict[str, int]]:
        extra: dict[str, Any] = {}
        if setting.tokens is not None:
            setting.apply(draft)
            extra["assistant_model"] = draft
        generate: Any = target.generate
        prompt = torch.tensor([ids], device=target.device)
        with torch.inference_mode():
            # A checkpoint's own repetition penalty would make another text than greedy decoding does.
            out = generate(
                prompt, attention_mask=torch.ones_like(prompt), do_sample=False, repetition_penalty=1.0,
                max_new_tokens=tokens, min_new_tokens=tokens, pad_token_id=pad, **extra,
            )  # fmt: skip
        return out[0, len(ids) :].tolist(), {}  # waits for the device

    return run


@dataclass
class _Counter:
    count: int = 0


@contextmanager
def _passes(model: PreTrainedModel) -> Iterator[_Counter]:
    """Counts the model's forward passes."""
    counter = _Counter()

    def called(*_: Any) -> None:
        counter.count += 1

    handle = model.register_forward_pre_hook(called)
    try:
        yield counter
    finally:
        handle.remove()


@contextmanager
def _unchanged(draft: PreTrainedModel) -> Iterator[None]:
    """Puts back what the settings change."""
    config, cached = draft.generation_config, draft.config.use_cache
    draft.generation_config = copy.deepcopy(config)
    try:
        yield
    finally:
        draft.generation_config, draft.config.use_cache = config, cached


def main() -> None:
    args = _arguments()
    torch.set_num_threads(args.threads or torch.get_num_threads())
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    tokenizer = load_tokenizer(args.target)
    target = load_model(args.target, dtype=dtype, device=device)
    draft = _draft(args, target, tokenizer, dtype, device)
    chosen = [each for each in prompts(args.per_category) if each.category in args.categories]
    total = len(chosen)
    rows = measure(
        target, draft, tokenizer, chosen, args.tokens, settings(args.sl),
        on_prompt=lambda done: print(f"prompt {done}/{total}", file=sys.stderr, flush=True),
    )  # fmt: skip
    show(rows, Console(width=120))
    figures = {
        "what": __doc__,
        "target": args.target,
        "draft": args.draft,
        "tokens": args.tokens,
        "device": str(device),
        "dtype": str(dtype),
        "threshold_adapts": find_spec("sklearn") is not None,
        "rows": [asdict(row) for row in rows],
    }
    save(args.json, figures)
    different = [row.setting for row in rows if row.category == "all" and row.different]
    if different and dtype == torch.float32:
        raise SystemExit(f"outputs differ from plain generate's: {different}")


def _draft(
    args: argparse.Namespace,
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype,
    device: torch.device,
) -> PreTrainedModel:
    """The model that --draft names: "default" and "self:N" as for the server."""
    if args.draft.startswith("self:"):
        return early_exit(target, int(args.draft.removeprefix("self:")))
    where = str(builtin_draft(args.target, tokenizer)) if args.draft == "default" else args.draft
    return load_model(where, dtype=dtype, device=device)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", default="smollm2")
    parser.add_argument("--draft", default="default", help="default, self:N or a model")
    parser.add_argument("--sl", type=int, nargs="*", default=list(LOOKAHEADS), help="static lookaheads")
    parser.add_argument("--categories", nargs="+", default=["code", "chat", "arithmetic", "writing"])
    parser.add_argument("--per-category", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto", help="auto: bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path, default=Path("out/transformers_peer.json"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
