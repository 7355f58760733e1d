"""Greedy text in bf16 on a GPU: where it parts from float32's, and by how near a tie.

    python tests/lossless/bf16.py [--target smollm2] [--draft default] [--prompts 50] [--tokens 64]

Compares the fused runner without drafts, the fused runner with chains and trees, and the reference runner,
all in bf16, with the reference runner in float32, and the fused runner with drafts against without.
For each first divergence it gives the gap of float32's two largest logits there, in units of
bf16's last place at the largest (ulp): identity is promised in float32 alone, but a divergence far from
a tie would be a fault. Where two texts part that have both left float32's, its logits say nothing of them,
and they are only counted. Fails if more of the fused runner's than of the reference runner's are far.
"""

from __future__ import annotations

import argparse
import math

import test_identity as identity
import torch
from prompts import PROMPTS

from engine.config import EngineConfig
from engine.core import Engine
from engine.models.load import load_model, load_tokenizer
from engine.types import SpeculationParams

NEAR = 2.0  # ulps

SPECULATIONS = {
    "static SL=4": SpeculationParams(policy="static", options={"sl": 4}),
    "confidence joint": SpeculationParams(
        policy="confidence", options={"signal": "joint", "threshold": 0.3, "max_sl": 15}
    ),
    **{
        f"{rule} {budget}": SpeculationParams(drafter=rule, options={"budget": budget})
        for rule, budget in (("dyspec", 8), ("dyspec", 64), ("opt_tree", 16), ("goodput_tree", 64))
    },
}
NONE = SpeculationParams(drafter="none")


def texts(
    engine: Engine, prompts: list[tuple[int, ...]], tokens: int, asked: SpeculationParams
) -> list[list[int]]:
    """One prompt after the other, so that every pass has the size it has at batch 1."""
    kind = {"temperature": 0, "ignore_eos": True}
    return identity.generate(engine, prompts, tokens, kind, [asked], 1)[0]


class Gaps:
    """The gap of float32's two largest logits after a context, in ulps of bf16."""

    def __init__(self, target: str) -> None:
        self._model = load_model(target, dtype=torch.float32, device=torch.device("cuda"))

    @torch.inference_mode()
    def __call__(self, ids: list[int]) -> float:
        logits = self._model(input_ids=torch.tensor([ids], device="cuda"), use_cache=False).logits[0, -1]
        first, second = logits.float().topk(2).values.tolist()
        return (first - second) / 2.0 ** (math.floor(math.log2(abs(first))) - 7)


def parting(a: list[int], b: list[int]) -> int | None:
    """Where two texts of one length first differ."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), None)


def main() -> None:
    args = _arguments()
    tokenizer = load_tokenizer(args.target)
    prompts = [tuple(tokenizer.encode(text)) for text in PROMPTS[: args.prompts]]
    found: dict[str, list[list[int]]] = {}

    def engine(runner: str, dtype: str) -> Engine:
        return Engine(
            EngineConfig(
                target=args.target,
                draft=args.draft,
                runner=runner,  # type: ignore[arg-type]
                dtype=dtype,  # type: ignore[arg-type]
                max_num_seqs=1,
                memory_fraction=0.2,
            )
        )

    found["float32"] = texts(engine("reference", "float32"), prompts, args.tokens, NONE)
    found["reference"] = texts(engine("reference", "bfloat16"), prompts, args.tokens, NONE)
    fused = engine("fused", "bfloat16")
    found["fused"] = texts(fused, prompts, args.tokens, NONE)
    for name, asked in SPECULATIONS.items():
        found[name] = texts(fused, prompts, args.tokens, asked)
    gaps, far = Gaps(args.target), {}
    pairs = [(name, "float32") for name in found if name != "float32"]
    pairs += [(name, "fused") for name in SPECULATIONS]
    for one, other in pairs:
        parted, behind = [], 0
        for ids, truth, a, b in zip(prompts, found["float32"], found[one], found[other], strict=True):
            at = parting(a, b)
            if at is not None and b[:at] == truth[:at]:
                parted.append(gaps([*ids, *b[:at]]))
            else:
                behind += at is not None
        far[one, other] = sum(gap > NEAR for gap in parted)
        shown = " ".join(f"{gap:.1f}" for gap in sorted(parted)) or "none"
        print(f"{one} against {other}: {len(parted)} of {len(prompts)} part; gaps in ulps: {shown}", end="")
        print(f"; {behind} part where both have left float32's text" if behind else "")
    worst = max(count for (one, other), count in far.items() if one != "reference")
    if worst > far["reference", "float32"]:
        raise SystemExit(f"{worst} far from a tie; of the reference runner {far['reference', 'float32']}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", default="smollm2")
    parser.add_argument("--draft", default="default")
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=64)
    return parser.parse_args()


if __name__ == "__main__":
    main()
