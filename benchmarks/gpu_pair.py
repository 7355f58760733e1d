"""A real pair at a real cost: SmolLM2's text from a model widened to the 7B shape, with its own draft."""

from __future__ import annotations

import time
from collections.abc import Sequence as Seq
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import play
import torch
from draft_step import ENDLESS, draft_step
from gpu_kernels import BLOCK, device_seconds, weight_bytes
from widen import SHAPES, Shape, widen

from classifiers.heldout import Prompt, prompts
from classifiers.pair_texts import Encoded, encode
from engine.config import EngineConfig
from engine.core import Engine
from engine.models.fused import FusedRunner
from engine.models.load import load_model, load_tokenizer
from engine.models.runner import Batch, Chunk
from engine.types import SpeculationParams

SL0 = SpeculationParams(drafter="none")
SETTINGS: dict[str, SpeculationParams] = {
    "SL=0": SL0,
    **{f"static SL={n}": SpeculationParams(policy="static", options={"sl": n}) for n in (2, 4, 6, 8, 12)},
    "heuristic": SpeculationParams(policy="heuristic"),
    **{
        f"confidence joint {t}": SpeculationParams(
            policy="confidence", options={"signal": "joint", "threshold": t, "max_sl": 15}
        )
        for t in (0.2, 0.3, 0.4, 0.5)
    },
}


def write_wide(source: str, to: Path) -> Shape:
    """The 7B shape with the source's number of layers, in bf16, with its tokenizer."""
    model = load_model(source, dtype=torch.bfloat16, device=torch.device("cpu"))
    seven = SHAPES["7b"]
    layers = max(seven.layers, int(model.config.num_hidden_layers))
    shape = replace(seven, layers=layers)
    wide = widen(model, shape, device="cuda", dtype=torch.bfloat16)
    wide.save_pretrained(to)
    load_tokenizer(source).save_pretrained(to)
    return shape


def start(target: Path, draft: str = "default") -> tuple[Engine, float]:
    """An engine on the GPU, and the seconds until it could serve."""
    begin = time.perf_counter()
    engine = Engine(EngineConfig(target=str(target), draft=draft, max_model_len=4096, max_num_seqs=32))
    torch.cuda.synchronize()
    return engine, time.perf_counter() - begin


def texts(target: Path, per_category: int) -> tuple[list[Prompt], list[Encoded]]:
    chosen = prompts(per_category)
    return chosen, encode(chosen, load_tokenizer(str(target)))


def generate(
    engine: Engine, rows: Seq[Encoded], tokens: int, speculation: SpeculationParams
) -> tuple[dict[str, list[int]], list[tuple[int, int]], float]:
    """All rows at once, greedy: token ids by row, (drafted, emitted) of every iteration, seconds."""
    found, iterations, seconds = play.generate(engine, rows, tokens, speculation, 0.0)
    return found, [each for own in iterations.values() for each in own], seconds


def costs(engine: Engine) -> dict[str, Any]:
    """Of this pair, at batch 1 and 1k of context: seconds of a draft step all in, of verifying n tokens."""
    target = engine._parts.target
    assert isinstance(target, FusedRunner)
    verify = {}
    for tokens in (1, 2, 3, 4, 5, 7, 8, 9, 11, 13, 16):
        made = Batch.pack([Chunk([7] * tokens, 512, list(range(40)), tokens)], BLOCK)
        verify[tokens] = device_seconds(lambda made=made: target.forward(made), calls=5, repeat=5)[0]
    return {
        "draft": draft_step(engine, "confidence", ENDLESS),
        "verify": verify,
        "weight_bytes": weight_bytes(target),
    }


def predicted(iterations: Seq[tuple[int, int]], found: dict[str, Any]) -> float:
    """Seconds of these iterations at the measured costs: drafts and one verification each, nothing else."""
    draft, verify = found["draft"]["seconds"], found["verify"]
    return sum(k * draft + min(s for n, s in verify.items() if n >= min(k + 1, 16)) for k, _ in iterations)


def alone(engine: Engine, rows: Seq[Encoded], tokens: int, found: dict[str, Any]) -> list[dict[str, Any]]:
    """Batch 1, one prompt after the other, under every setting: by category and in all."""
    generate(engine, rows[:1], 16, SETTINGS["heuristic"])
    plain: dict[int, list[int]] = {}
    results = []
    for name, speculation in SETTINGS.items():
        speeds: dict[str, list[float]] = {}
        seconds = ideal = 0.0
        drafted = emitted = steps = different = 0
        for i, row in enumerate(rows):
            text, iterations, took = generate(engine, [row], tokens, speculation)
            plain.setdefault(i, text["0"])
            different += text["0"] != plain[i]
            speeds.setdefault(row.category, []).append((tokens - 1) / took)
            seconds += took
            ideal += predicted(iterations, found)
            drafted += sum(k for k, _ in iterations)
            emitted += sum(n for _, n in iterations)
            steps += len(iterations)
        by_category = {category: median(values) for category, values in speeds.items()}
        results.append(
            {
                "setting": name,
                "tokens_per_second": {**by_category, "all": (tokens - 1) * len(rows) / seconds},
                "of_predicted": ideal / seconds,
                "emitted_per_pass": emitted / steps,
                "mean_sl": drafted / steps,
                "prompts_unlike_SL0": different,
            }
        )
    return results


def together(engine: Engine, rows: Seq[Encoded], tokens: int, sizes: Seq[int]) -> list[dict[str, Any]]:
    """Many rows at once, all begun together, short prompts."""
    short = [Encoded(row.category, row.ids[:16]) for row in rows]
    results = []
    for size in sizes:
        chosen = [short[i % len(short)] for i in range(size)]
        for name in ("SL=0", "static SL=2", "static SL=4", "heuristic", "confidence joint 0.3"):
            generate(engine, chosen, 8, SETTINGS[name])
            _, _, seconds = generate(engine, chosen, tokens, SETTINGS[name])
            results.append(
                {"streams": size, "setting": name, "tokens_per_second": size * (tokens - 1) / seconds}
            )
    return results


def idle(engine: Engine, rows: Seq[Encoded], name: str, trace: Path | None) -> dict[str, float]:
    """The share of time in which the GPU runs nothing, at batch 1, from torch's profiler."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as prof:
        generate(engine, rows[:1], 64, SETTINGS[name])
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in prof.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    )
    if trace is not None:
        prof.export_chrome_trace(str(trace))
    spans = spans[len(spans) // 4 :]  # past the prefill
    busy, end = 0.0, spans[0][0]
    for a, b in spans:
        busy += max(0.0, b - max(a, end))
        end = max(end, b)
    whole = end - spans[0][0]
    return {"idle_share": 1 - busy / whole, "milliseconds": whole / 1000}
