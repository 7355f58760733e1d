"""Structured output of the default pair under random JSON schemas: valid, and the same with speculation.

    python tests/lossless/structured.py [--schemas 200] [--tokens 120] [--batch 8] [--sl 5] [--seed 0]
        [--target smollm2] [--draft default] [--device cpu] [--dtype float32]

Greedy. Every finished answer must validate with jsonschema, and every text must be the same token by
token without a draft, with a masked draft and with one that drafts what it likes (in float32; in other
types texts may part at ties, and those that do are counted). Prints acceptance with both drafts and what
the masks cost on this machine.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import jsonschema
import torch
import xgrammar
from schemas import schema
from transformers import PreTrainedTokenizerBase

import engine.sampling
from engine.config import EngineConfig
from engine.core import Engine
from engine.grammar import vocabulary
from engine.models.load import load_tokenizer, real_vocab_size
from engine.types import CompiledGrammar, GenerateRequest, SamplingParams, SpeculationParams
from server.grammar_messages import Ask
from server.grammar_worker import answer


@dataclass
class Result:
    """One way of drafting: texts by schema, why each ended, and counts."""

    texts: dict[int, list[int]] = field(default_factory=dict)
    reasons: dict[int, str] = field(default_factory=dict)
    drafted: int = 0
    accepted: int = 0
    seconds: float = 0.0
    masks: int = 0  # positions masked
    mask_seconds: float = 0.0

    def line(self, name: str) -> str:
        tokens = sum(map(len, self.texts.values()))
        rate = f"{self.accepted / self.drafted:.3f}" if self.drafted else "-"
        cost = 1e6 * self.mask_seconds / max(self.masks, 1)
        return (
            f"{name:<22} {tokens:>7} {self.drafted:>8} {rate:>10} {self.seconds:>8.1f} {cost:>10.0f} "
            f"{self.mask_seconds / self.seconds:>10.1%}"
        )


HEADER = (
    f"{'draft':<22} {'tokens':>7} {'drafted':>8} {'acceptance':>10} {'seconds':>8} {'us a mask':>10} "
    f"{'of all':>10}"
)


def main() -> None:
    args = _arguments()
    torch.set_num_threads(args.threads)
    source = random.Random(args.seed)
    asked = [schema(source) for _ in range(args.schemas)]
    tokenizer = load_tokenizer(args.target)
    grammars = compile_all(tokenizer, asked)
    served = Engine(
        EngineConfig(
            target=args.target, draft=args.draft, dtype=args.dtype, device=args.device,
            max_model_len=1024, max_num_seqs=args.batch,
        )
    )  # fmt: skip
    prompts = [prompt(tokenizer, each) for each in asked]
    plain = SpeculationParams(drafter="none")
    drafts = SpeculationParams(drafter="model", policy="static", options={"sl": args.sl})
    ways = {
        "none": (plain, True),
        f"sl {args.sl}, masked": (drafts, True),
        f"sl {args.sl}, free": (drafts, False),
    }
    print(HEADER, flush=True)
    results = {}
    for name, (speculation, masked) in ways.items():
        results[name] = generate(served, prompts, grammars, speculation, masked, args)
        print(results[name].line(name), flush=True)
    wrong = judge(tokenizer, asked, results, exact=args.dtype == "float32")
    if wrong:
        raise SystemExit("\n".join(wrong))


def compile_all(tokenizer: PreTrainedTokenizerBase, asked: list[dict[str, Any]]) -> list[CompiledGrammar]:
    """As the server compiles them. Exits if one is refused."""
    known = vocabulary(tokenizer, real_vocab_size(tokenizer))
    compiler = xgrammar.GrammarCompiler(known, max_threads=1, cache_enabled=False)
    found, begin = [], time.perf_counter()
    for i, each in enumerate(asked):
        result = answer(compiler, Ask("json_schema", json.dumps(each, ensure_ascii=False)))
        if result.refused is not None:
            raise SystemExit(f"schema {i} is refused: {result.refused}\n{json.dumps(each)}")
        found.append(CompiledGrammar(str(i), result.data))
    seconds, size = time.perf_counter() - begin, sum(len(each.data) for each in found)
    print(f"{len(asked)} schemas compiled in {seconds:.1f} s, {size / len(found) / 1024:.0f} KiB on average")
    return found


def prompt(tokenizer: PreTrainedTokenizerBase, wanted: dict[str, Any]) -> tuple[int, ...]:
    text = f"Answer with JSON for this schema: {json.dumps(wanted, ensure_ascii=False)[:800]}"
    messages = [{"role": "user", "content": text}]
    return tuple(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))


def generate(
    served: Engine,
    prompts: list[tuple[int, ...]],
    grammars: list[CompiledGrammar],
    speculation: SpeculationParams,
    masked: bool,
    args: argparse.Namespace,
) -> Result:
    """All of them, `batch` at a time."""
    served._blocks.reset_cache()
    served._parts.drafters["model"].mask_drafts = masked  # type: ignore[attr-defined]
    result = Result(texts={i: [] for i in range(len(prompts))})
    started, begin = 0, time.perf_counter()
    with counted(result):
        while len(result.reasons) < len(prompts):
            while started < len(prompts) and started - len(result.reasons) < args.batch:
                params = SamplingParams(temperature=0.0, max_tokens=args.tokens, grammar=grammars[started])
                served.add(
                    GenerateRequest(
                        id=str(started), prompt_ids=prompts[started], params=params, speculation=speculation
                    )
                )
                started += 1
            for event in served.step()[0]:
                result.texts[int(event.id)].extend(event.token_ids)
                result.drafted += event.drafted
                result.accepted += event.accepted
                if event.finish_reason is not None:
                    result.reasons[int(event.id)] = event.finish_reason
    result.seconds = time.perf_counter() - begin
    return result


@contextmanager
def counted(result: Result) -> Iterator[None]:
    """Times the masking of draft and target."""
    shipped = engine.sampling._mask

    def mask(out: torch.Tensor, masked: list[int], *given: Any) -> None:
        begin = time.perf_counter()
        shipped(out, masked, *given)
        result.mask_seconds += time.perf_counter() - begin
        result.masks += len(masked)

    engine.sampling._mask = mask
    try:
        yield
    finally:
        engine.sampling._mask = shipped


def judge(
    tokenizer: PreTrainedTokenizerBase,
    asked: list[dict[str, Any]],
    results: dict[str, Result],
    exact: bool = True,
) -> list[str]:
    """What is wrong: texts that differ, if they must not; answers that do not validate; failed requests."""
    names, wrong, finished, parted = list(results), [], 0, 0
    for i, wanted in enumerate(asked):
        texts = [results[name].texts[i] for name in names]
        for name, text in zip(names, texts, strict=True):
            reason = results[name].reasons[i]
            if text != texts[0] or reason != results[names[0]].reasons[i]:
                parted += 1
                if exact:
                    wrong.append(f"schema {i}: the text of {name!r} is not that of {names[0]!r}")
            if reason == "stop":
                finished += name == names[0]
                said = tokenizer.decode(text, skip_special_tokens=True)
                if (fault := invalid(said, wanted)) is not None:
                    wrong.append(f"schema {i}, {name}: {fault}\n  {said!r}\n  {json.dumps(wanted)}")
            elif reason != "length":
                wrong.append(f"schema {i}, {name}: ended with {reason!r}")
    print(f"{finished} of {len(asked)} answers finished; {parted} texts differ; {len(wrong)} faults")
    return wrong


def invalid(said: str, wanted: dict[str, Any]) -> str | None:
    """Why the text does not validate, or None."""
    try:
        jsonschema.validate(json.loads(said), wanted, jsonschema.Draft202012Validator)
    except (ValueError, jsonschema.ValidationError) as error:
        return str(error).splitlines()[0]
    return None


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", default="smollm2")
    parser.add_argument("--draft", default="default")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--schemas", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=120)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--sl", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser.parse_args()


if __name__ == "__main__":
    main()
