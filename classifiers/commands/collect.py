"""`disco-serve classifier collect`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    target: Annotated[str, typer.Option(help="The model that is served.")],
    draft: Annotated[str, typer.Option(help="default, self:N or a model.")],
    data: Annotated[
        list[str],
        typer.Option(
            help="Prompts: a .jsonl or .json file (also .gz), 'examples' or hub:NAME[:CONFIG[:SPLIT]]; see "
            "docs/classifiers.md. Repeatable."
        ),
    ],
    out: Annotated[
        Path, typer.Option(help="Directory of the trace; a killed run goes on from what is there.")
    ],
    temperature: Annotated[float, typer.Option(help="0: greedy; 1: coupled sampling.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the sampled texts: prompt i has seed + i.")] = 0,
    tokens: Annotated[int, typer.Option(help="The longest text.")] = 128,
    branch: Annotated[int, typer.Option(help="The draft's own steps after each of its mismatches.")] = 24,
    hidden: Annotated[bool, typer.Option(help="Record the draft's hidden states.")] = True,
    target_hidden: Annotated[
        bool, typer.Option("--target-hidden", help="Record the target's hidden states too.")
    ] = False,
    trees: Annotated[
        bool, typer.Option("--trees", help="Record what `simulate-trees` and a c2t head need.")
    ] = False,
    per_category: Annotated[
        int | None, typer.Option(help="Prompts of a category, the first ones; default: all.")
    ] = None,
    batch: Annotated[
        int | None, typer.Option(help="Texts written at once, a shard; default: 64 on a GPU, 16 on a CPU.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16")] = "auto",
    threads: Annotated[int | None, typer.Option(help="CPU threads.")] = None,
) -> None:
    """Record what a draft would propose along its target's texts, and what it shows while it does."""
    from classifiers.collect import CollectOptions, collect
    from classifiers.collect_report import show

    given = locals() | {"data": tuple(data)}
    options = CollectOptions(**{name: given[name] for name in CollectOptions.__struct_fields__})
    collect(options)
    show(options.out)
