"""Everything that is claimed of a GPU, in one command: kernels, a real pair, peers, HTTP.

    python benchmarks/gpu.py [--source smollm2] [--stages kernels pair peer http] [--json out/gpu.json]

`kernels`: random models of the 7B and the 0.5B shape against the memory's floor. `pair`: SmolLM2
widened to the 7B shape (it computes the same function at the large one's cost; 30 layers instead of
28) with its own draft. `peer`: transformers on the same weights. `http`: the server under load;
`http7b`: the same of the exact 7B shape, in random weights, without a draft.
"""

from __future__ import annotations

import argparse
import gc
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import record
import torch
from rich.console import Console
from rich.table import Table

STAGES = ("kernels", "pair", "peer", "http", "http7b")
console = Console(width=150)


def main() -> None:
    args = _arguments()
    if not torch.cuda.is_available():
        raise SystemExit("gpu.py measures a GPU; torch sees none")
    figures: dict[str, Any] = {}
    wide = args.work / "wide"
    for stage in args.stages:
        begin = time.perf_counter()
        figures[stage] = {
            "kernels": _kernels,
            "pair": _pair,
            "peer": _peer,
            "http": _http,
            "http7b": _http7b,
        }[stage](args, wide)
        figures[stage]["stage_seconds"] = time.perf_counter() - begin
        record.save(args.json, figures)
        gc.collect()
        torch.cuda.empty_cache()


def _kernels(args: argparse.Namespace, wide: Path) -> dict[str, Any]:
    import gpu_kernels as kernels

    read, rate = kernels.bandwidth(), kernels.matrix_rate()
    console.print(f"read bandwidth {read / 1e12:.2f} TB/s, bf16 product {rate / 1e12:.0f} TFLOP/s")
    found: dict[str, Any] = {"read_bytes_per_second": read, "matrix_operations_per_second": rate}
    for name in ("0.5b", "7b"):
        found[name] = one = kernels.passes(name, read, rate)
        table = Table(
            "rows x tokens", "ms", "of the weights' floor", "over 1 token", title=f"{name}, context 1k"
        )
        base = one["passes"][0]["seconds"]
        for row in one["passes"]:
            seconds = row["seconds"]
            table.add_row(
                f"{row['rows']} x {row['tokens']}", f"{seconds * 1e3:.3f}",
                f"{one['floor'] / seconds:.1%}", f"{seconds / base:.2f}",
            )  # fmt: skip
        for row in one["contexts"]:
            table.add_row(
                f"context {row['context']}", f"{row['seconds'] * 1e3:.3f}", f"KV {row['of_kv_floor']:.1%}", ""
            )
        prefill = one["prefill"]
        table.add_row(
            "prefill 2048", f"{prefill['seconds'] * 1e3:.1f}", f"{prefill['of_matrix_rate']:.1%} of rate", ""
        )
        console.print(table)
        gc.collect()
        torch.cuda.empty_cache()
    found["draft_step"] = kernels.random_draft_step()
    console.print(f"0.5b draft step, all in: {found['draft_step']['seconds'] * 1e3:.3f} ms")
    return found


def _pair(args: argparse.Namespace, wide: Path) -> dict[str, Any]:
    import gpu_pair as pair

    shape = None if wide.exists() else pair.write_wide(args.source, wide)
    gc.collect()
    torch.cuda.empty_cache()
    engine, seconds = pair.start(wide)
    console.print(f"start-up {seconds:.1f} s")
    _, rows = pair.texts(wide, args.per_category)
    found: dict[str, Any] = {"shape": str(shape), "start_seconds": seconds, "costs": pair.costs(engine)}
    cost = found["costs"]
    one = cost["verify"][1]
    console.print(f"draft step {cost['draft']['seconds'] * 1e3:.3f} ms, target {one * 1e3:.3f} ms")
    console.print("verify over 1 token:", {n: f"{s / one:.2f}" for n, s in cost["verify"].items()})
    found["alone"] = pair.alone(engine, rows, args.tokens, cost)
    table = Table("batch 1", "tok/s by category", "all", "of predicted", "emitted", "SL", "unlike SL=0")
    for row in found["alone"]:
        speeds = row["tokens_per_second"]
        table.add_row(
            row["setting"], " ".join(f"{k} {v:.0f}" for k, v in speeds.items() if k != "all"),
            f"{speeds['all']:.1f}", f"{row['of_predicted']:.1%}", f"{row['emitted_per_pass']:.2f}",
            f"{row['mean_sl']:.2f}", str(row["prompts_unlike_SL0"]),
        )  # fmt: skip
    console.print(table)
    found["together"] = pair.together(engine, rows, args.tokens, (4, 16, 32))
    for row in found["together"]:
        console.print(f"{row['streams']} streams, {row['setting']}: {row['tokens_per_second']:.0f} tok/s")
    found["idle"] = {
        name: pair.idle(engine, rows, name, args.trace if name == "SL=0" else None)
        for name in ("SL=0", "confidence joint 0.3")
    }
    console.print({name: f"GPU idle {each['idle_share']:.1%}" for name, each in found["idle"].items()})
    return found


def _peer(args: argparse.Namespace, wide: Path) -> dict[str, Any]:
    import gpu_pair as pair
    from peers.rows import show
    from peers.transformers_peer import measure, settings

    from engine.models.builtin import builtin_draft
    from engine.models.load import load_model, load_tokenizer

    tokenizer = load_tokenizer(str(wide))
    cuda = torch.device("cuda")
    target = load_model(str(wide), dtype=torch.bfloat16, device=cuda)
    draft = load_model(str(builtin_draft(str(wide), tokenizer)), dtype=torch.bfloat16, device=cuda)
    draft.config.vocab_size = target.config.vocab_size  # greedy needs ids alone; transformers compares sizes
    chosen, _ = pair.texts(wide, 1)
    rows = measure(target, draft, tokenizer, chosen, 64, settings((3, 5, 8)))
    show(rows, console)
    return {"rows": [row.__dict__ for row in rows]}


def _http7b(args: argparse.Namespace, wide: Path) -> dict[str, Any]:
    from shapes import random_model

    from engine.models.load import load_tokenizer

    exact = args.work / "random7b"
    if not exact.exists():
        random_model("7b").save_pretrained(exact)
        load_tokenizer(args.source).save_pretrained(exact)
    gc.collect()
    torch.cuda.empty_cache()
    return _served(args, exact, ["--draft", "none"], {"SL=0": None})


def _http(args: argparse.Namespace, wide: Path) -> dict[str, Any]:
    return _served(args, wide, [], {"SL=0": {"drafter": "none"}, "default": None})


def _served(
    args: argparse.Namespace, model: Path, flags: list[str], settings: dict[str, dict[str, Any] | None]
) -> dict[str, Any]:
    from http_load import measure

    port, log = 8765, (args.work / "server.log").open("wb")
    command = [sys.executable, "-c", "from server.cli import main; main()", "serve", "--target", str(model)]
    command += ["--port", str(port), "--served-model-name", "wide", "--max-model-len", "4096", *flags]
    server = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"PYTHONPATH": _path()})
    try:
        begin = time.perf_counter()
        while True:
            try:
                if httpx.get(f"http://127.0.0.1:{port}/health", timeout=5).status_code == 200:
                    break
            except httpx.TransportError:
                pass
            if server.poll() is not None or time.perf_counter() - begin > 200:
                raise SystemExit(
                    f"the server did not start: {(args.work / 'server.log').read_text()[-3000:]}"
                )
            time.sleep(0.5)
        found: dict[str, Any] = {"start_seconds": time.perf_counter() - begin, "loads": []}
        for name, speculation in settings.items():
            for streams in (1, 4, 16, 32):
                load = measure(
                    f"http://127.0.0.1:{port}/v1", "wide", streams, 128, max(4, 2 * streams),
                    speculation=speculation, processes=min(streams, 4),
                )  # fmt: skip
                found["loads"].append({"setting": name, **load.__dict__})
                console.print(
                    f"HTTP {name} {streams} streams: {load.tokens_per_second:.0f} tok/s, "
                    f"TTFT {load.ttft_p50_ms:.0f} ms, TPOT {load.tpot_p50_ms or 0:.2f} ms"
                )
        return found
    finally:
        server.terminate()
        server.wait(timeout=60)


def _path() -> str:
    return os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", default="smollm2", help="the checkpoint that is widened")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--per-category", type=int, default=3, help="held-out prompts")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--work", type=Path, default=Path("out/gpu"), help="where the widened model is kept")
    parser.add_argument("--trace", type=Path, help="where the profiler's trace goes")
    parser.add_argument("--json", type=Path, default=Path("out/gpu.json"))
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    return args


if __name__ == "__main__":
    main()
