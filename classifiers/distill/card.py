"""The model card that lies beside a draft."""

from __future__ import annotations

from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from classifiers.distill.evaluate import LOOKAHEADS, Marks
from classifiers.distill.options import DistillOptions
from engine.models.load import pick_device


def write_card(options: DistillOptions, command: str, facts: dict[str, Any], marks: Marks) -> None:
    """Writes README.md into `options.out`."""
    card = torch.cuda.get_device_name() if pick_device(options.device).type == "cuda" else "CPU"
    documents = ", ".join(f"{count:,} {kind}" for kind, count in sorted(facts["documents"].items()))
    precision = "the device's" if options.dtype == "auto" else options.dtype
    coverage = facts.get("coverage")
    head = "" if coverage is None else f"; its head knows {coverage:.2%} of the answers' tokens"
    text = f"""# Draft for {options.target}

A draft model for speculative decoding: {facts["parameters"]:,} stored parameters{head}.
Alone it is of no use; verified by its target it changes no token.

Made {datetime.now(UTC):%Y-%m-%d} by disco-serve {_own_version()} on {card}, torch {version("torch")}:

```
{command}
```

## Training text

Nothing but the target's own text: {facts["text_tokens"]:,} tokens, {facts["answer_tokens"]:,} of them its
answers, continuing openings ({documents}), at temperatures
{_numbers(options.temperatures)}. Trained for {facts["steps"]:,} steps,
{facts["train_tokens"]:,} token passes: forward KL, from {options.finish_from:.0%} of the steps on
total variation.

## Held-out prompts

Not trained on. `match`: share of positions where the draft's greedy choice is the target's, along the
target's greedy text; `1 - TV`: expected acceptance of one token at temperature 1 (rejection sampling);
then accepted over drafted tokens at a static SL, greedy. Measured in training, in {precision} precision.

{_table(marks)}
"""
    (options.out / "README.md").write_text(text, encoding="utf-8")


def _own_version() -> str:
    try:
        return version("disco-serve")
    except PackageNotFoundError:  # run from a source tree
        return "(not installed)"


def _numbers(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:g} ({values.count(value)}/{len(values)})" for value in dict.fromkeys(values))


def _table(marks: Marks) -> str:
    rows = [
        "| category | positions | match | 1 - TV | " + " | ".join(f"SL={k}" for k in LOOKAHEADS) + " |",
        "|---" * (4 + len(LOOKAHEADS)) + "|",
    ]
    for name, each in marks.items():
        shares = " | ".join(f"{a:.2f}" for a in each.acceptance)
        rows.append(f"| {name} | {each.positions:,} | {each.match:.3f} | {each.overlap:.3f} | {shares} |")
    return "\n".join(rows)
